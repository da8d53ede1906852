# SPDX-License-Identifier: AGPL-3.0-or-later

"""A model whose layers are spread over two devices gives what it gives on one, everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate
import pytest
import torch

from heretic_contrast.engine.check import checked_engine
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.evaluation.divergence import References
from heretic_contrast.evaluation.geometry import measure_directions
from heretic_contrast.evaluation.plan import Configuration, SweepOptions
from heretic_contrast.evaluation.results import Pair
from heretic_contrast.evaluation.sweep import sweep, swept_layers
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.tiers.responses import Tier
from heretic_contrast.vectors import to_device
from tests.architectures import FAMILIES, Family
from tests.devices import PretendedDevices, spread
from tests.plain_sweeps import CANARIES, HARMFUL, REFERENCES, random_directions

pytestmark = pytest.mark.filterwarnings("ignore::heretic_contrast.errors.ContrastWarning")

KINDS = ("Llama", "Qwen3.5", "Mixtral", "Gemma 3", "LFM2", "Qwen2.5 with vision")
"""Attention, gated linear attention, experts, sliding windows, convolutions, and a model that also sees."""

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)

APPLE, SECOND_APPLE = torch.device("mps", 0), torch.device("mps", 1)


def marked(name: str) -> Any:
    thorough = [] if name in KINDS else [pytest.mark.thorough]
    return pytest.param(name, marks=[] if name == "Llama" else [pytest.mark.slow, *thorough])


ALL = [marked(name) for name, family in FAMILIES.items() if not family.quantized]


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: torch.where(here > 0, here, there),
        lambda here, there: torch.where(here.cpu() > 0, here, 0.0),
        lambda here, there: torch.cat([here, there]),
        lambda here, there: here.gather(0, torch.zeros(1, 4, dtype=torch.long)),
        lambda here, there: here.index_select(0, torch.zeros(1, dtype=torch.long)),
        lambda here, there: here[torch.zeros(1, dtype=torch.long, device=SECOND)],
        lambda here, there: torch.nn.functional.linear(here, torch.ones(2, 4)),
        lambda here, there: here.add_(there),
        lambda here, there: torch.equal(here, there),
        lambda here, there: here.numpy(),
        lambda here, there: torch.ones_like(there) * torch.ones(4, device=here.device),
    ],
)
def test_what_cuda_refuses_is_refused(mix: Callable[[Any, Any], Any]) -> None:
    with PretendedDevices():
        here, there = torch.ones(4, 4, device=FIRST), torch.ones(4, 4).to(SECOND)
        with pytest.raises((RuntimeError, TypeError)):
            mix(here, there)


def test_what_apple_refuses_is_refused() -> None:
    with PretendedDevices():
        here = torch.ones(4, device=APPLE)
        with pytest.raises(TypeError, match="float64"):
            here.double()
        assert here.cpu().double().sum() == 4
        with pytest.raises(RuntimeError, match="let go of"):
            torch.ones(4).to(APPLE, non_blocking=True)


@pytest.mark.parametrize("device", [FIRST, APPLE])
def test_numbers_that_are_let_go_of_at_once_reach_a_device(device: torch.device) -> None:
    with PretendedDevices() as devices:
        assert to_device([3, 1, 2], device).tolist() == [3, 1, 2]
        # To read them, and, on Apple's, to send them.
        assert sum(devices.waits.values()) == (1 if device == FIRST else 2)


def test_what_cuda_takes_is_taken() -> None:
    with PretendedDevices() as devices:
        here, there = torch.ones(4, 4, device=FIRST), torch.ones(4, 4).to(SECOND)
        assert sum(devices.waits.values()) == 1
        assert (here * torch.tensor(2.0)).device == FIRST
        assert here[torch.tensor([0, 1])].device == FIRST
        assert (here.to(there) + there).device == SECOND and here.device == FIRST
        assert here.to(torch.float64).device == FIRST and here.new_zeros(3).device == FIRST
        assert torch.nn.Parameter(here).data.device == FIRST
        assert torch.nn.Linear(4, 4).to(SECOND).weight.device == SECOND
        assert here.cpu().numpy().sum() == 16


def network(family: Family, other: Any = None) -> LanguageModel:
    """A model, on this CPU alone, or with its upper layers on another device than the first."""

    model = family.make_model()
    found = wrap(model, family.make_tokenizer(), "tiny", batch_size=3)
    if other is not None:
        if other == APPLE:
            model.to(APPLE)
        elif other == "all":
            accelerate.cpu_offload(model, execution_device=FIRST)
        elif other == SECOND_APPLE:
            spread(model, found.layers[:2], found.layers[2:], other, APPLE)
        else:
            spread(model, found.layers[:2], found.layers[2:], other)
        found = wrap(model, found.tokenizer, "tiny", batch_size=3)
        places = {parameter.device for parameter in model.parameters()}
        meta = torch.device("meta")
        expected = {
            SECOND: {FIRST, SECOND},
            "cpu": {FIRST, meta},
            "all": {meta},
            APPLE: {APPLE},
            SECOND_APPLE: {APPLE, SECOND_APPLE},
        }
        assert places == expected[other]
        assert found.device == (APPLE if other in (APPLE, SECOND_APPLE) else FIRST)
    return found


def measured(model: LanguageModel) -> dict[str, Any]:
    """Everything that the commands and the scorers measure on a model."""

    directions = random_directions(model, 2, 1)
    # Of four layers, as long as none is skipped.
    layers = tuple(swept_layers(model, SweepOptions())[1::2])
    options = SweepOptions(
        layers=layers, weights=(1.0,), max_new_tokens=5, kl_tokens=4, synergy_size=0
    )
    arguments = ({"two": directions}, HARMFUL[:3], CANARIES, REFERENCES, options)
    engines: list[Any] = []

    def checked(*arguments: Any) -> Any:
        engines.append(checked_engine(*arguments))
        return engines[-1]

    with patch("heretic_contrast.evaluation.sweep.checked_engine", checked):
        result = sweep(model, *arguments, classify=lambda *_: Tier.REFUSE)
    (engine,) = engines
    pairs = [Pair(HARMFUL[0].text, CANARIES[0].text)]
    configurations = {"two": Configuration(directions)}
    _, geometry = measure_directions(model, configurations, pairs, HARMFUL[:3], CANARIES, (1.0,), 4)
    tokens = tuple(model.token_ids(REFERENCES))
    known = Continuations(tokens, tuple(engine.generate(tokens, [5] * len(tokens))))
    return {
        "engine": type(engine),
        "residuals": model.residuals(HARMFUL),
        "responses": [(cell.responses, cell.canary_responses) for cell in result.cells],
        "divergences": [cell.measurement.kl_divergence for cell in result.cells],
        "floor": [*References(engine, known, 50).measure(engine)[0], result.floor],
        "occupancy": [x for item in geometry.activities for x in item.occupancy_harmless],
        "variation": [item.natural_variation for item in geometry.activities],
        "weights": model.identity()["weights"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_layers_on_two_devices_without_float64(name: str) -> None:
    require_the_same(name, SECOND_APPLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_layers_on_two_devices_and_all_on_one(name: str) -> None:
    require_the_same(name, SECOND, APPLE)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["cpu", "all"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3.5"])
def test_layers_that_wait_in_memory(name: str, other: str) -> None:
    require_the_same(name, other)


def require_the_same(name: str, *others: Any) -> None:
    family = FAMILIES[name]
    expected = measured(network(family))
    # Elsewhere than on a CPU, recurrent layers and experts are computed in another order.
    exact = family.dtype is torch.float32
    close = {"rtol": 1e-3, "atol": 1e-4} if exact else {"rtol": 0.1, "atol": 0.1}
    for other in others:
        with PretendedDevices():
            found = measured(network(family, other))
        for key, value in expected.items():
            if key in ("weights", "engine") or (key == "responses" and exact):
                assert found[key] == value, (other, key)
            elif key != "responses":
                pair = torch.as_tensor(found[key]), torch.as_tensor(value)
                assert torch.allclose(*pair, **close), (other, key)


@pytest.mark.parametrize("other", [SECOND, APPLE])
@pytest.mark.parametrize("row_normalization", ["none", "pre", "full"])
def test_a_trial_elsewhere(row_normalization: str, other: torch.device, tmp_path: Path) -> None:
    from tests.engine.test_architectures import logits, make_case

    case = make_case("Llama", tmp_path, row_normalization=row_normalization)
    case.ablate()
    expected = logits(case.host.model, case.plain)
    case.host.reset_model()
    with PretendedDevices():
        if other == APPLE:
            case.host.model.to(APPLE)
        else:
            layers = case.host.get_layers()
            spread(case.host.model, layers[:2], layers[2:])
        for _ in range(2):
            case.ablate()
            found = logits(case.host.model, case.plain)
            assert torch.allclose(found, expected, atol=1e-5)
            case.host.reset_model()
            assert not torch.allclose(logits(case.host.model, case.plain), expected, atol=0.1)
