# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast audit`: counts harm categories in a harmless pool."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ..errors import ContrastError
from ..hosts.arguments import PROGRAM
from ..hosts.settings import CommandSettings, load_settings
from ..outputs import require_writable_file
from ..settings import PromptSource


class AuditSettings(PromptSource, CommandSettings):  # type: ignore[misc]
    """Settings of `audit`: the source of the prompts, and where the results go."""

    output: str = Field(min_length=1)
    """Directory to write audit.json to."""

    cleaned: str | None = None
    """File to write the prompts that match no category to, as JSON Lines."""


def main(arguments: Sequence[str]) -> None:
    """Raises `ContrastError` when the settings, the pool or the output do not work."""

    settings = load_settings(AuditSettings, f"{PROGRAM} audit", arguments)
    cleaned = None if settings.cleaned is None else Path(settings.cleaned)
    require_writable_file(Path(settings.output) / "audit.json", [settings.dataset])
    if cleaned is not None:
        require_writable_file(cleaned, [settings.dataset])
        if cleaned.suffix not in (".jsonl", ".ndjson"):
            raise ContrastError(
                f"--cleaned writes JSON Lines, and {cleaned} would be read as something else: give a name that ends in .jsonl."
            )

    from ..hosts.surface import log
    from ..prompts import load_pool
    from ..prompts.audit import render, run_audit

    prompts = load_pool(settings, "audited", "--")
    log(render(run_audit(prompts, Path(settings.output), cleaned)))
