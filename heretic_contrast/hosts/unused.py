# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What in `config.toml` and the environment looks meant for this package and has no effect.

Heretic 2.0 drops tables that no plugin reads, and keys that nobody knows, without a word. Settings of Heretic itself and
tables of other plugins are nobody's business here.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel
from pydantic_settings import BaseSettings, TomlConfigSettingsSource

PLUGINS = {
    "ContrastAbliteration": "modifier",
    "RefusalTiers": "scorer",
    "TeacherForcedDivergence": "scorer",
    "FalseRefusals": "scorer",
    "FixedWeightSweep": "scorer",
}
"""The plugins of this package, and the table of `config.toml` below which each has its own."""

SCORERS = [name for name, namespace in PLUGINS.items() if namespace == "scorer"]

NAMESPACES = {"modifier": "modifiers", "scorer": "scorers"}
"""Where Heretic 2.0 looks for tables of plugins, and the setting that names the plugins to load."""

LIKE = 0.85
"""How much two names are alike, between 0 and 1, from which on one is taken for the other."""

ONLY_UNDER_14 = {
    "sampler": "its study has a sampler of its own",
    "stop_dominated": "its scorers are asked one after the other, each to its end",
    "warm_start": "its study begins by itself",
    "patience": "its study runs all of its trials",
    "finalist_prompts": "its menu shows what its scorers have found",
    "refusal_classifier": "the scorer RefusalTiers takes its place",
    "counted_tiers": "counted_tiers in [scorer.RefusalTiers] takes its place",
    "text_classifier": "text_classifier in [scorer.RefusalTiers] takes its place",
    "text_classifier_labels": "text_classifier_labels in [scorer.RefusalTiers] takes its place",
    "text_classifier_reads_prompt": "text_classifier_reads_prompt in [scorer.RefusalTiers] takes its place",
}
"""Settings of the modifier that have no effect under Heretic 2.0, and why."""

FORMER_POOLS = {
    "bad_evaluation_prompts": "prompts in the table of a scorer, such as [scorer.RefusalTiers]",
    "good_evaluation_prompts": "prompts in the table of a scorer, such as [scorer.FalseRefusals]",
}
"""Prompts that judge trials: settings of Heretic 1.4, and of scorers in 2.0."""


SHIPPED = {
    "orthogonalize_direction": True,
    "row_normalization": "full",
    "full_normalization_lora_rank": 3,
    "winsorization_quantile": 1.0,
    "good_prompts": {
        "dataset": "mlabonne/harmless_alpaca",
        "split": "train[:400]",
        "column": "text",
    },
    "bad_prompts": {
        "dataset": "mlabonne/harmful_behaviors",
        "split": "train[:400]",
        "column": "text",
    },
}
"""What stands in the configuration that Heretic 2.0 ships, although nothing there reads it any more."""


def config_file() -> dict[str, Any]:
    """Returns what stands in `config.toml`; nothing where there is none."""

    return TomlConfigSettingsSource(BaseSettings, toml_file="config.toml").toml_data


def without_shipped(
    config: Mapping[str, Any], known: Collection[str]
) -> tuple[dict[str, Any], str | None]:
    """Returns a configuration without what nothing reads and is as Heretic ships it, and a sentence where there is any."""

    names = []
    for name in sorted(set(config) & set(SHIPPED) - set(known)):
        value = config[name]
        if isinstance(value, dict):
            value = {
                key: inner for key, inner in value.items() if not key.startswith("residual_plot")
            }
        if value == SHIPPED[name]:
            names.append(name)
    kept = {name: value for name, value in config.items() if name not in names}
    if not names:
        return kept, None
    return kept, (
        f"config.toml holds {', '.join(names)} as Heretic ships it, which has no effect: "
        "settings of the plugin stand in [modifier.ContrastAbliteration]"
    )


def named_plugins(entries: Any) -> set[tuple[str, str | None]]:
    """
    Returns the plugins that `modifiers` or `scorers` name: their classes, and the names of their instances.

    `entries`: what Heretic has made of the setting, or what stands in the file.
    """

    found = set()
    for entry in entries if isinstance(entries, list) else []:
        values = entry if isinstance(entry, Mapping) else getattr(entry, "__dict__", {})
        instance = values.get("instance_name")
        found.add((class_name(values.get("plugin")), None if instance is None else str(instance)))
    return found


def class_name(plugin: Any) -> str:
    """Returns the class in an import path, or in the path of a file."""

    return re.split(r"[.:]", str(plugin))[-1]


