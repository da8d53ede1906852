# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast extract`: extracts directions, and reports on them."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from rich.markup import escape

from ..builtin import model_name
from ..errors import ContrastError
from ..evaluation.plan_settings import PairsSettings
from ..hosts.arguments import PROGRAM
from ..hosts.installed import require_heretic
from ..hosts.settings import HostSettings, load_settings
from ..outputs import require_writable_directory, require_writable_file


class ExtractSettings(HostSettings, PairsSettings):  # type: ignore[misc]
    """Settings of `extract`."""

    # A report observes the model on the prompts.
    idle_beside_directions: ClassVar[set[str]] = {"category_source"}

    searches: ClassVar[bool] = False

    output: str | None = Field(None, exclude=True)
    """File to save the directions to. With several presets, the name of each is added before the suffix."""

    report: str | None = Field(None, exclude=True)
    """Directory to write tables and plots of the directions' geometry to."""


def output_paths(output: str, names: Collection[str]) -> dict[str, Path]:
    path = Path(output)
    if len(names) < 2:
        return dict.fromkeys(names, path)
    return {name: path.with_name(f"{path.stem}-{name}{path.suffix}") for name in names}


def main(arguments: Sequence[str]) -> None:
    """Raises `ContrastError` when the settings, the prompts or the output do not work."""

    require_heretic("extract", arguments)
    settings = load_settings(ExtractSettings, f"{PROGRAM} extract", arguments)
    if settings.output is None and settings.report is None:
        raise ContrastError(
            "Nothing would be written: give --output FILE.safetensors, --report DIR, or both."
        )
    configurations = settings.contrast.configurations()
    if settings.output is not None and settings.contrast.directions is not None:
        raise ContrastError(
            f"The directions are taken from {settings.contrast.directions}, so that there are none to extract: leave --output out "
            "and give --report DIR, or leave --contrast.directions out."
        )
    paths = {} if settings.output is None else output_paths(settings.output, configurations)
    read = settings.inputs_without_search()
    for path in paths.values():
        require_writable_file(path, read)
    if settings.report is not None:
        report = Path(settings.report)
        require_writable_directory(report)
        for name in ("sweep.json", "sweep.journal"):
            if (report / name).exists():
                # Most files of both reports have the same names.
                raise ContrastError(
                    f"{report} holds the report of a sweep ({name}), part of which would be replaced: give another --report."
                )

    # Heavy imports come last, so that bad settings are answered at once.
    from ..directions.directions import Directions
    from ..directions.sources import DirectionSources
    from ..evaluation.capture import load_pairs
    from ..evaluation.geometry import measure_directions
    from ..evaluation.plan import Configuration
    from ..evaluation.results import N_PROMPTS
    from ..hosts.loading import load_language_model, with_common_prefix
    from ..hosts.surface import log, progress_bar

    # Whatever can be wrong with prompts and files is found before a model is loaded.
    sources = DirectionSources(
        configurations,
        settings.response_prefix,
        settings.contrast_setting,
        needs_prompts=settings.report is not None,
    )
    pairs = load_pairs(settings.pairs, model_name(settings.model))
    model = load_language_model(settings)
    model = with_common_prefix(model, settings, sources)

    def save(name: str, directions: Directions) -> None:
        if name in paths:
            directions.save(paths[name])
            log(
                f"* Saved [bold]{directions.n_directions}[/] direction{'s' if directions.n_directions > 1 else ''} per layer to [bold]{escape(str(paths[name]))}[/]"
            )

    found = sources.directions(model, log, progress_bar, settings.max_response_length, save)
    if settings.report is not None:
        from ..report import write_extraction_report

        log()
        log("Measuring capture and geometry...")
        capture, geometry = measure_directions(
            model,
            {name: Configuration.of(found[name], configurations[name]) for name in found},
            pairs,
            sources.harmful[:N_PROMPTS],
            sources.bulk[:N_PROMPTS],
        )
        write_extraction_report(model.name, found, Path(settings.report), log, capture, geometry)
        log(f"* Report written to [bold]{escape(settings.report)}[/]")
