# SPDX-License-Identifier: AGPL-3.0-or-later

"""One direction against Heretic 1.4's own abliteration, on every component and layer."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

heretic_main = pytest.importorskip("heretic.main")
if not hasattr(heretic_main, "AbliterationParameters"):
    pytest.skip("needs Heretic 1.4's own abliteration", allow_module_level=True)

from heretic.config import Settings  # noqa: E402
from heretic.utils import Prompt as HereticPrompt  # noqa: E402

from heretic_contrast.directions.directions import Directions  # noqa: E402
from heretic_contrast.directions.extraction import extract  # noqa: E402
from heretic_contrast.directions.pools import Pools  # noqa: E402
from heretic_contrast.errors import ContrastError  # noqa: E402
from heretic_contrast.hosts.host_model import HostModel  # noqa: E402
from heretic_contrast.hosts.loading import LoadedContext  # noqa: E402
from heretic_contrast.hosts.surface import from_heretic, wrap  # noqa: E402
from heretic_contrast.modifier import ContrastAbliteration  # noqa: E402
from heretic_contrast.prompts import Prompt  # noqa: E402
from heretic_contrast.search.parameters import Kernel, Parameters  # noqa: E402
from heretic_contrast.settings import ContrastSettings  # noqa: E402
from tests.tiny_models import make_model, make_tokenizer  # noqa: E402


@pytest.fixture(scope="module", params=["llama", "qwen3_5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model on disk."""

    path = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def heretic_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, normalization: str) -> Settings:
    """Heretic's own settings for the model."""

    monkeypatch.setattr(
        sys,
        "argv",
        [
            "heretic",
            f"--model={folder}",
            f"--row-normalization={normalization}",
            "--seed=7",
            "--batch-size=4",
        ],
    )
    monkeypatch.chdir(folder)
    return Settings()


def adapter_changes(model: Any) -> dict[str, torch.Tensor]:
    """The product B A of every LoRA adapter, in float64."""

    return {
        name: module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        for name, module in model.model.named_modules()
        if hasattr(module, "lora_A")
    }


GOOD = [HereticPrompt(system="Be brief.", user=f"Bake {name}.") for name in "abcdefg"]
BAD = [HereticPrompt(system="Be brief.", user=f"Break {name}!") for name in "hijklmnop"]


def initialized(
    model: HostModel, settings: Settings, folder: Path, **options: Any
) -> tuple[ContrastAbliteration, LoadedContext]:
    """The modifier with the difference in means of `BAD` and `GOOD`, and what it was initialized in."""

    files = {}
    for name, prompts in (("bad_prompts", BAD), ("good_prompts", GOOD)):
        files[name] = folder / f"{name}.txt"
        files[name].write_text("\n".join(prompt.user for prompt in prompts))
    modifier = ContrastAbliteration(
        heretic_settings=settings.model_copy(update={"system_prompt": "Be brief."}),
        settings=ContrastSettings.model_validate(
            {
                "preset": "arditi",
                "embeddings": False,
                **{name: {"dataset": str(path)} for name, path in files.items()},
                **options,
            }
        ),
    )
    context = LoadedContext(model)
    modifier.init(context)
    return modifier, context


SHARED = {
    "method": "som",
    "classes": "category",
    "som_rows": 1,
    "som_columns": 2,
    "som_iterations": 50,
    "winners": 2,
    "shared_direction": True,
}
"""What makes two directions beside Heretic's."""


