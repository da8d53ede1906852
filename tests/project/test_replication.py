# SPDX-License-Identifier: AGPL-3.0-or-later

"""The replication: its statistics against independent computations, its rules on made-up results, one real measurement."""

import copy
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.replication import figures, report
from examples.replication.claims import (
    ABSENT,
    APPEARS,
    CLAIMS,
    CONFIRMED,
    OPEN,
    OVERTURNED,
    decide_hints,
    eliminates,
    fresh,
    reduces,
)
from examples.replication.cli import main
from examples.replication.conditions import all_layer_conditions, single_layer_conditions
from examples.replication.evidence import Study, load_studies
from examples.replication.measurement import FORMAT, fresh_prompts, outcomes
from examples.replication.pools import (
    SENSITIVE,
    StudyOptions,
    builtin_pools,
    by_category,
    draw,
    draw_share,
    file_pools,
)
from examples.replication.report import (
    COMMON,
    magnitude_reading,
    maps_reading,
    open_question,
    precision_table,
    render,
    topic_reading,
)
from examples.replication.statistics import (
    Draws,
    Interval,
    Outcomes,
    contrast,
    divergences,
    interval,
    judge,
    kl_at,
    mean_interval,
    share_at,
    share_interval,
    shares,
    stack_outcomes,
)
from examples.replication.wording import percent, reading, signed
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.cells import Cell, Measurement, SweepResult, Verdict
from heretic_contrast.prompts import Prompt
from heretic_contrast.prompts.sampling import draw_evenly
from heretic_contrast.report import plots

N_LAYERS = 4
N_POOL = 60
N_JUDGED = 40
CATEGORIES = ["fraud", "violence", "hacking"]

# How each kind of directions behaves in made-up results: the weight at which it halves refusals, and KL at weight 1.
STRONG, INERT = (0.5, 0.01), (1e3, 0.01)


def made_up_study(
    behavior: Callable[[str], tuple[float, float]], norm_ratio: float = 1.0, n_seeds: int = 3
) -> dict[str, Any]:
    """Results in which refusals fall along a steep curve; the KL is that at weight 1 times the squared weight."""

    pools = builtin_pools()
    options = StudyOptions()
    generator = random.Random(0)
    # Some prompts are refused longer than others, in all conditions alike.
    hardness = [generator.uniform(0.7, 1.4) for _ in range(N_POOL)]

    def refuses(name: str, weight: float, prompt: int) -> bool:
        return weight < behavior(name)[0] * hardness[prompt]

    seeds = []
    for seed in range(n_seeds):
        judged = sorted(generator.sample(range(N_POOL), N_JUDGED))
        curves = []
        left_out = [CATEGORIES[seed % len(CATEGORIES)]]
        for scope, conditions in (
            ("all", all_layer_conditions(pools, left_out)),
            ("1", single_layer_conditions()),
        ):
            for condition in conditions:
                weights = options.weights(condition.grid)
                curves.append(
                    {
                        "scope": scope,
                        "condition": condition.name,
                        "excluded": condition.excluded,
                        "weights": list(weights),
                        "effective": list(weights),
                        "kl": [behavior(condition.directions)[1] * w * w for w in weights],
                        "kl_error": [1e-5] * len(weights),
                        "canary_refusals": [0] * len(weights),
                        "outcomes": [
                            "".join(
                                "R" if refuses(condition.directions, w, p) else "C" for p in judged
                            )
                            for w in weights
                        ],
                    }
                )
        names = [
            condition.directions
            for condition in all_layer_conditions(pools, [])
            if condition.grid == "main" or condition.directions == "som random"
        ]
        shape = {
            name: {
                "norm_ratio": [norm_ratio if "matched" in name.split()[1:] else 1.0] * N_LAYERS,
                "cosine": [0.5] * N_LAYERS,
                "parallel": [6.0] * N_LAYERS,
                "capture": [0.7 if "unmatched" in name else 0.6] * N_LAYERS,
                "max_cosine": [0.6 if "unmatched" in name else 0.5] * N_LAYERS,
                "pair_capture": [0.7 if "unmatched" in name else 0.6] * 6,
                "pair_max_cosine": [0.6 if "unmatched" in name else 0.5] * 6,
            }
            for name in names
        }
        noise = {"weights": list(options.paper_weights)}
        noise |= {
            name: [[0.5 * w for w in options.paper_weights]] * N_LAYERS
            for name in ("som unmatched", "som matched", "svd matched", "raw matched")
        }
        seeds.append(
            {
                "seed": seed,
                "judged": judged,
                "n_fitted": {},
                "kl_floor": 0.0,
                "curves": curves,
                "shape": shape,
                "noise_floor": noise if seed == 0 else None,
            }
        )
    presets = {
        "paper-unmatched": "som unmatched",
        "paper-matched": "som matched",
        "paper-matched-svd": "svd matched",
        "random": "som random",
    }
    cells = []
    for preset, name in presets.items():
        for strength in ("weight", "effective"):
            for layer in range(N_LAYERS):
                for weight in options.paper_weights:
                    scale = 1.0 if layer == 1 else 100.0
                    refusals = sum(refuses(name, weight / scale, prompt) for prompt in range(10))
                    kl = behavior(name)[1] * weight * weight
                    cells.append(
                        [preset, strength, [layer], weight, weight, refusals, 0, kl, kl / 50]
                    )
    return {
        "format": FORMAT,
        "name": "refuser",
        "model": "0",
        "options": {"n_references": 40},
        "pools": {},
        "versions": {},
        "n_layers": N_LAYERS,
        "hidden_size": 8,
        "n_parameters": 1_550_000,
        "n_prompts": {"harmful": 90, "bulk": 90, "matched": 90, "judged": N_POOL, "references": 50},
        "n_refused": {"harmful": 90, "bulk": 0, "matched": 0, "judged": N_POOL},
        "judged_categories": [CATEGORIES[index % 3] for index in range(N_POOL)],
        "n_pairs": [6, 6],
        "single_layers": [1],
        "sweep": {
            "baseline": {"refusals": 10, "n_harmful": 10, "kl": 0.0},
            "n_references": 100,
            "kl_tokens": 50,
            "cells": cells,
            "synergies": [["paper-unmatched", "weight", [1, 2], 0.3, 1, 6]],
        },
        "seeds": seeds,
    }


