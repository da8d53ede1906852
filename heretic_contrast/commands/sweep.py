# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast sweep`: tests each layer alone at fixed weights."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from rich.markup import escape

from ..builtin import model_name
from ..errors import ContrastError, warn
from ..evaluation.plan_settings import SweepPlanSettings
from ..hosts.arguments import PROGRAM
from ..hosts.installed import require_heretic
from ..hosts.settings import HostSettings, load_settings, prompt_sources
from ..outputs import require_writable_file
from ..settings import require_effect


class SweepSettings(HostSettings, SweepPlanSettings):  # type: ignore[misc]
    """Settings of `sweep`."""

    # Categories are also those of the prompts that are judged, and pools may be needed to look for a response prefix.
    idle_beside_directions: ClassVar[set[str]] = set()

    searches: ClassVar[bool] = False

    output: str | None = Field(None, exclude=True)
    """Directory to write the report to."""


def main(arguments: Sequence[str]) -> None:
    """Raises `ContrastError` when the settings, the prompts, the storage or the output do not work."""

    require_heretic("sweep", arguments)
    settings = load_settings(SweepSettings, f"{PROGRAM} sweep", arguments)
    if not settings.output:
        raise ContrastError("The sweep needs a place for its report: give --output DIR.")
    output = Path(settings.output)
    # A folder that is read may hold the report of a sweep that goes on.
    read = list(filter(os.path.isfile, settings.inputs_without_search()))
    for name in ("sweep.json", "sweep.csv", "responses.jsonl"):
        require_writable_file(output / name, read)
    for name in ("text_classifier", "judge_model"):
        if getattr(settings.contrast, name) is not None and settings.classifier_name is None:
            flag = name.replace("_", "-")
            warn(f"--contrast.{flag} judges a search, and no sweep: give --{flag} for that.")

    # Heavy imports come last, so that bad settings are answered at once.
    from ..evaluation.plan import PreparedSweep, SweepSources
    from ..evaluation.sweep import check_places, run_prepared
    from ..hosts.loading import load_language_model, with_common_prefix
    from ..hosts.surface import log, progress_bar
    from ..report import write_sweep_report

    prepared = PreparedSweep(
        settings,
        settings.contrast,
        SweepSources(
            harmful=prompt_sources(settings.bad_evaluation_prompts),
            harmless=prompt_sources(settings.good_evaluation_prompts),
            contrast_setting=settings.contrast_setting,
        ),
        output,
        model_name(settings.model),
        settings.response_prefix,
        log,
    )
    if settings._own_pools and not prepared.sources.harmful:
        require_effect(["bad_prompts", "good_prompts"])
    model = load_language_model(settings)
    check_places(model, prepared.options)
    model = with_common_prefix(model, settings, prepared.sources)
    result, capture, geometry = run_prepared(
        model,
        prepared,
        log,
        progress_bar,
        settings.max_response_length,
        settings.batch_size or settings.max_batch_size,
    )
    write_sweep_report(result, output, log, capture, geometry)
    log(f"Report written to [bold]{escape(str(output / 'report.html'))}[/].")
