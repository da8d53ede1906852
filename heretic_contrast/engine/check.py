# SPDX-License-Identifier: AGPL-3.0-or-later

"""Which engine a model gets: the fast one where it gives what the plain one gives for a few prompts, and the plain one elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ablation.hooks import Intervention
from ..ablation.operator import Operator
from ..errors import one_line, warn
from ..greedy import is_plainly_greedy
from ..language_model import LanguageModel, Tokens, groups_by_length, is_of_the_machine
from ..vectors import logits_difference, logits_tolerance, unit_vectors
from .fast.engine import FastEngine
from .interface import Continuations
from .plain import AloneEngine, PlainEngine

N_TOKENS = 4

ROUNDINGS = 4
"""How many times what batches alone change an engine may differ: a strong intervention amplifies rounding."""


def checked_engine(model: LanguageModel, prompts: Sequence[Tokens]) -> PlainEngine:
    """
    Returns the fast engine, or the plain one where the fast one differs or fails on some of the prompts.

    What is right is what a prompt gives alone: where it gives another thing in batches, every prompt is run alone. A warning says so:
    see `LanguageModel.for_batches`. Whatever the plain engine raises is raised, and so is it when memory is exhausted or a device fails.
    """

    if model.for_batches(prompts) is not model:
        return AloneEngine(model)
    # The shortest, one between, and the longest; and two that are read beside each other, of which one is padded most.
    distinct = sorted(set(prompts), key=lambda tokens: (len(tokens), tokens))
    groups = groups_by_length(distinct)
    widest = max(groups, key=lambda group: len(distinct[group[-1]]) - len(distinct[group[0]]))
    places = {0, len(distinct) // 2, len(distinct) - 1, widest[0], widest[-1]}
    chosen = tuple(distinct[place] for place in sorted(places))
    plain, alone = PlainEngine(model), AloneEngine(model)
    known = Continuations(chosen, tuple(alone.generate(chosen, [N_TOKENS] * len(chosen))))
    interventions = some_interventions(plain, known)
    try:
        reason = reason_against(FastEngine(model), plain, known, interventions)
    except Exception as error:
        # Every architecture fails in its own way.
        if is_of_the_machine(error):
            raise
        reason = one_line(str(error)) or type(error).__name__
    if not reason:
        return FastEngine(model)
    warn(
        f"The fast engine does not work for {model.name} ({reason}), so the plain one runs it, which takes several times as long."
    )
    return plain


def some_interventions(plain: PlainEngine, known: Continuations) -> list[Intervention]:
    """Returns a weak intervention on the lowest layer, and one on the upper half that is strong enough to change responses."""

    model = plain.model
    n_vectors = max(1, min(64, model.hidden_size // 2))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(n_vectors, model.hidden_size, generator=generator)
    vectors = unit_vectors(vectors)[0].float()
    weak = Operator(vectors[:1], torch.full((1, 1), 0.5))
    # As much is taken away as there is, and more where that is not enough.
    strength = (model.hidden_size / n_vectors) ** 0.5
    for _ in range(3):
        strong = Operator(vectors, strength * torch.eye(n_vectors))
        layers = range(model.n_layers // 2, model.n_layers)
        intervention = Intervention(dict.fromkeys(layers, strong))
        if plain.respond(known, N_TOKENS, [intervention])[0] != list(known.tokens):
            break
        strength *= 4
    return [Intervention({0: weak}), intervention]


def reason_against(
    engine: PlainEngine,
    plain: PlainEngine,
    known: Continuations,
    interventions: Sequence[Intervention],
) -> str:
    """Returns in what an engine differs from the plain one by more than rounding explains; nothing where it does not."""

    tolerance = logits_tolerance(plain.model.model.dtype)
    for chosen in (None, *([intervention] for intervention in interventions)):
        (found,), (right,) = (all_logits(item, known, chosen) for item in (engine, plain))
        share = logits_difference(found, right)
        if share > tolerance:
            unbatched = AloneEngine(plain.model)
            (alone,) = all_logits(unbatched, known, chosen)
            if not share <= ROUNDINGS * logits_difference(alone, right):
                return "its logits differ"
    responses = [item.respond(known, N_TOKENS, interventions) for item in (engine, plain)]
    for index, (response, expected) in enumerate(zip(*responses, strict=True)):
        if response == expected:
            continue
        # Rounding decides between tokens that are equally likely.
        own_choice = Continuations(known.prompts, tuple(response))
        (values,) = all_logits(plain, own_choice, [interventions[index]])
        tokens = torch.tensor([token for row in response for token in row], device=values.device)
        missing = values.amax(dim=1) - values.gather(1, tokens[:, None])[:, 0]
        scale = values.amax(dim=1) - values.mean(dim=1)
        if not is_plainly_greedy(plain.model.model) or bool((missing > tolerance * scale).any()):
            return "its responses differ"
    return ""


def all_logits(
    engine: PlainEngine, known: Continuations, interventions: Sequence[Intervention] | None
) -> list[Tensor]:
    """
    Returns the logits at all positions under each intervention, Tensors of shape (n_positions, vocabulary).

    On the device of the model's inputs: engines give them where they compute them, which may be that of its last layer.
    """

    chunks = list(engine.logits(known, interventions))
    n_positions = sum(known.lengths)
    places = torch.cat([chunk.interventions * n_positions + chunk.positions for chunk in chunks])
    values = torch.cat([chunk.values for chunk in chunks])[places.argsort()]
    return list(values.to(engine.model.device).split(n_positions))
