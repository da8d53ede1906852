# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What in `config.toml` and the environment looks meant for this package and has no effect.

Heretic 2.0 drops tables that no plugin reads, and keys that nobody knows, without a word. Settings of Heretic itself and
tables of other plugins are nobody's business here.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic_settings import BaseSettings, TomlConfigSettingsSource

from ..settings import ContrastSettings, nearest

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
    "storage": "its study is kept in its own checkpoint",
    "warm_start": "its study begins by itself",
    "patience": "its study runs all of its trials",
    "finalist_prompts": "its menu shows what its scorers have found",
    "divergence": "the scorer TeacherForcedDivergence takes its place",
    "divergence_tokens": "n_tokens in [scorer.TeacherForcedDivergence] takes its place",
    "false_refusals": "the scorer FalseRefusals takes its place",
    "max_false_refusals": "its studies have no limits",
    "sensitive_prompts": "prompts in [scorer.FalseRefusals] takes its place",
    "refusal_classifier": "the scorer RefusalTiers takes its place",
    "counted_tiers": "counted_tiers in [scorer.RefusalTiers] takes its place",
    "text_classifier": "text_classifier in [scorer.RefusalTiers] takes its place",
    "text_classifier_labels": "text_classifier_labels in [scorer.RefusalTiers] takes its place",
    "text_classifier_reads_prompt": "text_classifier_reads_prompt in [scorer.RefusalTiers] takes its place",
    "judge_model": "judge_model in [scorer.RefusalTiers] takes its place",
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


