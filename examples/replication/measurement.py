# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Measures a model after its sweep: the protocol with controls, seed by seed.

Cells that are finished stand in a journal per seed in a work directory. Results hold counts, one letter per judged prompt, and
geometry; no prompts and no responses.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.residuals import cached_residuals
from heretic_contrast.engine.text_classification import rules_digest
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.capture import split_by_behavior
from heretic_contrast.evaluation.cells import Cell, CellKey, SweepResult, Verdict, best_layers
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.storage import SweepState
from heretic_contrast.evaluation.sweep import SweepEvaluator
from heretic_contrast.identity import identify
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt, prompts_digest, text_digest
from heretic_contrast.tiers.responses import Tier, classify_response

from .conditions import (
    Condition,
    DirectionsMaker,
    all_layer_conditions,
    distinct,
    single_layer_conditions,
)
from .pools import Draw, StudyOptions, StudyPools, draw
from .shape import describe_shape, noise_floor, rounded
from .wording import MATCHED, SVD, UNMATCHED

FORMAT = "heretic-contrast replication 1"

Log = Callable[[str], None]
ShowProgress = Callable[[int, int], None]


def require_own_sweep(model: LanguageModel, swept: SweepResult, path: Path) -> None:
    """Raises `ContrastError` when a sweep is of another model, or lacks a configuration of the paper."""

    missing = [name for name in (UNMATCHED, MATCHED, SVD) if not swept.single_cells(name, "weight")]
    if missing:
        raise ContrastError(
            f"{path} has no {' and no '.join(missing)} at equal weight: sweep the paper's three presets."
        )
    known = model.identity()
    is_other = swept.identity.get("dtype") == known["dtype"] and (
        swept.identity["weights"] != known["weights"]
    )
    if is_other or any(max(cell.layers) >= model.n_layers for cell in swept.cells):
        raise ContrastError(
            f"{path} is a sweep of another model than {model.name}: sweep this one."
        )


def measure_study(
    model: LanguageModel,
    pools: StudyPools,
    options: StudyOptions,
    work: Path,
    log: Log,
    show: ShowProgress,
    swept: SweepResult,
    swept_in_16_bits: SweepResult | None = None,
) -> dict[str, Any]:
    """
    Returns the results of a whole study as JSON values.

    `work`: directory for what is finished. `swept`: a sweep with the paper's presets. `swept_in_16_bits`: one of a part of its cells.

    Raises `ContrastError` when the model refuses too little, or a journal in the work directory belongs to another study.
    """

    model = model.identified()
    all_pools = {**pools.fitted(), "judged": pools.judged, "references": pools.references}
    fingerprint = {
        "format": FORMAT,
        "model": identify(
            model,
            all_pools,
            rules=rules_digest(classify_response),
        ),
        "options": json.loads(json.dumps(asdict(replace(options, seeds=0)))),
        "pools": {key: prompts_digest(prompts) for key, prompts in all_pools.items()},
        "versions": {key: version(key) for key in ("numba", "numpy", "torch", "transformers")},
    }
    log("Looking at what the unmodified model refuses...")
    refused = _refused(model, pools, options.tokens)
    candidates = fresh_prompts(
        pools.judged, refused["judged"], filter(None, (swept, swept_in_16_bits))
    )
    if len(candidates) < 3:
        raise ContrastError(
            f"Of {len(pools.judged)} harmful prompts {model.name} refuses {len(candidates)} that its sweep did not judge, too few "
            "to measure: use other prompts, or a model that refuses."
        )
    log(
        f"* Of the {len(pools.judged)} prompts that may be judged it refuses {len(candidates)} that its sweep did not judge."
    )
    log("Obtaining residuals...")
    residuals = {
        key: cached_residuals(model, prompts, None, show) for key, prompts in pools.fitted().items()
    }
    provenance = {
        "identity": model.identity(),
        "prompt_digests": sorted(
            {text_digest(prompt.text) for pool in pools.fitted().values() for prompt in pool}
        ),
    }
    layers = control_layers(swept, options.single_layers)
    log(f"* Single layers for the controls: {', '.join(map(str, layers)) or 'none'}.")
    pairs, _ = split_by_behavior(model, pools.pairs, options.tokens)
    at_pairs = model.residuals(
        [Prompt(text) for pair in pairs for text in (pair.refused, pair.answered)]
    )
    differences = at_pairs[0::2] - at_pairs[1::2]

    seeds = []
    for seed in range(options.seeds):
        log(f"Seed {seed + 1} of {options.seeds}...")
        drawn = draw(pools, candidates, seed, options)
        maker = DirectionsMaker(pools, residuals, refused, drawn, provenance)
        seeds.append(
            _measure_seed(model, pools, drawn, maker, layers, differences, options, work, log, show)
        )
    return {
        **fingerprint,
        "name": model.name,
        "options": json.loads(json.dumps(asdict(options))),
        "n_layers": model.n_layers,
        "hidden_size": model.hidden_size,
        "n_parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "n_prompts": {key: len(prompts) for key, prompts in all_pools.items()},
        "n_refused": {key: sum(values) for key, values in refused.items()},
        "n_fresh": len(candidates),
        "judged_categories": [prompt.category for prompt in pools.judged],
        "n_pairs": [len(pairs), len(pools.pairs)],
        "single_layers": layers,
        "sweep": compact_sweep(swept),
        "sweep_16_bits": compact_sweep(swept_in_16_bits) if swept_in_16_bits else None,
        "seeds": seeds,
    }


