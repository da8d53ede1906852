# SPDX-License-Identifier: AGPL-3.0-or-later

"""Greedy generation a few tokens at a time, so that responses of which nothing more is needed leave the batch."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import one_line, warn
from ..greedy import is_plainly_greedy
from ..language_model import (
    Batches,
    LanguageModel,
    Tokens,
    groups_by_length,
    is_of_the_machine,
    until_end,
)
from ..vectors import to_device
from .compat import CACHE, Cache, forget_images, select_rows
from .cpu.layers import fast_on_cpu

STRIDE = 8
"""How many tokens are generated before responses leave the batch, at first; later on as many as there are."""

CPU_STRIDE = 4
"""The same on a CPU, where each row of a step takes its time."""

Row = TypeVar("Row", bound=Hashable)

Watch = Callable[[Mapping[Row, Tokens], list[Row], list[Row]], Collection[Row]]
"""Is told what there is of responses, which have ended and which have not; returns those of the latter that are needed no further."""


def none_leaves(
    found: Mapping[Row, Tokens], ended: list[Row], others: list[Row]
) -> Collection[Row]:
    """Lets every response go on to its end."""

    return ()


def has_ended(tokens: Tokens, limit: int, ends: frozenset[int]) -> bool:
    """Returns whether a response of at most `limit` tokens has ended."""

    return len(tokens) >= limit or (len(tokens) > 0 and tokens[-1] in ends)


def staying(
    rows: Sequence[Row],
    found: Mapping[Row, Tokens],
    limit: int,
    ends: frozenset[int],
    watch: Watch[Row],
) -> list[int]:
    """Returns the samples of a batch whose responses have not ended and are needed further."""

    ended = [row for row in rows if has_ended(found[row], limit, ends)]
    leaving = {*ended, *watch(found, ended, [row for row in rows if row not in ended])}
    return [sample for sample, row in enumerate(rows) if row not in leaving]


@torch.no_grad()
def generate_together(
    model: LanguageModel,
    rows: list[Row],
    tokens: Tensor,
    mask: Tensor,
    cache: Cache | None,
    found: dict[Row, Tokens],
    limit: int,
    watch: Watch[Row] = none_leaves,
    ablated: Callable[[list[Row]], AbstractContextManager[None]] = lambda rows: nullcontext(),
) -> None:
    """
    Generates responses to their end, in one batch that those leave which have ended.

    `tokens` and `mask`: integer Tensors of shape (n_rows, length), what has been read and the token that follows it, or without a
    `cache` what is to be read. `found`: what there is of each response, to which what is generated is added. `ablated`: what the
    model is to be for a batch of rows.
    """

    is_cpu = model.device.type == "cpu"
    ends, n_new = model.end_tokens(), 0
    while rows:
        left = limit - min(len(found[row]) for row in rows)
        stride = CPU_STRIDE if is_cpu else max(STRIDE, n_new)
        forget_images(model.model)
        with ablated(rows), fast_on_cpu(model):
            output = model.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                **{CACHE: cache},
                # One that is named cannot be given.
                cache_implementation=None,
                max_new_tokens=min(stride, left),
                do_sample=False,
                num_return_sequences=1,
                pad_token_id=model.pad_token_id(),
                return_dict_in_generate=True,
            )
        new = output.sequences[:, tokens.shape[1] :]
        n_new += new.shape[1]
        for row, more in zip(rows, new.tolist(), strict=True):
            found[row] = until_end(found[row] + tuple(more), limit, ends)
        kept = staying(rows, found, limit, ends, watch)
        tokens, cache = output.sequences, getattr(output, CACHE)
        mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)
        if 0 < len(kept) < len(rows):
            chosen = to_device(kept, tokens.device)
            tokens, mask, cache = tokens[chosen], mask[chosen], select_rows(cache, chosen)
        rows = [rows[sample] for sample in kept]


def generate_watched(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    limit: int,
    batches: Batches,
    watch: Watch[int] = none_leaves,
) -> list[Tokens]:
    """
    Returns the greedy response to each prompt, of at most `limit` tokens, or what there is of it where it has left.

    They are answered in batches, in their order, but that those which are much longer than others come last. For models that decode
    plainly: see `greedy`.
    """

    found: dict[int, Tokens] = dict.fromkeys(range(len(prompts)), ())

    def answer(rows: list[int]) -> None:
        # Begun anew where memory was exhausted.
        found.update(dict.fromkeys(rows, ()))
        inputs = model.pad([prompts[row] for row in rows])
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        generate_together(model, rows, tokens, mask, None, found, limit, watch)

    for _ in batches.run_groups(map(sorted, groups_by_length(prompts)), answer):
        pass
    return [found[row] for row in range(len(prompts))]


def is_watchable(model: LanguageModel, prompts: Sequence[Tokens]) -> bool:
    """
    Returns whether responses that leave one after the other are, up to there, what the model's own `generate` gives for a few prompts.

    Where they should be and are not, a warning says so. Raises what `generate` raises, also when memory is exhausted.
    """

    if not is_plainly_greedy(model.model):
        return False
    chosen = sorted(set(prompts), key=len)[:: max(1, len(set(prompts)) // 3)][:3]
    limit = len(chosen) * STRIDE
    expected = model.generate_tokens(chosen, [limit] * len(chosen))
    try:
        found = generate_watched(
            model, chosen, limit, Batches(len(chosen)), lambda found, ended, others: others[:1]
        )
        reason = "its responses differ"
        if all(a == b[: len(a)] for a, b in zip(found, expected, strict=True)):
            return True
    except Exception as error:
        # Every architecture fails in its own way.
        if is_of_the_machine(error):
            raise
        reason = one_line(str(error)) or type(error).__name__
    warn(
        f"The responses of {model.name} cannot leave a batch before all have ended ({reason}), so that trials take longer."
    )
    return False
