# SPDX-License-Identifier: AGPL-3.0-or-later

"""The paper's protocol: every layer alone at five weights, with directions of all prompts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from heretic_contrast.evaluation.cells import SweepResult
from heretic_contrast.evaluation.plan import SweepOptions
from heretic_contrast.evaluation.sweep import sweep
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from heretic_contrast.prompts.sampling import stratified_sample

from .conditions import PAPER_WEIGHTS, DirectionsMaker
from .pools import Draw, StudyPools

PRESET_NAMES = ("paper-unmatched", "paper-matched", "paper-matched-svd")


def everything(pools: StudyPools) -> Draw:
    """Returns a draw that takes every prompt that directions are fitted to."""

    fitted = {name: list(range(len(prompts))) for name, prompts in pools.fitted().items()}
    return Draw(seed=0, fitted=fitted, judged=[], references=[], left_out=[])


def run_sweep(
    model: LanguageModel,
    pools: StudyPools,
    maker: DirectionsMaker,
    refused: Sequence[Prompt],
    n_judged: int,
    n_references: int,
    n_canaries: int,
    tokens: int,
    journal: Path,
    show: Callable[[int, int], None],
) -> SweepResult:
    """
    Sweeps the paper's three configurations and random directions, at equal weight and at equal effective weight.

    `refused`: the prompts that may be judged. Finished cells stand in the journal.
    """

    names = ("som unmatched", "som matched", "svd matched")
    configurations = {
        preset: maker.make(name) for preset, name in zip(PRESET_NAMES, names, strict=True)
    }
    configurations["random"] = maker.make("som random")
    # Each category is judged at least once.
    n_judged = min(len(refused), max(n_judged, len({prompt.category for prompt in refused})))
    n_references = min(n_references, len(pools.references) - n_canaries)
    harmless = stratified_sample(
        [replace(prompt, category=None) for prompt in pools.references],
        n_references + n_canaries,
        0,
    )
    return sweep(
        model,
        configurations,
        stratified_sample(refused, n_judged, 0),
        harmless[:n_canaries],
        harmless[n_canaries:],
        SweepOptions(
            weights=PAPER_WEIGHTS,
            strengths=("weight", "effective"),
            max_new_tokens=tokens,
            kl_tokens=tokens,
        ),
        str(journal),
        progress=show,
    )


def compact_sweep(result: SweepResult) -> dict[str, Any]:
    """Returns a sweep without responses and prompts."""

    base = result.baseline
    return {
        "baseline": {
            "refusals": base.refusals,
            "n_harmful": base.n_harmful,
            "kl": base.kl_divergence,
        },
        "n_references": result.pools.get("references", {}).get("count"),
        "kl_tokens": result.settings.get("kl_tokens"),
        "cells": [
            [
                cell.configuration,
                cell.strength,
                list(cell.layers),
                cell.weight,
                rounded(cell.effective_weight),
                cell.measurement.refusals,
                cell.measurement.incoherent,
                rounded(cell.measurement.kl_divergence),
                rounded(cell.measurement.kl_standard_error),
            ]
            for cell in result.cells
        ],
        "synergies": [
            [
                item.configuration,
                item.strength,
                list(item.layers),
                item.weight,
                item.refusals,
                item.synergy,
            ]
            for item in result.synergies
        ],
    }


def best_layers(result: SweepResult, count: int) -> list[int]:
    """
    Returns the layers that the controls look at: the best of each of the paper's presets, then their second best, and so on.

    Best is the fewest refusals at any of the weights, then the least divergence there.
    """

    ranked = []
    for preset in PRESET_NAMES:
        best: dict[int, tuple[int, float]] = {}
        for cell in result.single_cells(preset, "weight"):
            rank = (cell.measurement.refusals, cell.measurement.kl_divergence)
            best[cell.layers[0]] = min(best.get(cell.layers[0], rank), rank)
        ranked.append(sorted(best, key=lambda layer: (best[layer], layer)))
    turns = [layer for layers in zip(*ranked, strict=True) for layer in layers]
    return list(dict.fromkeys(turns))[:count]


def rounded(value: float | None) -> float | None:
    """Rounds to six significant digits, so that results stay small."""

    return None if value is None else float(f"{value:.6g}")
