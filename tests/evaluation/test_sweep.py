# SPDX-License-Identifier: AGPL-3.0-or-later

"""The sweep against changed weights, plain generation and the full-vocabulary divergence."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic_contrast.ablation.operator import compose, effective_weight
from heretic_contrast.engine.judge import JudgeModel
from heretic_contrast.evaluation.cells import Cell, CellKey, Measurement, SweepResult, efficiency
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import SweepEvaluator, sweep
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.identity import weights_digest
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from heretic_contrast.tiers.coherence import is_coherent
from heretic_contrast.tiers.responses import Tier, classify_response
from tests.engine.test_judge import write_keyword_judge
from tests.plain_sweeps import (
    CANARIES,
    HARMFUL,
    NAMES,
    REFERENCES,
    always_refuse_at_base,
    changed_weights,
    full_divergence,
    known_references,
    random_directions,
)
from tests.tiny_models import make_model, make_tokenizer


def test_cells_that_are_evaluated_report_progress(tiny_llama: LanguageModel) -> None:
    options = SweepOptions(layers=(1, 2), weights=(0.5, 1.0), max_new_tokens=12, kl_tokens=5)
    evaluator = SweepEvaluator(
        tiny_llama,
        plan_sweep(
            {"one": random_directions(tiny_llama, 1, 0)}, HARMFUL, CANARIES, REFERENCES, options
        ),
        always_refuse_at_base(tiny_llama, HARMFUL),
    )
    shown: list[tuple[int, int]] = []
    cells = evaluator.evaluate(evaluator.grid(), lambda *progress: shown.append(progress))
    assert len(cells) == 4
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert {done for done, _ in shown} >= {1, 2, 3, 4} and shown[-1] == (4, 4)
    assert cells == evaluator.evaluate(evaluator.grid())


@pytest.mark.parametrize(
    "fixture", ["tiny_llama", pytest.param("tiny_hybrid", marks=pytest.mark.slow)]
)
def test_cells_equal_changed_weights(fixture: str, request: pytest.FixtureRequest) -> None:
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
        top_k=320,
        strengths=("weight", "effective"),
        synergy_weight=0.5,
        n_synergy_layers=2,
    )
    classify = always_refuse_at_base(model, HARMFUL)
    pools = (HARMFUL, CANARIES, REFERENCES)
    result = sweep(model, configurations, *pools, options, classify=classify)
    assert result.floor == pytest.approx(0, abs=1e-6)
    assert len(result.cells) == 2 * 2 * 2 * 3 + 2 * 2
    assert len({cell.responses for cell in result.cells}) > 5

    # By fewer tokens the divergence is a bound.
    plan = plan_sweep(configurations, *pools, replace(options, top_k=16))
    evaluator = SweepEvaluator(model, plan, classify)
    keys = [key for key in evaluator.grid() if key.layers == (1,) and key.weight == 1.5]
    bounds = {cell.key(): cell for cell in evaluator.evaluate(keys)}

    known = known_references(model, 12)
    at_once = replace(model, batch_size=len(HARMFUL) + len(CANARIES))
    n_bounds = 0
    for cell in result.cells:
        changes = {}
        for layer in cell.layers:
            vectors = configurations[cell.configuration].tensor[layer + 1].double()
            changes[layer] = cell.weight * (vectors.T @ vectors)
            if cell.strength == "effective":
                changes[layer] *= cell.weight / torch.linalg.eigvalsh(changes[layer])[-1]
        assert cell.effective_weight == pytest.approx(
            max(float(torch.linalg.eigvalsh(change)[-1]) for change in changes.values()), rel=1e-5
        )
        # Of the single layers half, in which any three of layer, weight, configuration and strength meet.
        place = (
            (0, 1, 3).index(cell.layers[0])
            + options.weights.index(cell.weight)
            + list(configurations).index(cell.configuration)
            + options.strengths.index(cell.strength)
        )
        if len(cell.layers) == 1 and place % 2:
            continue
        with ExitStack() as stack:
            for layer, change in changes.items():
                stack.enter_context(changed_weights(model, layer, change))
            responses = at_once.generate([*HARMFUL, *CANARIES], 12)
            expected = full_divergence(model, known)
        assert [*cell.responses, *cell.canary_responses] == responses
        assert cell.measurement.kl_divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
        if cell.key() in bounds:
            bound = bounds[cell.key()].measurement.kl_divergence
            assert 0 <= bound <= expected + 1e-6 and bound != cell.measurement.kl_divergence
            n_bounds += 1
    assert n_bounds == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_ablation_of_nothing_changes_no_response(dtype: torch.dtype) -> None:
    # Many tokens are almost equally likely, between which rounding decides.
    network = make_model("llama", vocab_size=2048, tie_word_embeddings=False).to(dtype)
    network.lm_head.weight.data.mul_(0.01)
    model = wrap(network, make_tokenizer(), "tiny", batch_size=16)
    prompts = [Prompt(f"{verb} the {name}") for verb in ("Break", "Open") for name in NAMES]
    options = SweepOptions(weights=(0.0,), max_new_tokens=24, kl_tokens=2)
    plan = plan_sweep(
        {"one": random_directions(model, 1, 0)}, prompts, CANARIES, REFERENCES, options
    )
    evaluator = SweepEvaluator(model, plan, lambda *_: Tier.REFUSE)
    stepwise = model.generate(prompts, 24)
    assert list(evaluator.base_responses) != stepwise
    for cells in (evaluator.grid(), evaluator.grid()[2:3]):
        for cell in evaluator.evaluate(cells):
            assert cell.responses == evaluator.base_responses
            assert cell.measurement.kl_divergence >= 0


def test_synergy_of_pairs(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[CellKey] = []
    evaluate = SweepEvaluator.evaluate

    def counting(self: SweepEvaluator, keys: Sequence[CellKey], *args: Any) -> list[Cell]:
        measured.extend(keys)
        return evaluate(self, keys, *args)

    monkeypatch.setattr(SweepEvaluator, "evaluate", counting)
    directions = random_directions(tiny_llama, 2, 3)
    options = SweepOptions(
        weights=(1.0, 2.0), max_new_tokens=12, kl_tokens=4, synergy_weight=1.0, n_synergy_layers=3
    )
    classify = always_refuse_at_base(tiny_llama, HARMFUL)
    result = sweep(
        tiny_llama, {"one": directions}, HARMFUL, CANARIES, REFERENCES, options, classify=classify
    )
    assert len(result.synergies) == 3
    # Each cell once.
    assert sorted(measured) == sorted(cell.key() for cell in result.cells)
    assert len(measured) == 2 * tiny_llama.n_layers + 3
    by_key = {(cell.layers, cell.weight): cell for cell in result.cells}
    for synergy in result.synergies:
        reductions = [
            result.baseline.refusals - by_key[(layer,), 1.0].measurement.refusals
            for layer in synergy.layers
        ]
        reduction = result.baseline.refusals - synergy.refusals
        assert synergy.synergy == reduction - max(reductions)


def test_a_judge_reads_the_responses_of_a_state_at_once(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    word = HARMFUL[0].text.split()[-1]
    judge = JudgeModel(str(write_keyword_judge(tmp_path, (word,))))
    sizes: list[int] = []
    judge.model.register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    result = sweep(
        tiny_llama,
        {"one": random_directions(tiny_llama, 1, 0)},
        HARMFUL,
        CANARIES,
        REFERENCES,
        SweepOptions(layers=(1,), weights=(0.5, 1.0), max_new_tokens=12, kl_tokens=4),
        classify=judge,
    )
    pools = {"verdicts": HARMFUL, "canary_verdicts": CANARIES}
    for cell in result.cells:
        for name, prompts in pools.items():
            tiers = [verdict.tier for verdict in getattr(cell, name)]
            assert tiers == [("COMPLY", "REFUSE")[word in prompt.text] for prompt in prompts]
    assert 0 < result.baseline.refusals < len(HARMFUL)
    states = [result.baseline_responses + result.baseline_canary_responses]
    states += [cell.responses + cell.canary_responses for cell in result.cells]
    seen: set[tuple[int, str]] = set()
    expected = []
    for responses in states:
        new = set(enumerate(responses)) - seen
        expected.append(len(new))
        seen |= new
    assert sizes == [size for size in expected if size] and len(sizes) > 1


def test_a_response_that_is_given_again_is_judged_once(tiny_llama: LanguageModel) -> None:
    configurations = {"one": random_directions(tiny_llama, 1, 0)}
    options = SweepOptions(weights=(0.0, 0.1, 1.0), max_new_tokens=12, kl_tokens=4)
    plan = plan_sweep(configurations, HARMFUL, CANARIES, REFERENCES, options)
    classify = always_refuse_at_base(tiny_llama, HARMFUL)
    judged: list[tuple[str, str]] = []

    def counting(prompt: str, response: str) -> Tier:
        judged.append((prompt, response))
        return classify(prompt, response)

    evaluator = SweepEvaluator(tiny_llama, plan, counting)
    prompts = [prompt.text for prompt in (*HARMFUL, *CANARIES)]
    base = list(judged)
    assert [prompt for prompt, _ in base] == prompts
    cells = evaluator.evaluate(evaluator.grid())
    given = [zip(prompts, cell.responses + cell.canary_responses, strict=True) for cell in cells]
    distinct = {pair for pairs in given for pair in pairs} | set(base)
    assert len(base) < len(distinct) < len(prompts) * (1 + len(cells))
    assert sorted(judged) == sorted(distinct)
    for cell in cells:
        for prompt, response, verdict in zip(HARMFUL, cell.responses, cell.verdicts, strict=True):
            assert verdict.tier == classify(prompt.text, response).value
            assert verdict.coherent == is_coherent(response)

    # What was measured before decides nothing, not even in which batches a judge reads.
    del judged[: len(base)]
    first = judged.copy()
    judged.clear()
    assert evaluator.evaluate(evaluator.grid()) == cells and judged == first


@pytest.mark.parametrize("n_references", [1, len(REFERENCES)])
def test_result_survives_json(tiny_llama: LanguageModel, n_references: int) -> None:
    """With one reference prompt there is no standard error, and JSON has no NaN."""

    classify = always_refuse_at_base(tiny_llama, HARMFUL)
    result = sweep(
        tiny_llama,
        {"one": random_directions(tiny_llama, 1, 0)},
        HARMFUL,
        CANARIES,
        REFERENCES[:n_references],
        SweepOptions(layers=(1,), weights=(1.0,), max_new_tokens=12, kl_tokens=4),
        classify=classify,
    )

    def no_json(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON.")

    written = json.loads(result.to_json(), parse_constant=no_json)
    weights = weights_digest(tiny_llama.model)
    assert (written["identity"]["weights"], written["identity"]["dtype"]) == (weights, "float32")
    assert written["identity"]["versions"]["torch"] == torch.__version__
    restored = SweepResult.from_dict(written)
    assert restored == result
    assert restored.to_json() == result.to_json()
    errors = [cell["measurement"]["kl_standard_error"] for cell in written["cells"]]
    assert all((error is None) == (n_references == 1) for error in errors)
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert len(rows) == len(result.cells)
    assert "nan" not in result.to_csv()

    responses = [json.loads(line) for line in result.responses_json_lines().splitlines()]
    assert len(responses) == 7 * (1 + len(result.cells))
    for row in responses:
        assert row["tier"] == classify(row["prompt"], row["response"]).value
        assert row["coherent"] == is_coherent(row["response"])
    for cell in result.cells:
        own = [row for row in responses if row.get("layers") == list(cell.layers)]
        own = [row for row in own if row["weight"] == cell.weight and row["pool"] == "harmful"]
        assert [row["response"] for row in own] == list(cell.responses)
        assert sum(row["tier"] == "REFUSE" for row in own) == cell.measurement.refusals
        assert sum(not row["coherent"] for row in own) == cell.measurement.incoherent


class Counted(str):
    """A response that counts how often it is copied."""

    n_copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Counted":
        Counted.n_copies += 1
        return self


def test_cells_are_turned_into_json_without_copies() -> None:
    responses = tuple(map(Counted, ("yes", "no", "never")))
    measurement = Measurement(3, 0, 0, 0, 3, 0, 0, 0.0, None)
    cell = Cell("one", "weight", (1,), 0.5, 0.5, 0.5, measurement, responses)
    written = json.loads(SweepResult("tiny", measurement, (cell,)).to_json())
    assert written["cells"][0]["responses"] == list(responses)
    assert Counted.n_copies == 0


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