def fresh_prompts(
    judged: Sequence[Prompt], refused: Sequence[bool], sweeps: Iterable[SweepResult]
) -> list[int]:
    """Returns the indices of the prompts that are refused, without those of the sweeps on which cells are chosen."""

    swept = {text for sweep in sweeps for text in sweep.prompts}
    return [
        index
        for index, (prompt, value) in enumerate(zip(judged, refused, strict=True))
        if value and prompt.text not in swept
    ]


def _refused(model: LanguageModel, pools: StudyPools, tokens: int) -> dict[str, list[bool]]:
    """Returns for each prompt of each pool but the references whether the unmodified model refuses it."""

    found = {}
    for name, prompts in {**pools.fitted(), "judged": pools.judged}.items():
        answered = zip(prompts, model.generate(prompts, tokens), strict=True)
        found[name] = [
            classify_response(prompt.text, response) is Tier.REFUSE for prompt, response in answered
        ]
    return found


def _measure_seed(
    model: LanguageModel,
    pools: StudyPools,
    drawn: Draw,
    maker: DirectionsMaker,
    layers: Sequence[int],
    differences: Tensor,
    options: StudyOptions,
    work: Path,
    log: Log,
    show: ShowProgress,
) -> dict[str, Any]:
    """Measures all conditions with what one seed draws."""

    scopes = [("all", tuple(range(model.n_layers)), all_layer_conditions(pools, drawn.left_out))]
    scopes += [(str(layer), (layer,), single_layer_conditions()) for layer in layers]
    planned = [
        (scope, at, condition)
        for scope, at, conditions in scopes
        for condition in conditions
        if not options.conditions or condition.name in options.conditions
    ]
    log("* Extracting directions...")
    kept, stands_for = distinct(
        list(dict.fromkeys(condition.directions for _, _, condition in planned)), maker.make
    )
    references = [pools.references[index] for index in drawn.references]
    others = [
        prompt for index, prompt in enumerate(pools.references) if index not in drawn.references
    ]
    judged = [pools.judged[index] for index in drawn.judged]
    evaluator = SweepEvaluator(
        model,
        plan_sweep(
            kept,
            judged,
            (others or references)[: options.n_canaries],
            references,
            SweepOptions(max_new_tokens=options.tokens, kl_tokens=options.tokens),
        ),
    )
    state = SweepState(str(work / f"seed-{drawn.seed}.journal"), evaluator.identity())
    keys = [
        [
            CellKey(stands_for[condition.directions], condition.strength, at, weight)
            for weight in options.weights(condition.grid)
        ]
        for _, at, condition in planned
    ]
    started = time.monotonic()
    wanted = list(dict.fromkeys(chain(*keys)))
    # Cells of one place follow each other, so that they are computed together.
    wanted.sort(key=lambda key: (-len(key.layers), key.layers))
    cells = dict(zip(wanted, state.run(wanted, evaluator.evaluate, show), strict=True))
    log(f"* {len(wanted)} cells in {time.monotonic() - started:.0f} s.")
    return {
        "seed": drawn.seed,
        "judged": drawn.judged,
        "n_fitted": {name: len(indices) for name, indices in drawn.fitted.items()},
        "kl_floor": rounded(evaluator.baseline.kl_divergence),
        "curves": [
            _curve(scope, condition, [cells[key] for key in own])
            for (scope, _, condition), own in zip(planned, keys, strict=True)
        ],
        "shape": describe_shape(_shaped(pools, maker), differences),
        "noise_floor": noise_floor(model, maker.make, judged[:10], references[:10], options.tokens)
        if drawn.seed == 0
        else None,
    }


