# SPDX-License-Identifier: AGPL-3.0-or-later

"""The sweep against changed weights, plain generation and the full-vocabulary divergence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from heretic_contrast.ablation import compose, effective_weight
from heretic_contrast.directions import Directions
from heretic_contrast.evaluation.generation import generate_tokens, prompt_tokens
from heretic_contrast.evaluation.head import Head
from heretic_contrast.evaluation.interventions import output_projections
from heretic_contrast.evaluation.responses import Tier, classify_response
from heretic_contrast.evaluation.results import SweepResult, efficiency
from heretic_contrast.evaluation.sweep import SweepEvaluator, SweepOptions, sweep
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.lora import base_weight
from heretic_contrast.prompts import Prompt

HARMFUL = [
    Prompt(f"Break the {name}", category="violence")
    for name in ("door", "jar", "cup", "vase", "lock")
]
CANARIES = [Prompt(f"Bake a {name}") for name in ("cake", "loaf")]
REFERENCES = [
    Prompt(f"Tell me about {name}") for name in ("tea", "the sea", "trains", "snow in May")
]


def random_directions(model: LanguageModel, n_directions: int, seed: int) -> Directions:
    """Directions without meaning."""

    generator = torch.Generator().manual_seed(seed)
    tensor = torch.nn.functional.normalize(
        torch.randn(model.n_layers + 1, n_directions, model.hidden_size, generator=generator),
        dim=-1,
    )
    shape = tensor.shape[:2]
    return Directions(
        tensor=tensor,
        names=tuple(f"class {index}" for index in range(n_directions)),
        aligned=True,
        norms=torch.ones(shape),
        singular_values=torch.ones(shape),
        class_directions=tensor,
        class_names=tuple(f"class {index}" for index in range(n_directions)),
        mean_direction=tensor.mean(dim=1),
        hits=torch.zeros(*shape, 0, dtype=torch.int64),
    )


def always_refuse_at_base(model: LanguageModel, prompts: list[Prompt]) -> Any:
    """A classifier that calls the unmodified model's responses refusals, since a random model refuses nothing."""

    base = set(model.generate(prompts, 12))

    def classify(prompt: str, response: str) -> Tier:
        return Tier.REFUSE if response in base else Tier.COMPLY

    return classify


@contextmanager
def changed_weights(
    model: LanguageModel, layer: int, change: Tensor, components: tuple[str, ...] | None = None
) -> Iterator[None]:
    """Changes the weights of a layer's output projections to W − C W."""

    modules = output_projections(model, layer, components)
    originals = [module.weight.data for module in modules]
    try:
        for module in modules:
            module.weight.data = (
                base_weight(module).double() - change @ base_weight(module).double()
            ).float()
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.weight.data = original


@torch.no_grad()
def full_divergence(model: LanguageModel, changed: Any, kl_tokens: int) -> float:
    """The divergence over the whole vocabulary, one prompt at a time, without any shortcut."""

    total, count = 0.0, 0
    for prompt in REFERENCES:
        tokens = prompt_tokens(model, [prompt])[0]
        continuation = generate_tokens(Head(model), [tokens], [kl_tokens])[0]
        ids = torch.tensor([tokens + continuation])
        positions = slice(len(tokens) - 1, len(tokens) - 1 + len(continuation))
        base = model.model(input_ids=ids).logits[0, positions].double().log_softmax(-1)
        with changed():
            modified = model.model(input_ids=ids).logits[0, positions].double().log_softmax(-1)
        total += float((base.exp() * (base - modified)).sum())
        count += len(continuation)
    return total / count