def own_table(name: str) -> str | None:
    """Returns the table of this package that a table's name, or a part of it, is much like, or None."""

    for part in (name, name.partition("_")[0], name.rpartition(".")[2]):
        text = _letters(part).removeprefix("heretic")
        for plugin, namespace in PLUGINS.items():
            known = _letters(plugin)
            if (text.startswith("contrast") and known.startswith(text)) or (
                difflib.SequenceMatcher(None, text, known).ratio() > LIKE
            ):
                return f"[{namespace}.{plugin}]"
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def own_setting(
    name: str, settings: Collection[str], known: Collection[str] = (), cutoff: float = LIKE
) -> str | None:
    """Returns the setting that a name is much like, or None where none is, or one that Heretic knows is as much."""

    text = name.lower().replace("-", "_")
    close = difflib.get_close_matches(text, [*settings, *known], n=1, cutoff=cutoff)
    return close[0] if close and close[0] not in known else None


def table_of(
    config: Mapping[str, Any], tables: Collection[str], path: Sequence[int | str], value: Any
) -> str | None:
    """
    Returns which of some tables of a configuration holds a value, or None.

    `tables`: names with dots; the name of the whole is empty. `path`: of the value, or of what is missing beside it, in the table.
    """

    for table in tables:
        place: Any = config
        for part in [*filter(None, table.split(".")), *path]:
            try:
                place = place[part]
            except (LookupError, TypeError):
                break
        else:
            part = ""
        # What is missing is complained about with all that is there, which may be nested too deeply to be compared.
        with suppress(RecursionError):
            if place == value and part in ("", *path[-1:]) and place is not config:
                return f"[{table}]" if table else "config.toml"
    return None


def instance_tables(config: Mapping[str, Any], table: str) -> list[str]:
    """Returns the tables of a plugin's instances, without brackets; `table`: that of the plugin."""

    namespace, _, plugin = table.strip("[]").partition(".")
    tables = config.get(namespace)
    return [
        f"{namespace}.{name}"
        for name in (tables if isinstance(tables, dict) else ())
        if name.startswith(f"{plugin}_")
    ]


def place_of_pools(settings: BaseModel, table: str) -> str:
    """Returns the table of `config.toml` that pools of a plugin stand in: that of an instance which holds one, or `table`."""

    config = config_file()
    names = instance_tables(config, table)
    for name, value in settings.model_dump(mode="json", exclude_unset=True).items():
        if name.endswith("prompts") or name == "contrast":
            found = table_of(config, names, (name,), value)
            if found:
                return found
    return table


def unused_tables(
    config: Mapping[str, Any],
    named: Mapping[str, Collection[tuple[str, str | None]]],
    settings: Collection[str],
    table: str,
    known: Collection[str],
    idle: Mapping[str, str],
) -> Iterator[str]:
    """
    Yields a sentence for all in a configuration that is for this package and not read.

    `named`: see `named_plugins`, by the table that they belong into. `settings`: names of a plugin's settings, which belong into `table`. `known`: names of
    Heretic's own settings. `idle`: settings of a plugin that have no effect, and why.
    """

    settings = [name for name in settings if name not in idle]

    for name, value in config.items():
        tables = value if isinstance(value, dict) else {}
        if name in NAMESPACES:
            if not isinstance(value, dict):
                yield f'"{name}" in config.toml must hold tables, such as {table}: correct it.'
            for inner, inner_value in tables.items():
                yield from _in_namespace(name, inner, inner_value, named[name], settings, table)
            continue
        for inner, inner_value in tables.items():
            meant = own_table(inner) if isinstance(inner_value, dict) else None
            if meant:
                yield _not_read(_table(name, inner), meant)
        if name in known:
            if name in NAMESPACES.values():
                yield from _beside_plugin(name, value, settings, table)
            continue
        shown = _table(name) if isinstance(value, dict) else f'"{name}"'
        # A table may be anybody's; it is a setting's where it has just its name.
        setting = own_setting(name, settings, known, cutoff=1.0 if tables else LIKE)
        meant = own_table(name)
        head, _, last = name.rpartition(".")
        if name in idle:
            yield f'The setting "{name}" in config.toml has no effect under Heretic 2.0, where {idle[name]}: remove it.'
        elif own_table(head):
            inner = own_setting(last, settings, known) if own_table(head) == table else None
            yield _not_read(shown, f"{inner} in {table}" if inner else str(own_table(head)))
        elif meant:
            yield _not_read(shown, meant)
        elif name in NAMESPACES.values() and {plugin for plugin, _ in named_plugins(value)} & set(
            PLUGINS
        ):
            yield f'"{name}" in config.toml has no effect, because this Heretic has no {name}: use Heretic 2.0, or remove it.'
        elif name in FORMER_POOLS:
            yield _not_read(shown, FORMER_POOLS[name])
        elif setting:
            yield _not_read(shown, f"{setting} in {table}")


