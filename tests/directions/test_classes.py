# SPDX-License-Identifier: AGPL-3.0-or-later

"""Which classes get directions, and what becomes of small ones."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from heretic_contrast.directions.baselines import Residuals
from heretic_contrast.directions.classes import select_classes
from heretic_contrast.directions.extraction import extract_directions
from heretic_contrast.errors import ContrastError
from heretic_contrast.settings import ContrastSettings
from tests.natural_pools import MIX as NATURAL


def pool(counts: dict[str, int]) -> list[str]:
    """The classes of a pool, shuffled so that no class stands together."""

    names = [name for name, count in counts.items() for _ in range(count)]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return [names[index] for index in order]


def select(counts: dict[str, int], **settings: Any) -> Any:
    return select_classes(
        pool(counts),
        pool(counts),
        ContrastSettings(**{"method": "som", "classes": "category", **settings}),
    )


def test_a_natural_mix_fits_by_default() -> None:
    selection = select(NATURAL)
    assert Counter(selection.harmful_classes) == {
        "fraud": 78,
        "miscellaneous": 45,
        "harassment": 37,
        "hacking": 30,
        "violence": 25,
        "drugs": 14,
    }
    assert selection.matched_classes == selection.harmful_classes
    assert selection.kept == tuple(range(229))
    assert selection.note == (
        "Merged classes with fewer than 9 prompts into miscellaneous (45 prompts): self-harm 2, surveillance 4"
    )


@pytest.mark.parametrize(
    ("counts", "settings", "left", "note"),
    [
        ({"drugs": 9, "fraud": 12}, {}, {"drugs": 9, "fraud": 12}, ""),
        (
            {"drugs": 8, "fraud": 12},
            {},
            {"fraud": 12},
            "Left out classes with fewer than 9 prompts, which have 8 even together: drugs 8",
        ),
        (
            {"drugs": 8, "fraud": 12, "miscellaneous": 1},
            {},
            {"fraud": 12, "miscellaneous": 9},
            "Merged classes with fewer than 9 prompts into miscellaneous (9 prompts): drugs 8",
        ),
        (
            {"fraud": 12, "miscellaneous": 4},
            {},
            {"fraud": 12},
            "Left out classes with fewer than 9 prompts, which have 4 even together: miscellaneous 4",
        ),
        (
            {"drugs": 4, "fraud": 5},
            {},
            {"miscellaneous": 9},
            "Merged classes with fewer than 9 prompts into miscellaneous (9 prompts): drugs 4, fraud 5",
        ),
        (
            {"drugs": 8, "fraud": 12},
            {"small_classes": "drop"},
            {"fraud": 12},
            "Left out classes with fewer than 9 prompts: drugs 8",
        ),
        (
            {"drugs": 3, "fraud": 4, "hacking": 2},
            {"som_rows": 2, "som_columns": 2},
            {"fraud": 4, "miscellaneous": 5},
            "Merged classes with fewer than 4 prompts into miscellaneous (5 prompts): drugs 3, hacking 2",
        ),
        ({"drugs": 1, "fraud": 2}, {"method": "mean"}, {"drugs": 1, "fraud": 2}, ""),
        ({"drugs": 1, "fraud": 2}, {"classes": "single"}, {"all": 3}, ""),
    ],
)
def test_small_classes(
    counts: dict[str, int], settings: dict[str, Any], left: dict[str, int], note: str
) -> None:
    selection = select(counts, **settings)
    assert Counter(selection.harmful_classes) == left and selection.note == note
    assert selection.names == sorted(left)
    assert len(selection.kept) == sum(left.values())


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ({"drugs": 4, "fraud": 4}, {}, "Even merged, the class .* has 8 prompts"),
        ({"drugs": 4, "fraud": 12}, {"small_classes": "error"}, '"drugs" has 4 prompts, fewer'),
        ({"drugs": 4, "fraud": 8}, {"small_classes": "drop"}, "drugs 4, fraud 8"),
        ({"drugs": 9}, {"exclude_categories": ["drugs"]}, "No class of harmful prompts is left"),
        ({"drugs": 9}, {"exclude_categories": ["fraud"]}, "'fraud' cannot be excluded"),
    ],
)
def test_pools_that_do_not_work(
    counts: dict[str, int], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContrastError, match=message):
        select(counts, **settings)


def test_matched_prompts_of_an_excluded_category_are_in_no_merged_class() -> None:
    counts = {"drugs": 5, "fraud": 12, "hacking": 6, "miscellaneous": 20}
    selection = select(counts, exclude_categories=["miscellaneous"])
    assert Counter(selection.harmful_classes) == {"fraud": 12, "miscellaneous": 11}
    assert Counter(selection.matched_classes) == {"fraud": 12, "miscellaneous": 11, "": 20}


@pytest.mark.parametrize("baseline", ["matched", "mixed", "residualized", "unmatched"])
def test_merged_directions_are_those_of_prompts_that_were_one_class(baseline: str) -> None:
    generator = torch.Generator().manual_seed(1)
    classes = pool({"drugs": 6, "fraud": 14, "hacking": 5, "miscellaneous": 3})
    others = pool({"drugs": 3, "fraud": 9, "hacking": 7, "miscellaneous": 4, "sexual": 5})
    residuals = Residuals(
        harmful=torch.randn(28, 3, 12, generator=generator),
        harmful_classes=tuple(classes),
        bulk=torch.randn(20, 3, 12, generator=generator),
        matched=torch.randn(28, 3, 12, generator=generator),
        matched_classes=tuple(others),
    )
    names = {"drugs": "miscellaneous", "hacking": "miscellaneous"}
    by_hand = replace(
        residuals,
        harmful_classes=tuple(names.get(name, name) for name in classes),
        matched_classes=tuple(names.get(name, name) for name in others),
    )
    merged, expected = (
        extract_directions(
            item,
            ContrastSettings(
                preset=["paper-unmatched"],
                baseline=baseline,
                som_iterations=60,
                small_classes=small,
            ),
        )
        for item, small in ((residuals, "merge"), (by_hand, "error"))
    )
    assert merged.names == expected.names == ("fraud", "miscellaneous")
    assert torch.equal(merged.tensor, expected.tensor)
