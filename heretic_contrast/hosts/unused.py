# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What in `config.toml` and the environment looks meant for this package and is read by nobody.

Heretic 2.0 drops tables that no plugin reads, and keys that nobody knows, without a word. Settings of Heretic itself and
tables of other plugins are nobody's business here.
"""

import difflib
import os
import re
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, TomlConfigSettingsSource

from ..builtin import harmful_pool, harmless_pool
from ..errors import ContrastError, one_line
from ..settings import ContrastSettings, nearest

SCORERS = ("RefusalTiers", "TeacherForcedDivergence", "FalseRefusals", "FixedWeightSweep")

PLUGINS = {"ContrastAbliteration": "modifier", **dict.fromkeys(SCORERS, "scorer")}
"""The plugins of this package, and the table of `config.toml` below which each has its own."""

NAMESPACES = {"modifier": "modifiers", "scorer": "scorers"}
"""Where Heretic 2.0 looks for tables of plugins, and the setting that names the plugins to load."""

LIKE = 0.85
"""How much two names are alike, between 0 and 1, from which on one is taken for the other."""

ONLY_UNDER_14 = set(
    """
    sampler stop_dominated storage warm_start screening patience finalist_prompts divergence divergence_tokens
    false_refusals max_false_refusals sensitive_prompts refusal_classifier counted_tiers text_classifier
    text_classifier_labels text_classifier_reads_prompt judge_model
    """.split()
)
"""Settings of the modifier that have no effect under Heretic 2.0, whose studies are its own."""

OF_A_SEARCH = ONLY_UNDER_14 | {"save_directions", "search_space"}
"""Those that have no effect where directions are swept, or extracted, and no weights are searched."""

OF_HERETIC_SEARCH = set(
    """
    n_trials n_startup_trials kl_divergence_scale kl_divergence_target study_checkpoint_dir checkpoint_action trial_index
    model_action save_directory export_strategy max_shard_size evaluate_model print_responses print_residual_geometry
    plot_residuals residual_plot_path residual_plot_title residual_plot_style benchmarks refusal_markers reproduce
    collect_reproducibles
    """.split()
)
"""Those of Heretic that have none there."""

FORMER_POOLS = {"bad_evaluation_prompts", "good_evaluation_prompts"}
"""Prompts that judge trials: settings of Heretic 1.4, and of scorers in 2.0."""

SHIPPED = {
    "orthogonalize_direction": True,
    "row_normalization": "full",
    "full_normalization_lora_rank": 3,
    "winsorization_quantile": 1.0,
    "good_prompts": harmless_pool("train[:400]").model_dump(exclude_unset=True),
    "bad_prompts": harmful_pool("train[:400]").model_dump(exclude_unset=True),
}
"""What stands in the configuration that Heretic ships, of which 2.0 reads nothing any more."""


class TomlSource(TomlConfigSettingsSource):
    """Reads `config.toml` as Heretic does. Raises `ContrastError` when it cannot be read."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        try:
            super().__init__(settings_cls, toml_file="config.toml")
        except (ValueError, OSError, RecursionError) as error:
            reason = one_line(str(error))
            if isinstance(error, ValueError) and Path("config.toml").read_bytes()[:3] == BOM_UTF8:
                reason = "it begins with a byte order mark, which TOML has none of"
            raise ContrastError(
                f"config.toml in the current directory cannot be read ({reason}): correct or remove it."
            ) from error


def config_file() -> dict[str, Any]:
    return TomlSource(BaseSettings).toml_data


def without_shipped(
    config: Mapping[str, Any], known: Collection[str]
) -> tuple[dict[str, Any], str | None]:
    """Returns a configuration without what nothing reads and is as Heretic ships it, and a sentence where there is any."""

    names = []
    for name in sorted(set(config) & set(SHIPPED) - set(known)):
        value = config[name]
        if isinstance(value, dict):
            value = {key: value[key] for key in value if not key.startswith("residual_plot")}
        if value == SHIPPED[name]:
            names.append(name)
    sentence = (
        f"config.toml holds {', '.join(names)} as Heretic ships it, which has no effect: "
        "settings of the plugin stand in [modifier.ContrastAbliteration]"
    )
    kept = {name: value for name, value in config.items() if name not in names}
    return kept, sentence if names else None