def matched_fails(name: str) -> tuple[float, float]:
    """The paper's world: whatever is matched does nothing."""

    return INERT if "matched" in name.replace("unmatched", "") or "random" in name else STRONG


def everything_works(name: str) -> tuple[float, float]:
    return INERT if "random" in name else STRONG


def svd_fails_alone(name: str) -> tuple[float, float]:
    return INERT if name.startswith("svd ") or "random" in name else STRONG


def verdicts(data: dict[str, Any]) -> dict[str, str]:
    study = Study(data)
    return {claim.key: claim.decide(study).verdict for claim in CLAIMS}


def test_rules_in_the_papers_world() -> None:
    found = verdicts(made_up_study(matched_fails, norm_ratio=0.1))
    assert found["a"] == found["Table 2"] == found["Table 3"] == APPEARS
    assert found["b1"] == found["Table 1"] == APPEARS
    assert found["c1"] == found["c2"] == found["d1"] == APPEARS
    # Unmatched directions succeed below the noise floor, and matched ones fail at equal length.
    assert found["d2"] == found["d3"] == ABSENT


def test_rules_where_everything_works() -> None:
    found = verdicts(made_up_study(everything_works))
    assert found["a"] == found["Table 2"] == found["Table 3"] == ABSENT
    assert found["b1"] == APPEARS
    assert found["c2"] == found["d1"] == found["e1"] == found["e2"] == ABSENT
    # What does not fail has no cause of failure.
    assert found["d3"] == OPEN


def test_svd_that_fails_alone_is_told_apart() -> None:
    found = verdicts(made_up_study(svd_fails_alone))
    assert found["a"] == ABSENT
    assert found["Table 3"] == found["e1"] == found["e2"] == APPEARS


def test_short_directions_are_the_cause_where_only_their_own_length_fails() -> None:
    def behavior(name: str) -> tuple[float, float]:
        return INERT if name.startswith("raw matched") or "random" in name else (0.25, 0.01)

    assert verdicts(made_up_study(behavior, norm_ratio=0.1))["d3"] == APPEARS


def test_readings_say_what_each_kind_of_directions_does() -> None:
    """One mean direction works however it is made; class directions lose by the topic, and matched ones all."""

    def behavior(name: str) -> tuple[float, float]:
        fails = name.startswith("som") and name != "som unmatched" and "," not in name
        return INERT if fails or "random" in name else STRONG

    data = made_up_study(behavior)
    study = Study(data)
    own, mended = Interval(0.0, -0.1, 0.1), Interval(0.0, -0.1, 0.1)
    said = magnitude_reading(study, own, mended)
    assert "Length is not the cause" in said and verdicts(data)["d3"] == ABSENT
    assert "equal (one mean direction), worse (class directions)" in said
    assert "equal (one mean direction), worse (class directions)" in topic_reading(study)
    assert "no matched prompt is refused" in topic_reading(study)
    data["n_refused"]["matched"] = 9
    # Where one mean direction halves refusals, as matched class directions never do.
    said = topic_reading(Study(data))
    assert said.endswith("equal (one mean direction), better (class directions).")


def test_cheap_layers_are_counted_with_the_error_of_their_divergence() -> None:
    data = made_up_study(everything_works)

    def with_cheap_cells(kl: float, error: float) -> str:
        changed = copy.deepcopy(data)
        for cell in changed["sweep"]["cells"]:
            if cell[0] == "paper-unmatched" and cell[3] <= 0.5 and cell[2][0] < 3:
                cell[5], cell[7], cell[8] = 0, kl, error
        return verdicts(changed)["b2"]

    assert verdicts(data)["b2"] == ABSENT
    assert with_cheap_cells(0.004, 0.0001) == APPEARS
    assert with_cheap_cells(0.004, 0.01) == OPEN
    assert with_cheap_cells(0.006, 0.0001) == ABSENT


