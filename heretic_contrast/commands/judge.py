# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast judge`: gives tiers to the responses of a file, and compares them with people's."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from rich.table import Column, Table

from ..errors import ContrastError
from ..evaluation.statistics import percent, percents, wilson_interval
from ..files import write_text_atomically
from ..hosts.arguments import PROGRAM
from ..hosts.settings import CommandSettings, load_settings
from ..outputs import json_lines, require_writable_file
from ..prompts import is_text
from ..prompts.formats import read_file
from ..settings import TextClassifierSettings, inputs_of
from ..tiers.agreement import TIERS_OF_LABELS, Agreement
from ..tiers.coherence import is_coherent
from ..tiers.responses import Tier, explain_response

JUDGED = ("tier", "refusal_probability", "coherent", "reason")
"""What a line of the output has beside what it had."""


class JudgeSettings(TextClassifierSettings, CommandSettings):  # type: ignore[misc]
    """Gives tiers to the responses of a file: heretic-contrast judge FILE."""

    positional: ClassVar[str] = "file"

    file: str
    """JSON Lines file with a prompt and a response on each line; other formats are read as those of prompts are."""

    prompt_key: str = "prompt"
    """Key of the prompts; where a line has none, its prompt is taken as unknown."""

    response_key: str = "response"
    """Key of the responses."""

    label_key: str = "label"
    """Key of the labels that people gave; a line without one, or with an empty one, is not compared."""

    labels: dict[str, Tier] = Field({})
    """Tier of each of these labels, as JSON, whatever their capitals; REFUSE, EVASIVE, COMPLY, and XSTest's names, mean themselves where they are not among these."""

    output: str | None = None
    """
    File to write the lines to, as JSON Lines, each with "tier", "coherent" and "reason", and with a judge model the probability that it
    is a refusal. From Parquet and Arrow come prompts, responses and labels alone.
    """


def read_rows(settings: JudgeSettings) -> list[dict[str, Any]]:
    """Raises `ContrastError` when a row has no response, no row has a key that was given, or nothing can be read."""

    key = settings.response_key
    columns = (settings.prompt_key, key, settings.label_key)
    rows = []
    for place, cells in read_file(Path(settings.file), columns).rows:
        if not isinstance(cells.get(key), str):
            raise ContrastError(
                f'{place} has no text under "{key}": name the key by --response-key.'
            )
        if not is_text(json.dumps(dict(cells), ensure_ascii=False, default=str)):
            raise ContrastError(
                f"{place} holds half a character, which cannot be written: correct it."
            )
        if settings.output is not None:
            try:
                json_lines([dict(cells)])
            except (ValueError, RecursionError) as error:
                # Fewer levels can be written than read.
                raise ContrastError(
                    f"{place} is nested too deeply to be written again: correct it, or leave --output out."
                ) from error
        rows.append(dict(cells))
    if not rows:
        raise ContrastError(f"{settings.file} has no lines: give a JSON Lines file with responses.")
    for name in {"prompt_key", "label_key"} & settings.model_fields_set:
        key = getattr(settings, name)
        if not any(key in row for row in rows):
            raise ContrastError(
                f'{settings.file} has nothing under "{key}": correct --{name.replace("_", "-")}.'
            )
    return rows


def people_tier(label: Any, labels: dict[str, Tier], path: Path) -> Tier | None:
    """Returns nothing where there is no label. Raises `ContrastError` when it is unknown."""

    if label is None or label == "":
        return None
    known = TIERS_OF_LABELS | {name.lower(): tier for name, tier in labels.items()}
    tier = known.get(str(label).lower())
    if tier is None:
        raise ContrastError(
            f'{path} has the label "{label}", whose tier is unknown: give --labels \'{{"{label}": "REFUSE"}}\', or EVASIVE or COMPLY.'
        )
    return tier


