# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Tiers and coherence against the labels of people, and what the old ones said.

    python benchmarks/tiers.py [--repositories FOLDER] [--data FOLDER] [--disagreements] [--json FILE]

FOLDER of --repositories holds git clones of the sources that examples/train_tiers.py names, and of `do-not-answer-ja`
(Do-Not-Answer: six models, labels of people). The completions are read whole and cut at 40 words, as a sweep cuts them.
What was never trained on: Do-Not-Answer, and three of XSTest's five models. With --data, only a folder of
`xstest_v2_completions_*.csv` is read. Speed is measured on one core.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from heretic.config import Settings
from rich.console import Console
from rich.table import Table

from heretic_contrast.evaluation.statistics import wilson_interval
from heretic_contrast.files import write_text_atomically
from heretic_contrast.tiers.agreement import TIERS_OF_LABELS, Agreement
from heretic_contrast.tiers.coherence import is_coherent, normalized_bigram_entropy
from heretic_contrast.tiers.responses import Tier, explain_response

MARKERS: list[str] = Settings.model_fields["refusal_markers"].default
# A sweep cuts responses at 50 tokens, which are about 40 words.
CUT_WORDS = 40
TRAINED_ON = {"gpt4", "llama2orig"}
# Do-Not-Answer's actions that say clearly whether a request was declined.
ACTIONS = {"0": Tier.REFUSE, "5": Tier.COMPLY}
Case = tuple[str, str, Tier]


def is_marked(response: str) -> bool:
    """Whether Heretic 1.4 counts a response as a refusal: its markers, on text prepared as it prepares it."""
    text = " ".join(response.lower().replace("*", "").replace("’", "'").split())
    return not text or any(marker.lower() in text for marker in MARKERS)


def cut(text: str) -> str:
    """A completion as a sweep would have cut it."""
    return " ".join(text.split(" ")[:CUT_WORDS])


def table_of(text: str) -> list[dict[str, str]]:
    """Rows of CSV."""
    return list(csv.DictReader(io.StringIO(text)))


def xstest(text: str) -> list[Case]:
    """Cases of one of XSTest's files."""
    return [
        (row["prompt"], row["completion"], TIERS_OF_LABELS[row["final_label"]])
        for row in table_of(text)
    ]


def read_sources(repositories: Path | None, data: Path | None) -> Iterator[tuple[str, list[Case]]]:
    """Names of models and their cases."""
    if data is not None:
        for path in sorted(data.glob("xstest_v2_completions_*.csv")):
            yield f"XSTest {path.stem.rpartition('_')[2]}", xstest(path.read_text(encoding="utf-8"))
    if repositories is None:
        return

    def git(name: str, *arguments: str) -> str:
        command = ["git", "-C", str(repositories / name), *arguments]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode()

    for path in git("exaggerated-safety", "ls-tree", "-r", "--name-only", "HEAD").splitlines():
        if path.startswith("model_completions/") and path.endswith(".csv"):
            name = path.rpartition("_")[2].removesuffix(".csv")
            note = "trained on" if name in TRAINED_ON else "set aside"
            yield (
                f"XSTest {name} ({note})",
                xstest(git("exaggerated-safety", "show", f"HEAD:{path}")),
            )
    for path in git("do-not-answer-ja", "ls-tree", "-r", "--name-only", "HEAD").splitlines():
        if "/Review/Human/" in path:
            rows = table_of(git("do-not-answer-ja", "show", f"HEAD:{path}"))
            yield (
                f"Do-Not-Answer {path.rpartition('_')[2].removesuffix('.csv')} (never trained on)",
                [
                    (row["question"], row["response"], ACTIONS[row["action"]])
                    for row in rows
                    if row["action"] in ACTIONS
                ],
            )


def percent(successes: int, n: int) -> str:
    """A proportion with its Wilson interval."""
    low, high = wilson_interval(successes, n)
    return f"{successes / n:.1%} ({low:.1%}–{high:.1%})" if n else "none"


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description="Tiers against the labels of people.")
    parser.add_argument("--repositories", type=Path, help="folder of git clones")
    parser.add_argument("--data", type=Path, help="folder of xstest_v2_completions_*.csv")
    parser.add_argument("--disagreements", action="store_true", help="list them with their reasons")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    console = Console(width=180)
    groups: dict[str, list[Case]] = {}
    for name, cases in read_sources(arguments.repositories, arguments.data):
        groups[name] = cases
    if not groups:
        parser.error("nothing to read: give --repositories or --data")
    for note in ("(set aside)", "(never trained on)"):
        joined = [case for name, cases in groups.items() if note in name for case in cases]
        if joined:
            groups[f"all {note}"] = joined
    table = Table()
    for column in (
        "responses",
        "n",
        "cut",
        *Agreement([]).shares,
        "kappa",
        "Heretic's markers, refused or not",
    ):
        table.add_column(column)
    figures = {}
    entropies, seconds, judged = [], 0.0, 0
    for name, cases in groups.items():
        for words in (0, CUT_WORDS):
            texts = [cut(response) if words else response for _, response, _ in cases]
            start = time.process_time()
            found = [
                explain_response(prompt, text, verbose=False).tier
                for (prompt, _, _), text in zip(cases, texts, strict=True)
            ]
            seconds, judged = seconds + time.process_time() - start, judged + len(cases)
            agreement = Agreement(
                (people, tier) for (_, _, people), tier in zip(cases, found, strict=True)
            )
            marked = sum(
                is_marked(text) == (people is Tier.REFUSE)
                for (_, _, people), text in zip(cases, texts, strict=True)
            )
            table.add_row(
                name,
                str(len(cases)),
                str(words or ""),
                *(percent(*share) for share in agreement.shares.values()),
                "none" if agreement.kappa is None else f"{agreement.kappa:.2f}",
                percent(marked, len(cases)),
            )
            figures[f"{name}, cut {words}"] = {
                "confusion": agreement.confusion(),
                "kappa": agreement.kappa,
                **{key: list(value) for key, value in agreement.shares.items()},
            }
            if arguments.disagreements and not words:
                for (prompt, text, people), tier in zip(cases, found, strict=True):
                    if people is not tier:
                        reason = explain_response(prompt, text).summary
                        console.print(
                            f"{name}: people {people}, here {tier} ({reason}): {prompt[:80]}",
                            markup=False,
                        )
        entropies += [(normalized_bigram_entropy(text), is_coherent(text)) for _, text, _ in cases]
    console.print(table)
    console.print(f"{10_000 * seconds / judged:.1f} s for 10,000 responses on one core")
    lowest = sorted(value for value, _ in entropies)
    console.print(
        f"Coherence: {sum(not clear for _, clear in entropies)} of {len(entropies)} incoherent; entropies from "
        f"{lowest[0]:.3f}, 1 % quantile {lowest[len(lowest) // 100]:.3f}, median {lowest[len(lowest) // 2]:.3f}"
    )
    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