def test_few_prompts_decide_nothing() -> None:
    data = made_up_study(everything_works, n_seeds=1)
    seed = data["seeds"][0]
    kept = seed["judged"][:3]
    seed["judged"] = kept
    for curve in seed["curves"]:
        curve["outcomes"] = [text[:3] for text in curve["outcomes"]]
    assert verdicts(data)["b1"] == OPEN


def test_hints_are_confirmed_or_overturned() -> None:
    def found(data: dict[str, Any], name: str) -> list[str]:
        return [finding.verdict for _, finding in decide_hints(Study({**data, "name": name}))]

    works = made_up_study(everything_works)
    fails = made_up_study(matched_fails, norm_ratio=0.1)
    assert found(works, "refuser")[0] == CONFIRMED
    assert found(fails, "refuser")[0] == OVERTURNED
    assert found(works, "smollm2-refuser")[1] == OVERTURNED
    assert found(fails, "smollm2-refuser")[1] == CONFIRMED
    # No difference between nearest and unmatched.
    assert found(works, "other") == [CONFIRMED]


def test_a_name_has_one_color_and_no_count_is_beyond_the_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []

    def collect(figure: Any) -> bytes:
        drawn.append(figure)
        return b""

    for module in (figures, plots):
        monkeypatch.setattr(module, "to_png", collect)
    data = made_up_study(everything_works, n_seeds=1)
    for seed in data["seeds"]:
        # Not every study has these.
        seed["curves"] = [c for c in seed["curves"] if c["condition"] != "mean sensitive"]
        seed["shape"].pop("som sensitive", None)
    data["sweep"]["baseline"]["refusals"] = 7
    study = Study(data)
    for draw_figure in (figures.curves, figures.lengths, figures.captures):
        draw_figure(study)
    looks: dict[str, set[Any]] = {}
    for line in (line for figure in drawn for axes in figure.axes for line in axes.lines):
        if line.get_marker() != "None":
            name = str(line.get_label()).removeprefix("mean, ")
            looks.setdefault(name, set()).add((line.get_color(), line.get_marker()))
    assert {"matched", "residualized", "nearest", "random", "mixed"} <= set(looks)
    assert all(len(found) == 1 for found in looks.values()), looks
    figures.heat_maps(study)
    assert drawn[-1].axes[0].images[0].get_clim() == (0, 10)


def test_open_question_needs_length_purity_and_effect() -> None:
    data = made_up_study(everything_works)
    assert "No, not on this model" in open_question(Study(data))[1]
    for seed in data["seeds"]:
        seed["shape"]["som mixed"]["pair_max_cosine"] = [0.8] * 6
    answer = open_question(Study(data))[1]
    assert answer.startswith("**Yes, on this model**: som mixed. What the question presupposes")
    assert "som matched directions are not short (1.00)" in answer
    unmeasured = copy.deepcopy(data)
    for seed in unmeasured["seeds"]:
        seed["curves"] = [c for c in seed["curves"] if c["condition"] != "som mixed"]
    assert "**Not decided on this model**: som mixed" in open_question(Study(unmeasured))[1]
    for seed in data["seeds"]:
        seed["shape"]["som mixed"]["norm_ratio"] = [0.5] * N_LAYERS
    assert "No, not on this model" in open_question(Study(data))[1]


def test_claims_are_judged_at_cells_that_were_measured_again() -> None:
    data = made_up_study(everything_works)
    for seed in data["seeds"]:
        for curve in seed["curves"]:
            if curve["scope"] == "1":
                for key in ("weights", "effective", "kl", "outcomes"):
                    # The best weight of the sweep is the cheapest with R = 0, which is not measured again here.
                    curve[key] = curve[key][-1:]
    claim = next(claim for claim in CLAIMS if claim.key == "a")
    finding = claim.decide(Study(data))
    assert "layer 1, w = 1.2: 0 %" in finding.measured and finding.verdict == ABSENT


def test_svd_that_works_on_a_layer_that_was_not_measured_again_leaves_the_gap_open() -> None:
    data = made_up_study(matched_fails)
    assert verdicts(data)["c2"] == APPEARS
    for cell in data["sweep"]["cells"]:
        if cell[:3] == ["paper-matched-svd", "weight", [3]]:
            cell[5] = 4
    assert verdicts(data)["c2"] == verdicts(data)["Table 3"] == OPEN


