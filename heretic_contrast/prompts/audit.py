# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The contamination audit (section 2.2 of the paper): how many prompts of a harmless pool touch a harm category.

A match is one category that the lexicon finds in one prompt, so a prompt may count several times; the paper
counts 859 matches in 400 prompts. A match says what a prompt is about, not that it is harmful.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..errors import ContrastError, one_line
from ..files import write_text_atomically
from ..outputs import json_lines, json_text
from . import Prompt, prompts_digest
from .categories import CATEGORIES, classify

FIRST_LABEL_RIGHT: dict[str, Any] = {"right": 200, "of": 260, "interval_95": [0.714, 0.816]}
"""
How often the lexicon's first label is right: of harmful prompts that were labelled by hand and set aside before it was
written, with the Wilson interval.
"""

FIRST_LABEL_RIGHT_IN_PUBLIC_SETS: dict[str, dict[str, Any]] = {
    "StrongREJECT": {"right": 120, "of": 154, "interval_95": [0.707, 0.837]},
    "Do-Not-Answer": {"right": 341, "of": 427, "interval_95": [0.758, 0.834]},
    "HarmBench": {"right": 66, "of": 93, "interval_95": [0.611, 0.792]},
    "JailbreakBench": {"right": 56, "of": 90, "interval_95": [0.519, 0.715]},
    "MultiJail": {"right": 174, "of": 294, "interval_95": [0.535, 0.646]},
    "AILuminate": {"right": 588, "of": 1100, "interval_95": [0.505, 0.564]},
    "SimpleSafetyTests": {"right": 58, "of": 80, "interval_95": [0.619, 0.811]},
}
"""The same by `benchmarks/categories.py`."""

READ = frozenset({"StrongREJECT", "Do-Not-Answer"})
"""The public sets whose errors were read when the lexicon was last extended."""

PAPER_MATCHES = 859
PAPER_PROMPTS = 400

N_EXAMPLES = 3
"""How many matching prompts of each category are shown."""


@dataclass(frozen=True)
class PoolAudit:
    """
    What the lexicon finds in a pool.

    `matching`: the texts of matching prompts, in order, for every category of `CATEGORIES`. `clean`: the prompts that match
    none. `digest` identifies the pool (see `prompts.prompts_digest`).
    """

    n_prompts: int
    n_matching_prompts: int
    matching: Mapping[str, Sequence[str]]
    clean: Sequence[Prompt]
    digest: str

    @property
    def n_matches(self) -> int:
        """The matches of all categories together, several per prompt counted."""

        return sum(map(len, self.matching.values()))

    @property
    def matches_per_paper_pool(self) -> float:
        """The number of matches scaled to a pool of the paper's size, 400 prompts."""

        return self.n_matches * PAPER_PROMPTS / self.n_prompts

    def to_dict(self) -> dict[str, Any]:
        """Returns the audit as plain data for JSON, with the paper's figure beside its own."""

        return {
            "n_prompts": self.n_prompts,
            "n_matching_prompts": self.n_matching_prompts,
            "n_matches": self.n_matches,
            "matches_per_400_prompts": round(self.matches_per_paper_pool, 2),
            "paper_matches_per_400_prompts": PAPER_MATCHES,
            "first_label_right": FIRST_LABEL_RIGHT,
            "first_label_right_in_public_sets": FIRST_LABEL_RIGHT_IN_PUBLIC_SETS,
            "pool_sha256": self.digest,
            "categories": {
                category: {"n_matches": len(texts), "examples": list(texts[:N_EXAMPLES])}
                for category, texts in self.matching.items()
            },
        }


def audit_pool(prompts: Sequence[Prompt]) -> PoolAudit:
    """Counts the categories that the lexicon finds in the prompts of a pool, which is not empty (paper, section 2.2)."""

    matching: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    clean = []
    for prompt in prompts:
        categories = classify(prompt.text)
        if not categories:
            clean.append(prompt)
        for category in categories:
            matching[category].append(prompt.text)
    n_matching = len(prompts) - len(clean)
    return PoolAudit(len(prompts), n_matching, matching, clean, prompts_digest(prompts))


def render(audit: PoolAudit) -> Table:
    """Returns the audit as a table for the terminal: a row per category, and the total beside the paper's."""

    low, high = FIRST_LABEL_RIGHT["interval_95"]
    unread = [
        found["right"] / found["of"]
        for name, found in FIRST_LABEL_RIGHT_IN_PUBLIC_SETS.items()
        if name not in READ
    ]
    table = Table(
        title=f"{audit.n_matching_prompts} of {audit.n_prompts} prompts touch a harm category",
        caption=(
            f"{audit.n_matches} matches, {audit.matches_per_paper_pool:.0f} per {PAPER_PROMPTS} prompts "
            f"(the paper: {PAPER_MATCHES}). On {FIRST_LABEL_RIGHT['of']} labelled harmful prompts the first category is right "
            f"in {100 * FIRST_LABEL_RIGHT['right'] / FIRST_LABEL_RIGHT['of']:.0f} % ({100 * low:.0f}–{100 * high:.0f} %), and in public "
            f"sets that it was not written on in {100 * min(unread):.0f} to {100 * max(unread):.0f} %."
        ),
        show_footer=True,
    )
    table.add_column("Category", footer="all")
    table.add_column("Matches", footer=str(audit.n_matches), justify="right")
    table.add_column("Examples")
    for category, texts in audit.matching.items():
        # Prompts are free text and may hold what looks like markup, or steers a terminal.
        examples = "\n".join(escape(one_line(text)) for text in texts[:N_EXAMPLES])
        table.add_row(category, str(len(texts)), examples)
    return table


def run_audit(prompts: Sequence[Prompt], output: Path, cleaned: Path | None = None) -> PoolAudit:
    """
    Audits the pool and writes `audit.json` into the directory `output`.

    With `cleaned` it also writes the pool without its matching prompts there, as JSON Lines: read as a pool, they
    are the same prompts.

    Raises `ContrastError` when cleaning leaves nothing, or a file cannot be written.
    """

    audit = audit_pool(prompts)
    if cleaned is not None and not audit.clean:
        raise ContrastError(
            f"All {len(prompts)} prompts of the pool touch a harm category, so nothing is left to write to {cleaned}: "
            "audit a larger pool, or leave out --cleaned."
        )
    write_text_atomically(output / "audit.json", json_text(audit.to_dict(), sort_keys=False))
    if cleaned is not None:
        write_text_atomically(cleaned, json_lines(rows_of(audit.clean)))
    return audit


def rows_of(prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
    """Yields a pool as JSON values: texts, or conversations where a prompt has a system prompt of its own or looks like one."""

    are_turns = any(
        prompt.system is not None or prompt.text.lstrip().startswith("[{") for prompt in prompts
    )
    for prompt in prompts:
        row: dict[str, Any] = {"text": prompt.text}
        if are_turns:
            turns = {"system": prompt.system, "user": prompt.text}
            said = {role: content for role, content in turns.items() if content is not None}
            row = {"messages": [{"role": role, "content": text} for role, text in said.items()]}
        if prompt.category is not None:
            row["category"] = prompt.category
        yield row
