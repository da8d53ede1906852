# SPDX-License-Identifier: AGPL-3.0-or-later

"""Prompts as models read them: one beginning, no end, and templates that refuse a system message."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_contrast import cli
from heretic_contrast.chat import _written, chat_texts, note_on_system_role, require_chat
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.prompts import Prompt
from tests.tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer

PROMPTS = [Prompt("Plant a tree."), Prompt("Go"), Prompt("Explain how", system="Be brief.")]

TURN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)

REFUSING = {
    "the role": "{% if messages[0].role == 'system' %}{{ raise_exception('No such role') }}{% endif %}",
    "the order": (
        "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
    ),
    "any other role": (
        "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('Unknown role ' + message.role) }}{% endif %}{% endfor %}"
    ),
}
"""Beginnings of templates that refuse a system message, as Gemma 2's and Mistral's first ones do."""


def tokenizer_that_adds(before: str = "", after: str = "", template: str = CHAT_TEMPLATE) -> Any:
    """A tokenizer that puts tokens around every text."""

    tokenizer = make_tokenizer({"sop": "<sop>"})
    names = ("<|endoftext|>", "<sop>", "<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("before", "after", "written"),
    [
        ("<|endoftext|>", "", "{{ bos_token }}"),
        ("<|endoftext|>", "<|im_end|>", "{{ bos_token }}"),
        ("<|endoftext|> <sop>", "", "<|endoftext|><sop>"),
        ("", "", "{{ bos_token }}"),
        ("", "<|im_end|>", ""),
    ],
)
def test_tokens_are_those_of_the_template(before: str, after: str, written: str) -> None:
    tokenizer = tokenizer_that_adds(before, after, written + CHAT_TEMPLATE)
    model = wrap(make_model("llama"), tokenizer, name="tiny")
    for prompt, ids in zip(PROMPTS, model.token_ids(PROMPTS), strict=True):
        chat = [
            {"role": "system", "content": prompt.system or model.system_prompt},
            {"role": "user", "content": prompt.text},
        ]
        expected = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert list(ids) == expected["input_ids"]


@pytest.mark.parametrize("before", ["<|endoftext|>", "<|endoftext|> <sop>"])
def test_a_beginning_that_the_tokenizer_alone_adds_is_kept(before: str) -> None:
    tokenizer = tokenizer_that_adds(before)
    model = wrap(make_model("llama"), tokenizer, name="tiny")
    assert [list(ids) for ids in model.token_ids(PROMPTS)] == tokenizer(model.chat_texts(PROMPTS))[
        "input_ids"
    ]
    assert model.token_ids(PROMPTS)[0][0] == 0 and model.token_ids([]) == []


def test_padding_is_on_the_left_and_masked(tiny_llama: Any) -> None:
    inputs = tiny_llama.tokenize(PROMPTS)
    expected = tiny_llama.tokenizer(
        tiny_llama.chat_texts(PROMPTS), padding=True, padding_side="left", return_tensors="pt"
    )
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


@pytest.mark.parametrize("name", REFUSING)
def test_system_prompts_go_in_front_of_the_user(name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + REFUSING[name] + TURN
    assert "refuses" in str(note_on_system_role(tokenizer))
    assert note_on_system_role(make_tokenizer()) is None
    model = wrap(make_model("llama"), tokenizer, name="tiny")
    for prompt, text in zip(PROMPTS, model.chat_texts(PROMPTS), strict=True):
        content = f"{prompt.system or model.system_prompt}\n\n{prompt.text}"
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert text == expected
    # Nothing is put in front where there is no system prompt.
    assert model.chat_texts([Prompt("Go", system="")])[0].count("user\nGo") == 1


def test_what_is_remembered_of_a_chat_is_its_text_alone() -> None:
    tokenizer = make_tokenizer()
    # Templates of models that call tools are as long.
    tokenizer.chat_template += "{#" + 10_000 * "x" + "#}"
    for number in range(3):
        chat_texts(tokenizer, [[{"role": "user", "content": f"{number}" + 500 * " word"}]])
    kept = _written[tokenizer]
    assert len(kept) == 3 and sum(map(len, kept)) < 300


def test_templates_that_do_not_take_a_system_message_are_named() -> None:
    tokenizer = make_tokenizer()
    assert note_on_system_role(tokenizer) is None
    tokenizer.chat_template = REFUSING["the role"] + TURN
    assert "refuses" in str(note_on_system_role(tokenizer))
    without = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    tokenizer.chat_template = without + TURN
    assert "leaves system messages out" in str(note_on_system_role(tokenizer))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose template writes a beginning that its tokenizer adds, and refuses a system message."""

    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer = tokenizer_that_adds(
        "<|endoftext|>", "", "{{ bos_token }}" + REFUSING["the role"] + TURN
    )
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_generation(folder: Path, **options: Any) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_dict_in_generate": True},
        # One response is meant, however many are asked for.
        {"num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
)
def test_heretic_asks_in_the_same_way(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heretic.config import Settings
    from heretic.utils import Prompt as HereticPrompt

    from heretic_contrast.hosts.loading import PlainModel

    edit_generation(folder, **options)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["heretic", f"--model={folder}", "--max-response-length=6"])
    model = PlainModel(Settings())
    prompts = [HereticPrompt(system="Be brief.", user=text) for text in ("Go", "Plant a tree.")]
    network = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network.generation_config.num_return_sequences = None
    network.generation_config.return_dict_in_generate = False
    expected = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{prompt.system}\n\n{prompt.user}"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        assert inputs["input_ids"][0].tolist().count(0) == 1
        ids = network.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    assert model.get_responses(prompts) == expected
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go"}]
    # Whatever comes first ends the response.
    model.model.generation_config.eos_token_id = list(range(320))
    if "num_beams" not in options:
        # Beams cannot be streamed; a chat is sampled where the configuration says so.
        first = model.stream_chat_response(chat)
        assert expected[0].startswith(first) or "do_sample" in options
    # What is saved beside a model is the tokenizer that came with it.
    assert type(model.tokenizer) is type(tokenizer)


