# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Tiers and coherence against human annotations.

Reads every `xstest_v2_completions_*.csv` of a folder (XSTest v2, Röttger et al., NAACL 2024; columns `id`, `prompt`,
`completion`, `final_label`) and prints, per model and for all: the confusion matrix, three-way agreement, refused or
not beside Heretic's own markers, false refusals of full answers; then the entropies behind the coherence threshold.

    python benchmarks/tiers.py [--data FOLDER] [--cross-validate] [--disagreements] [--json FILE]

With --cross-validate, the numbers in the decisions (`Limits`) are chosen on one model's completions and measured on
those of the others, for every model in turn. The rules themselves cannot be chosen that way.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from heretic.config import Settings
from rich.console import Console
from rich.table import Table

from heretic_contrast.evaluation.statistics import wilson_interval
from heretic_contrast.files import write_text_atomically
from heretic_contrast.tiers.coherence import (
    ENTROPY_THRESHOLD,
    has_loop,
    is_coherent,
    normalized_bigram_entropy,
    split_words,
)
from heretic_contrast.tiers.responses import Limits, Tier, explain_response

LABELS = {
    "1_full_compliance": Tier.COMPLY,
    "2_full_refusal": Tier.REFUSE,
    "3_partial_refusal": Tier.EVASIVE,
}
MARKERS: list[str] = Settings.model_fields["refusal_markers"].default
# A sweep cuts responses at 50 tokens, which are about 40 words.
CUT_WORDS = 40
# What each limit is multiplied by in the search.
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Judged:
    """A completion with the tier that people gave it, ours, and Heretic's verdict."""

    model: str
    identifier: str
    prompt: str
    completion: str
    human: Tier
    tier: Tier
    decision: str
    marked: bool


def is_marked(response: str) -> bool:
    """Whether Heretic 1.4 counts a response as a refusal: its markers, on text prepared as it prepares it."""
    if not response.strip():
        return True
    text = " ".join(response.lower().replace("*", "").replace("’", "'").split())
    return any(marker.lower() in text for marker in MARKERS)


def cut(text: str) -> str:
    """A completion as a sweep would have cut it."""
    return " ".join(text.split(" ")[:CUT_WORDS])


def judge(path: Path, shortened: bool = False) -> list[Judged]:
    """Judges all completions of one file, whole or cut."""
    model = path.stem.removeprefix("xstest_v2_completions_")
    judged = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            completion = cut(row["completion"]) if shortened else row["completion"]
            explanation = explain_response(row["prompt"], completion)
            judged.append(
                Judged(
                    model=model,
                    identifier=row["id"],
                    prompt=row["prompt"],
                    completion=completion,
                    human=LABELS[row["final_label"]],
                    tier=explanation.tier,
                    decision=explanation.decision,
                    marked=is_marked(completion),
                )
            )
    return judged


def summarize(judged: Sequence[Judged]) -> dict[str, object]:
    """Counts of one model: confusion matrix, and successes of n for every proportion."""
    n = len(judged)
    full = [case for case in judged if case.human is Tier.COMPLY]
    return {
        "confusion": {
            str(human): {
                str(tier): sum(case.human is human and case.tier is tier for case in judged)
                for tier in Tier
            }
            for human in Tier
        },
        "three-way agreement": (sum(case.human is case.tier for case in judged), n),
        "refused fully or not": (
            sum((case.human is Tier.REFUSE) == (case.tier is Tier.REFUSE) for case in judged),
            n,
        ),
        "refused fully or not, Heretic's markers": (
            sum((case.human is Tier.REFUSE) == case.marked for case in judged),
            n,
        ),
        "refused in part or not": (
            sum((case.human is Tier.COMPLY) == (case.tier is Tier.COMPLY) for case in judged),
            n,
        ),
        "refused in part or not, Heretic's markers": (
            sum((case.human is not Tier.COMPLY) == case.marked for case in judged),
            n,
        ),
        "false refusals of full answers": (
            sum(case.tier is Tier.REFUSE for case in full),
            len(full),
        ),
        "false refusals of full answers, Heretic's markers": (
            sum(case.marked for case in full),
            len(full),
        ),
    }


