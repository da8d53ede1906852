# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast audit`: counts harm categories in a harmless pool."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ..cli import PROGRAM
from ..files import require_writable_directory, require_writable_file
from ..hosts.settings import parse_settings
from ..settings import PromptSource, check_dataset_name


class AuditSettings(BaseSettings):
    """Settings of `audit`."""

    # Errors of the command line become one sentence instead of pages of usage.
    model_config = SettingsConfigDict(cli_exit_on_error=False)

    dataset: str = Field(
        description=(
            "Hugging Face dataset ID, or path to a dataset on disk, a JSON Lines file, "
            "or a plain text file with one prompt per line."
        )
    )

    split: str | None = Field(default=None, description="Portion of the dataset to use.")

    column: str | None = Field(default=None, description="Column that contains the prompts.")

    commit: str | None = Field(default=None, description="Hugging Face commit hash of the dataset.")

    output: str = Field(description="Directory to write audit.json to.")

    cleaned: str | None = Field(
        default=None,
        description="File to write the prompts that match no category to, as JSON Lines.",
    )

    @field_validator("dataset")
    @classmethod
    def check_dataset(cls, value: str) -> str:
        """Refuses the names of file formats."""

        check_dataset_name(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            CliSettingsSource(settings_cls, cli_parse_args=True, cli_kebab_case=True),
        )


def main(arguments: Sequence[str]) -> None:
    """
    Audits a pool.

    Raises `ContrastError` when the settings, the pool or the output do not work.
    """

    sys.argv = [f"{PROGRAM} audit", *arguments]
    settings = parse_settings(AuditSettings)
    require_writable_directory(Path(settings.output))
    if settings.cleaned is not None:
        require_writable_file(Path(settings.cleaned))

    from heretic.utils import load_prompts

    from ..audit import render, run_audit
    from ..hosts.surface import dataset_specification, log
    from ..prompts import Prompt, load_pool

    source = PromptSource(
        dataset=settings.dataset,
        split=settings.split,
        column=settings.column,
        commit=settings.commit,
        # Heretic falls back to the system prompt of a model; an audit has no model.
        system_prompt="",
    )

    def load(source: PromptSource) -> list[Prompt]:
        prompts = load_prompts(settings, dataset_specification(source))
        return [Prompt(text=prompt.user) for prompt in prompts]

    prompts = load_pool(source, load, "audited")
    cleaned = None if settings.cleaned is None else Path(settings.cleaned)
    result = run_audit(prompts, Path(settings.output), cleaned)
    log(render(result))