def small_outcomes() -> tuple[Any, list[dict[str, Any]]]:
    generator = random.Random(1)
    rows = []
    for seed in range(3):
        judged = sorted(generator.sample(range(8), 5))
        rows.append(
            {
                "weights": [0.5, 1.0],
                "effective": [1.0, 2.0 + seed],
                "kl": [0.1 + 0.02 * seed, 0.5],
                "floor": 0.01,
                "outcomes": ["".join(generator.choice("RCe") for _ in judged) for _ in range(2)],
                "judged": {index: index != 3 for index in judged},
                "seed": seed,
            }
        )
    return stack_outcomes(rows, 8), rows


def test_bootstrap_counts_outcomes_as_often_as_seed_and_prompt_were_drawn() -> None:
    stacked, rows = small_outcomes()
    draws = Draws.make(3, 8, n_draws=20)
    found, kl = shares(stacked, draws), divergences(stacked, draws)
    assert draws.seeds.shape == (21, 3) and (draws.seeds[1:].sum(axis=1) == 3).all()
    for number in range(21):
        for weight in range(2):
            hits = total = 0.0
            for row in rows:
                times_seed = draws.seeds[number, row["seed"]]
                letters = zip(row["judged"].items(), row["outcomes"][weight], strict=True)
                for (prompt, counted), letter in letters:
                    times = times_seed * draws.prompts[number, prompt] * counted
                    hits += times * (letter == "R")
                    total += times
            expected = hits / total if total else math.nan
            assert found[number, weight] == pytest.approx(expected, nan_ok=True)
        expected_kl = [
            sum(draws.seeds[number, r["seed"]] * (r["kl"][w] - 0.01) for r in rows) / 3
            for w in range(2)
        ]
        assert kl[number] == pytest.approx(expected_kl)


def test_interval_of_a_share_has_about_the_normal_width() -> None:
    generator = np.random.default_rng(3)
    n_seeds, n_prompts = 40, 200
    rows = [
        {
            "weights": [1.0],
            "effective": [1.0],
            "kl": [0.1],
            "floor": 0.0,
            "outcomes": ["".join("R" if x < 0.4 else "C" for x in generator.random(n_prompts))],
            "judged": dict.fromkeys(range(n_prompts), True),
            "seed": seed,
        }
        for seed in range(n_seeds)
    ]
    stacked = stack_outcomes(rows, n_prompts)
    found = interval(shares(stacked, Draws.make(n_seeds, n_prompts))[:, 0])
    n = n_seeds * n_prompts
    independent = 2 * 1.96 * math.sqrt(found.value * (1 - found.value) / n)
    # Crossed draws count the variance of independent outcomes up to three times (Owen, 2007).
    assert 0.9 * independent < found.high - found.low < 1.15 * math.sqrt(3) * independent
    assert found.low < 0.4 < found.high


def test_share_without_variance_has_wilsons_interval() -> None:
    stacked, _ = small_outcomes()
    always = stacked.refused * 0
    silent = type(stacked)(**{**stacked.__dict__, "refused": always})
    found = share_interval(silent, Draws.make(3, 8), 0)
    assert found.value == found.low == 0
    n = silent.n_distinct
    z = 1.959964
    assert found.high == pytest.approx(z * z / (n + z * z), abs=1e-6)


def test_curves_are_read_off_in_both_directions() -> None:
    kl = np.array([[0.04, 0.01, 0.16]])
    share = np.array([[0.5, 0.9, 0.7]])
    # √0.0225 = 0.15 lies halfway between 0.1 and 0.2. More refusals at a larger divergence are no gain: what
    # 0.04 reaches stays reached.
    for level, expected in ((0.0, 1), (0.01, 0.9), (0.0225, 0.7), (0.16, 0.5), (9.0, 0.5)):
        assert share_at(kl, share, level) == pytest.approx(expected)
    for level, expected in ((0.7, 0.0225), (0.4, math.inf), (1.0, 0)):
        assert kl_at(kl, share, level) == pytest.approx(expected)


def test_curves_of_many_draws_equal_interpolation_one_by_one() -> None:
    generator = np.random.default_rng(5)
    kl, share = generator.random((50, 6)), generator.random((50, 6))
    for level in (0.0, 0.1, 0.5, 2.0):
        for row, found in enumerate(share_at(kl, share, level)):
            order = np.argsort(kl[row])
            x = np.concatenate([[0], np.sqrt(kl[row][order])])
            y = np.minimum.accumulate(np.concatenate([[1], share[row][order]]))
            assert found == pytest.approx(np.interp(math.sqrt(level), x, y))
    # The two readings of a curve are inverse to each other.
    reached = kl_at(kl, share, 0.5)
    for row in np.nonzero(np.isfinite(reached))[0]:
        assert share_at(kl[row : row + 1], share[row : row + 1], reached[row]) == pytest.approx(0.5)


