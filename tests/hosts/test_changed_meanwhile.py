# SPDX-License-Identifier: AGPL-3.0-or-later

"""What others change on the disk while a run goes on."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic_contrast.commands.rebuild import RebuildSettings
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts import heretic14, rebuilding
from heretic_contrast.hosts.answers import ACTION_QUESTION
from heretic_contrast.hosts.evaluator import Evaluator
from heretic_contrast.hosts.record import Made
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.prompts import prompts_digest
from heretic_contrast.search.parameters import Kernel, Parameters
from tests.conftest import DATA, small_pool

MakeHost = Callable[..., heretic14.Host]


@pytest.fixture
def make_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeHost:
    """Makes a host for a model in a folder of its own, which has looked at all inputs and loads the model next."""

    shutil.copytree(DATA / "refuser", tmp_path / "model")

    def make(*options: str) -> heretic14.Host:
        monkeypatch.setattr(sys, "argv", [])
        arguments = [
            f"--model={tmp_path / 'model'}",
            "--seed=1",
            "--batch-size=32",
            "--max-response-length=4",
            f"--contrast.bad-prompts.dataset={small_pool(tmp_path, 'harmful', 'train', 2)}",
            f"--contrast.good-prompts.dataset={small_pool(tmp_path, 'harmless', 'train', 8)}",
            "--contrast.classes=single",
            "--contrast.method=mean",
            *options,
        ]
        settings = load_settings(HostSettings, "heretic-contrast", arguments)
        host = heretic14.Host(settings, ContrastAbliteration)
        assert host.sources.pools
        return host

    return make


def load(host: heretic14.Host) -> Any:
    """Loads the model, as Heretic does."""

    return host.model_class()(host.settings)


def use_other_prompts(folder: Path) -> None:
    path = folder / "harmful-train.jsonl"
    path.write_text(path.read_text().replace("a", "e"))


def test_a_search_uses_the_prompts_that_its_record_names(
    make_host: MakeHost, tmp_path: Path
) -> None:
    host = make_host("--response-prefix=")
    use_other_prompts(tmp_path)
    load(host)
    host.modifier.init(host.context)
    assert host.modifier.directions.provenance["prompts"] == {
        name: prompts_digest(pool) for name, pool in host.sources.named_pools().items()
    }


def test_a_rebuild_uses_the_prompts_that_it_has_compared(
    make_host: MakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host("--response-prefix=")
    load(host)
    host.modifier.init(host.context)
    kernels = {name: Kernel(1.0, 3.0, 0.5, 2.0) for name in ("attn.o_proj", "mlp.down_proj")}
    parameters = Parameters(None, kernels, {"all": 1.0}, host.modifier.configuration)
    record = Made(
        host.settings,
        host.settings.contrast,
        host.modifier.model(host.context),
        host.modifier.directions,
        parameters,
        host.sources.named_pools(),
    ).record()
    given = RebuildSettings.model_construct(record="")
    settings, sources = rebuilding.prepare(record, given)
    use_other_prompts(tmp_path)
    found: list[ContrastAbliteration] = []
    init = ContrastAbliteration.init

    def remember(modifier: ContrastAbliteration, context: Any) -> None:
        init(modifier, context)
        found.append(modifier)

    monkeypatch.setattr(ContrastAbliteration, "init", remember)
    rebuilding.rebuild(record, settings, sources, tmp_path / "again", ContrastAbliteration)
    assert found[0].directions.digest() == record.directions


def replace_weights(folder: Path) -> None:
    """As another training saves its next state."""

    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "down_proj" in name)
    save_file({**weights, name: weights[name] * 0.5}, path, {"format": "pt"})


def save_merged(host: heretic14.Host, model: Any) -> None:
    """Saves a merged model, as Heretic does in headless mode, and loads the original again."""

    assert host.answers.select(ACTION_QUESTION, [])
    place = host.answers.path("Path to the folder:")
    model.get_merged_model().save_pretrained(place)
    host.answers.show("* Resetting model...")
    model.reset_model()


def test_another_model_in_the_folder_is_noticed_when_it_is_loaded_again(
    make_host: MakeHost, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    host = make_host(
        "--response-prefix=", "--trial-index=0", "--model-action=save", f"--save-directory={saved}"
    )
    model = load(host)
    host.evaluator = Evaluator.__new__(Evaluator)
    host.modifier.init(host.context)
    host.answers.describe = lambda folder: None
    # The same one is the same, with the adapters that it has now.
    save_merged(host, model)
    assert host.modifier.model(host.context).own_adapter is not None
    before = (saved / "model.safetensors").read_bytes()
    replace_weights(tmp_path)
    host.answers.action_was_taken, host.answers.given_directory = False, str(saved)
    with pytest.raises(ContrastError, match=r"another model since .* \(other weights\)") as error:
        save_merged(host, model)
    # Heretic shows it, and asks what to do next.
    host.answers.format_exception(error.value)
    assert host.answers.select(ACTION_QUESTION, []) == ""
    assert (saved / "model.safetensors").read_bytes() == before
    with pytest.raises(ContrastError, match=f"saved to {saved}, but") as error:
        host.answers.require_success()
    assert "--checkpoint-action" not in str(error.value)
    # Nothing can be done with the other one.
    with pytest.raises(ContrastError, match="another model since"):
        model.reset_model()
