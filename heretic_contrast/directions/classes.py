# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Which classes of harmful prompts get a direction of their own, and what becomes of those that are too small for a map.

Decided by the prompts' classes alone, so that it can be said before a model is loaded.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ContrastError
from ..prompts.categories import MISCELLANEOUS
from ..settings import ContrastSettings

NO_CLASS = ""
"""The class of matched prompts that belong to none that gets a direction."""


@dataclass(frozen=True)
class ClassSelection:
    """
    The classes that get directions.

    `kept`: indices of the harmful prompts that directions are fitted to, in order. `harmful_classes`: the class of each of
    them. `matched_classes`: the class of each matched prompt. `note`: what became of small classes, or "".
    """

    kept: tuple[int, ...]
    harmful_classes: tuple[str, ...]
    matched_classes: tuple[str, ...]
    note: str = ""

    @property
    def names(self) -> list[str]:
        return sorted(set(self.harmful_classes))


def select_classes(
    harmful_classes: Sequence[str], matched_classes: Sequence[str], settings: ContrastSettings
) -> ClassSelection:
    """
    Returns the classes that get directions: applies `classes`, `exclude_categories` and `small_classes`.

    Where even all small classes together are too small, they are left out, unless nothing else remains.

    Raises `ContrastError` when an excluded category does not exist, a class is too small, or none is left.
    """

    kept = not_excluded(harmful_classes, settings.exclude_categories)
    # The matched prompts of an excluded category are none of another class, even where that gets its name.
    matched_classes = [
        NO_CLASS if name in settings.exclude_categories else name for name in matched_classes
    ]
    if settings.classes == "single":
        # With one class for everything, the matched pool of that class is all that is left of it.
        matched = [name if name == NO_CLASS else "all" for name in matched_classes]
        return _selection(kept, ["all"] * len(harmful_classes), matched)
    # A map cannot tell more prompts apart than it has neurons to win them.
    needed = settings.som_rows * settings.som_columns if settings.method == "som" else 1
    counts = Counter(harmful_classes[index] for index in kept)
    small = {name: count for name, count in sorted(counts.items()) if count < needed}
    if not small:
        return _selection(kept, harmful_classes, matched_classes)
    which = f"classes with fewer than {needed} prompts"
    if settings.small_classes == "error":
        name, count = next(iter(small.items()))
        raise ContrastError(
            f'The class "{name}" has {count} prompts, fewer than the {needed} neurons of its map: give it more prompts, '
            'use a smaller map, or set small_classes to "drop" or "merge".'
        )
    if settings.small_classes == "merge":
        merged = sum(({MISCELLANEOUS: counts[MISCELLANEOUS]} | small).values())
        if merged >= needed:
            rest = {name: count for name, count in small.items() if name != MISCELLANEOUS}
            names = dict.fromkeys(small, MISCELLANEOUS)
            return _selection(
                kept,
                [names.get(name, name) for name in harmful_classes],
                [names.get(name, name) for name in matched_classes],
                f"Merged {which} into {MISCELLANEOUS} ({merged} prompts): {_listed(rest)}",
            )
        if len(small) == len(counts):
            raise ContrastError(
                f'Even merged, the class "{MISCELLANEOUS}" has {merged} prompts, fewer than the {needed} neurons of its map: '
                "give more prompts, or use a smaller map."
            )
        which += f", which have {merged} even together"
    kept = [index for index in kept if harmful_classes[index] not in small]
    if not kept:
        raise ContrastError(
            f"All classes have fewer prompts than the {needed} neurons of a map ({_listed(small)}), so that none is left: give "
            "more prompts, or use a smaller map."
        )
    return _selection(kept, harmful_classes, matched_classes, f"Left out {which}: {_listed(small)}")


def not_excluded(harmful_classes: Sequence[str], excluded: Sequence[str]) -> list[int]:
    """Returns the indices of the harmful prompts that are not left out. Raises `ContrastError` as `select_classes` does."""

    unknown = set(excluded) - set(harmful_classes)
    if unknown:
        raise ContrastError(
            f"The category {min(unknown)!r} cannot be excluded, since no harmful prompt has it: "
            f"the categories are {', '.join(sorted(set(harmful_classes)))}."
        )
    kept = [index for index, name in enumerate(harmful_classes) if name not in excluded]
    if not kept:
        raise ContrastError(
            "No class of harmful prompts is left to extract a direction from: exclude fewer, or give more prompts."
        )
    return kept


def _selection(
    kept: Sequence[int],
    harmful_classes: Sequence[str],
    matched_classes: Sequence[str],
    note: str = "",
) -> ClassSelection:
    return ClassSelection(
        tuple(kept),
        tuple(harmful_classes[index] for index in kept),
        tuple(matched_classes),
        note,
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