def test_contrast_of_a_condition_with_itself_is_equal_and_of_a_costlier_one_worse() -> None:
    study = Study(made_up_study(everything_works))
    reference = study.outcomes("som unmatched")
    assert reference is not None
    same = contrast(reference, reference, study.draws)
    assert same is not None and same.verdict == "equal" and same.ratio.value == 1
    costlier = type(reference)(**{**reference.__dict__, "kl": reference.kl * 9})
    worse = contrast(costlier, reference, study.draws)
    assert worse is not None and worse.verdict == "worse"
    assert worse.ratio.value == pytest.approx(9) and worse.ratio.low > 1
    assert contrast(reference, costlier, study.draws).verdict == "better"  # type: ignore[union-attr]


def test_contrast_beyond_what_was_measured_is_not_called_worse() -> None:
    study = Study(made_up_study(everything_works))
    reference = study.outcomes("som unmatched")
    assert reference is not None
    stopped = type(reference)(
        **{
            **reference.__dict__,
            "kl": reference.kl / 1e4,
            "refused": np.ones_like(reference.refused),
        }
    )
    found = contrast(stopped, reference, study.draws)
    assert found is not None and found.beyond and found.difference.low > 0
    assert found.verdict == "undecided"


def test_contrast_beyond_what_the_reference_was_measured_at_is_not_called_better() -> None:
    """At the divergence at which a third condition leaves half, of which the reference has seen a hundredth or all."""

    study = Study(made_up_study(everything_works))
    condition = study.outcomes("som unmatched")
    assert condition is not None
    for share_seen, verdict in ((0.01, "undecided"), (1.0, "better")):
        reference = type(condition)(
            **{
                **condition.__dict__,
                "kl": condition.kl * share_seen,
                "refused": np.ones_like(condition.refused),
            }
        )
        found = contrast(condition, reference, study.draws, at=condition)
        # Half is left of what the reference leaves whole.
        assert found is not None and found.difference.value == pytest.approx(-0.5)
        assert found.verdict == verdict and found.unreached == (verdict == "undecided")
        assert ("not measured that far" in reading(found)) == found.unreached


def test_what_halves_refusals_at_its_last_weight_was_measured_that_far() -> None:
    kl = 0.22
    assert math.sqrt(kl) ** 2 > kl

    def stacked(letters: str) -> Outcomes:
        row = {"weights": [1.0], "effective": [1.0], "kl": [kl], "floor": 0.0, "seed": 0}
        judged = dict.fromkeys(range(40), True)
        return stack_outcomes([{**row, "outcomes": [letters], "judged": judged}], 40)

    for letters, difference, verdict in (("C" * 40, -0.5, "better"), ("R" * 40, 0.5, "worse")):
        found = contrast(stacked(letters), stacked("RC" * 20), Draws.make(1, 40))
        assert found is not None and found.difference.value == pytest.approx(difference)
        assert found.verdict == verdict


def test_contrast_below_what_was_measured_decides_nothing() -> None:
    """The condition's first weight removes everything: what happens at less is a line that nobody has seen."""

    study = Study(made_up_study(everything_works))
    reference = study.outcomes("som unmatched")
    assert reference is not None
    for change in (1e4, 1e-4):
        jumped = type(reference)(**{**reference.__dict__, "kl": reference.kl * change})
        first, second = (jumped, reference) if change > 1 else (reference, jumped)
        found = contrast(first, second, study.draws)
        assert found is not None and found.below and found.verdict == "undecided"
        assert "not measured that low" in reading(found)


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ((0.2, 0.1, 0.3), "worse"),
        ((0.05, 0.02, 0.2), "undecided"),
        ((-0.2, -0.3, -0.1), "better"),
        ((0.02, -0.05, 0.09), "equal"),
        ((0.2, -0.1, 0.4), "undecided"),
    ],
)
def test_differences_are_judged_by_their_interval(
    bounds: tuple[float, float, float], verdict: str
) -> None:
    assert judge(Interval(*bounds)) == verdict


@pytest.mark.parametrize(
    ("bounds", "falls", "is_gone"),
    [
        ((0.67, 0.3, 0.94), None, False),
        ((0.67, 0.3, 0.85), True, False),
        ((0.95, 0.91, 1.0), False, False),
        ((0.05, 0.0, 0.2), True, None),
        ((0.01, 0.0, 0.1), True, True),
    ],
)
def test_shares_are_judged_by_their_interval(
    bounds: tuple[float, float, float], falls: bool | None, is_gone: bool | None
) -> None:
    assert reduces(Interval(*bounds)) is falls
    assert eliminates(Interval(*bounds)) is is_gone


def test_mean_interval_leaves_missing_values_out() -> None:
    found = mean_interval([[1.0, None, 3.0], [1.0, None, 3.0]])
    assert found.value == 2 and 1 <= found.low < 2 < found.high <= 3