def named_plugins(entries: Any) -> set[tuple[str, str | None]]:
    """Returns the plugins that `modifiers` or `scorers` name: their classes, and the names of their instances."""

    found = set()
    for entry in entries if isinstance(entries, list) else []:
        values = entry if isinstance(entry, Mapping) else getattr(entry, "__dict__", {})
        instance = values.get("instance_name")
        found.add((class_name(values.get("plugin")), None if instance is None else str(instance)))
    return found


def holds(table: Any, path: Sequence[str | int]) -> bool:
    """Returns whether a table has a value at a path, or one that takes the place of a table there."""

    for name in path:
        if not isinstance(table, dict):
            return True
        if name not in table:
            return False
        table = table[name]
    return True


def class_name(plugin: Any) -> str:
    """Returns the class in an import path, or in the path of a file."""

    return re.split(r"[.:]", str(plugin))[-1]


def own_place(plugin: str) -> str:
    return f"[{PLUGINS[plugin]}.{plugin}]"


def own_table(name: str) -> str | None:
    """Returns the table of this package that a table's name, or a part of it, is much like, or None."""

    for part in (name, name.partition("_")[0], name.rpartition(".")[2]):
        text = _letters(part).removeprefix("heretic")
        for plugin in PLUGINS:
            known = _letters(plugin)
            if (text.startswith("contrast") and known.startswith(text)) or (
                difflib.SequenceMatcher(None, text, known).ratio() > LIKE
            ):
                return own_place(plugin)
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


