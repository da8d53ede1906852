# SPDX-License-Identifier: AGPL-3.0-or-later

"""docs/maps.md against the results that are stored beside it."""

import json

from tests.documents import ROOT

MEASURES = {
    "## Cosine with the class's difference in means": "to_mean",
    "## Cosine between two seeds": "between_seeds",
    "## Share of the class's prompts that the densest neuron wins": "share",
}


def test_tables_are_the_stored_medians() -> None:
    results = json.loads((ROOT / "docs" / "maps.json").read_text(encoding="utf-8"))
    measure, found = None, set()
    for line in (ROOT / "docs" / "maps.md").read_text(encoding="utf-8").splitlines():
        measure = MEASURES.get(line, measure)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if measure is None or cells[0] not in results["builtin:refuser"]:
            continue
        expected = [f"{result[cells[0]][measure][1]:.2f}" for result in results.values()]
        assert cells[1:] == expected, f"{measure} of {cells[0]}"
        found.add((measure, cells[0]))
    assert len(found) == len(MEASURES) * len(results["builtin:refuser"])
