# SPDX-License-Identifier: AGPL-3.0-or-later

"""Where directions come from, looked at before a model is loaded, and which prompts nothing may be judged on after that."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape

from ..errors import one_line
from ..files import digest
from ..language_model import LanguageModel, Progress
from ..prompts import Prompt, load_pool, text_digest
from ..settings import ContrastSettings, PromptSources
from .directions import Directions
from .extraction import extract, names_before_extraction
from .pools import Log, Pools, load_plain_pools, load_pools

ShowProgress = Callable[[], AbstractContextManager[Progress]]
"""Shows a progress bar for as long as the context lasts."""


@dataclass(frozen=True)
class UsedPrompts:
    """
    The prompts that directions came from, on which nothing is judged.

    `digests`: of their texts. `unknown`: the names of configurations whose directions do not say what they came from.
    """

    digests: frozenset[str]
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, configurations: Mapping[str, Directions]) -> "UsedPrompts":
        known = {
            name: directions.provenance["known_prompts"]
            for name, directions in configurations.items()
            if "known_prompts" in directions.provenance
        }
        return cls(
            frozenset(digest for digests in known.values() for digest in digests),
            tuple(name for name in configurations if name not in known),
        )

    def leave_out(self, prompts: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], int]:
        """Returns the other prompts, and how many were left out."""

        used = self.among(prompts)
        kept = tuple(prompt for prompt in prompts if prompt.text not in used)
        return kept, len(prompts) - len(kept)

    def among(self, prompts: Sequence[Prompt]) -> set[str]:
        """Returns the texts of those of the prompts that directions came from."""

        return {prompt.text for prompt in prompts if text_digest(prompt.text) in self.digests}

    def sentences(self) -> list[str]:
        return [
            f"It cannot be known which prompts the directions of {name} were extracted from, since they do not say so: those among "
            "the evaluation prompts are not left out. Directions that are extracted again do."
            for name in self.unknown
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values: the number of the prompts and their digest, null where neither is known."""

        known = bool(self.digests) or not self.unknown
        return {
            "count": len(self.digests) if known else None,
            "digest": digest(sorted(self.digests)) if known else None,
            "unknown": list(self.unknown),
            "notes": self.sentences(),
        }


class DirectionSources:
    """
    Where the directions of some configurations come from, by name: everything that is known before a model is loaded.

    `pools`: of configurations whose directions are extracted. `loaded`: the directions of the others. `harmful`, `bulk`:
    the prompts that a response prefix is looked for with, and activations are observed on; empty where neither is needed.
    `response_prefix`: None where it is looked for. `where`: as in `load_pools`. Raises `ContrastError` as `load_pools` and
    `Directions.load` do.
    """

    def __init__(
        self,
        settings: Mapping[str, ContrastSettings],
        response_prefix: str | None,
        where: str = "--contrast.",
        needs_prompts: bool = False,
    ) -> None:
        self.settings = dict(settings)
        self.pools: dict[str, Pools] = {}
        self.loaded: dict[str, Directions] = {}
        known: dict[str, list[Prompt]] = {}

        def read(source: PromptSources, what: str, where: str) -> list[Prompt]:
            key = repr(source)
            if key not in known:
                known[key] = load_pool(source, what, where)
            return known[key]

        for name, item in settings.items():
            if item.directions is None:
                self.pools[name] = load_pools(item, where, read)
            else:
                self.loaded[name] = Directions.load(item.directions)
        self.harmful: Sequence[Prompt] = ()
        self.bulk: Sequence[Prompt] = ()
        if self.pools:
            first = next(iter(self.pools.values()))
            self.harmful, self.bulk = first.harmful, first.bulk
        elif needs_prompts or (response_prefix is None and self.response_prefix is None):
            self.harmful, self.bulk = load_plain_pools(next(iter(settings.values())), where)

    def names(self, configuration: str) -> tuple[str, ...] | None:
        """Returns the names of the directions of a configuration, so far as they are known before a model is loaded."""

        if configuration in self.loaded:
            return self.loaded[configuration].names
        return names_before_extraction(self.pools[configuration], self.settings[configuration])

    @property
    def response_prefix(self) -> str | None:
        """The response prefix that loaded directions were extracted with, or None where no file says it."""

        for directions in self.loaded.values():
            if "response_prefix" in directions.provenance:
                return str(directions.provenance["response_prefix"])
        return None

    def named_pools(self) -> dict[str, tuple[Prompt, ...]]:
        """Returns the pools of the one configuration by name; none where its directions come from a file."""

        return {name: pool for pools in self.pools.values() for name, pool in pools.named().items()}

    def used_prompts(self) -> UsedPrompts:
        """Returns the prompts that the directions come from, before they are extracted."""

        used = UsedPrompts.of(self.loaded)
        fitted = [pools.digests() for pools in self.pools.values()]
        return replace(used, digests=used.digests.union(*fitted))

    def directions(
        self,
        model: LanguageModel,
        log: Log,
        show_progress: ShowProgress,
        max_response_length: int,
        done: Callable[[str, Directions], None] = lambda name, directions: None,
    ) -> dict[str, Directions]:
        """
        Returns the directions of every configuration for a loaded model.

        `done`: told of each as soon as it is there. Raises `ContrastError` as `extract` does, or when loaded directions
        belong to another model.
        """

        for name, directions in self.loaded.items():
            directions.require_model(model, str(self.settings[name].directions))
        found = {}
        for name, settings in self.settings.items():
            log()
            if name in self.loaded:
                log(
                    f"Taking directions of [bold]{escape(name)}[/] from {escape(str(settings.directions))}..."
                )
                found[name] = self.loaded[name]
                # Outputs are ablated, not weights.
                if said := settings.ablation_of_file(
                    but={"row_normalization", "full_normalization_lora_rank"}
                ):
                    log(f"* Ablation of the directions file: [bold]{escape(said)}[/]")
                for note in found[name].asked_otherwise(model, str(settings.directions)):
                    log(f"* [yellow]{escape(one_line(note))}[/]")
            else:
                log(f"Extracting directions of [bold]{escape(name)}[/]...")
                with show_progress() as progress:
                    found[name] = extract(
                        model, self.pools[name], settings, log, progress, max_response_length
                    )
            done(name, found[name])
        return found
