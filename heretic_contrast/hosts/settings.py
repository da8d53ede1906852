# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Heretic's settings with those of the plugin.

Imports Heretic's configuration alone, which is light, so that `--help` is as fast as Heretic's.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from heretic.config import Settings
from pydantic import (
    Field,
    NonNegativeInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from ..builtin import (
    harmful_pool,
    harmless_pool,
    is_builtin,
    refuser_pool,
    resolve_model,
    with_refuser_pools,
)
from ..errors import ContrastError, one_line, warn
from ..files import digest, file_digest
from ..settings import (
    ContrastSettings,
    PromptSource,
    PromptSources,
    check_dataset_name,
    check_names,
    check_text,
    datasets_of,
    error_path,
    inputs_of,
    nearest,
    require_effect,
    validation_error,
)
from .arguments import PROGRAM, normalize_arguments
from .unused import (
    FORMER_POOLS,
    LIKE,
    NAMESPACES,
    OF_A_SEARCH,
    OF_HERETIC_SEARCH,
    ONLY_UNDER_14,
    SHIPPED,
    TomlSource,
    Unused,
    config_file,
    holds,
    named_plugins,
    without_shipped,
)

PLUGIN = "heretic_contrast.ContrastAbliteration"
TABLE = "ContrastAbliteration"

MODEL_FILES = """
    *config.json *.model *.py adapter_model* added_tokens.json additional_chat_templates/*
    chat_template* merges.txt model*.safetensors* pytorch_model* special_tokens_map.json
    tokenizer* vocab*
""".split()
"""What transformers may read in a model's folder."""


PASSING = {
    "batch_size",
    "response_prefix",
    "n_trials",
    "export_strategy",
    "max_shard_size",
    "device_map",
    "max_memory",
    "offload_outputs_to_cpu",
}
"""Heretic's settings that are decided during the run, or have no influence on trials."""

PASSING_OF_CONTRAST = {
    "batch_size",
    "save_directions",
    "residual_cache",
    "patience",
    "finalist_prompts",
}
"""Those of the plugin that have none."""

LEAST = {"n_trials": 1, "max_response_length": 1, "max_batch_size": 1, "batch_size": 0}
"""Heretic's settings that count something, and from which number on they do."""

PLACES = ("bad_prompts", "good_prompts")

SHARED = (
    "row_normalization",
    "orthogonalize_direction",
    "full_normalization_lora_rank",
    "winsorization_quantile",
)
"""Heretic's settings that mean the plugin's of the same name, where these are not given."""

POOLS = (*PLACES, "matched_prompts")
"""The pools that directions are made from."""

LARGE = 2**26
"""From how many bytes on a file is identified by its size, where reading it takes too long for what it is."""


def path_digest(
    path: Path, patterns: Sequence[str] = ("**/*",), ignored: Path | None = None
) -> str:
    """
    Returns a digest of a file, or of files in a folder with their names.

    `patterns`: which files of a folder. `ignored`: a folder whose files do not count. Of a large file, such as the weights of a
    model, only the size is looked at; what cannot be read is named by whoever needs it.
    """

    files = [path] if os.path.isfile(path) else []
    # Asked of a name that is too long, the methods of a path raise errors.
    if os.path.isdir(path):
        files = [file for part in patterns for file in path.glob(part)]
    found = []
    for file in files:
        with suppress(OSError):
            # A pipe would be waited for.
            if file.is_file() and (
                ignored is None or ignored.absolute() not in file.absolute().parents
            ):
                size = file.stat().st_size
                content = file_digest(file) if size < LARGE else str(size)
                found.append(f"{file.relative_to(path)} {content}")
    return digest(sorted(found))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def prompt_sources(specification: Any) -> PromptSources:
    known = set(PromptSource.model_fields)
    sources = [PromptSource(**item.model_dump(include=known)) for item in listed(specification)]
    return sources if isinstance(specification, list) else sources[0]


def contrast_table(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the plugin's table, with that of an instance on top. Raises `ContrastError` when another modifier is named."""

    modifiers = config.get("modifiers")
    named = named_plugins(modifiers)
    if modifiers is not None and ([name for name, _ in named] != [TABLE] or len(modifiers) > 1):
        raise ContrastError(
            f"config.toml has modifiers = {modifiers}, but heretic-contrast runs exactly one modifier: write "
            f'modifiers = [{{ plugin = "{PLUGIN}" }}], or run plain heretic.'
        )
    tables = config.get("modifier", {})
    found: dict[str, Any] = {}
    for _, instance in [(TABLE, None), *named]:
        name = f"{TABLE}_{instance}" if instance else TABLE
        table = tables.get(name, {}) if isinstance(tables, dict) else None
        if not isinstance(table, dict):
            raise ContrastError(
                f"[modifier.{name}] in config.toml must be a table of settings: correct it."
            )
        found = _merged(found, table)
    return found


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns a table with the values of another, which go into tables inside it."""

    inner = {
        name: _merged(below[name], value)
        for name, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(name), dict)
    }
    return {**below, **above, **inner}


class ContrastTomlSource(TomlSource):
    """Reads `config.toml` with Heretic 2.0's table for the plugin."""

    def __call__(self) -> dict[str, Any]:
        config = dict(super().__call__())
        if "scorers" not in Settings.model_fields and ("scorers" in config or "scorer" in config):
            raise ContrastError(
                "config.toml configures scorers, which only Heretic 2.0 has: remove them, and see "
                "--contrast.refusal-classifier for the tiers under Heretic 1.4."
            )
        table = contrast_table(config)
        config, shipped = without_shipped(config, self.settings_cls.model_fields)
        if shipped:
            warn(f"{shipped}.")
        idle = ONLY_UNDER_14 if "scorers" in Settings.model_fields else ()
        # As in config.toml for Heretic 2.0, there is one table for the plugin.
        known = {*self.settings_cls.model_fields, "modifiers"} - {"contrast"}
        named = {where: named_plugins(config.get(name)) for where, name in NAMESPACES.items()}
        unused = Unused(TABLE, ContrastSettings.model_fields, known, named, idle)
        unused.require_none(config, read=["contrast"])
        for name in sorted(set(config) - known - set(NAMESPACES)):
            close = nearest(name, known, LIKE)
            if close:
                raise ContrastError(
                    f'config.toml has "{name}", which nothing reads: did you mean "{close}"?'
                )
        # What is as Heretic ships it was not chosen, and a preset stands before it.
        left = {name for name in SHARED if config.get(name) == SHIPPED[name]}
        kept = {
            name: config[name] for name in config if name not in {*left, "modifiers", "modifier"}
        }
        # A flag comes before the file, also where the file has the plugin's setting and the flag is Heretic's for the same.
        above = {name for name in (*PLACES, *SHARED) if name in self.current_state}
        table = {name: value for name, value in table.items() if name not in above}
        return {**kept, "contrast": table} if table else kept


class HostSettings(Settings):
    """Settings of Heretic, of the plugin, and of Heretic 2.0's headless mode, which Heretic 1.4 has none of."""

    # Errors of the command line become one sentence instead of pages of usage.
    model_config = SettingsConfigDict(cli_exit_on_error=False, use_attribute_docstrings=True)

    idle_beside_directions: ClassVar[set[str]] = {"bad_prompts", "good_prompts", "category_source"}
    """Settings of the plugin that have no effect in this command where directions come from a file."""

    searches: ClassVar[bool] = True
    """Whether this command searches weights."""

    _own_pools: set[str] = PrivateAttr(default_factory=set)
    """The pools that were given as the plugin's own."""

    _replaced_pools: set[str] = PrivateAttr(default_factory=set)
    """Those of Heretic's, not given, whose place they take."""

    contrast: ContrastSettings = Field(default_factory=ContrastSettings)
    """Settings of the plugin; in config.toml the table [modifier.ContrastAbliteration]."""

    if "bad_evaluation_prompts" not in Settings.model_fields:
        # Heretic 2.0 has moved these pools to the scorers' own settings.
        good_evaluation_prompts: PromptSources = harmless_pool("test[:100]")
        """Dataset of prompts that tend to not result in refusals (used for evaluation)."""

        bad_evaluation_prompts: PromptSources = harmful_pool("test[:100]")
        """Dataset of prompts that tend to result in refusals (used for evaluation)."""

    checkpoint_action: Literal["continue", "restart"] | None = Field(None, exclude=True)
    """Action to take in case a checkpoint exists: "continue", "restart", or unset to prompt the user."""

    trial_index: NonNegativeInt | None = Field(None, exclude=True)
    """Index (in the sorted Pareto front) of the trial to use, or unset to prompt the user."""

    model_action: Literal["save", "upload", "none"] | None = Field(None, exclude=True)
    """
    Action to take with the decensored model: "save", "upload", "none" (end after the study, to choose a trial later), or
    unset to prompt the user.
    """

    save_directory: str | None = Field(None, min_length=1, exclude=True)
    """Directory to save the model to, or unset to prompt the user."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        *sources: PydanticBaseSettingsSource,
        **named: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Made first, because it names what is wrong with a file that cannot be read.
        toml_source = ContrastTomlSource(settings_cls)
        # Heretic reads config.toml last; the replacement knows the plugin's table.
        *others, _ = super().settings_customise_sources(settings_cls, *sources, **named)
        return (*others, toml_source)

    @model_validator(mode="before")
    @classmethod
    def refuse_null_characters(cls, data: Any) -> Any:
        if isinstance(data, dict):
            check_text(data)
        return data

    @field_validator("*", mode="wrap")
    @classmethod
    def check_datasets(
        cls, value: Any, validate: Callable[[Any], Any], info: ValidationInfo
    ) -> Any:
        """Refuses unknown keys of Heretic's own datasets, and the names of file formats."""

        # Pydantic 2.12.0 does not name the field whose default it validates, in which no key is unknown.
        field = cls.model_fields.get(info.field_name or "")
        for item in listed(field and field.default):
            if "dataset" in getattr(type(item), "model_fields", {}):
                check_names(value, type(item).model_fields)
        found = validate(value)
        for item in listed(found):
            if hasattr(item, "dataset"):
                check_dataset_name(item.dataset)
        return found

    @model_validator(mode="after")
    def complete(self) -> "HostSettings":
        for name, least in LEAST.items():
            value = getattr(self, name, least)
            if value < least:
                raise ContrastError(f"{name} is {value}: give {least} or more.")
        # Heretic divides by it.
        if not getattr(self, "kl_divergence_scale", 1) > 0:
            raise ContrastError("kl_divergence_scale must be more than 0: give another.")
        given = set(self.model_fields_set)
        own = {name for name, value in self.contrast.given().items() if value is not None}
        if self.contrast.directions is not None:
            require_effect(sorted(own & self.idle_beside_directions))
        elif "category_source" in self.idle_beside_directions:
            self.contrast.require_categories()
        if not self.searches:
            # What stands in config.toml may be for another command.
            typed = {name for name in own & OF_A_SEARCH if not file_table("contrast", name)}
            if self.contrast.classifier_name is not None:
                typed.discard("refusal_classifier")
            here = [
                f"{name} (here: --{name.replace('_', '-')})"
                if name in type(self).model_fields
                else name
                for name in sorted(typed)
            ] + sorted(filter(is_typed, OF_HERETIC_SEARCH))
            if here:
                raise ContrastError(
                    f"This command makes no search, without which these settings have no effect: {', '.join(here)}; leave them out."
                )
        self._own_pools = own & set(PLACES)
        self._replaced_pools = self._own_pools - given
        self.model = resolve_model(self.model)  # type: ignore[has-type]
        if self.evaluate_model is not None:  # type: ignore[has-type]
            self.evaluate_model = resolve_model(self.evaluate_model)  # type: ignore[has-type]
        if is_builtin(self.model):
            self._use_builtin_pools(given)
        if self.contrast.preset or self.contrast.directions:
            left = [
                name
                for name in SHARED
                # Neither decides the rank, which goes by the number of directions.
                if name != "full_normalization_lora_rank"
                and name in {*config_file()} - given - self.contrast.model_fields_set
                and getattr(self, name, None) not in (None, getattr(self.contrast, name))
            ]
            if left:
                warn(
                    f"config.toml holds {', '.join(left)} as Heretic ships it, which is left to the preset or the directions file: give "
                    "a flag where it is meant."
                )
        updates: dict[str, Any] = {}
        for name in PLACES:
            # Heretic 2.0 has moved these pools to the modifiers' own settings.
            specification = getattr(self, name, None)
            if getattr(self.contrast, name) is None and specification is not None:
                updates[name] = prompt_sources(specification)
        for name in SHARED:
            if name in given and name not in self.contrast.model_fields_set:
                value = getattr(self, name)
                if value != getattr(self.contrast, name):
                    updates[name] = getattr(value, "value", value)
        if updates:
            self.contrast = ContrastSettings.model_validate({**self.contrast.given(), **updates})
        folder = Path(self.study_checkpoint_dir)  # type: ignore[has-type]
        self.study_checkpoint_dir = str(folder / f"contrast-{self.configuration_digest()[:16]}")
        return self

    def _use_builtin_pools(self, given: set[str]) -> None:
        for name, pool, split in (
            ("good_prompts", "harmless", "train"),
            ("bad_prompts", "harmful", "train"),
            ("good_evaluation_prompts", "harmless", "test"),
            ("bad_evaluation_prompts", "harmful", "test"),
        ):
            if name not in given and hasattr(self, name):
                source = refuser_pool(pool, split).model_dump(exclude_defaults=True)
                setattr(self, name, type(getattr(self, name))(**source))
        own = with_refuser_pools(self.contrast)
        self.contrast = self.contrast.model_copy(
            update={name: getattr(own, name) for name in POOLS if name not in given}
        )

    @property
    def contrast_setting(self) -> str:
        """What messages put before the name of a pool of the plugin: a flag, or the table of `config.toml`."""

        tables = filter(None, (file_table("contrast", name) for name in POOLS))
        return next((f"{table} " for table in tables), "--contrast.")

    def inputs_without_search(self) -> list[str]:
        """Returns the names of all that is read where no search is made."""

        return inputs_of(self.model_dump(mode="json", exclude={"contrast": OF_A_SEARCH}))

    def configuration_digest(self) -> str:
        """
        Returns a digest of everything that decides the trials of a study, as far as it is known before anything is loaded.

        What files and folders hold belongs to it. The weights of the model, and prompts from elsewhere, are compared when they
        have been loaded.
        """

        passing: dict[str, Any] = {**dict.fromkeys(PASSING, True), "contrast": PASSING_OF_CONTRAST}
        content = self.model_dump(mode="json", exclude=passing)
        if self.response_prefix is not None:
            content["response_prefix"] = self.response_prefix
        # Where the trials are kept may lie within a folder of prompts.
        own = Path(self.study_checkpoint_dir)
        content["files"] = [path_digest(Path(self.model), MODEL_FILES)] + [
            path_digest(Path(name), ignored=own) for name in datasets_of(content)
        ]
        for name in ("directions", "warm_start"):
            file = getattr(self.contrast, name)
            if file is not None and os.path.isfile(file):
                content["contrast"][name] = file_digest(Path(file))
        return digest(content)


def deciding(content: dict[str, Any]) -> dict[str, Any]:
    """Returns settings, as JSON values by their options, that decide trials and are no places: what lies there is compared when loaded."""

    own = {f"contrast.{name}": value for name, value in content.get("contrast", {}).items()}
    kept_out = {"contrast", "model", "study_checkpoint_dir", *PASSING, *PLACES, *FORMER_POOLS}
    passing = (*PASSING_OF_CONTRAST, *POOLS, "sensitive_prompts")
    kept_out |= {f"contrast.{name}" for name in (*passing, "directions", "warm_start")}
    return {name: value for name, value in {**content, **own}.items() if name not in kept_out}


class CommandSettings(BaseSettings):
    """Settings of a command that needs no Heretic: what its own command line says, and nothing else."""

    model_config = SettingsConfigDict(cli_exit_on_error=False, use_attribute_docstrings=True)

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


SettingsType = TypeVar("SettingsType", bound=BaseSettings)


def gives(text: str, *path: str) -> bool:
    """Returns whether a value, which is JSON where it is a table, has a setting at a path in it, or takes the place of its table."""

    with suppress(ValueError, RecursionError):
        return holds(json.loads(text), path)
    return not path


def is_typed(*path: str) -> bool:
    """Returns whether a setting, such as "contrast", "seed", stands on the command line."""

    flag = f"--(no-)?{'.'.join(path)}".replace("_", "-")
    return any(
        re.match(rf"{flag}(?![\w-])", word)
        or (word.startswith(f"--{path[0]}=") and gives(word.partition("=")[2], *path[1:]))
        for word in sys.argv
    )


def file_table(*path: str) -> str | None:
    """
    Returns the table of `config.toml` that a setting, such as "contrast", "seed", stands in, or None where a flag replaces it.

    An environment variable that replaces it takes the place of the table.
    """

    if is_typed(*path):
        return None
    variable = f"HERETIC_{path[0]}".upper()
    values = {name.upper(): value for name, value in os.environ.items()}
    if variable in values and gives(values[variable], *path[1:]):
        return f"the environment variable {variable}"
    config = config_file()
    tables = {"config.toml": config}
    if path[0] == "contrast":
        names = [
            TABLE,
            *(f"{TABLE}_{instance}" for _, instance in named_plugins(config.get("modifiers"))),
        ]
        own = config.get("modifier", {})
        # The table of an instance comes before the one that all have.
        tables = {f"[modifier.{name}]": own.get(name, {}) for name in reversed(names)}
    keys = {path[-1], path[-1].replace("_", "-")}
    return next((table for table, values in tables.items() if keys & set(values)), None)


def _complaint(error: ValidationError, settings_class: type[BaseSettings]) -> ContrastError:
    """Returns the first complaint, which names the table of `config.toml` where the value stands there."""

    if not issubclass(settings_class, HostSettings):
        return validation_error(error, where="on the command line")
    path = [str(part) for part in error_path(error)] or [""]
    is_own = path[0] == "contrast"
    table = file_table(*path[: 1 + is_own])
    return validation_error(error, table, skip=int(is_own and table is not None))


def load_settings(
    settings_class: type[SettingsType], program: str, arguments: Sequence[str]
) -> SettingsType:
    """Parses settings, and leaves `sys.argv` as Heretic parses it. Raises `ContrastError` with the first complaint."""

    sys.argv = [program, *normalize_arguments(settings_class, arguments)]
    try:
        return settings_class()
    except ValidationError as error:
        raise _complaint(error, settings_class) from error
    except (SettingsError, UnicodeEncodeError, RecursionError) as error:
        # Bytes of the command line that are no UTF-8 arrive as halves of characters, which pydantic cannot complain about.
        reason = one_line(str(error.__cause__ or error))
        raise ContrastError(
            f"The settings cannot be read ({reason}): correct them, or see {PROGRAM} --help."
        ) from error
