# SPDX-License-Identifier: AGPL-3.0-or-later

"""A second look at the front of a study of Heretic 1.4, on prompts that the search never saw."""

import copy
from collections.abc import Sequence
from typing import Any

from questionary import Choice
from rich.table import Table

from ..directions.pools import shared_texts
from ..errors import ContrastError
from ..evaluation.statistics import wilson_interval
from ..language_model import batches
from ..prompts import Prompt

LENGTHS = (30, 50, 100, 150)
"""Tokens of a response after which refusals are counted: how many there are depends on it."""


def require_fresh(prompts: Sequence[Prompt], name: str, seen: Sequence[Prompt]) -> None:
    """Raises `ContrastError` when prompts of the second look are among others that the search sees."""

    shared = shared_texts(prompts, seen)
    n_seen = sum(prompt.text in shared for prompt in prompts)
    if n_seen:
        raise ContrastError(
            f"{n_seen} of the {len(prompts)} finalist prompts are among the {name} prompts, so that they are not fresh: give "
            "others as finalist_prompts."
        )


def count_refusals_at(
    model: Any, evaluator: Any, prompts: Sequence[Any], lengths: Sequence[int]
) -> list[int]:
    """Returns how many responses are refusals after so many of their tokens, from one generation of the longest."""

    judge = copy.copy(evaluator)
    judge.bad_prompts = prompts
    responses: list[Any] = []
    for batch in batches(len(prompts), model.settings.batch_size):
        inputs, outputs = model.generate(prompts[batch], max_new_tokens=max(lengths))
        responses += list(outputs[:, inputs["input_ids"].shape[1] :])
    counts = []
    for length in lengths:
        # It judges the responses in the order of its prompts.
        judge.n_judged = 0
        texts = model.tokenizer.batch_decode(
            [response[:length] for response in responses], skip_special_tokens=True
        )
        counts.append(sum(map(judge.is_refusal, texts)))
    return counts


def second_look(
    choices: Sequence[Any], counts: dict[int, list[int]], n_prompts: int
) -> tuple[list[Any], Table]:
    """
    Returns Heretic's choices of trials with what the second look has found at its longest responses, and a table of all of it.

    `counts`: refusals of `n_prompts` after so many tokens, by number of the trial. Where the share of the first look lies outside
    the second one's interval (Wilson, 95 %), the choice says so.
    """

    table = Table(title=f"Refusals of {n_prompts} fresh prompts")
    for heading in ("Trial", *(f"{length} tokens" for length in LENGTHS), "95 %", "First look"):
        table.add_column(heading, justify="right")
    found = []
    for choice in choices:
        trial = choice.value
        if isinstance(trial, str):
            found.append(choice)
            continue
        counted = counts[trial.number]
        low, high = wilson_interval(counted[-1], n_prompts)
        first = trial.user_attrs["refusals"] / trial.user_attrs["n_bad_prompts"]
        interval = f"{low:.0%} to {high:.0%}"
        title = f"{choice.title}, fresh prompts: {counted[-1]:>2}/{n_prompts} ({interval})"
        if not low <= first <= high:
            title += ", which the first look does not agree with"
        found.append(Choice(title=title, value=trial))
        table.add_row(str(trial.user_attrs["index"]), *map(str, counted), interval, f"{first:.0%}")
    return found, table
