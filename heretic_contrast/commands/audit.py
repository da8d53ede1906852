# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast audit`: counts harm categories in a harmless pool."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ..files import require_writable_directory, require_writable_file
from ..hosts.arguments import PROGRAM
from ..hosts.settings import load_settings
from ..settings import PromptSource


class AuditSettings(PromptSource, BaseSettings):
    """Settings of `audit`: the source of the prompts, and where the results go."""

    # Errors of the command line become one sentence instead of pages of usage.
    model_config = SettingsConfigDict(cli_exit_on_error=False)

    output: str
    """Directory to write audit.json to."""

    cleaned: str | None = None
    """File to write the prompts that match no category to, as JSON Lines."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: PydanticBaseSettingsSource,
        **named: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        source = CliSettingsSource[Any](settings_cls, cli_parse_args=True, cli_kebab_case=True)
        return (init_settings, source)


def main(arguments: Sequence[str]) -> None:
    """
    Audits a pool.

    Raises `ContrastError` when the settings, the pool or the output do not work.
    """

    settings = load_settings(AuditSettings, f"{PROGRAM} audit", arguments)
    cleaned = None if settings.cleaned is None else Path(settings.cleaned)
    require_writable_directory(Path(settings.output))
    if cleaned is not None:
        require_writable_file(cleaned)

    from ..hosts.surface import log
    from ..prompts import load_pool
    from ..prompts.audit import render, run_audit

    prompts = load_pool(settings, "audited", "--")
    log(render(run_audit(prompts, Path(settings.output), cleaned)))