def judge(
    settings: JudgeSettings, prompts: Sequence[str], responses: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns what is found of each response: all of `JUDGED`, but probabilities from a judge model alone."""

    found: list[dict[str, Any]]
    if settings.classifier_name is None:
        explanations = [explain_response(*pair) for pair in zip(prompts, responses, strict=True)]
        found = [{"tier": item.tier, "reason": item.summary} for item in explanations]
    else:
        from ..engine.judge import JudgeModel
        from ..engine.text_classification import classifier_of, classify_all

        classifier = classifier_of(settings)
        kind = "text classifier" if settings.judge_model is None else "judge model"
        reason = f"{kind}: {settings.classifier_name}"
        if isinstance(classifier, JudgeModel):
            found = [
                {"tier": classifier.tier(value), "refusal_probability": value, "reason": reason}
                for value in classifier.probabilities(prompts, responses)
            ]
        else:
            tiers = classify_all(classifier, prompts, responses)
            found = [{"tier": tier, "reason": reason} for tier in tiers]
    for item, response in zip(found, responses, strict=True):
        item["coherent"] = is_coherent(response)
    return [{key: item[key] for key in JUDGED if key in item} for item in found]


def show_tiers(judged: Sequence[dict[str, Any]]) -> None:
    from ..hosts.surface import log

    counts = Counter(item["tier"] for item in judged)
    incoherent = sum(not item["coherent"] for item in judged)
    table = Table(
        "Tier",
        Column("Responses", justify="right"),
        Column("Share (95 %)", justify="right"),
        title=f"{len(judged)} responses, {incoherent} of them incoherent",
    )
    for tier in Tier:
        interval = percents(*wilson_interval(counts[tier], len(judged)))
        table.add_row(tier.value, str(counts[tier]), f"{interval} %")
    log(table)


def show_agreement(pairs: Sequence[tuple[Tier, Tier]]) -> None:
    """Shows how far the tiers of people, first in each pair, and those given here agree."""

    from ..hosts.surface import log

    agreement = Agreement(pairs)
    kappa = "not defined for one tier" if agreement.kappa is None else f"{agreement.kappa:.2f}"
    table = Table(
        "People",
        *(Column(tier.value, justify="right") for tier in Tier),
        title=f"People's labels of {len(pairs)} responses; kappa {kappa}",
    )
    for name, row in agreement.confusion().items():
        table.add_row(name, *map(str, row.values()))
    log(table)
    for name, (successes, n) in agreement.shares.items():
        if n:
            interval = percents(*wilson_interval(successes, n))
            share = percent(successes / n, 1)
            log(f"* {name}: [bold]{share} %[/] ({interval} %; {successes} of {n})", highlight=False)


def main(arguments: Sequence[str]) -> None:
    """Judges the responses of a file. Raises `ContrastError` when the settings, the file or the classifier do not work."""

    settings = load_settings(JudgeSettings, f"{PROGRAM} judge", arguments)
    path = Path(settings.file)
    rows = read_rows(settings)
    people = [people_tier(row.get(settings.label_key), settings.labels, path) for row in rows]
    if settings.output is not None:
        read = inputs_of(settings.model_dump(mode="json"))
        require_writable_file(Path(settings.output), read)
        if settings.label_key in JUDGED:
            raise ContrastError(
                f'The labels under "{settings.label_key}" would be replaced in {settings.output}: give them another key, or leave out '
                "--output."
            )
    prompts = [str(row.get(settings.prompt_key) or "") for row in rows]
    judged = judge(settings, prompts, [row[settings.response_key] for row in rows])
    if settings.output is not None:
        # What was found before, by another judge perhaps, is not kept in part.
        kept = ({key: row[key] for key in row if key not in JUDGED} for row in rows)
        lines = ({**row, **item} for row, item in zip(kept, judged, strict=True))
        write_text_atomically(Path(settings.output), json_lines(lines))
    show_tiers(judged)
    both = zip(people, judged, strict=True)
    pairs = [(label, item["tier"]) for label, item in both if label is not None]
    if pairs:
        show_agreement(pairs)
