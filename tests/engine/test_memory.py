# SPDX-License-Identifier: AGPL-3.0-or-later

"""The memory of a pass is that of one chunk or one batch, however much is measured."""

from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.measuring import LiveBytes
from heretic_contrast.engine.check import N_TOKENS
from heretic_contrast.engine.fast.decoder import ELEMENTS, Decoder, TokenBatch
from heretic_contrast.evaluation.cells import CellKey
from heretic_contrast.evaluation.divergence import base_statistics, divergences
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import SweepEvaluator
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from heretic_contrast.tiers.responses import Tier
from tests.plain_sweeps import random_directions
from tests.tiny_models import make_model, make_tokenizer

VOCABULARY = 248_320
"""That of Qwen 3.5, the paper's model."""

FLOAT = 4
KL_TOKENS = 32


@lru_cache
def large_vocabulary() -> LanguageModel:
    """A model whose logits dwarf everything else."""

    return wrap(
        make_model("llama", num_hidden_layers=2, vocab_size=VOCABULARY),
        make_tokenizer(),
        name="large-vocabulary",
        batch_size=128,
    )


def long_prompts(count: int, n_words: int) -> list[Prompt]:
    return [Prompt("bread " * n_words) for _ in range(count)]


def residual_peak(n_layers: int, n_prompts: int, n_words: int) -> tuple[int, int]:
    """The most bytes alive beside the result while residuals are collected, and those of a batch's hidden states."""

    model = wrap(
        make_model("llama", num_hidden_layers=n_layers), make_tokenizer(), "tiny", batch_size=4
    )
    prompts = long_prompts(n_prompts, n_words)
    with LiveBytes() as memory:
        residuals = model.residuals(prompts)
    assert residuals.shape == (n_prompts, n_layers + 1, model.hidden_size)
    assert memory.current == residuals.nbytes
    batch = model.tokenize(prompts[: model.batch_size])["input_ids"]
    return memory.peak - residuals.nbytes, batch.numel() * model.hidden_size * FLOAT


def test_counter_counts_what_is_alive() -> None:
    kept = torch.ones(5)
    with LiveBytes() as memory:
        first = torch.ones(100)
        second = first.reshape(10, 10)[2:]
        kept += 1
        assert memory.current == 100 * FLOAT
        del first
        assert memory.current == 100 * FLOAT
        del second
        assert memory.current == 0
        (torch.ones(50) + 1).sum().item()
    assert memory.peak == 100 * FLOAT


def test_residuals_hold_no_hidden_states_of_layers_that_have_run() -> None:
    few, hidden_states = residual_peak(n_layers=4, n_prompts=4, n_words=200)
    many, _ = residual_peak(n_layers=24, n_prompts=4, n_words=200)
    # Last positions of twenty more layers, and nothing of the positions before.
    last_positions = 20 * 4 * 32 * FLOAT
    assert many - few <= 2 * last_positions < hidden_states / 2


def test_residuals_hold_one_batch() -> None:
    one_batch, hidden_states = residual_peak(n_layers=4, n_prompts=4, n_words=200)
    four_batches, _ = residual_peak(n_layers=4, n_prompts=16, n_words=200)
    assert four_batches - one_batch < hidden_states / 20


def test_stored_statistics_of_a_position() -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    kept = base_statistics(logits, top_k=100)
    stored = sum(tensor.nbytes for tensor in kept) / len(logits)
    assert stored == 804
    assert stored <= VOCABULARY * FLOAT / 200


def sweep_memory(n_references: int) -> dict[str, Any]:
    """Bytes alive while the unmodified model and a cell are measured, and those that the evaluator keeps."""

    model = large_vocabulary()
    references = [Prompt(f"Bread {index:03}") for index in range(n_references)]
    options = SweepOptions(weights=(1.0,), max_new_tokens=4, kl_tokens=KL_TOKENS)
    with LiveBytes() as preparation:
        evaluator = SweepEvaluator(
            model,
            plan_sweep(
                {"one": random_directions(model, 2, 0)},
                [Prompt("Break the door")],
                [Prompt("Bake a cake")],
                references,
                options,
            ),
            classify=lambda prompt, response: Tier.REFUSE,
        )
        kept = preparation.current
    with LiveBytes() as cell:
        (measured,) = evaluator.evaluate([CellKey("one", "weight", (1,), 1.0)])
    assert measured.measurement.kl_divergence > 0
    return {"preparation": preparation.peak, "cell": cell.peak, "kept": kept}


@pytest.mark.slow
def test_sweep_holds_the_logits_of_a_few_positions() -> None:
    few = sweep_memory(16)
    many = sweep_memory(64)
    assert 16 * KL_TOKENS >= 15 * ELEMENTS // VOCABULARY
    position = VOCABULARY * FLOAT
    # Beside the logits of a part, what is kept of each position.
    assert many["cell"] <= ELEMENTS * FLOAT + 2 * position
    assert many["cell"] - few["cell"] <= 2 * position
    # While all continuations are generated in one batch, transformers holds three rows of logits for each. Before, both
    # engines are compared on a few positions of three prompts.
    compared = 7 * 3 * N_TOKENS * position
    for n_prompts, memory in ((16, few), (64, many)):
        generated = (3 * n_prompts + 2) * position + 0.06 * 256 * position
        assert memory["preparation"] <= max(generated, compared)
    per_position = (many["kept"] - few["kept"]) / (48 * KL_TOKENS)
    assert per_position <= VOCABULARY * FLOAT / 200


@pytest.mark.slow
def test_generation_and_divergence_hold_the_logits_of_a_few_positions() -> None:
    decoder = Decoder(large_vocabulary())
    tokens = torch.tensor([[5, 6, 7]])
    decoder.run(TokenBatch(tokens, torch.ones_like(tokens)))
    states = torch.randn(800, 32, generator=torch.Generator().manual_seed(0))
    with LiveBytes() as memory:
        decoder.most_likely(states)
        for part in decoder.chunks(states):
            divergences(
                base_statistics(decoder.logits(states[part]), 100), decoder.logits(states[part])
            )
    assert memory.peak <= 3 * ELEMENTS * FLOAT
    assert memory.peak < 800 * VOCABULARY * FLOAT / 20
