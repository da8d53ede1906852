# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What a sweep consists of, set up in one place: configurations, prompts and options.

Whoever sweeps makes a `SweepPlan`: the command and Heretic's scorer from settings, by `PreparedSweep`, which finds what is
wrong before a model is loaded, and whoever has directions and prompts already by `plan_sweep`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from ..ablation.operator import Operator, compose, equalize
from ..builtin import pool_name
from ..directions.directions import Directions
from ..directions.file import content_digest
from ..directions.pools import Log, assign_categories, require_apart
from ..directions.sources import DirectionSources, ShowProgress, UsedPrompts
from ..errors import ContrastError
from ..language_model import LanguageModel
from ..outputs import require_writable_directory, require_writable_file
from ..prompts import Prompt, load_pool, prompts_digest
from ..prompts.sampling import split_harmless, stratified_sample
from ..settings import Composition, ContrastSettings, PromptSources
from .capture import load_pairs
from .plan_settings import WEIGHTS, SweepPlanSettings, parse_layers
from .storage import require_own_sweep

RANDOM = "random"
"""The name of the configuration with random directions."""


@dataclass(frozen=True)
class Configuration:
    """
    What is swept under one name: directions, and how their ablations are put together.

    `equal_effective_weight`: the configuration is always ablated at equal effective weight, and swept at no other strength.
    `embeddings`: whether they are ablated with the first layer.
    """

    directions: Directions
    composition: Composition = "sum"
    equal_effective_weight: bool = False
    embeddings: bool = False

    @classmethod
    def of(cls, directions: Directions, settings: ContrastSettings) -> "Configuration":
        return cls(
            directions,
            settings.composition,
            settings.equal_effective_weight,
            settings.embeddings,
        )

    def strengths(self, asked: Sequence[str]) -> tuple[str, ...]:
        return ("effective",) if self.equal_effective_weight else tuple(asked)

    def operator(self, layer: int, weight: float, strength: str = "weight") -> Operator:
        """Returns what is done at a decoder layer: all its directions at uniform weight."""

        vectors = self.directions.tensor[layer + 1]
        weights = torch.full((len(vectors),), float(weight), dtype=torch.float64)
        if strength == "effective" or self.equal_effective_weight:
            weights = equalize(vectors, weights, self.composition)
        return compose(vectors, weights, self.composition)

    def key(self) -> dict[str, Any]:
        """Returns what decides the configuration's cells as JSON values."""

        return {
            "digest": self.directions.digest(),
            # Cells say the weight along it.
            "mean_direction": content_digest({"": self.directions.mean_direction}),
            "composition": self.composition,
            "equal_effective_weight": self.equal_effective_weight,
            # Cells of earlier versions have no embeddings, and all were equalized as a sum.
            **({"embeddings": True} if self.embeddings else {}),
            **({"equalized": 2} if self.composition != "sum" else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns what is recorded of the configuration as JSON values."""

        return {
            **self.directions.settings,
            "names": list(self.directions.names),
            **self.key(),
        }


Configurations = Mapping[str, Configuration | Directions]
"""Configurations by name. Directions alone are ablated as a sum."""


def complete(configurations: Configurations) -> dict[str, Configuration]:
    return {
        name: item if isinstance(item, Configuration) else Configuration(item)
        for name, item in configurations.items()
    }


@dataclass(frozen=True)
class SweepOptions:
    """
    What is swept, and how it is measured. The defaults are the paper's, where it gives any.

    `layers`: decoder layers, or None for all. `components`: "attn.o_proj", "mlp.down_proj", or None for both.
    `strengths`: "weight" (every direction has the weight), "effective" (λ_max(Σ w v vᵀ) is the weight), or both.
    `synergy_size`: how many layers a set has; 0 leaves synergy out. `n_synergy_layers`: from how many of the best
    layers of each configuration the sets are made.
    """

    layers: tuple[int, ...] | None = None
    weights: tuple[float, ...] = WEIGHTS
    components: tuple[str, ...] | None = None
    strengths: tuple[str, ...] = ("weight",)
    max_new_tokens: int = 50
    kl_tokens: int = 50
    top_k: int = 100
    synergy_size: int = 2
    synergy_weight: float = 0.3
    n_synergy_layers: int = 4

    @classmethod
    def of(cls, settings: SweepPlanSettings) -> "SweepOptions":
        return cls(
            layers=parse_layers(settings.layers),
            weights=tuple(settings.weights),
            components=None if settings.components is None else tuple(settings.components),
            strengths=("weight", "effective")
            if settings.strength == "both"
            else (settings.strength,),
            max_new_tokens=settings.sweep_response_length,
            kl_tokens=settings.kl_tokens,
            top_k=settings.kl_top_k,
            synergy_size=settings.synergy_size,
            synergy_weight=settings.synergy_weight,
            n_synergy_layers=settings.synergy_layers,
        )


@dataclass(frozen=True)
class SweepPlan:
    """
    A sweep before it is run.

    `harmful`: prompts whose responses are judged. `canaries`: harmless prompts whose refusals are counted. `references`:
    harmless prompts that the divergence is measured on. `pools`: what is recorded of them.
    """

    configurations: dict[str, Configuration]
    harmful: tuple[Prompt, ...]
    canaries: tuple[Prompt, ...]
    references: tuple[Prompt, ...]
    options: SweepOptions = SweepOptions()
    pools: dict[str, dict[str, Any]] = field(default_factory=dict)


def plan_sweep(
    configurations: Configurations,
    harmful: Sequence[Prompt],
    canaries: Sequence[Prompt],
    references: Sequence[Prompt],
    options: SweepOptions | None = None,
    used: UsedPrompts | None = None,
    left_out: Mapping[str, int] | None = None,
    sources: Mapping[str, str] | None = None,
) -> SweepPlan:
    """
    Returns the plan of a sweep with these prompts, less those that directions were extracted from.

    `used`: the latter, where more is known of them than directions say. `left_out`: how many prompts were left out of each pool
    before, of which these are samples. `sources`: what the files or datasets of the pools are called. Raises `ContrastError` when no harmful or no reference prompt is left.
    """

    completed = complete(configurations)
    used = used or UsedPrompts.of({name: item.directions for name, item in completed.items()})
    kept: dict[str, tuple[Prompt, ...]] = {}
    provenances = [item.directions.provenance for item in completed.values()]
    fitted = [name for item in provenances for name in item.get("sources", ())]
    sources = {"extraction": ", ".join(dict.fromkeys(fitted)), **(sources or {})}
    pools: dict[str, dict[str, Any]] = {"extraction": used.to_dict()}
    given = {"harmful": harmful, "canaries": canaries, "references": references}
    for name, prompts in given.items():
        kept[name], count = used.leave_out(prompts)
        count += (left_out or {}).get(name, 0)
        pools[name] = {
            "count": len(kept[name]),
            "digest": prompts_digest(kept[name]),
            # Null where it cannot be known.
            "left_out_as_used_for_extraction": count or (None if used.unknown else 0),
        }
        if prompts and not kept[name] and name != "canaries":
            raise ContrastError(
                f"All {len(prompts)} prompts of the pool {name} are among those that directions were extracted from: give others."
            )
    for name, pool in pools.items():
        pool["source"] = sources.get(name) or None
    return SweepPlan(completed, **kept, options=options or SweepOptions(), pools=pools)


@dataclass(frozen=True)
class SweepSources:
    """Where evaluation prompts come from, and what messages put before the names of the settings that say so."""

    harmful: PromptSources
    harmless: PromptSources
    harmful_setting: str = "--bad-evaluation-prompts."
    harmless_setting: str = "--good-evaluation-prompts."
    contrast_setting: str = "--contrast."


class PreparedSweep:
    """
    A sweep before its model is loaded: all prompts and directions files are read, and the prompts chosen that it evaluates.

    `response_prefix`: that of the settings, or None where it is looked for. Only categories that the model itself assigns
    are left open, and with them which harmful prompts are judged.

    Raises `ContrastError` when the settings, the prompts, a directions file or the output do not work.
    """

    def __init__(
        self,
        settings: SweepPlanSettings,
        contrast: ContrastSettings,
        evaluation: SweepSources,
        output: Path,
        model_name: str,
        response_prefix: str | None,
        log: Log,
    ) -> None:
        require_writable_directory(output)
        extracted, *swept = (
            (output / name).exists() for name in ("classes.csv", "sweep.json", "sweep.journal")
        )
        if extracted and not any(swept):
            # Most files of both reports have the same names.
            raise ContrastError(
                f"{output} holds the report of an extraction (classes.csv), part of which would be replaced: give another output."
            )
        self.settings = settings
        self.contrast = contrast
        self.options = SweepOptions.of(settings)
        self.storage = settings.storage or str(output / "sweep.journal")
        if "://" not in self.storage:
            require_writable_file(Path(self.storage))
        self.pairs = load_pairs(settings.pairs, model_name)
        configurations = contrast.configurations()
        if settings.random_control and all(
            item.control == "none" for item in configurations.values()
        ):
            first = next(iter(configurations.values()))
            if first.directions is None:
                configurations[RANDOM] = first.model_copy(update={"control": "random"})
            else:
                log("* Random directions are left out, since the directions come from a file")
        if any(
            item.given().get("row_normalization", "none") != "none"
            for item in configurations.values()
        ):
            log("* Row normalization is left out: a sweep ablates outputs, and changes no weights")
        where = evaluation.contrast_setting
        self.sources = DirectionSources(configurations, response_prefix, where)
        self.used = self.sources.used_prompts()
        for sentence in self.used.sentences():
            log(f"* [yellow]{escape(sentence)}[/]")
        self.harmful, n_harmful_left_out = _evaluation_pool(
            evaluation.harmful, "harmful evaluation", evaluation.harmful_setting, self.used, log
        )
        harmless, n_harmless_left_out = _evaluation_pool(
            evaluation.harmless, "harmless evaluation", evaluation.harmless_setting, self.used, log
        )
        self.left_out = {"harmful": n_harmful_left_out, "references": n_harmless_left_out}
        names = dict.fromkeys(("canaries", "references"), pool_name(evaluation.harmless))
        self.pool_names = {"harmful": pool_name(evaluation.harmful), **names}
        require_apart(self.harmful, harmless, "harmless evaluation", "counted on both sides")
        self.canaries, self.references = _harmless(settings, harmless, contrast.seed, log)
        known: dict[str, Any] = {"options": asdict(self.options)}
        if contrast.category_source != "model":
            self.harmful = _judged(settings, contrast, self.harmful, None, log)
            pools = {
                "harmful": self.harmful,
                "canaries": self.canaries,
                "references": self.references,
            }
            known["texts"] = {name: prompts_digest(pool) for name, pool in pools.items()}
        require_own_sweep(self.storage, known)

    def plan(
        self,
        model: LanguageModel,
        log: Log,
        show_progress: ShowProgress,
        max_response_length: int,
    ) -> SweepPlan:
        """
        Extracts the directions, or takes those of files, and returns the plan.

        `model`: with the response prefix that prompts are read with. Raises `ContrastError` when prompts, directions and
        model do not fit.
        """

        harmful = self.harmful
        if self.contrast.category_source == "model":
            harmful = _judged(self.settings, self.contrast, harmful, model, log)
        directions = self.sources.directions(model, log, show_progress, max_response_length)
        return plan_sweep(
            {
                name: Configuration.of(item, self.sources.settings[name])
                for name, item in directions.items()
            },
            harmful,
            self.canaries,
            self.references,
            self.options,
            self.used,
            self.left_out,
            self.pool_names,
        )


def _evaluation_pool(
    source: PromptSources, name: str, setting: str, used: UsedPrompts, log: Log
) -> tuple[Sequence[Prompt], int]:
    pool = load_pool(source, name, setting)
    # A repeated prompt would make intervals too narrow.
    distinct = list(dict.fromkeys(pool))
    if len(distinct) < len(pool):
        log(f"* Taking each prompt of the {name} pool once: {len(distinct)} of {len(pool)}")
    kept, n_left_out = used.leave_out(distinct)
    if not kept:
        raise ContrastError(
            f"All {n_left_out} {name} prompts are among those that directions were extracted from: give others."
        )
    return kept, n_left_out


def _judged(
    settings: SweepPlanSettings,
    contrast: ContrastSettings,
    pool: Sequence[Prompt],
    model: LanguageModel | None,
    log: Log,
) -> Sequence[Prompt]:
    """
    Returns the harmful prompts that are judged: a sample over the categories.

    A number that was not asked for fits itself to the pool. Raises `ContrastError` when one that was asked for does not fit.
    """

    pool = assign_categories(pool, contrast.category_source, model, "harmful evaluation")
    known = {str(prompt.category) for prompt in pool}
    for name in settings.evaluate_categories:
        if name not in known:
            raise ContrastError(
                f'No harmful evaluation prompt has the category "{name}": the categories are {", ".join(sorted(known))}.'
            )
    if settings.evaluate_categories:
        pool = [prompt for prompt in pool if prompt.category in settings.evaluate_categories]
    count = settings.n_harmful
    if "n_harmful" not in settings.model_fields_set:
        n_categories = len({prompt.category for prompt in pool})
        count = min(len(pool), max(count, n_categories))
        if count != settings.n_harmful:
            log(
                f"* Judging [bold]{count}[/] harmful prompts instead of {settings.n_harmful}, since the pool has {len(pool)} of "
                f"{n_categories} categories"
            )
    return stratified_sample(pool, count, contrast.seed)


def _harmless(
    settings: SweepPlanSettings, pool: Sequence[Prompt], seed: int, log: Log
) -> tuple[list[Prompt], list[Prompt]]:
    """
    Returns canaries and reference prompts.

    Numbers that were not asked for fit themselves to the pool. Raises `ContrastError` when those that were do not fit.
    """

    n_canaries, n_references = settings.n_canaries, settings.n_references
    given = {"n_canaries", "n_references"} & settings.model_fields_set
    if len(pool) < n_canaries + n_references:
        if not given:
            n_canaries = min(n_canaries, len(pool) // 2)
        if "n_references" not in given:
            n_references = len(pool) - n_canaries
        elif "n_canaries" not in given:
            n_canaries = len(pool) - n_references
        if len(pool) < 2 and not given:
            raise ContrastError(
                "A sweep takes a canary and a reference prompt at least, but the harmless evaluation pool has only one prompt: "
                "give a larger pool."
            )
        if min(n_canaries, n_references) < 1:
            n_canaries, n_references = settings.n_canaries, settings.n_references
        else:
            log(
                f"* Taking [bold]{n_canaries}[/] canaries and [bold]{n_references}[/] reference prompts instead of "
                f"{settings.n_canaries} and {settings.n_references}, since the harmless evaluation pool has {len(pool)} prompts"
            )
    return split_harmless(pool, n_canaries, n_references, seed)