def _table(*names: str) -> str:
    """Returns a table as it stands in the file, where a name that holds a dot has quotes."""

    parts = [name if re.fullmatch(r"[\w-]+", name) else f'"{name}"' for name in names]
    return f"[{'.'.join(parts)}]"


def _not_read(what: str, meant: str) -> str:
    return f"config.toml has {what}, which nothing reads: did you mean {meant}?"


def _in_namespace(
    namespace: str,
    name: str,
    value: Any,
    named: Collection[tuple[str, str | None]],
    settings: Collection[str],
    table: str,
) -> Iterator[str]:
    """As `unused_tables`, for what stands below `[modifier]` or `[scorer]`."""

    where = _table(namespace, name)
    plugin, _, instance = name.partition("_")
    if PLUGINS.get(plugin) == namespace and isinstance(value, dict):
        if instance and (plugin, instance) not in named:
            others = sorted(other for known, other in named if known == plugin and other)
            close = difflib.get_close_matches(instance, others, n=1, cutoff=0)
            nearest = f"{plugin}_{close[0]}" if close else plugin
            yield (
                f"config.toml has {where}, but no instance_name in {NAMESPACES[namespace]} is {instance}: "
                f"did you mean [{namespace}.{nearest}]?"
            )
    elif PLUGINS.get(name) == namespace:
        yield f"{where} in config.toml must be a table of settings: correct it."
    elif not any(name in (known, f"{known}_{other}") for known, other in named):
        meant = own_table(name)
        setting = None if isinstance(value, dict) else own_setting(name, settings)
        if meant or setting:
            shown = where if isinstance(value, dict) else f'"{name}" in [{namespace}]'
            yield _not_read(shown, meant or f"{setting} in {table}")


def _beside_plugin(name: str, entries: Any, settings: Collection[str], table: str) -> Iterator[str]:
    """As `unused_tables`, for what stands in an entry of `modifiers` or `scorers`."""

    read = ["plugin", "instance_name", "optimization"]
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and class_name(entry.get("plugin")) in PLUGINS:
            for key in entry:
                if key not in read:
                    setting = own_setting(key, settings, read)
                    meant = f"{setting} in {table}" if setting else own_setting(key, read, (), 0)
                    yield _not_read(f'"{key}" in {name}', str(meant))


def unused_keys(
    table: Mapping[str, Any],
    settings: Collection[str],
    where: str,
    idle: Mapping[str, str],
    instances: Collection[str | None] = (),
) -> Iterator[str]:
    """As `unused_tables`, for the keys of a plugin's table `where`. `idle`: settings without an effect, and why; `instances`: names."""

    settings = [name for name in settings if name not in idle]
    for key in table:
        if key in instances:
            right = f"{where.strip('[]')}_{key}"
            yield _not_read(f"[{where.strip('[]')}.{key}]", f"[{right}]")
        elif key in idle:
            yield f'The setting "{key}" in {where} has no effect under Heretic 2.0, where {idle[key]}: remove it.'
        elif key not in settings:
            close = own_setting(key, settings, cutoff=0)
            yield f'There is no setting "{key}" in {where}: did you mean "{close}"?'


def unused_variables(
    variables: Collection[str],
    settings: Collection[str],
    table: str,
    known: Collection[str],
    idle: Mapping[str, str],
) -> Iterator[str]:
    """As `unused_tables`, for environment variables: Heretic reads its own settings from such as HERETIC_MODEL."""

    settings = [name for name in settings if name not in idle]
    for variable in variables:
        prefix, found, name = variable.lower().partition("heretic_")
        if prefix or not found or name in known:
            continue
        scorer = next(
            (
                plugin
                for plugin in SCORERS
                if _letters(name).startswith(f"scorer{_letters(plugin)}")
            ),
            None,
        )
        rest = re.sub(r"^(modifier_+)?contrast(_?abliteration)?(_+|$)", "", name)
        if rest in idle:
            meant: str | None = None
            yield f"The environment variable {variable} has no effect under Heretic 2.0, where {idle[rest]}: remove it."
        elif scorer:
            meant = f"[scorer.{scorer}]"
        elif name in NAMESPACES or not rest:
            meant = table
        else:
            # Other variables of this package begin in the same way.
            setting = own_setting(rest, settings, (), 1.0 if rest == name else LIKE)
            meant = f"{setting} in {table}" if setting else None
        if meant:
            yield (
                f"The environment variable {variable} has no effect: did you mean {meant} of config.toml?"
            )
