# SPDX-License-Identifier: AGPL-3.0-or-later

"""The plan of a sweep: what it evaluates, how each configuration is ablated, and that all ways to set it up agree."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from heretic_contrast.ablation.operator import Composition
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.sources import DirectionSources
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.cells import Cell
from heretic_contrast.evaluation.plan import (
    Configuration,
    PreparedSweep,
    SweepOptions,
    SweepSources,
    plan_sweep,
)
from heretic_contrast.evaluation.plan_settings import SweepPlanSettings
from heretic_contrast.evaluation.results import CaptureResult, Geometry
from heretic_contrast.evaluation.sweep import SweepEvaluator, run_prepared, sweep
from heretic_contrast.hosts.loading import with_common_prefix
from heretic_contrast.hosts.surface import progress_bar
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt, text_digest
from heretic_contrast.report.sweep_report import sweep_report
from heretic_contrast.report.writing import to_html
from heretic_contrast.settings import ContrastSettings, PromptSource
from tests import natural_pools
from tests.conftest import DATA
from tests.plain_sweeps import (
    CANARIES,
    HARMFUL,
    REFERENCES,
    always_refuse_at_base,
    changed_weights,
    full_divergence,
    known_references,
    random_directions,
)


def write(path: Path, rows: list[dict[str, str]]) -> PromptSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PromptSource(dataset=str(path))


def rows(what: str, count: int, n_categories: int = 0) -> list[dict[str, str]]:
    """Prompts that differ in a number, with or without a category."""

    return [
        {
            "text": f"{what} number {index}",
            **({"category": f"subject {index % n_categories}"} if n_categories else {}),
        }
        for index in range(count)
    ]


def prepare(
    directory: Path,
    harmful: list[dict[str, str]],
    harmless: list[dict[str, str]],
    lines: list[str] | None = None,
    contrast: dict[str, Any] | None = None,
    **settings: Any,
) -> PreparedSweep:
    """Prepares a sweep of one direction from twelve harmful and twelve harmless prompts."""

    shown = [] if lines is None else lines
    return PreparedSweep(
        SweepPlanSettings(**settings),
        ContrastSettings(
            **{
                "method": "mean",
                "bad_prompts": write(directory / "bad.jsonl", rows("Break", 12, 2)),
                "good_prompts": write(directory / "good.jsonl", rows("Paint", 12)),
                **(contrast or {}),
            }
        ),
        SweepSources(
            write(directory / "harmful.jsonl", harmful),
            write(directory / "harmless.jsonl", harmless),
        ),
        directory / "output",
        "model",
        "",
        lambda *line: shown.extend(map(str, line)),
    )


@pytest.mark.parametrize(
    ("n_harmless", "given", "expected"),
    [
        (110, {}, (10, 100)),
        (150, {}, (10, 100)),
        (100, {}, (10, 90)),
        (16, {}, (8, 8)),
        (2, {}, (1, 1)),
        (100, {"n_canaries": 30}, (30, 70)),
        (104, {"n_references": 100}, (4, 100)),
        (20, {"n_canaries": 4, "n_references": 6}, (4, 6)),
    ],
)
def test_canaries_and_references_fit_the_pool(
    n_harmless: int, given: dict[str, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    lines: list[str] = []
    prepared = prepare(
        tmp_path, rows("Smash", 10, 2), rows("Bake", n_harmless), lines=lines, **given
    )
    assert (len(prepared.canaries), len(prepared.references)) == expected
    assert not set(prepared.canaries) & set(prepared.references)
    said = [line for line in lines if "canaries" in line]
    if sum(expected) == n_harmless and n_harmless != 110:
        assert len(said) == 1 and f"[bold]{expected[0]}[/] canaries" in said[0]
        assert f"[bold]{expected[1]}[/] reference prompts" in said[0]
    else:
        assert not said


@pytest.mark.parametrize(
    ("pool", "n_categories", "expected"), [(30, 3, 10), (7, 3, 7), (30, 13, 13), (12, 12, 12)]
)
def test_judged_prompts_fit_the_pool(
    pool: int, n_categories: int, expected: int, tmp_path: Path
) -> None:
    lines: list[str] = []
    prepared = prepare(tmp_path, rows("Smash", pool, n_categories), rows("Bake", 120), lines=lines)
    assert len(prepared.harmful) == expected
    assert len({prompt.category for prompt in prepared.harmful}) == n_categories
    assert [line for line in lines if "Judging" in line] == (
        []
        if expected == 10
        else [
            f"* Judging [bold]{expected}[/] harmful prompts instead of 10, since the pool has {pool} of {n_categories} "
            "categories"
        ]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_harmful": 31}, "31 prompts are asked for, but the pool has 30"),
        ({"n_harmful": 2}, "2 prompts cannot cover 3 categories"),
        ({"n_canaries": 10, "n_references": 100}, "10 canaries and 100 reference prompts"),
        ({"n_references": 100}, "10 canaries and 100 reference prompts"),
        ({"n_canaries": 100}, "100 canaries and 100 reference prompts"),
        ({"evaluate_categories": ["tea"]}, 'category "tea": the categories are subject 0'),
    ],
)
def test_numbers_that_are_asked_for_and_not_there(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ContrastError, match=message):
        prepare(tmp_path, rows("Smash", 30, 3), rows("Bake", 100), **given)


def test_pools_that_say_less_than_they_seem_to(tmp_path: Path) -> None:
    lines: list[str] = []
    prepared = prepare(tmp_path, rows("Smash", 4, 2) * 3, rows("Bake", 5) * 4, lines=lines)
    assert len(prepared.harmful) == 4 and len({*prepared.canaries, *prepared.references}) == 5
    assert "* Taking each prompt of the harmful evaluation pool once: 4 of 12" in lines
    assert "* Taking each prompt of the harmless evaluation pool once: 5 of 20" in lines
    with pytest.raises(ContrastError, match='"Smash number 3" stands both in the harmful and'):
        prepare(tmp_path, rows("Smash", 4, 2), [*rows("Bake", 9), {"text": " smash  number 3"}])
    with pytest.raises(ContrastError, match="harmless evaluation pool has only one prompt"):
        prepare(tmp_path, rows("Smash", 4, 2), rows("Bake", 1) * 7)


def test_a_pool_that_directions_come_from_is_not_judged(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match="All 12 harmful evaluation prompts are among those"):
        prepare(tmp_path, rows("Break", 12, 2), rows("Bake", 20))
    with pytest.raises(ContrastError, match="All 12 harmless evaluation prompts are among those"):
        prepare(tmp_path, rows("Smash", 12, 2), rows("Paint", 12))


def test_natural_pools_fit_by_default(tmp_path: Path) -> None:
    options = dict(option[2:].split(".dataset=") for option in natural_pools.write_pools(tmp_path))
    lines: list[str] = []
    for preset in (
        "paper-unmatched",
        "paper-matched",
        "paper-matched-svd",
        "som-sequential",
        "arditi",
    ):
        prepared = PreparedSweep(
            SweepPlanSettings(),
            ContrastSettings(
                preset=[preset],
                bad_prompts=PromptSource(dataset=options["bad-prompts"]),
                good_prompts=PromptSource(dataset=options["good-prompts"]),
            ),
            SweepSources(
                PromptSource(dataset=options["bad-evaluation-prompts"]),
                PromptSource(dataset=options["good-evaluation-prompts"]),
            ),
            tmp_path / "output",
            "model",
            "",
            lambda *line: lines.extend(map(str, line)),
        )
        assert len(prepared.harmful) == 10
        assert {prompt.category for prompt in prepared.harmful} == set(natural_pools.TEST)
        assert (len(prepared.canaries), len(prepared.references)) == (10, 90)
        pools = prepared.sources.pools[preset].named().values()
        assert {len(pool) for pool in pools} <= {400, 0, 432, 486}


def dense(vectors: torch.Tensor, weights: list[float], composition: str) -> torch.Tensor:
    """The operator, written out: Σ w v vᵀ, or I − Π (I − w v vᵀ)."""

    identity = torch.eye(vectors.shape[1], dtype=torch.float64)
    terms = [w * torch.outer(v, v) for w, v in zip(weights, vectors.double(), strict=True)]
    if composition == "sum":
        return torch.stack(terms).sum(0)
    product = identity
    for term in terms:
        product = product @ (identity - term)
    return identity - product


@pytest.mark.slow
def test_each_configuration_is_ablated_as_it_says(tiny_llama: LanguageModel) -> None:
    first, second = (random_directions(tiny_llama, 3, seed) for seed in (5, 6))
    # Nearly parallel directions, with which compositions differ most.
    tensor = torch.nn.functional.normalize(
        first.tensor[:, :1] + 0.2 * second.tensor, dim=-1
    ).contiguous()
    directions = replace(first, tensor=tensor)
    configurations = {
        "plain": directions,
        "sequential": Configuration(directions, "sequential"),
        "equal": Configuration(directions, equal_effective_weight=True),
    }
    options = SweepOptions(
        layers=(1, 2),
        weights=(0.5, 1.0),
        max_new_tokens=12,
        kl_tokens=12,
        top_k=320,
        synergy_size=0,
    )
    classify = always_refuse_at_base(tiny_llama, HARMFUL)
    known = known_references(tiny_llama, 12)
    arguments = (HARMFUL, CANARIES, REFERENCES, options)
    result = sweep(tiny_llama, configurations, *arguments, classify=classify)
    assert {(cell.configuration, cell.strength) for cell in result.cells} == {
        ("plain", "weight"),
        ("sequential", "weight"),
        ("equal", "effective"),
    }
    for cell in result.cells:
        (layer,) = cell.layers
        composition = "sequential" if cell.configuration == "sequential" else "sum"
        change = dense(tensor[layer + 1], [cell.weight] * 3, composition)
        if cell.configuration == "equal":
            change *= cell.weight / torch.linalg.matrix_norm(change, ord=2)
        assert cell.effective_weight == pytest.approx(
            float(torch.linalg.matrix_norm(change, ord=2)), rel=1e-5
        )
        with changed_weights(tiny_llama, layer, change):
            assert list(cell.responses) == tiny_llama.generate(HARMFUL, 12)
            expected = full_divergence(tiny_llama, known)
        assert cell.measurement.kl_divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # Alone, each is what it is beside the others.
    for name, item in configurations.items():
        alone = sweep(tiny_llama, {name: item}, *arguments, classify=classify)
        assert_same_cells(
            alone.cells, [cell for cell in result.cells if cell.configuration == name]
        )
    settings = result.settings["directions"]
    assert settings["sequential"]["composition"] == "sequential"
    assert settings["plain"]["composition"] == settings["equal"]["composition"] == "sum"


def test_compositions_are_told_apart_by_a_storage(tiny_llama: LanguageModel) -> None:
    directions = random_directions(tiny_llama, 2, 1)
    identities = set()
    for configuration in (
        Configuration(directions),
        Configuration(directions, "sequential"),
        Configuration(directions, equal_effective_weight=True),
    ):
        plan = plan_sweep(
            {"one": configuration},
            HARMFUL,
            CANARIES,
            REFERENCES,
            SweepOptions(layers=(1,), max_new_tokens=12, kl_tokens=4),
        )
        classify = always_refuse_at_base(tiny_llama, HARMFUL)
        evaluator = SweepEvaluator(tiny_llama, plan, classify)
        identities.add(json.dumps(evaluator.identity(), sort_keys=True))
    assert len(identities) == 3


def test_cells_that_were_equalized_as_a_sum_are_told_apart(tiny_llama: LanguageModel) -> None:
    directions = random_directions(tiny_llama, 2, 1)
    marks = {
        composition: Configuration(directions, composition).key().get("equalized")
        for composition in get_args(Composition)
    }
    assert marks == {"sum": None, "sequential": 2, "capped": 2}


def test_prompts_of_the_extraction_are_left_out_of_the_python_call() -> None:
    directions = SimpleNamespace(
        provenance={
            "known_prompts": [
                text_digest(f" {prompt.text.upper()}\n") for prompt in (*HARMFUL[:2], CANARIES[0])
            ]
        }
    )
    plan = plan_sweep({"one": directions}, HARMFUL, CANARIES, REFERENCES)  # type: ignore[dict-item]
    assert plan.harmful == tuple(HARMFUL[2:]) and plan.canaries == tuple(CANARIES[1:])
    assert plan.references == tuple(REFERENCES)
    found = {name: pool.get("left_out_as_used_for_extraction") for name, pool in plan.pools.items()}
    assert found == {"extraction": None, "harmful": 2, "canaries": 1, "references": 0}
    assert plan.pools["extraction"]["count"] == 3
    with pytest.raises(ContrastError, match="All 2 prompts of the pool harmful"):
        plan_sweep({"one": directions}, HARMFUL[:2], CANARIES, REFERENCES)  # type: ignore[dict-item]


REFUSER_SETTINGS: dict[str, Any] = {
    "layers": [3, 6],
    "weights": [0.5, 1.0],
    "n_harmful": 9,
    "n_canaries": 3,
    "n_references": 5,
    "kl_tokens": 6,
    "sweep_response_length": 10,
    "synergy_size": 0,
}


def refuser_pools(directory: Path) -> dict[str, PromptSource]:
    """A few prompts of each category; the evaluation pools hold four of the harmful and two of the harmless ones."""

    found = {}
    for pool, overlap in (("harmful", 4), ("harmless", 2), ("matched", 0)):
        parts = {}
        for split in ("train", "test"):
            path = DATA / "refuser_prompts" / pool / f"{split}.jsonl"
            parts[split] = [
                json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
            ]
        found[f"{pool} train"] = write(directory / f"{pool}-train.jsonl", parts["train"][:36])
        found[f"{pool} test"] = write(
            directory / f"{pool}-test.jsonl", parts["test"][:27] + parts["train"][:overlap]
        )
    return found


def run_refuser(
    model: LanguageModel,
    directory: Path,
    contrast: dict[str, Any],
    lines: list[str] | None = None,
    **settings: Any,
) -> Any:
    """Sweeps the built-in refuser with small pools and maps of few iterations."""

    pools = refuser_pools(directory)
    shown = [] if lines is None else lines
    if "directions" not in contrast:
        contrast = {
            "method": "som",
            "classes": "category",
            "som_iterations": 50,
            "bad_prompts": pools["harmful train"],
            "good_prompts": pools["harmless train"],
            "matched_prompts": pools["matched train"],
            "residual_cache": str(directory / "residuals"),
            **contrast,
        }
    prepared = PreparedSweep(
        SweepPlanSettings(**{**REFUSER_SETTINGS, **settings}),
        ContrastSettings(**contrast),
        SweepSources(pools["harmful test"], pools["harmless test"]),
        directory / "output",
        model.name,
        "",
        lambda *line: shown.extend(map(str, line)),
    )
    # Each run measures all of its cells itself.
    prepared.storage = None
    return run_prepared(
        model, prepared, lambda *line: shown.extend(map(str, line)), progress_bar, 10
    )[0]


def assert_same_cells(found: Sequence[Cell], expected: Sequence[Cell]) -> None:
    """Checks that cells are the same but for the last digits, which depend on how many share a pass."""

    assert [cell.key() for cell in found] == [cell.key() for cell in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.responses == other.responses and one.canary_responses == other.canary_responses
        assert one.effective_weight == other.effective_weight
        assert one.measurement.kl_divergence == pytest.approx(
            other.measurement.kl_divergence, rel=1e-3, abs=1e-6
        )


@pytest.mark.slow
def test_presets_are_swept_as_each_alone(refuser: LanguageModel, tmp_path: Path) -> None:
    presets = ["paper-unmatched", "som-sequential"]
    both = run_refuser(refuser, tmp_path, {"preset": presets})
    assert [name for name, _ in both.configurations()] == [
        *("paper-unmatched", "paper-unmatched"),
        *("som-sequential", "som-sequential"),
        *("random", "random"),
    ]
    for preset in presets:
        alone = run_refuser(refuser, tmp_path, {"preset": [preset]}, random_control=False)
        assert_same_cells(
            [cell for cell in both.cells if cell.configuration == preset], alone.cells
        )
    compositions = {name: item["composition"] for name, item in both.settings["directions"].items()}
    assert compositions == {
        "paper-unmatched": "sum",
        "som-sequential": "sequential",
        "random": "sum",
    }


@pytest.mark.slow
def test_a_directions_file_is_swept_as_the_extraction_that_made_it(
    refuser: LanguageModel, tmp_path: Path
) -> None:
    pools = refuser_pools(tmp_path)
    texts = {
        name: [
            json.loads(line)["text"]
            for line in Path(source.dataset).read_text(encoding="utf-8").splitlines()
        ]
        for name, source in pools.items()
    }
    expected = run_refuser(refuser, tmp_path, {"method": "mean"}, random_control=False)
    fitted = {text for name in ("harmful train", "harmless train") for text in texts[name]}
    assert expected.pools["extraction"]["count"] == len(fitted)
    assert not fitted & {*expected.prompts, *expected.canaries}
    for name, pool in (("harmful", "harmful test"), ("references", "harmless test")):
        left_out = expected.pools[name]["left_out_as_used_for_extraction"]
        assert left_out == len(fitted & set(texts[pool])) > 0

    sources = DirectionSources(
        {
            "unmatched": ContrastSettings(
                classes="category",
                method="mean",
                som_iterations=50,
                bad_prompts=pools["harmful train"],
                good_prompts=pools["harmless train"],
                matched_prompts=pools["matched train"],
                residual_cache=str(tmp_path / "residuals"),
            )
        },
        "",
    )
    made = sources.directions(refuser, lambda *line: None, progress_bar, 10)["unmatched"]
    made.save(tmp_path / "unmatched.safetensors")
    lines: list[str] = []
    contrast = {"directions": str(tmp_path / "unmatched.safetensors")}
    found = run_refuser(refuser, tmp_path, contrast, lines, random_control=False)
    assert found.to_dict() == expected.to_dict()
    assert not [line for line in lines if "cannot be known" in line]

    # A file of an earlier version does not say which prompts it came from.
    provenance = {key: value for key, value in made.provenance.items() if key != "known_prompts"}
    replace(made, provenance=provenance).save(tmp_path / "unmatched.safetensors")
    older = run_refuser(refuser, tmp_path, contrast, lines, random_control=False)
    assert len([line for line in lines if "cannot be known" in line]) == 1
    extraction = dict(older.pools["extraction"])
    (note,) = extraction.pop("notes")
    assert "cannot be known" in note
    source = "harmful-train.jsonl, harmless-train.jsonl"
    assert extraction == {
        "count": None,
        "digest": None,
        "unknown": ["unmatched"],
        "source": source,
    }
    measured = CaptureResult(0, ()), Geometry(())
    page = to_html(sweep_report(older, *measured))
    assert "cannot be known" in page
    assert "cannot be known" not in to_html(sweep_report(found, *measured))
    for name in (source, ">harmful-test.jsonl<", ">harmless-test.jsonl<"):
        assert name in page
    assert str(tmp_path) not in page
    assert older.pools["harmful"]["left_out_as_used_for_extraction"] is None
    assert json.loads(older.to_json())["pools"] == older.pools


@pytest.mark.slow
def test_a_sweep_of_a_file_is_the_one_of_the_preset_it_was_extracted_with(
    refuser: LanguageModel, tmp_path: Path
) -> None:
    pools = refuser_pools(tmp_path)
    preset: dict[str, Any] = {"preset": ["som-sequential"], "som_iterations": 50}
    options: dict[str, Any] = {"random_control": False, "layers": "0,6", "weights": [1.0]}
    expected = run_refuser(refuser, tmp_path, {"classes": "single", **preset}, **options)
    own = {"bad_prompts": pools["harmful train"], "good_prompts": pools["harmless train"]}
    sources = DirectionSources({"one": ContrastSettings(**preset, **own)}, "")
    path = tmp_path / "som-sequential.safetensors"
    made = sources.directions(refuser, lambda *line: None, progress_bar, 10)["one"]
    made.save(path)
    lines: list[str] = []
    found = run_refuser(refuser, tmp_path, {"directions": str(path)}, lines, **options)
    assert found.to_dict() == expected.to_dict()
    swept = found.settings["directions"]["som-sequential"]
    assert (swept["composition"], swept["embeddings"]) == ("sequential", True)
    (line,) = (line for line in lines if "Ablation of the directions file" in line)
    # Rows are never normalized in a sweep.
    assert 'embeddings = true, composition = "sequential"[' in line
    # What is given comes first, and a file of an earlier version says nothing.
    summed = {"directions": str(path), "composition": "sum", "embeddings": False}
    other = run_refuser(refuser, tmp_path, summed, **options)
    del made.provenance["ablation"]
    made.save(path)
    lines.clear()
    older = run_refuser(refuser, tmp_path, {"directions": str(path)}, lines, **options)
    assert older.to_dict() == other.to_dict() != expected.to_dict()
    assert not [line for line in lines if "Ablation of the directions file" in line]


def test_the_prefix_of_a_directions_file_is_the_one_it_was_extracted_with(
    refuser: LanguageModel, tmp_path: Path
) -> None:
    bad = [Prompt(text) for text in natural_pools.harmful({"fraud": 6}, "train")]
    good = [Prompt(text) for text in natural_pools.harmful({"harassment": 6}, "train")]
    contrast: dict[str, Any] = {
        "classes": "single",
        "method": "mean",
        "bad_prompts": write(tmp_path / "bad.jsonl", [{"text": item.text} for item in bad]),
        "good_prompts": write(tmp_path / "good.jsonl", [{"text": item.text} for item in good]),
        "residual_cache": str(tmp_path / "residuals"),
    }

    def settings(prefix: str | None = None) -> Any:
        return SimpleNamespace(
            response_prefix=prefix,
            max_response_length=6,
            chain_of_thought_skips=[],
            model_fields_set=set(),
        )

    def read(**given: Any) -> DirectionSources:
        taken = {name: contrast[name] for name in ("bad_prompts", "good_prompts")}
        settings = {**(taken if given else contrast), **given}
        return DirectionSources({"one": ContrastSettings(**settings)}, None)

    # Refusals of both subjects open alike.
    sources = read()
    model = with_common_prefix(refuser, settings(), sources)
    responses = refuser.generate([*bad, *good], 6)
    assert model.response_prefix and all(
        response.startswith(model.response_prefix) for response in responses
    )
    path = tmp_path / "directions.safetensors"

    def directions(model: LanguageModel, sources: DirectionSources, lines: list[str]) -> Directions:
        log = lambda *line: lines.extend(map(str, line))  # noqa: E731
        return sources.directions(model, log, progress_bar, 6)["one"]

    directions(model, sources, []).save(path)
    # It is not looked for: there is nothing to look with.
    sources = read(directions=str(path))
    assert sources.harmful == sources.bulk == ()
    found = with_common_prefix(refuser, settings(), sources)
    assert found.response_prefix == model.response_prefix
    # One that is given wins, and is said to be another one.
    other = with_common_prefix(refuser, settings("Well"), sources)
    assert other.response_prefix == "Well"
    lines: list[str] = []
    made = directions(other, sources, lines)
    assert len([line for line in lines if "'Well'" in line]) == 1
    # Where a file does not say it, it is looked for as in an extraction.
    provenance = {key: value for key, value in made.provenance.items() if key != "response_prefix"}
    replace(made, provenance=provenance).save(path)
    sources = read(directions=str(path))
    assert Counter(sources.harmful) == Counter(bad)
    found = with_common_prefix(refuser, settings(), sources)
    unsaid = SimpleNamespace(response_prefix=None, bulk=good, harmful=bad)
    assert found.response_prefix == with_common_prefix(refuser, settings(), unsaid).response_prefix
    assert found.response_prefix == model.response_prefix