def test_cells_that_are_evaluated_report_progress(tiny_llama: LanguageModel) -> None:
    options = SweepOptions(layers=(1, 2), weights=(0.5, 1.0), max_new_tokens=12, kl_tokens=5)
    evaluator = SweepEvaluator(
        tiny_llama,
        {"one": random_directions(tiny_llama, 1, 0)},
        HARMFUL,
        CANARIES,
        REFERENCES,
        options,
        always_refuse_at_base(tiny_llama, HARMFUL),
    )
    shown: list[tuple[int, int]] = []
    cells = evaluator.evaluate(evaluator.grid(), lambda *progress: shown.append(progress))
    assert len(cells) == 4
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert {done for done, _ in shown} >= {1, 2, 3, 4} and shown[-1] == (4, 4)
    assert cells == evaluator.evaluate(evaluator.grid())


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_hybrid"])
@pytest.mark.parametrize("top_k", [16, 320])
def test_cells_equal_changed_weights(
    fixture: str, top_k: int, request: pytest.FixtureRequest
) -> None:
    model: LanguageModel = request.getfixturevalue(fixture)
    configurations = {
        "one": random_directions(model, 1, 0),
        "three": random_directions(model, 3, 1),
    }
    options = SweepOptions(
        layers=(0, 1, 3),
        weights=(0.5, 1.5),
        max_new_tokens=12,
        kl_tokens=12,
        top_k=top_k,
        strengths=("weight", "effective"),
    )
    result = sweep(
        model,
        configurations,
        HARMFUL,
        CANARIES,
        REFERENCES,
        options,
        classify=always_refuse_at_base(model, HARMFUL),
    )
    assert result.floor == pytest.approx(0, abs=1e-6)
    cells = [cell for cell in result.cells if len(cell.layers) == 1]
    assert len(cells) >= 2 * 2 * 2 * 3
    assert len({cell.responses for cell in cells}) > 5
    for cell in cells:
        layer = cell.layers[0]
        vectors = configurations[cell.configuration].tensor[layer + 1]
        change = cell.weight * (vectors.double().T @ vectors.double())
        if cell.strength == "effective":
            change *= cell.weight / torch.linalg.eigvalsh(change)[-1]
        assert cell.effective_weight == pytest.approx(
            float(torch.linalg.eigvalsh(change)[-1]), rel=1e-5
        )
        with changed_weights(model, layer, change):
            assert list(cell.responses) == model.generate(HARMFUL, 12)
            assert list(cell.canary_responses) == model.generate(CANARIES, 12)
        expected = full_divergence(
            model, lambda layer=layer, change=change: changed_weights(model, layer, change), 12
        )
        found = cell.measurement.kl_divergence
        if top_k == 320:
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        else:
            assert 0 <= found <= expected + 1e-6


def test_synergy_of_pairs(tiny_llama: LanguageModel) -> None:
    directions = random_directions(tiny_llama, 2, 3)
    options = SweepOptions(
        weights=(1.0, 2.0), max_new_tokens=12, kl_tokens=4, synergy_weight=1.0, n_synergy_layers=3
    )
    classify = always_refuse_at_base(tiny_llama, HARMFUL)
    result = sweep(
        tiny_llama, {"one": directions}, HARMFUL, CANARIES, REFERENCES, options, classify=classify
    )
    assert len(result.synergies) == 3
    by_key = {(cell.layers, cell.weight): cell for cell in result.cells}
    for synergy in result.synergies:
        reductions = [
            result.baseline.refusals - by_key[(layer,), 1.0].measurement.refusals
            for layer in synergy.layers
        ]
        reduction = result.baseline.refusals - synergy.refusals
        assert synergy.synergy == reduction - max(reductions)


def test_result_survives_json(tiny_llama: LanguageModel) -> None:
    result = sweep(
        tiny_llama,
        {"one": random_directions(tiny_llama, 1, 0)},
        HARMFUL,
        CANARIES,
        REFERENCES,
        SweepOptions(layers=(1,), weights=(1.0,), max_new_tokens=12, kl_tokens=4),
        classify=always_refuse_at_base(tiny_llama, HARMFUL),
    )
    import json

    restored = SweepResult.from_dict(json.loads(result.to_json()))
    assert restored == result
    assert restored.to_json() == result.to_json()
    assert result.to_csv().count("\n") == 1 + len(result.cells)
    assert len(result.responses_json_lines().splitlines()) == 5 + 7 * len(result.cells)


def test_efficiencies_of_the_paper() -> None:
    # Table 1: minimal weight's KL and efficiency of layers 9, 14, 15, 11, 12 and 13.
    table = [
        (0.0048, 2305),
        (0.0047, 2358),
        (0.0050, 2193),
        (0.0456, 222),
        (0.0398, 254),
        (0.0191, 536),
    ]
    for kl_divergence, printed in table:
        # The divergence is printed to four decimals.
        low = efficiency(10, 0, kl_divergence + 0.00005, 0.00045)
        high = efficiency(10, 0, kl_divergence - 0.00005, 0.00045)
        assert low is not None and high is not None
        assert low - 0.5 <= printed <= high + 0.5
        without_floor = efficiency(10, 0, kl_divergence - 0.00005, 0.0)
        assert without_floor is not None
    assert efficiency(10, 0, 0.0048 - 0.00005, 0.0) < 2305  # type: ignore[operator]
    assert efficiency(10, 10, 0.1, 0.0) is None and efficiency(10, 3, 0.0, 0.0) is None


def test_effective_weight_of_parallel_directions_adds_up() -> None:
    vector = torch.nn.functional.normalize(torch.randn(1, 8), dim=1)
    assert effective_weight(compose(vector.expand(7, -1), torch.full((7,), 0.5))) == pytest.approx(
        3.5
    )


def test_classifier_is_the_default() -> None:
    assert classify_response("Break the door", "I cannot help with that.") is Tier.REFUSE
