# SPDX-License-Identifier: AGPL-3.0-or-later

"""A folder that one model after the other is saved to holds the last one alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.model_folder import (
    PREVIOUS,
    UNFINISHED,
    publish_model,
    require_other_folder,
)
from tests.tiny_models import make_model, make_tokenizer

FOREIGN = {
    "README.md": "# My notes",
    "notes.txt": "mine",
    "model_of_last_week.safetensors": "mine",
    "my_model.bin": "mine",
    "model.gguf": "mine",
    "results/config.json": "mine",
    "vocab.csv": "mine",
}
"""What is of no model, or not loaded from a folder."""

FORMATS = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.fp16-00001-of-00002.bin",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "model-00003-of-00007.safetensors",
    "adapter_model.bin",
    "tf_model.h5",
    "tf_model-00001-of-00002.h5",
    "flax_model.msgpack",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "tokenizer.model",
    "preprocessor_config.json",
    "chat_template.json",
]
"""What models of other kinds leave."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that adapters belong to."""

    folder = tmp_path_factory.mktemp("base")
    make_model("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


def save_merged(base: Path, folder: Path, seed: int, **options: Any) -> None:
    make_model("llama", seed, num_hidden_layers=1).save_pretrained(folder, **options)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = f"{{# {seed} #}}{tokenizer.chat_template}"
    tokenizer.save_pretrained(folder)


def save_sharded(base: Path, folder: Path, seed: int) -> None:
    save_merged(base, folder, seed, max_shard_size="20KB")


def save_adapter(base: Path, folder: Path, seed: int) -> None:
    network = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    options = {"target_modules": ["o_proj"], "init_lora_weights": False}
    get_peft_model(network, LoraConfig(r=2, **options)).save_pretrained(folder)


Save = Callable[[Path, Path, int], None]

SAVES: dict[str, Save] = {
    "merged": save_merged,
    "sharded": save_sharded,
    "adapter": save_adapter,
}


@torch.no_grad()
def logits(network: Any) -> Tensor:
    return network(input_ids=torch.arange(3, 20)[None]).logits  # type: ignore[no-any-return]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_foreign(folder: Path) -> None:
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("merged", "adapter"),
        ("adapter", "merged"),
        ("sharded", "merged"),
        ("formats", "merged"),
        *(
            pytest.param(old, new, marks=pytest.mark.slow)
            for old, new in [
                ("merged", "merged"),
                ("merged", "sharded"),
                ("sharded", "sharded"),
                ("sharded", "adapter"),
                ("adapter", "sharded"),
                ("adapter", "adapter"),
                ("formats", "adapter"),
            ]
        ),
    ],
)
def test_the_folder_holds_the_new_model_alone(
    old: str, new: str, base: Path, tmp_path: Path
) -> None:
    target, alone = tmp_path / "target", tmp_path / "alone"
    target.mkdir()
    if old == "formats":
        for name in FORMATS:
            (target / name).write_text("{}")
        (target / "additional_chat_templates").mkdir()
        (target / "additional_chat_templates" / "rag.jinja").write_text("old")
    else:
        SAVES[old](base, target, 1)
    write_foreign(target)
    SAVES[new](base, target / UNFINISHED, 2)
    SAVES[new](base, alone, 2)
    publish_model(target / UNFINISHED, target)
    mode = (target / next(iter(FOREIGN))).stat().st_mode
    assert {path.stat().st_mode for path in target.iterdir() if path.is_file()} == {mode}
    expected = contents(alone)
    expected.pop("README.md", None)
    foreign = {name: text.encode() for name, text in FOREIGN.items()}
    assert contents(target) == {**expected, **foreign}
    network = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits(network), logits(AutoModelForCausalLM.from_pretrained(alone)))
    if new == "adapter":
        separate = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), target)
        assert torch.equal(logits(network), logits(separate))
    else:
        independent = make_model("llama", 2, num_hidden_layers=1)
        assert torch.equal(logits(network), logits(independent))
        assert AutoTokenizer.from_pretrained(target).chat_template.startswith("{# 2 #}")


def test_a_card_that_peft_wrote_goes_with_its_adapter(base: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    save_adapter(base, target, 1)
    assert (target / "README.md").exists()
    save_merged(base, target / UNFINISHED, 2)
    publish_model(target / UNFINISHED, target)
    assert not (target / "README.md").exists()
    save_adapter(base, target / UNFINISHED, 3)
    publish_model(target / UNFINISHED, target)
    assert "peft" in (target / "README.md").read_text()


def test_a_share_that_refuses_modes_takes_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / UNFINISHED).mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / UNFINISHED / name).write_text("{}")
    refuse = Mock(side_effect=PermissionError(1, "Operation not permitted"))
    monkeypatch.setattr(Path, "chmod", refuse)
    publish_model(tmp_path / UNFINISHED, tmp_path)
    assert {item.name for item in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert refuse.call_count == 2


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_model_whole(
    kind: type[BaseException], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    save_sharded(base, made, 1)
    write_foreign(made)
    old = contents(made)
    save_adapter(base, made / UNFINISHED, 2)
    replace, n_moves = os.replace, 0
    for failing in range(100):
        target = tmp_path / str(failing)
        shutil.copytree(made, target)
        n_moves = 0

        def fail(origin: Path, place: Path, failing: int = failing) -> None:
            nonlocal n_moves
            n_moves += 1
            if n_moves == failing + 1:
                raise kind("no more")
            replace(origin, place)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            try:
                publish_model(target / UNFINISHED, target)
            except (ContrastError, KeyboardInterrupt) as error:
                assert isinstance(error, KeyboardInterrupt) or "could not be moved" in str(error)
            else:
                break
        assert contents(target).items() >= old.items()
        assert not (target / PREVIOUS).exists()
        # The new one is whole as well, and is moved by the next attempt.
        publish_model(target / UNFINISHED, target)
        assert (target / "adapter_config.json").exists()
        assert not (target / "config.json").exists()
    assert failing > 10


def test_a_kill_between_two_moves_leaves_nothing_that_loads(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    save_merged(base, made, 1)
    save_adapter(base, made / UNFINISHED, 2)
    before = sorted(contents(made).values())
    replace = os.replace
    for n_moves in range(1, 100):
        target = tmp_path / str(n_moves)
        shutil.copytree(made, target)
        process = os.fork()
        if process == 0:
            left = n_moves

            def move(origin: Path, place: Path) -> None:
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                replace(origin, place)

            monkeypatch.setattr(os, "replace", move)
            publish_model(target / UNFINISHED, target)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
            break
        assert sorted(contents(target).values()) == before
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(target)
        # The next save, which starts anew, finds its way.
        shutil.rmtree(target / UNFINISHED)
        save_merged(base, target / UNFINISHED, 3)
        publish_model(target / UNFINISHED, target)
        independent = make_model("llama", 3, num_hidden_layers=1)
        network = AutoModelForCausalLM.from_pretrained(target)
        assert torch.equal(logits(network), logits(independent))
        assert not (target / PREVIOUS).exists() and not (target / UNFINISHED).exists()
    assert n_moves > 5


def test_the_original_model_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    for folder in (base, link, base / ".." / base.name):
        with pytest.raises(ContrastError, match="choose another folder"):
            require_other_folder(folder, str(base))
    require_other_folder(tmp_path, str(base))
    require_other_folder(tmp_path / "missing", "owner/name")
