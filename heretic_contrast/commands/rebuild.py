# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast rebuild`: makes the weights of a saved model again from the record beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ..errors import ContrastError
from ..hosts.arguments import PROGRAM
from ..hosts.installed import require_heretic
from ..hosts.model_folder import CONFIGURATIONS, UNFINISHED
from ..hosts.settings import CommandSettings, load_settings
from ..outputs import require_writable_directory
from ..processes import LOCK, alone_in
from ..settings import PromptSources


class RebuildSettings(CommandSettings):
    """Makes the weights of a saved model again: heretic-contrast rebuild RECORD."""

    positional: ClassVar[str] = "record"

    record: str
    """The heretic-contrast.json beside a saved model, or the folder of the model."""

    output: str | None = None
    """Directory to save the model to, which must be new, or unset for that of the record with "-rebuilt" behind its name."""

    model: str | None = None
    """Where the original model is now."""

    directions: str | None = None
    """Where the file of directions is now, or one that holds the same directions, so that no prompts are needed."""

    bad_prompts: PromptSources | None = None
    """Where the harmful prompts are now."""

    good_prompts: PromptSources | None = None
    """Where the general harmless prompts are now."""

    matched_prompts: PromptSources | None = None
    """Where the matched harmless prompts are now."""


def require_new(output: Path) -> None:
    """Raises `ContrastError` where there is anything but what a process that was killed has left, or that this one works here."""

    found = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    if output.exists() and found - {UNFINISHED, LOCK}:
        raise ContrastError(f"{output} exists, and is not overwritten: give another --output.")


def main(arguments: Sequence[str]) -> None:
    """Rebuilds a model. Raises `ContrastError` when the record, what it names, or the output do not work."""

    require_heretic("rebuild", arguments)
    settings = load_settings(RebuildSettings, f"{PROGRAM} rebuild", arguments)

    from ..hosts.record import read_record

    path = Path(settings.record)
    record = read_record(path)
    folder = (path if path.is_dir() else path.parent).resolve()
    output = Path(settings.output or folder.with_name(f"{folder.name}-rebuilt"))
    require_new(output)
    inside = folder == output.resolve() or folder in output.resolve().parents
    if inside and any((folder / name).exists() for name in CONFIGURATIONS):
        raise ContrastError(
            f"{output} lies in the folder of the record, which holds one model: give another --output."
        )

    # Heavy imports come last, so that bad settings are answered at once.
    from ..hosts.rebuilding import prepare, rebuild
    from ..modifier import ContrastAbliteration

    made_with, sources = prepare(record, settings)
    require_writable_directory(output)
    with alone_in(output, "give another --output"):
        require_new(output)
        rebuild(record, made_with, sources, output, ContrastAbliteration)
