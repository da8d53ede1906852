# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast sweep`: tests each layer alone at fixed weights."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt
from rich.markup import escape

from ..builtin import is_builtin, refuser_pool
from ..cli import PROGRAM
from ..errors import ContrastError
from ..files import require_writable_directory, require_writable_file
from ..hosts.installed import require_heretic
from ..hosts.settings import HostSettings, load_settings, prompt_sources
from ..settings import PromptSources

JOURNAL = "sweep.journal"


class SweepSettings(HostSettings):
    """Settings of `sweep`."""

    output: str | None = Field(
        default=None,
        description="Directory to write the report to.",
        exclude=True,
    )

    layers: str = Field(
        default="all",
        description='Decoder layers to test: "all", or indices and ranges such as "3,7,10-14".',
        exclude=True,
    )

    weights: list[float] = Field(
        default=[0.3, 0.5, 0.8, 1.0, 1.2],
        description="Weights to test, increasing (the paper's by default).",
        exclude=True,
    )

    components: list[Literal["attn.o_proj", "mlp.down_proj"]] | None = Field(
        default=None,
        description="Components to ablate, or unset for all that the model has.",
        exclude=True,
    )

    strength: Literal["weight", "effective", "both"] = Field(
        default="both",
        description=(
            "What a weight means. Options: "
            '"weight" (of each direction, as in the paper), '
            '"effective" (of the largest shared component, so that parallel directions do not add up), "both".'
        ),
        exclude=True,
    )

    random_control: bool = Field(
        default=True,
        description="Whether to sweep random directions of the same norms and cosines beside the first configuration.",
        exclude=True,
    )

    n_harmful: PositiveInt = Field(
        default=10,
        description="Number of harmful prompts to judge, stratified over categories (the paper: 10).",
        exclude=True,
    )

    n_canaries: PositiveInt = Field(
        default=10,
        description="Number of harmless prompts whose false refusals are counted.",
        exclude=True,
    )

    n_references: PositiveInt = Field(
        default=100,
        description="Number of harmless prompts that the KL divergence is measured on (the paper: 100).",
        exclude=True,
    )

    kl_tokens: PositiveInt = Field(
        default=50,
        description="Number of teacher-forced tokens per reference prompt (the paper: 50).",
        exclude=True,
    )

    kl_top_k: PositiveInt = Field(
        default=100,
        description="Number of log-probabilities kept per position (the paper: 100).",
        exclude=True,
    )

    sweep_response_length: PositiveInt = Field(
        default=50,
        description="Maximum number of tokens of a judged response.",
        exclude=True,
    )

    evaluate_categories: list[str] = Field(
        default=[],
        description=(
            "Harm categories to judge on, or none for all. With --contrast.exclude-categories this is the control "
            "for topic: directions fitted without a category, judged on it."
        ),
        exclude=True,
    )

    synergy_size: int = Field(
        default=2,
        ge=0,
        description="Number of layers in the sets that are tested for synergy (0 = none).",
        exclude=True,
    )

    synergy_weight: float = Field(
        default=0.3,
        gt=0,
        description="Weight of the synergy test (the paper: 0.3).",
        exclude=True,
    )

    synergy_layers: PositiveInt = Field(
        default=4,
        description="Number of best layers that sets are made of.",
        exclude=True,
    )

    pairs: str | None = Field(
        default=None,
        description=(
            "File of prompt pairs for the capture analysis, with columns refused and answered (JSON Lines, CSV, Parquet); "
            "unset for the shipped ones."
        ),
        exclude=True,
    )

    storage: str | None = Field(
        default=None,
        description=(
            "URL of an Optuna storage, or path of a journal file, that several processes may share; "
            f"unset for {JOURNAL} in the output directory."
        ),
        exclude=True,
    )

    sweep_batch_size: PositiveInt = Field(
        default=128,
        description="Number of samples in one pass of the sweep; several cells share a pass.",
        exclude=True,
    )