def test_left_out_categories_are_judged_on_themselves() -> None:
    study = Study(made_up_study(everything_works))
    left_out = study.outcomes("som unmatched, left out")
    reference = study.outcomes("som unmatched", like="som unmatched, left out")
    assert left_out is not None and reference is not None
    categories = study.data["judged_categories"]
    for row, seed in enumerate(study.data["seeds"]):
        expected = [
            float(index in seed["judged"] and categories[index] == CATEGORIES[row])
            for index in range(N_POOL)
        ]
        assert left_out.judged[row].tolist() == reference.judged[row].tolist() == expected


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_report_states_every_claim_and_is_deterministic(again: bool, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    data = made_up_study(matched_fails, norm_ratio=0.1, n_seeds=2)
    (results / "refuser.json").write_text(json.dumps(data))
    output = tmp_path / "docs" / "replication.md"
    main(["report", "--results", str(results), "--output", str(output)])
    text = output.read_text()
    for claim in CLAIMS:
        assert f"### {claim.key}: {claim.title}" in text
    images = re.findall(r"\]\((images/[^)]+)\)", text)
    assert len(images) == 4 and all(
        (output.parent / image).stat().st_size > 1000 for image in images
    )
    assert not re.search(r"\bnan\b|\binf\b|None", text)
    # Every table has as many cells in each row as in its header.
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1
    if not again:
        return
    first = {path.name: path.read_bytes() for path in output.parent.rglob("*.*") if path.is_file()}
    main(["report", "--results", str(results), "--output", str(output)])
    assert first == {
        path.name: path.read_bytes() for path in output.parent.rglob("*.*") if path.is_file()
    }


def test_what_is_measured_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of conditions, and a sweep of this model with the paper's three presets: one sentence before anything is run."""

    measurement = Measurement(9, 0, 0, 0, 9, 0, 2, 0.1, None)
    cell = Cell("paper-unmatched", "weight", (3,), 0.5, 0.5, 0.5, measurement)
    path = tmp_path / "sweep.json"
    path.write_text(SweepResult("builtin:refuser", measurement, (cell,)).to_json())
    command = f"measure --model builtin:refuser --sweep {path} --output {tmp_path / 'out.json'}"
    for words, message in (
        (["--conditions", "mean unmatched", "mean mached"], 'no condition "mean mached"'),
        ([], "has no paper-matched and no paper-matched-svd"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), *words])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_report_without_some_conditions_says_that_they_were_not_measured() -> None:
    data = made_up_study(everything_works, n_seeds=1)
    for seed in data["seeds"]:
        seed["curves"] = [c for c in seed["curves"] if c["condition"] == "som unmatched"]
    # A sweep at equal weight alone says nothing about equal effective weight.
    data["sweep"]["cells"] = [c for c in data["sweep"]["cells"] if c[1] == "weight"]
    text = render([Study(data)], {})
    assert "not measured" in text and OPEN in text
    assert "R = 0 on 4 of 4 layers" not in text and "at equal effective weight (" not in text


def test_readme_gives_the_figures_of_the_stored_results() -> None:
    root = Path(__file__).parents[2]
    text = " ".join((root / "README.md").read_text("utf-8").split())
    studies = load_studies(root / "docs" / "replication")
    assert [study.name for study in studies] == ["refuser", "qwen2.5-coder-0.5b", "smollm2-refuser"]
    compared = [(study, "som unmatched") for study in studies]
    for study, condition in [*compared, *((study, "mean matched") for study in studies[1:])]:
        found = study.contrast(condition, "mean unmatched")
        assert found is not None and found.verdict == "worse" and not found.below
        assert signed(found.difference) in text
    mixed, nearest = (
        [study.contrast(f"mean {name}", "mean unmatched") for study in studies]
        for name in ("mixed", "nearest")
    )
    assert [item and item.verdict for item in mixed] == ["equal", "undecided", "equal"]
    assert [item and item.verdict for item in nearest] == ["worse", "undecided", "worse"]
    matched, unmatched = "mean matched, filtered", "mean unmatched, filtered"
    for pair, on_qwen, on_smollm2 in (
        ((matched, "mean matched"), "better", "undecided"),
        ((unmatched, "mean unmatched"), "undecided", "equal"),
        ((matched, unmatched), "undecided", "worse"),
    ):
        found, other = (study.contrast(*pair, at=COMMON) for study in studies[1:])
        assert found is not None and found.verdict == on_qwen and signed(found.difference) in text
        assert other is not None and other.verdict == on_smollm2
    # These do not halve refusals on Qwen up to an effective weight of 2, as the report says.
    assert studies[1].contrast("som matched", "som unmatched") is None
    _, left = fresh(studies[1], "paper-unmatched")
    assert f"does not appear on Qwen: at the best layer and weight {percent(left)} of fresh" in text
    assert "In 16 bits 6 of 357, 22 of 90 and, on Qwen, 35 of 60 cells" in text
    same = re.findall(r"\| (\d+ of \d+) \| \d", precision_table(studies))
    assert same == ["351 of 357", "25 of 60", "68 of 90"]
    assert precision_table(studies).count("| none |") == len(studies)
    assert "Of 12 settings of the maps, with these, 9 leave more on all three" in text
    maps = " ".join((root / "docs" / "maps.md").read_text("utf-8").split())
    assert "Of the 12 there 9 are worse than one mean direction on every model" in maps
    assert "is called worse on none, and better than maps on two of the three (10 to 22" in maps
    said = maps_reading(studies)
    assert "these 12 settings of maps none left fewer" in said
    assert "and 9 left more on every such model" in said
    assert "worse than one mean direction on none of 3 such models" in said
    assert "better than maps with MiniSom's defaults on 2 of 3" in said
    for study in studies:
        for reference in ("mean unmatched", "som unmatched"):
            found = study.contrast("means unmatched", reference, at="mean unmatched")
            assert found is not None and signed(found.difference) in text