@dataclass(frozen=True)
class Unused:
    """
    Finds what stands somewhere for this package and is not read; each method yields a sentence for each such thing.

    `settings`: names of the settings of `plugin`. `known`: names of Heretic's own settings. `named`: the plugins that are loaded (see
    `named_plugins`), by the table that theirs belong into. `idle`: settings of the plugin that have no effect, and why.
    """

    plugin: str
    settings: Collection[str]
    known: Collection[str]
    named: Mapping[str, Collection[tuple[str, str | None]]]
    idle: Mapping[str, str]

    @property
    def table(self) -> str:
        """The table that the plugin's settings belong into."""

        return f"[{PLUGINS[self.plugin]}.{self.plugin}]"

    @property
    def effective(self) -> list[str]:
        """The settings that have an effect."""

        return [name for name in self.settings if name not in self.idle]

    def setting(self, name: str, others: Collection[str] = (), cutoff: float = LIKE) -> str | None:
        """Returns the setting that a name is much like, and its table; None where none is, or another name is as much."""

        found = nearest(name, [*self.effective, *others], cutoff)
        return f"{found} in {self.table}" if found and found not in others else None

    def in_file(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Looks at a configuration."""

        for name, value in config.items():
            tables = value if isinstance(value, dict) else {}
            if name in NAMESPACES:
                if not isinstance(value, dict):
                    yield f'"{name}" in config.toml must hold tables, such as {self.table}: correct it.'
                for inner, inner_value in tables.items():
                    yield from self._in_namespace(name, inner, inner_value)
                continue
            for inner, inner_value in tables.items():
                meant = own_table(inner) if isinstance(inner_value, dict) else None
                if meant:
                    yield _not_read(_table(name, inner), meant)
            if name not in self.known:
                yield from self._at_the_top(name, value)
            elif name in NAMESPACES.values():
                yield from self._beside_plugins(name, value)

    def _at_the_top(self, name: str, value: Any) -> Iterator[str]:
        """Looks at a name that Heretic does not know."""

        is_table = isinstance(value, dict)
        shown = _table(name) if is_table else f'"{name}"'
        head, _, last = name.rpartition(".")
        table = own_table(head)
        meant = own_table(name)
        if table:
            meant = (self.setting(last, self.known) if table == self.table else None) or table
        if name in self.idle:
            yield f'The setting "{name}" in config.toml has no effect under Heretic 2.0, where {self.idle[name]}: remove it.'
            return
        loaded = {plugin for plugin, _ in named_plugins(value)}
        if not meant and name in NAMESPACES.values() and loaded & set(PLUGINS):
            yield f'"{name}" in config.toml has no effect, because this Heretic has no {name}: use Heretic 2.0, or remove it.'
            return
        # A table may be anybody's; it is a setting's where it has just its name.
        meant = (
            meant
            or FORMER_POOLS.get(name)
            or self.setting(name, self.known, 1.0 if is_table and value else LIKE)
        )
        if meant:
            yield _not_read(shown, meant)

    def _in_namespace(self, namespace: str, name: str, value: Any) -> Iterator[str]:
        """Looks at what stands below `[modifier]` or `[scorer]`."""

        where = _table(namespace, name)
        named = self.named[namespace]
        plugin, _, instance = name.partition("_")
        if PLUGINS.get(plugin) == namespace and isinstance(value, dict):
            if instance and (plugin, instance) not in named:
                others = sorted(other for known, other in named if known == plugin and other)
                close = nearest(instance, others)
                table = f"{plugin}_{close}" if close else plugin
                yield (
                    f"config.toml has {where}, but no instance_name in {NAMESPACES[namespace]} is {instance}: "
                    f"did you mean [{namespace}.{table}]?"
                )
            if plugin == self.plugin:
                yield from self._in_own_table(f"{namespace}.{name}", value)
        elif PLUGINS.get(name) == namespace:
            yield f"{where} in config.toml must be a table of settings: correct it."
        elif not any(name in (known, f"{known}_{other}") for known, other in named):
            is_table = isinstance(value, dict)
            meant = own_table(name) or (None if is_table else self.setting(name))
            if meant:
                yield _not_read(where if is_table else f'"{name}" in [{namespace}]', meant)

    def _in_own_table(self, where: str, table: Mapping[str, Any]) -> Iterator[str]:
        """Looks at the keys of a table of the plugin's."""

        named = self.named.get(PLUGINS[self.plugin], ())
        instances = [instance for plugin, instance in named if plugin == self.plugin]
        for key, value in table.items():
            if key in instances:
                yield _not_read(f"[{where}.{key}]", f"[{where}_{key}]")
            elif key in self.idle:
                yield f'The setting "{key}" in [{where}] has no effect under Heretic 2.0, where {self.idle[key]}: remove it.'
            elif key not in self.settings:
                close = nearest(key, self.effective)
                yield f'There is no setting "{key}" in [{where}]: did you mean "{close}"?'
            elif key == "contrast" and isinstance(value, dict):
                # The directions that a scorer sweeps.
                names, idle = ContrastSettings.model_fields, ONLY_UNDER_14
                inner = replace(self, settings=names, idle=idle, named={})
                yield from inner._in_own_table(f"{where}.contrast", value)

    def _beside_plugins(self, name: str, entries: Any) -> Iterator[str]:
        """Looks at the entries of `modifiers` or `scorers`."""

        read = ["plugin", "instance_name", "optimization"]
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and class_name(entry.get("plugin")) in PLUGINS:
                for key in entry:
                    if key not in read:
                        meant = self.setting(key, read) or str(nearest(key, read))
                        yield _not_read(f'"{key}" in {name}', meant)

    def in_environment(self, known: Collection[str]) -> Iterator[str]:
        """Looks at environment variables. `known`: what Heretic reads, its own settings from such as HERETIC_MODEL."""

        for variable in os.environ:
            prefix, found, name = variable.lower().partition("heretic_")
            if prefix or not found or name in known:
                continue
            letters = _letters(name)
            scorers = (known for known in SCORERS if letters.startswith(f"scorer{_letters(known)}"))
            scorer = next(scorers, None)
            rest = re.sub(r"^(modifier_+)?contrast(_?abliteration)?(_+|$)", "", name)
            if rest in self.idle:
                yield f"The environment variable {variable} has no effect under Heretic 2.0, where {self.idle[rest]}: remove it."
                continue
            if scorer:
                meant: str | None = f"[scorer.{scorer}]"
            elif name in NAMESPACES or not rest:
                meant = self.table
            else:
                # Other variables of this package begin in the same way.
                meant = self.setting(rest, cutoff=1.0 if rest == name else LIKE)
            if meant:
                yield f"The environment variable {variable} has no effect: did you mean {meant} of config.toml?"


def _table(*names: str) -> str:
    """Returns a table as it stands in the file, where a name that holds a dot has quotes."""

    parts = [name if re.fullmatch(r"[\w-]+", name) else f'"{name}"' for name in names]
    return f"[{'.'.join(parts)}]"


def _not_read(what: str, meant: str) -> str:
    return f"config.toml has {what}, which nothing reads: did you mean {meant}?"