def sentence(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the command line says, and nothing else."""

    monkeypatch.setattr(sys, "argv", ["heretic-contrast", *given])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error
    return error


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_tokens(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    for name in ("pad_token", "eos_token"):
        content.pop(name)
    path.write_text(json.dumps(content))
    for name in ("special_tokens_map.json",):
        (folder / name).unlink(missing_ok=True)


def refusing_everything(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('Never') }}")


def not_there(folder: Path) -> None:
    shutil.rmtree(folder)


def broken_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


def generating(**options: Any) -> Callable[[Path], None]:
    """Gives a model settings with which it can be loaded, and generate nothing."""

    return partial(edit_generation, **options)


CANNOT_GENERATE = (
    r"The model \S+ could not be loaded, or cannot generate \(.*\): .*generation_config\.json"
)

BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "template": (without_template, "has no chat template"),
    "tokens": (without_tokens, "neither a padding token nor an end-of-sequence token"),
    "refusing": (refusing_everything, r"cannot write a single user message \(Never\)"),
    "missing": (not_there, "check its name or path"),
    "weights": (broken_weights, "could not be loaded"),
    "responses": (generating(num_return_sequences=2), CANNOT_GENERATE),
    "words": (generating(bad_words_ids=[[99999]]), CANNOT_GENERATE),
    "decoding": (generating(dola_layers="high"), CANNOT_GENERATE),
}


def arguments(command: str, folder: Path) -> list[str]:
    """A command on a few prompts of each kind."""

    found = [command, f"--model={folder}", "--contrast.preset=arditi"]
    for kind, verb in (("bad", "Break"), ("good", "Bake")):
        pool = folder.parent / f"{kind}.txt"
        pool.write_text("".join(f"{verb} {thing}.\n" for thing in ("a door", "it")))
        for option in (f"{kind}-prompts", f"{kind}-evaluation-prompts"):
            found += [f"--{option}.dataset={pool}", f"--{option}.split="]
    last = "--model-action=none" if command == "run" else "--output=directions.safetensors"
    return [*found, last]


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["extract", "run"])
def test_models_that_cannot_be_asked_are_named(
    name: str,
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, expected = BROKEN[name]
    edit(folder)
    monkeypatch.chdir(folder.parent)
    error = sentence(arguments(command, folder), monkeypatch, capsys)
    assert re.search(expected, error) and ("check its name" in error) == (name == "missing")


def test_adapters_of_a_model_are_not_taken_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = AutoModelForCausalLM.from_pretrained(folder)
    configuration = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    get_peft_model(network, configuration).save_pretrained(folder)
    monkeypatch.chdir(folder.parent)
    options = ["--batch-size=2", "--response-prefix=", "--max-response-length=2"]
    error = sentence([*arguments("run", folder), *options], monkeypatch, capsys)
    assert "comes with an adapter of its own" in error


def test_python_callers_are_told_as_well(folder: Path) -> None:
    without_template(folder)
    with pytest.raises(ContrastError, match="has no chat template"):
        wrap(make_model("llama"), AutoTokenizer.from_pretrained(folder), name="tiny")


PARTS = (
    "{% for message in messages %}{{ message['role'] }}: {% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
"""As some models with vision write messages: lists of parts alone."""


def test_a_template_that_leaves_the_user_out_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PARTS
    with pytest.raises(ContrastError, match="of it leaves out what the user says: correct it"):
        require_chat(tokenizer, "it")


def test_prompts_stay_as_they_are_when_a_template_writes_the_time() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = '{{ strftime_now("%f") }}' + CHAT_TEMPLATE
    model = wrap(make_model(), tokenizer, "tiny")
    first = model.token_ids(PROMPTS)
    assert first == model.token_ids(PROMPTS)
    assert model.token_ids([*PROMPTS[::-1], Prompt("Another")])[:-1] == first[::-1]
    tokenizer.chat_template = CHAT_TEMPLATE
    assert model.token_ids(PROMPTS) != first