def _shaped(pools: StudyPools, maker: DirectionsMaker) -> dict[str, Directions]:
    """Returns the directions whose geometry and capture are described."""

    names = [
        condition.directions
        for condition in all_layer_conditions(pools, [])
        if condition.grid == "main" or condition.directions == "som random"
    ]
    return {name: maker.make(name) for name in names}


def _curve(scope: str, condition: Condition, cells: Sequence[Cell]) -> dict[str, Any]:
    """Returns what is stored of the cells of one condition."""

    return {
        "scope": scope,
        "condition": condition.name,
        "excluded": condition.excluded,
        "weights": [cell.weight for cell in cells],
        "effective": [rounded(cell.effective_weight) for cell in cells],
        "kl": [rounded(cell.measurement.kl_divergence) for cell in cells],
        "kl_error": [rounded(cell.measurement.kl_standard_error) for cell in cells],
        "canary_refusals": [cell.measurement.canary_refusals for cell in cells],
        "outcomes": [outcomes(cell.verdicts) for cell in cells],
    }


def outcomes(verdicts: Sequence[Verdict]) -> str:
    """Returns a letter per response: R, E or C for its tier, small where it is incoherent."""

    return "".join(v.tier[0] if v.coherent else v.tier[0].lower() for v in verdicts)


def compact_sweep(result: SweepResult) -> dict[str, Any]:
    """Returns a sweep without responses and prompts."""

    base = result.baseline
    return {
        "dtype": result.identity.get("dtype"),
        "baseline": {
            "refusals": base.refusals,
            "n_harmful": base.n_harmful,
            "kl": base.kl_divergence,
        },
        "n_references": result.pools.get("references", {}).get("count"),
        "kl_tokens": result.settings.get("kl_tokens"),
        "cells": [
            [
                *cell.key(),
                rounded(cell.effective_weight),
                cell.measurement.refusals,
                cell.measurement.incoherent,
                rounded(cell.measurement.kl_divergence),
                rounded(cell.measurement.kl_standard_error),
            ]
            for cell in result.cells
        ],
        "synergies": [list(astuple(item))[:6] for item in result.synergies],
    }


def control_layers(result: SweepResult, count: int) -> list[int]:
    """
    Returns the layers that the controls look at: the best of each of the paper's presets, then their second best, and so on.

    Best is the fewest refusals at any of the weights, then the least divergence there.
    """

    ranked = [best_layers(result.cells, name, "weight") for name in (UNMATCHED, MATCHED, SVD)]
    return list(dict.fromkeys(layer for turn in zip(*ranked, strict=True) for layer in turn))[
        :count
    ]