def percent(successes: int, n: int) -> str:
    """A proportion with its Wilson interval."""
    low, high = wilson_interval(successes, n)
    share = f"{successes / n:.1%}" if n else "none"
    return f"{share} ({low:.1%} to {high:.1%}; {successes} of {n})"


def print_summary(console: Console, model: str, summary: dict[str, object]) -> None:
    """One confusion matrix and the proportions below it."""
    console.print(f"[bold]{model}[/]")
    table = Table()
    table.add_column("people \\ classifier")
    for tier in Tier:
        table.add_column(str(tier), justify="right")
    confusion = summary["confusion"]
    assert isinstance(confusion, dict)
    for human, counts in confusion.items():
        table.add_row(human, *(str(count) for count in counts.values()))
    console.print(table)
    for name, value in summary.items():
        if isinstance(value, tuple):
            console.print(f"  {name}: {percent(*value)}", highlight=False)
    console.print()


def agreement(judged: Sequence[Judged], limits: Limits) -> int:
    """How many completions get the tier that people gave them."""
    return sum(
        explain_response(case.prompt, case.completion, limits).tier is case.human for case in judged
    )


def candidates(limits: Limits, name: str) -> list[Limits]:
    """The limits with one of them at other values, itself unchanged first."""
    value = getattr(limits, name)
    values = [value]
    for factor in FACTORS:
        # Counts stay whole, and shares at most 1.
        if isinstance(value, int):
            scaled = max(1, round(value * factor))
        else:
            scaled = min(1.0, value * factor)
        if scaled not in values:
            values.append(scaled)
    return [replace(limits, **{name: scaled}) for scaled in values]


def choose_limits(judged: Sequence[Judged]) -> Limits:
    """The limits that agree best with people, changed one at a time until nothing improves."""
    best = Limits()
    score = agreement(judged, best)
    improved = True
    while improved:
        improved = False
        for field in fields(Limits):
            for limits in candidates(best, field.name)[1:]:
                if (other := agreement(judged, limits)) > score:
                    best, score, improved = limits, other, True
    return best


def cross_validate(console: Console, by_model: dict[str, list[Judged]]) -> None:
    """Chooses the limits on one model and measures them on the others."""
    table = Table(title="Three-way agreement with limits chosen on one model")
    for heading in ("chosen on", "changed limits", "there", "on the others", "as shipped, there"):
        table.add_column(heading)
    table.add_column("as shipped, on the others")
    for model, chosen_on in by_model.items():
        others = [case for name, judged in by_model.items() if name != model for case in judged]
        limits = choose_limits(chosen_on)
        changed = [
            f"{field.name} {getattr(limits, field.name):g}"
            for field in fields(Limits)
            if getattr(limits, field.name) != getattr(Limits(), field.name)
        ]
        shares = [
            f"{agreement(judged, given) / max(1, len(judged)):.1%}"
            for given in (limits, Limits())
            for judged in (chosen_on, others)
        ]
        table.add_row(model, ", ".join(changed) or "none", *shares)
    console.print(table)

    table = Table(title="Three-way agreement on all models with one limit changed")
    table.add_column("limit")
    table.add_column("value: agreement")
    everything = [case for judged in by_model.values() for case in judged]
    for field in fields(Limits):
        varied = sorted(
            candidates(Limits(), field.name), key=lambda item: getattr(item, field.name)
        )
        table.add_row(
            field.name,
            ", ".join(
                f"{getattr(limits, field.name):g}: {agreement(everything, limits) / len(everything):.1%}"
                for limits in varied
            ),
        )
    console.print(table)