@pytest.mark.parametrize("options", [{}, SHARED], ids=["one", "shared"])
@pytest.mark.parametrize("direction_index", [None, 1.4])
@pytest.mark.parametrize("normalization", ["none", "pre", "full"])
@torch.no_grad()
def test_weight_change_equals_heretic(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    normalization: str,
    direction_index: float | None,
    options: dict[str, Any],
) -> None:
    settings = heretic_settings(folder, monkeypatch, normalization)
    theirs = heretic_main.Model(settings)
    refusal_directions = F.normalize(
        theirs.get_residuals_mean(BAD) - theirs.get_residuals_mean(GOOD), p=2, dim=1
    )
    kernel = {
        "max_weight": 1.1,
        "max_weight_position": 2.3,
        "min_weight": 0.4,
        "min_weight_distance": 1.6,
    }
    components = theirs.get_abliterable_components()
    theirs.abliterate(
        refusal_directions,
        direction_index,
        {name: heretic_main.AbliterationParameters(**kernel) for name in components},
    )
    expected = adapter_changes(theirs)

    ours = HostModel(settings)
    # Heretic's own rank, which the plugin's follows from the number of directions unless it is given.
    rank = settings.full_normalization_lora_rank
    modifier, context = initialized(
        ours,
        settings,
        folder,
        row_normalization=normalization,
        full_normalization_lora_rank=rank,
        **options,
    )
    assert modifier.directions.n_directions == (3 if options else 1)
    if folder.name.startswith("llama"):
        # Random linear attention forgets the prompt, so that its directions would be rounding noise.
        assert torch.allclose(modifier.directions.tensor[:, 0], refusal_directions, atol=1e-4)
    modifier.directions.tensor[:, 0] = refusal_directions
    modifier.modify_model(
        context,
        Parameters(
            direction_index=direction_index,
            kernels={name: Kernel(**kernel) for name in components},
            scales=dict.fromkeys(modifier.directions.names, 0.0)
            | {modifier.directions.names[0]: 1.0},
        ),
    )
    found = adapter_changes(ours)

    assert set(found) == set(expected) and len(found) == 8
    assert any(change.norm() > 0 for change in expected.values())
    for name, change in expected.items():
        difference = (found[name] - change).norm()
        assert difference <= 1e-5 * change.norm(), (
            f"{name} differs by {difference / change.norm():.1e}"
        )
        if normalization == "none":
            assert (change.norm() > 0) == (float(found[name].norm()) > 0)


def test_unknown_weights_are_refused_before_anything_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = heretic_settings(folder, monkeypatch, "none")
    model = HostModel(settings)
    model.get_layers()[2].mlp.down_proj.register_buffer("weight_scale", torch.ones(32))

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("The model was run.")

    monkeypatch.setattr(model.model, "generate", never)
    with pytest.raises(ContrastError, match="It is not known how torch's Linear keeps"):
        initialized(model, settings, folder)


def test_residuals_equal_heretic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = heretic_settings(folder, monkeypatch, "none")
    settings.winsorization_quantile = 0.9
    theirs = heretic_main.Model(settings)
    texts = [
        "Hi.",
        "What is the capital of France?",
        "Plant a tree",
        "Name four colors, please.",
        "Go",
    ]
    expected = theirs.get_residuals_batched(
        [HereticPrompt(system=settings.system_prompt, user=text) for text in texts]
    )
    ours = replace(from_heretic(theirs, settings), winsorization_quantile=0.9)
    found = ours.residuals([Prompt(text) for text in texts])
    assert found.dtype == torch.float32 and found.shape == (5, 5, 32)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_winsorized_directions_equal_heretic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not folder.name.startswith("llama"):
        pytest.skip("Random linear attention forgets the prompt.")
    settings = heretic_settings(folder, monkeypatch, "none")
    modifier, _ = initialized(HostModel(settings), settings, folder, winsorization_quantile=0.6)
    theirs = heretic_main.Model(settings)
    found = {}
    for quantile in (0.6, 1.0):
        settings.winsorization_quantile = quantile
        difference = theirs.get_residuals_mean(BAD) - theirs.get_residuals_mean(GOOD)
        found[quantile] = F.normalize(difference, p=2, dim=1)
    assert torch.allclose(modifier.directions.tensor[:, 0], found[0.6], atol=1e-4)
    assert not torch.allclose(modifier.directions.tensor[:, 0], found[1.0], atol=1e-2)


def test_directions_of_another_model_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Any
) -> None:
    other = wrap(make_model("llama", seed=5), make_tokenizer(), name="other")
    settings = ContrastSettings(preset=["arditi"])
    pools = Pools(
        harmful=tuple(Prompt(f"Break {name}!") for name in "abc"),
        bulk=tuple(Prompt(f"Bake {name}.") for name in "abc"),
        matched=(),
    )
    directions = extract(other, pools, settings, lambda line: None)
    directions.save(tmp_path / "directions.safetensors")
    loaded = Directions.load(tmp_path / "directions.safetensors")
    loaded.require_model(other, "the file")
    with pytest.raises(ContrastError, match="another model of the same shape"):
        loaded.require_model(tiny_llama, "the file")