@dataclass(frozen=True)
class Unused:
    """
    Finds what stands somewhere for this package and is not read; each method yields a sentence for each such thing.

    `settings`: names of the settings of `plugin`. `known`: names of Heretic's own settings. `named`: the plugins that are loaded (see
    `named_plugins`), by the table that theirs belong into. `idle`: settings that have no effect.
    """

    plugin: str
    settings: Collection[str]
    known: Collection[str]
    named: Mapping[str, Collection[tuple[str, str | None]]]
    idle: Collection[str]

    def require_none(self, *configs: Mapping[str, Any], read: Collection[str] = ()) -> None:
        """Raises `ContrastError` with the first sentence. `read`: what Heretic reads of the environment beside its own settings."""

        sentences = [self._in_environment({*self.known, *read}), *map(self._in_file, configs)]
        for sentence in (sentence for found in sentences for sentence in found):
            raise ContrastError(sentence)

    @property
    def table(self) -> str:
        return own_place(self.plugin)

    def _setting(self, name: str, others: Collection[str] = (), cutoff: float = LIKE) -> str | None:
        """Returns the setting that a name is much like, and its table; None where none is, or another name is as much."""

        effective = [known for known in self.settings if known not in self.idle]
        found = nearest(name, [*effective, *others], cutoff)
        return f"{found} in {self.table}" if found and found not in others else None

    def _in_file(self, config: Mapping[str, Any]) -> Iterator[str]:
        for name, value in config.items():
            tables = value if isinstance(value, dict) else {}
            if name in NAMESPACES:
                if not isinstance(value, dict):
                    yield _not_read(_shown(value, name), self.table)
                for key, inner in tables.items():
                    yield from self._in_namespace(name, key, inner)
                continue
            for key, inner in tables.items():
                if isinstance(inner, dict) and own_table(key):
                    yield from self._unread(_shown(inner, name, key), key, inner)
            if name not in self.known:
                yield from self._unread(_shown(value, name), name, value)
            elif name in NAMESPACES.values():
                yield from self._beside_plugins(name, value)

    def _unread(self, shown: str, name: str, value: Any) -> Iterator[str]:
        head, _, last = name.rpartition(".")
        table = own_table(head) or own_table(name)
        # A table may be anybody's; it is a setting's where it has just its name.
        cutoff = 1.0 if isinstance(value, dict) and not table else LIKE
        may_be_setting = not table or own_table(head) == self.table
        setting = self._setting(last, self.known, cutoff) if may_be_setting else None
        loaded = {plugin for plugin, _ in named_plugins(value)}
        if name in {*self.idle, *FORMER_POOLS}:
            yield _idle(f"The setting {shown} in config.toml")
        elif name in NAMESPACES.values() and loaded & set(PLUGINS):
            yield (
                f"The setting {shown} in config.toml names a plugin that this Heretic cannot load, which has no {name}: install "
                "Heretic 1.4 or 2.0, or remove it."
            )
        elif setting or table:
            yield _not_read(shown, str(setting or table))

    def _in_namespace(self, namespace: str, name: str, value: Any) -> Iterator[str]:
        named = self.named[namespace]
        plugin, _, instance = name.partition("_")
        tables = [known if other is None else f"{known}_{other}" for known, other in named]
        if PLUGINS.get(plugin) == namespace and isinstance(value, dict):
            if instance and name not in tables:
                own = [table for table in tables if table.startswith(f"{plugin}_")]
                meant = nearest(name, [plugin, *sorted(own)])
                yield _not_read(_shown(value, namespace, name), f"[{namespace}.{meant}]")
            if plugin == self.plugin:
                yield from self._in_own_table(f"{namespace}.{name}", value)
        elif name not in {*tables, *(known for known, _ in named)}:
            yield from self._unread(_shown(value, namespace, name), name, value)

    def _in_own_table(self, where: str, table: Mapping[str, Any]) -> Iterator[str]:
        named = self.named.get(PLUGINS[self.plugin], ())
        for key, value in table.items():
            name = str(key).replace("-", "_")
            if (self.plugin, key) in named:
                yield _not_read(f"[{where}.{key}]", f"[{where}_{key}]")
            elif name in self.idle:
                yield _idle(f'The setting "{key}" in [{where}]')
            elif key not in self.settings:
                close = nearest(name, [known for known in self.settings if known not in self.idle])
                yield f'There is no setting "{key}" in [{where}]: did you mean "{close}"?'
            elif name == "contrast" and isinstance(value, dict):
                # The directions that a scorer sweeps, which it neither saves nor searches weights for.
                inner = replace(
                    self,
                    settings=ContrastSettings.model_fields,
                    named={},
                    idle=OF_A_SEARCH,
                )
                yield from inner._in_own_table(f"{where}.contrast", value)

    def _beside_plugins(self, name: str, entries: Any) -> Iterator[str]:
        read = ["plugin", "instance_name", "optimization"]
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and class_name(entry.get("plugin")) in PLUGINS:
                for key in (key for key in entry if key not in read):
                    meant = self._setting(key, read) or str(nearest(key, read))
                    yield _not_read(f'"{key}" in {name}', meant)

    def _in_environment(self, read: Collection[str]) -> Iterator[str]:
        """Looks at environment variables. `read`: what Heretic reads, its own settings from such as HERETIC_MODEL."""

        for variable in os.environ:
            prefix, found, name = variable.lower().partition("heretic_")
            if prefix or not found or name in read:
                continue
            scorers = (
                item for item in SCORERS if _letters(name).startswith(_letters(f"scorer{item}"))
            )
            scorer = next(scorers, None)
            rest = re.sub(r"^(modifier_+)?contrast(_?abliteration)?(_+|$)", "", name)
            if scorer:
                meant: str | None = f"[scorer.{scorer}]"
            elif name in NAMESPACES or not rest:
                meant = self.table
            else:
                # Other variables of this package begin in the same way.
                meant = self._setting(rest, cutoff=1.0 if rest == name else LIKE)
            if rest in self.idle:
                yield _idle(f"The environment variable {variable}")
            elif meant:
                yield f"The environment variable {variable} has no effect: did you mean {meant} of config.toml?"


def _shown(value: Any, *names: str) -> str:
    """Returns a table, or a key, as it stands in the file, where a name that holds a dot has quotes."""

    if not isinstance(value, dict):
        return f'"{names[-1]}"' + (f" in [{names[0]}]" if len(names) > 1 else "")
    parts = [name if re.fullmatch(r"[\w-]+", name) else f'"{name}"' for name in names]
    return f"[{'.'.join(parts)}]"


def _not_read(what: str, meant: str) -> str:
    return f"config.toml has {what}, which nothing reads: did you mean {meant}?"


def _idle(what: str) -> str:
    return f"{what} has no effect under Heretic 2.0, whose studies and scorers have settings of their own: remove it."