def test_the_report_compares_nothing_below_what_was_measured() -> None:
    """Its limits say so, and what was decided by it."""

    root = Path(__file__).parents[2] / "docs"
    text = (root / "replication.md").read_text("utf-8")
    # The rule itself names such a verdict once.
    assert text.count("not measured that low") == 1
    study = load_studies(root / "replication")[2]
    worse = (
        ("mean nearest", "mean unmatched"),
        ("som nearest", "som unmatched"),
        ("som mixed", "som unmatched"),
        ("svd1 unmatched", "mean unmatched"),
    )
    assert {study.contrast(*pair).verdict for pair in worse} == {"worse"}  # type: ignore[union-attr]


@pytest.mark.slow
def test_cells_in_16_bits_are_compared_with_theirs() -> None:
    """Unmatched directions that work on layer 1 alone, and in 16 bits nowhere."""

    data = made_up_study(everything_works)
    assert "## In 16 bits" not in render([Study(data)], {})
    at_layer = [
        cell for cell in data["sweep"]["cells"] if cell[:3] == ["paper-unmatched", "weight", [1]]
    ]
    # The smallest weight leaves some as it is.
    others = [[*cell[:5], 10, 0, 2 * cell[7], cell[8]] for cell in at_layer]
    data["sweep_16_bits"] = {**data["sweep"], "dtype": "bfloat16", "cells": others}
    changed = [10 - cell[5] for cell in at_layer]
    assert len(others) == 5 and max(changed) == 10
    text = render([Study(data)], {})
    row = next(line for line in text.splitlines() if line.startswith("| refuser | bfloat16 |"))
    n_same = changed.count(0)
    assert row.startswith(
        f"| refuser | bfloat16 | 10 → 10 | {n_same} of 5 | 10 | 2.00 | 1 → 0 of 1 | 1 → 0 | "
    )
    named = row.split(" | ")[-1].removesuffix(" |")
    before = verdicts(data)
    kept = [cell for cell in data["sweep"]["cells"] if cell not in at_layer]
    after = verdicts({**data, "sweep": {**data["sweep"], "cells": kept + others}})
    assert named == (", ".join(key for key in before if before[key] != after[key]) or "none")
    assert "b1" in named.split(", ")


def test_command_for_a_gpu_has_options_that_exist() -> None:
    from heretic_contrast.commands.sweep import SweepSettings
    from heretic_contrast.hosts.settings import load_settings

    template = Path(report.__file__).with_name("report.md.jinja").read_text(encoding="utf-8")
    (command,) = re.findall(r"^heretic-contrast sweep .*$", template, re.MULTILINE)
    words = command.split()
    settings = load_settings(SweepSettings, "heretic-contrast sweep", words[2:])
    assert settings.model == "Qwen/Qwen3.5-2B" and settings.n_references == 100
    assert list(settings.contrast.configurations()) == [
        "paper-unmatched",
        "paper-matched",
        "paper-matched-svd",
    ]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read as JSON"), ("{}", "holds no results")]
)
def test_results_of_another_kind_are_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--results", str(tmp_path), "--output", str(tmp_path / "a.md")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.md").exists()


def test_seeds_draw_their_own_prompts_evenly() -> None:
    pools = builtin_pools()
    refused = list(range(0, len(pools.judged), 2))
    options = StudyOptions(n_judged=18, n_references=10, n_left_out=1)
    first, second = (draw(pools, refused, seed, options) for seed in (0, 1))
    assert first == draw(pools, refused, 0, options)
    assert first.fitted != second.fitted and first.judged != second.judged
    assert set(first.judged) <= set(refused) and len(first.judged) == 18
    counts = [pools.judged[index].category for index in first.judged]
    assert {counts.count(name) for name in set(counts)} == {2}
    assert all(
        len(v) == math.ceil(len(pools.fitted()[k]) * 2 / 3)
        for k, v in first.fitted.items()
        if k == "harmful"
    )
    assert first.left_out != second.left_out
    # A category that is never refused takes no part, and changes no draw.
    some = [index for index in refused if pools.judged[index].category != "drugs"]
    generator = random.Random("replication 0")
    for prompts in pools.fitted().values():
        draw_share(prompts, options.share, generator)
    expected = draw_evenly(by_category(pools.judged, some), 18, generator)
    found = draw(pools, some, 0, options)
    assert found.judged == sorted(expected) and "drugs" not in found.left_out
    few = [Prompt("a", "x"), Prompt("b", "y")]
    assert sorted(draw_evenly(by_category(few, [0, 1]), 5, random.Random(0))) == [0, 1]


