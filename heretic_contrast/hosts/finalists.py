# SPDX-License-Identifier: AGPL-3.0-or-later

"""A second look at the front of a study of Heretic 1.4, on prompts that the search never saw."""

from collections.abc import Collection, Sequence
from typing import Any

from optuna.trial import FrozenTrial
from questionary import Choice
from rich.table import Table

from ..errors import ContrastError
from ..evaluation.statistics import percent, percents, wilson_interval
from ..prompts import Prompt, text_digest
from ..search.stopping import front
from .evaluator import Evaluator, count
from .guidance import FALSE_KEY, SUM_KEY, measured

LENGTHS = (30, 50, 100, 150)
"""Tokens of a response after which refusals are counted, beside the length of the first look: how many there are depends on it."""


def require_fresh(prompts: Sequence[Prompt], seen: Collection[str]) -> None:
    """Raises `ContrastError` when prompts of the second look have texts, known by digests, that the search sees, or directions are made from."""

    n_seen = sum(text_digest(prompt.text) in seen for prompt in prompts)
    if n_seen:
        raise ContrastError(
            f"{n_seen} of the {len(prompts)} finalist prompts are among those that directions are made from or trials are judged on, so "
            "that they are not fresh: give others as finalist_prompts."
        )


def all_lengths(first_length: int) -> list[int]:
    return sorted({*LENGTHS, first_length})


def count_refusals(evaluator: Evaluator, prompts: Sequence[Any]) -> dict[int, int]:
    """Returns how many responses are refusals after each number of tokens, ascending, from one generation of the longest."""

    lengths = all_lengths(evaluator.settings.max_response_length)
    responses = evaluator.respond(prompts, lengths[-1])
    return {
        length: count(
            evaluator.judge(prompts, evaluator.decode([tokens[:length] for tokens in responses]))
        )
        for length in lengths
    }


def front_choices(trials: Sequence[FrozenTrial], choices: Sequence[Any]) -> list[Any]:
    """Returns Heretic's choices, with the trials of the front by all that is counted in the place of those of Heretic's own."""

    points = {index: point for index, trial in enumerate(trials) if (point := measured(trial))}
    found = []
    for index in front(points):
        attributes = trials[index].user_attrs
        title = f"[Trial {attributes['index']:>3}] Refusals: {attributes['refusals']:>2}/{attributes['n_bad_prompts']}"
        if SUM_KEY in attributes:
            title += f" (sum of probabilities: {attributes[SUM_KEY]:.2f})"
        title += f", KL divergence: {attributes['kl_divergence']:.4f}"
        if FALSE_KEY in attributes:
            title += ", False refusals: {}/{}".format(*attributes[FALSE_KEY])
        found.append(Choice(title=title, value=trials[index]))
    return [*found, *(choice for choice in choices if isinstance(choice.value, str))]


def second_look(
    choices: Sequence[Any], counts: dict[int, dict[int, int]], n_prompts: int, first_length: int
) -> tuple[list[Any], Table]:
    """
    Returns Heretic's choices with the second look, and a table of all lengths.

    Wilson intervals say whether it agrees with the first look, which judged responses of `first_length` tokens.
    """

    lengths = all_lengths(first_length)
    table = Table(title=f"Refusals of {n_prompts} fresh prompts")
    for heading in (
        "Trial",
        *(f"{length} tokens" for length in lengths),
        "95 %",
        f"First look, {first_length} tokens",
    ):
        table.add_column(heading, justify="right")
    found = []
    for choice in choices:
        trial = choice.value
        if isinstance(trial, str):
            found.append(choice)
            continue
        counted = counts[trial.number]
        interval = f"{percents(*wilson_interval(counted[lengths[-1]], n_prompts))} %"
        low, high = wilson_interval(counted[first_length], n_prompts)
        first = trial.user_attrs["refusals"] / trial.user_attrs["n_bad_prompts"]
        title = f"{choice.title}, fresh prompts: {counted[lengths[-1]]:>2}/{n_prompts} ({interval})"
        if not low <= first <= high:
            title += ", which the first look does not agree with"
        found.append(Choice(title=title, value=trial))
        cells = (str(counted[length]) for length in lengths)
        table.add_row(str(trial.user_attrs["index"]), *cells, interval, f"{percent(first)} %")
    return found, table