def degenerate(text: str, kind: str, generator: random.Random) -> str:
    """A text broken in one way: a real beginning of 15 words, then repetition up to 45 words."""
    words = text.split()
    if kind == "few words":
        pool = generator.sample(words, min(4, len(words)))
        return " ".join(words[:15] + generator.choices(pool, k=30))
    lengths = {"loop of one word": 1, "loop of a phrase": 4, "loop of a sentence": 10}
    start = generator.randrange(max(1, len(words) - lengths[kind]))
    phrase = words[start : start + lengths[kind]]
    # Four copies of the longest loop are more than 30 words.
    return " ".join(words[:15] + (phrase * 40)[:40])


def measure_coherence(judged: Sequence[Judged]) -> dict[str, dict[str, float | int]]:
    """Entropies and verdicts on real completions, whole and cut, and on degenerate ones."""
    generator = random.Random(0)
    completions = [case.completion for case in judged]
    texts = {
        "whole": completions,
        f"cut at {CUT_WORDS} words": [cut(text) for text in completions],
    }
    for kind in ("loop of one word", "loop of a phrase", "loop of a sentence", "few words"):
        texts[kind] = [degenerate(text, kind, generator) for text in completions]
    result: dict[str, dict[str, float | int]] = {}
    for name, versions in texts.items():
        entropies = sorted(normalized_bigram_entropy(text) for text in versions)
        result[name] = {
            "texts": len(versions),
            "incoherent": sum(not is_coherent(text) for text in versions),
            "looping": sum(has_loop(text) for text in versions),
            "median words": sorted(len(split_words(text)) for text in versions)[len(versions) // 2],
            "lowest entropy": entropies[0],
            "1 % quantile": entropies[len(entropies) // 100],
            "median": entropies[len(entropies) // 2],
            "highest entropy": entropies[-1],
        }
    return result


def print_coherence(console: Console, measured: dict[str, dict[str, float | int]]) -> None:
    """Table of the coherence figures."""
    table = Table(
        title=f"Normalized bigram entropy; incoherent below {ENTROPY_THRESHOLD}, or when looping"
    )
    table.add_column("completions")
    for name in next(iter(measured.values())):
        table.add_column(name, justify="right")
    for name, row in measured.items():
        table.add_row(name, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    """Runs the comparison."""
    default = os.environ.get("HERETIC_CONTRAST_SHARED_DATA")
    root = Path(default) if default else Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description="Tiers and coherence against human annotations.")
    parser.add_argument("--data", type=Path, default=root / "xstest", help="folder of XSTest v2")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--disagreements", action="store_true", help="list the disagreements with their decision"
    )
    parser.add_argument(
        "--cross-validate",
        action="store_true",
        help="choose the limits on one model, measure on the others",
    )
    arguments = parser.parse_args()

    paths = sorted(arguments.data.glob("xstest_v2_completions_*.csv"))
    if not paths:
        sys.exit(f"{arguments.data} has no xstest_v2_completions_*.csv: name the folder by --data.")
    console = Console()
    by_model = {path.stem.removeprefix("xstest_v2_completions_"): judge(path) for path in paths}
    everything = [case for judged in by_model.values() for case in judged]
    shortened = [case for path in paths for case in judge(path, shortened=True)]
    groups = {
        **by_model,
        "all models": everything,
        f"all models, cut at {CUT_WORDS} words (people saw all)": shortened,
    }
    summaries = {model: summarize(judged) for model, judged in groups.items()}
    for model, summary in summaries.items():
        print_summary(console, model, summary)
    coherence = measure_coherence(everything)
    print_coherence(console, coherence)
    if arguments.cross_validate:
        cross_validate(console, by_model)
    if arguments.disagreements:
        for case in everything:
            if case.human is not case.tier:
                console.print(
                    f"{case.model} {case.identifier}: people {case.human}, classifier {case.tier} ({case.decision})"
                )
    if arguments.json is not None:
        figures = {"tiers": summaries, "coherence": coherence}
        write_text_atomically(arguments.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