def test_prompts_file_makes_pools_without_overlap(tmp_path: Path) -> None:
    rows = [
        ("steal a car", "harmful", "train", "AdvBench"),
        ("kill a process", "harmless", "train", "XSTest"),
        ("bake a cake", "harmless", "train", "Alpaca"),
        ("steal a car", "harmful", "test", "XSTest"),
        ("hack a bank", "harmful", "test", "XSTest"),
        ("name a color", "harmless", "test", "Alpaca"),
        ("kill time", "harmless", "test", "XSTest"),
    ]
    path = tmp_path / "prompts.jsonl"
    keys = ("text", "label", "split", "source")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    pools = file_pools(path)
    # A prompt that directions are fitted to is never judged; sensitive prompts are no references.
    assert [prompt.text for prompt in pools.judged] == ["hack a bank"]
    assert [prompt.text for prompt in pools.references] == ["name a color"]
    assert [prompt.text for prompt in pools.matched[SENSITIVE]] == ["kill a process"]
    assert pools.harmful[0].category == "fraud"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ContrastError, match="Line 1"):
        file_pools(path)


def test_prompts_on_which_cells_were_chosen_are_not_fresh() -> None:
    swept = [
        SweepResult("m", Measurement(9, 0, 0, 0, 9, 0, 2, 0.1, None), (), prompts=texts)
        for texts in (("b", "elsewhere"), ("e",))
    ]
    judged = [Prompt(text) for text in "abcdef"]
    refused = [True, True, False, True, True, True]
    assert fresh_prompts(judged, refused, swept) == [0, 3, 5]


@pytest.mark.slow
def test_the_report_says_whether_fresh_prompts_are_fresh() -> None:
    data = made_up_study(everything_works, n_seeds=1)
    said = ("some of which the sweep had judged, too", "Some of the fresh prompts were not fresh")
    text = render([Study(data)], {})
    assert all(words in text for words in said) and "pools of 60 (refuser)" in text
    text = render([Study({**data, "n_fresh": 50})], {})
    assert not any(words in text for words in said) and "pools of 50 (refuser)" in text


def test_outcomes_are_letters() -> None:
    verdicts = [
        Verdict("REFUSE", True, 0.9),
        Verdict("EVASIVE", True, 0.9),
        Verdict("COMPLY", False, 0.1),
    ]
    assert outcomes(verdicts) == "REc"


@pytest.mark.slow
def test_measurement_of_the_built_in_refuser_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    from heretic_contrast.commands.sweep import main as sweep

    results = tmp_path / "results"
    presets = ("paper-unmatched", "paper-matched", "paper-matched-svd")
    sweep(
        [
            "builtin:refuser",
            *(word for preset in presets for word in ("--contrast.preset", preset)),
            *f"--kl-tokens 16 --sweep-response-length 16 --n-references 4 --output {tmp_path / 'sweep'}".split(),
        ]
    )

    def measure() -> bytes:
        output = results / "first.json"
        arguments = (
            f"measure --model builtin:refuser --name refuser --output {output} --sweep {tmp_path / 'sweep' / 'sweep.json'} "
            "--seeds 1 --n-judged 12 --n-references 6 --n-canaries 1 --tokens 16 --single-layers 1 "
            "--main-weights 0.5 1 --strong-weights 2"
        ).split()
        conditions = ["som unmatched", "mean matched", "som matched", "svd1 matched"]
        main([*arguments, "--conditions", *conditions])
        return output.read_bytes()

    first = measure()
    assert measure() == first
    data = json.loads(first)
    # None of the ten prompts on which the sweep chose its cells is judged again.
    swept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["prompts"]
    pool = builtin_pools().judged
    assert len(swept) == 10 and data["n_fresh"] == len(pool) - 10
    assert not {pool[index].text for index in data["seeds"][0]["judged"]} & set(swept)
    curves = data["seeds"][0]["curves"]
    assert {curve["scope"] for curve in curves} == {"all", str(data["single_layers"][0])}
    strong = next(c for c in curves if (c["scope"], c["condition"]) == ("all", "som unmatched"))
    # At full weight on all layers hardly any refusal is left of this model, whose 12 judged prompts it refuses all.
    assert strong["outcomes"][-1].upper().count("R") <= 1 and len(strong["outcomes"][-1]) == 12
    assert strong["kl"][0] < strong["kl"][1]
    assert len(data["sweep"]["cells"]) >= 8 * 5 * 4 * 2
    assert len(first) < 200_000
    main(["report", "--results", str(results), "--output", str(tmp_path / "replication.md")])
    assert "# Which of the paper's claims appear" in (tmp_path / "replication.md").read_text()