def parse_layers(text: str) -> tuple[int, ...] | None:
    """
    Returns the layers that a text names, or None for all.

    Raises `ContrastError` when the text does not name layers.
    """

    if text.strip() == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        # No model has more than four digits of layers, and a range of more would take all memory.
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if match is None:
            raise ContrastError(
                f'The layers "{text}" do not work: give "all", or indices and ranges such as "3,7,10-14".'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ContrastError(
                f"The range of layers {part.strip()} runs backwards: write {last}-{first}."
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def pool_source(settings: Any, name: str, pool: str) -> PromptSources:
    """Returns where evaluation prompts come from: the built-in refuser's pools know their categories."""

    if is_builtin(settings.model) and name not in settings.model_fields_set:
        return refuser_pool(pool, "test")
    return prompt_sources(getattr(settings, name))


def main(arguments: Sequence[str]) -> None:
    """
    Sweeps a model, and reports.

    Raises `ContrastError` when the settings, the prompts, the storage or the output do not work.
    """

    require_heretic("sweep", arguments)
    settings = load_settings(SweepSettings, f"{PROGRAM} sweep", list(arguments))
    if settings.output is None:
        raise ContrastError("The sweep needs a place for its report: give --output DIR.")
    output = Path(settings.output)
    layers = parse_layers(settings.layers)
    require_writable_directory(output)
    if settings.storage is not None and "://" not in settings.storage:
        require_writable_file(Path(settings.storage))

    # Heavy imports come last, so that bad settings are answered at once.
    from dataclasses import replace

    from ..ablation import Composition
    from ..directions import Directions
    from ..evaluation.capture import capture_pairs, load_pairs
    from ..evaluation.geometry import measure_activities, measure_geometry
    from ..evaluation.sampling import split_harmless, stratified_sample
    from ..evaluation.sweep import (
        SweepEvaluator,
        SweepOptions,
        run_cells,
        without_extraction_prompts,
    )
    from ..extraction import assign_categories, extract, load_pools
    from ..hosts.loading import load_language_model, with_response_prefix
    from ..hosts.surface import log, progress_bar
    from ..prompts import Prompt, load_pool, prompts_digest
    from ..report import write_sweep_report
    from ..settings import Control

    model, _ = load_language_model(settings, settings.contrast.batch_size)
    pairs = load_pairs(None if settings.pairs is None else Path(settings.pairs), model.name)
    configurations = settings.contrast.configurations()
    if settings.random_control and all(
        contrast.control is Control.NONE and contrast.directions is None
        for contrast in configurations.values()
    ):
        first = next(iter(configurations.values()))
        configurations["random"] = first.model_copy(update={"control": Control.RANDOM})

    directions: dict[str, Directions] = {}
    extraction: dict[str, Prompt] = {}
    for name, contrast in configurations.items():
        log()
        log(f"Extracting directions of [bold]{name}[/]...")
        if contrast.directions is not None:
            directions[name] = Directions.load(contrast.directions)
            continue
        pools = load_pools(contrast)
        model = with_response_prefix(model, settings, pools.bulk, pools.harmful)
        for prompt in (*pools.harmful, *pools.bulk, *pools.matched):
            extraction[prompt.text] = prompt
        with progress_bar() as progress:
            directions[name] = extract(
                model, pools, contrast, log, progress, settings.max_response_length
            )

    harmful_pool = load_pool(
        pool_source(settings, "bad_evaluation_prompts", "harmful"),
        "harmful evaluation",
        "--bad-evaluation-prompts.",
    )
    harmless_pool = load_pool(
        pool_source(settings, "good_evaluation_prompts", "harmless"),
        "harmless evaluation",
        "--good-evaluation-prompts.",
    )
    used = list(extraction.values())
    harmful_pool, n_harmful_dropped = without_extraction_prompts(harmful_pool, used)
    harmless_pool, n_harmless_dropped = without_extraction_prompts(harmless_pool, used)
    harmful_pool = assign_categories(
        harmful_pool, settings.contrast.category_source, model, "harmful evaluation"
    )
    if settings.evaluate_categories:
        known = {prompt.category for prompt in harmful_pool}
        for name in settings.evaluate_categories:
            if name not in known:
                raise ContrastError(
                    f'No harmful evaluation prompt has the category "{name}": the categories are '
                    f"{', '.join(sorted(map(str, known)))}."
                )
        harmful_pool = [
            prompt for prompt in harmful_pool if prompt.category in settings.evaluate_categories
        ]
    seed = settings.contrast.seed
    harmful = stratified_sample(harmful_pool, settings.n_harmful, seed)
    canaries, references = split_harmless(
        harmless_pool, settings.n_canaries, settings.n_references, seed
    )

    options = SweepOptions(
        layers=layers,
        weights=tuple(settings.weights),
        components=None if settings.components is None else tuple(settings.components),
        composition=Composition(settings.contrast.composition),
        strengths=("weight", "effective") if settings.strength == "both" else (settings.strength,),
        max_new_tokens=settings.sweep_response_length,
        kl_tokens=settings.kl_tokens,
        top_k=settings.kl_top_k,
        synergy_size=settings.synergy_size,
        synergy_weight=settings.synergy_weight,
        n_synergy_layers=settings.synergy_layers,
    )
    log()
    log("Measuring the unmodified model...")
    evaluator = SweepEvaluator(
        replace(model, batch_size=settings.sweep_batch_size),
        directions,
        harmful,
        canaries,
        references,
        options,
    )
    log(
        f"* Initial refusals: [bold]{evaluator.baseline.refusals}[/]/{evaluator.baseline.n_harmful}"
    )
    log(f"Sweeping [bold]{len(evaluator.grid())}[/] cells...")
    with progress_bar() as progress:
        cells = run_cells(evaluator, settings.storage or str(output / JOURNAL), progress)
    result = evaluator.result(
        cells,
        {
            "extraction": {"count": len(extraction), "digest": prompts_digest(used)},
            "harmful": {
                "count": len(harmful),
                "digest": prompts_digest(harmful),
                "left_out_as_used_for_extraction": n_harmful_dropped,
            },
            "canaries": {"count": len(canaries), "digest": prompts_digest(canaries)},
            "references": {
                "count": len(references),
                "digest": prompts_digest(references),
                "left_out_as_used_for_extraction": n_harmless_dropped,
            },
        },
    )
    log("Measuring capture and geometry...")
    capture = capture_pairs(model, directions, pairs, settings.sweep_response_length)
    activities = measure_activities(
        model,
        directions,
        harmful,
        [*canaries, *references],
        settings.weights,
        dict.fromkeys(directions, options.composition),
        settings.sweep_response_length,
    )
    write_sweep_report(result, output, log, capture, measure_geometry(directions, activities))
    log(f"Report written to [bold]{escape(str(output / 'report.html'))}[/].")
