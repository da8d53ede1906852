# SPDX-License-Identifier: AGPL-3.0-or-later

"""Where memory does not suffice for a batch, half as many rows are run, and the results are the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from heretic_contrast.engine import judge
from heretic_contrast.engine.check import all_logits
from heretic_contrast.engine.fast import drafts, teacher_forcing
from heretic_contrast.engine.fast.decoder import Decoder
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.fast.teacher_forcing import TeacherForcing
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.errors import ContrastError, ContrastWarning
from heretic_contrast.hosts import loading
from heretic_contrast.language_model import Batches, LanguageModel
from tests.devices import PretendedDevices
from tests.engine.test_cuda import interventions, known, on_device
from tests.plain_sweeps import CANARIES, HARMFUL


@contextmanager
def little_memory(model: LanguageModel, n_rows: int, n_cached: int = 1000) -> Iterator[None]:
    """Lets a model read no more than some rows at once. `n_cached`: so much fewer rows may follow a cache."""

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs["input_ids"]
        if len(tokens) > (n_cached if tokens.shape[1] == 1 else n_rows):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.decoder().register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "limits", [(3, 1000), pytest.param((2, 1000), marks=pytest.mark.slow), (1000, 2)]
)
@pytest.mark.parametrize("kind", [PlainEngine, FastEngine])
@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_results_do_not_depend_on_memory(
    architecture: str, kind: Any, limits: tuple[int, int]
) -> None:
    model = on_device(architecture, "cpu")
    chosen = interventions(model)
    tokens = tuple(model.token_ids([*HARMFUL, *CANARIES]))
    continuations = Continuations(tokens, tuple(kind(model).generate(tokens, [12] * len(tokens))))
    expected = kind(model).respond(continuations, 12, chosen)
    expected_logits = all_logits(kind(model), continuations, chosen)
    assert any(row != list(continuations.tokens) for row in expected)
    counts: list[int] = []
    with (
        little_memory(model, *limits),
        pytest.warns(ContrastWarning, match="Memory is exhausted by"),
    ):
        engine = kind(model)
        assert engine.generate(tokens, [12] * len(tokens)) == list(continuations.tokens)
        assert engine.respond(continuations, 12, chosen, counts.append) == expected
    assert sum(counts) == len(chosen) * len(tokens)
    with little_memory(model, limits[0]):
        found = all_logits(kind(model), continuations, chosen)
    for values, others in zip(found, expected_logits, strict=True):
        torch.testing.assert_close(values, others, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["passes", "concatenate"])
def test_drafts_are_read_again_where_memory_does_not_suffice_for_their_cache(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(on_device("llama", "cpu"), batch_size=4)
    chosen = interventions(model)
    continuations = known(model)
    expected = PlainEngine(model).respond(continuations, 12, chosen)
    engine = FastEngine(model)
    n_passes: list[int] = []
    run = Decoder.run

    def exhausted(*args: Any, **kwargs: Any) -> Any:
        # The prefix and one pass are read beside what is kept.
        n_passes.append(1)
        if where == "concatenate" or len(n_passes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(*args, **kwargs)

    place: tuple[Any, str] = (drafts, where) if where == "concatenate" else (Decoder, "run")
    with monkeypatch.context() as patched, pytest.warns(ContrastWarning, match="of all drafts"):
        patched.setattr(*place, exhausted)
        (found,) = engine.drafts(continuations, 12)
    assert not found.are_read_once
    assert engine.respond(continuations, 12, chosen) == expected
    # As many at once as before, since nothing is kept beside them now.
    (forcing,) = engine._forcing(continuations)
    n_rows = [len(item.rows) for item in forcing.modified(chosen)]
    assert max(n_rows) == 4


def test_residuals_do_not_depend_on_memory(tiny_llama: LanguageModel) -> None:
    expected = tiny_llama.residuals(HARMFUL)
    steps: list[tuple[int, int]] = []
    with little_memory(tiny_llama, 1), pytest.warns(ContrastWarning) as said:
        found = tiny_llama.residuals(HARMFUL, lambda *step: steps.append(step))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert steps == [(n, 5) for n in range(1, 6)]
    assert [str(item.message) for item in said] == [
        "Memory is exhausted by 4 sequences at once: going on with 2.",
        "Memory is exhausted by 2 sequences at once: going on with 1.",
    ]


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 1.00 GB)",
        "Invalid buffer size: 19.45 GB",
        "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
        r"[enforce fail at ..\c10\core\impl\alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    ],
)
def test_exhausted_memory_is_known_by_its_words(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(rows: slice) -> slice:
        if rows.stop - rows.start > 1:
            raise RuntimeError(message)
        return rows

    with pytest.warns(ContrastWarning, match="going on with 1"):
        assert len(list(Batches(2).run(2, run))) == 2
    exhausted = Mock(side_effect=RuntimeError(message))
    monkeypatch.setattr(judge, "AutoTokenizer", Mock())
    with pytest.raises(ContrastError, match="give a smaller one"):
        judge.load_pretrained(Mock(from_pretrained=exhausted), "name", "judge", "judge")
    monkeypatch.setattr(loading.Model, "__init__", exhausted)
    with pytest.raises(ContrastError, match="use a smaller model"):
        loading.ChatModel(SimpleNamespace(model="name"))


@pytest.mark.parametrize("kind", [PlainEngine, FastEngine])
def test_a_single_sequence_that_does_not_fit_is_an_error(
    kind: Any, tiny_llama: LanguageModel
) -> None:
    tokens = tuple(tiny_llama.token_ids(HARMFUL[:2]))
    known = Continuations(tokens, ((5, 6), (7, 8)))
    with little_memory(tiny_llama, 0), pytest.raises(torch.OutOfMemoryError):
        list(kind(tiny_llama).logits(known, interventions(tiny_llama)))


def test_long_prompts_are_read_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_forcing, "DEVICE_TOKENS_PER_PASS", 100)
    known = Continuations(tuple((n, *[7] * 23) for n in range(9)), ((5, 6),) * 9)
    with PretendedDevices():
        model = replace(on_device("llama"), batch_size=128)
        passes = TeacherForcing(Decoder(model), known, range(9), (), model.batch_size).unmodified()
        # Of 25 tokens each.
        assert [len(item.rows) for item in passes] == [4, 4, 1]
