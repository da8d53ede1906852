# SPDX-License-Identifier: AGPL-3.0-or-later

"""The faster ways through layers on a CPU, against transformers' own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations import sdpa_attention
from transformers.models.qwen3_5 import modeling_qwen3_5

from heretic_contrast.engine.compat import grouped_attention
from heretic_contrast.engine.cpu.gated_delta_rule import gated_delta_rule
from heretic_contrast.engine.cpu.layers import FUNCTIONS, fast_on_cpu
from heretic_contrast.engine.fast.decoder import Decoder, TokenBatch
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from tests.tiny_models import make_model

ORIGINALS = {name: getattr(modeling_qwen3_5, name) for name in FUNCTIONS}
CHUNKS = ORIGINALS["torch_chunk_gated_delta_rule"]
TOKENS = ORIGINALS["torch_recurrent_gated_delta_rule"]


def some_inputs(length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "query": normal(3, length, 2, 5).to(dtype),
        "key": normal(3, length, 2, 5).to(dtype),
        "value": normal(3, length, 2, 7).to(dtype),
        "g": -normal(3, length, 2).abs(),
        "beta": torch.sigmoid(normal(3, length, 2)).to(dtype),
    }


@pytest.mark.parametrize("reference", [CHUNKS, TOKENS])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", [1, 6, 70])
def test_delta_rule_equals_that_of_transformers(
    reference: Any, normalize: bool, length: int
) -> None:
    inputs = some_inputs(length)
    if not normalize:
        # Without normalization, keys that are not short let the state explode.
        inputs["key"] = 0.3 * inputs["key"]
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": normalize}
    states = [None, torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(1))]
    for initial_state in states:
        before = None if initial_state is None else initial_state.clone()
        expected = reference(**inputs, initial_state=initial_state, **options)
        found = gated_delta_rule(**inputs, initial_state=initial_state, **options)
        for a, b in zip(found, expected, strict=True):
            assert a is not None and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert initial_state is None or torch.equal(initial_state, before)
    assert gated_delta_rule(**inputs)[1] is None


def test_delta_rule_by_its_formula() -> None:
    inputs = {name: tensor.double() for name, tensor in some_inputs(4).items()}
    state = torch.zeros(3, 2, 5, 7, dtype=torch.float64)
    outputs = []
    for query, key, value, g, beta in zip(
        *(inputs[name].unbind(1) for name in ("query", "key", "value", "g", "beta")), strict=True
    ):
        state = state * g.exp()[..., None, None]
        error = value - (state.transpose(-1, -2) @ key[..., None])[..., 0]
        state = state + beta[..., None, None] * key[..., None] * error[..., None, :]
        outputs.append((state.transpose(-1, -2) @ query[..., None])[..., 0] / 5**0.5)
    found, final_state = gated_delta_rule(**some_inputs(4), output_final_state=True)
    assert final_state is not None
    torch.testing.assert_close(found.double(), torch.stack(outputs, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final_state.double(), state, rtol=1e-5, atol=1e-5)


def test_delta_rule_of_heads_that_share_keys() -> None:
    inputs = some_inputs(6)
    for name in ("value", "g", "beta"):
        inputs[name] = torch.cat([inputs[name], 0.5 * inputs[name], -inputs[name].abs()], dim=2)
    repeated = dict(inputs)
    for name in ("query", "key"):
        repeated[name] = inputs[name][:, :, [0, 0, 0, 1, 1, 1]]
    options = {"initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": True}
    expected = TOKENS(**repeated, **options)[0]
    found = gated_delta_rule(**inputs, **options)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_delta_rule_of_half_precision_and_of_nothing() -> None:
    inputs = some_inputs(9, torch.bfloat16)
    found, state = gated_delta_rule(**inputs, output_final_state=True, use_qk_l2norm_in_kernel=True)
    # Some versions of transformers round in between, and this one does not.
    expected, expected_state = CHUNKS(
        **{name: tensor.float() for name, tensor in inputs.items()},
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert found.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-4)
    empty = {name: tensor[:0] for name, tensor in some_inputs(3).items()}
    assert gated_delta_rule(**empty)[0].shape == (0, 3, 2, 7)


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule"])
def test_functions_are_replaced_in_passes_only(
    tiny_hybrid: LanguageModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    network = tiny_hybrid.model
    ids = torch.arange(3, 33).view(2, 15)
    calls = []

    def counting(*args: Any, **arguments: Any) -> Any:
        calls.append(1)
        return ORIGINALS[name](*args, **arguments)

    monkeypatch.setattr(modeling_qwen3_5, name, counting)
    with torch.no_grad():
        expected = network(input_ids=ids).logits
        n_layers = len(calls)
        assert n_layers > 0
        with fast_on_cpu(tiny_hybrid):
            found = network(input_ids=ids).logits
        assert len(calls) == n_layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="stop"), fast_on_cpu(tiny_hybrid):
        # The compiled recurrence has no gradient, and Heretic switches gradients off for good.
        with torch.enable_grad():
            network(input_ids=ids)
        assert len(calls) == 2 * n_layers
        raise RuntimeError("stop")
    assert getattr(modeling_qwen3_5, name) is counting
    others = [other for other in FUNCTIONS if other != name]
    assert all(getattr(modeling_qwen3_5, other) is ORIGINALS[other] for other in others)


def test_the_head_is_handed_whole_tensors(tiny_hybrid: LanguageModel) -> None:
    head = tiny_hybrid.model.get_output_embeddings()
    before = dict(head._forward_pre_hooks)
    seen: list[bool] = []
    hook = head.register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].is_contiguous())
    )
    prompts = [Prompt("Who?"), Prompt("Why is it so?")]
    tiny_hybrid.generate(prompts, 3)
    assert all(seen) and len(seen) > 1
    n_seen = len(seen)
    tokens = tiny_hybrid.pad(tiny_hybrid.token_ids(prompts))
    options = {"do_sample": False, "pad_token_id": tiny_hybrid.pad_token_id(), "max_new_tokens": 1}
    with fast_on_cpu(tiny_hybrid):
        found = tiny_hybrid.model.generate(**tokens, **options)
    assert all(seen) and len(seen) == n_seen + 1
    # What `generate` does by itself.
    expected = tiny_hybrid.model.generate(**tokens, **options)
    assert not seen[-1]
    hook.remove()
    assert found.tolist() == expected.tolist()
    assert dict(head._forward_pre_hooks) == before


def test_functions_with_other_arguments_are_left_alone(
    tiny_hybrid: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_a_library(x: Tensor, weight: Tensor) -> Tensor:
        return x + weight

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", of_a_library)
    monkeypatch.setattr(modeling_qwen3_5, "torch_recurrent_gated_delta_rule", None)
    with torch.no_grad(), fast_on_cpu(tiny_hybrid):
        called = modeling_qwen3_5.torch_chunk_gated_delta_rule(
            x=torch.ones(1), weight=torch.ones(1)
        )
        assert called == torch.full((1,), 2.0)
        assert modeling_qwen3_5.torch_recurrent_gated_delta_rule is None


COMPILED = {
    "layers": """
from heretic_contrast.engine.cpu.gated_delta_rule import gated_delta_rule

gated_delta_rule(*[torch.ones(1, 2, 1, 1)] * 3, *[torch.ones(1, 2, 1)] * 2)
""",
    "maps": """
import numpy
from heretic_contrast.directions.som import SomSettings, train_maps

train_maps([numpy.eye(3)], SomSettings(iterations=10))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("code", COMPILED.values(), ids=COMPILED)
def test_compiled_functions_leave_the_number_of_threads_alone(code: str) -> None:
    """In a new process, since Numba starts its threads once."""

    count = "print(torch.get_num_threads())"
    code = f"import torch\n{count}\n{code}\n{count}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output.split() == ["1", "1"]


@pytest.mark.slow
def test_numbers_do_not_depend_on_whether_they_are_compiled_or_cached(tmp_path: Path) -> None:
    code = """
import hashlib
import torch
from heretic_contrast.directions.som import SomSettings, train_maps
from heretic_contrast.engine.cpu.gated_delta_rule import gated_delta_rule

torch.manual_seed(0)
for length, size in ((50, 7), (64, 32), (100, 16)):
    pairs, single = torch.randn(3, 4, length, 2, size), torch.rand(2, 4, length, 2)
    output, state = gated_delta_rule(*pairs, -single[0], single[1], None, True, True)
    (trained,) = train_maps([torch.randn(length, 9 * size).numpy()], SomSettings())
    for array in (output.numpy(), state.numpy(), trained.vectors(range(9))):
        print(hashlib.sha256(array.tobytes()).hexdigest())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        for _ in range(2)
    )
    assert first == second and len(set(first.split())) == 9


def test_passes_and_generation_use_the_fast_functions(
    tiny_hybrid: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*args: Any, **arguments: Any) -> Any:
        raise AssertionError("A function of transformers was called.")

    for name in FUNCTIONS:
        monkeypatch.setattr(modeling_qwen3_5, name, unwanted)
    ids = torch.arange(3, 33).view(2, 15)
    hidden_states = Decoder(tiny_hybrid).run(TokenBatch(ids, torch.ones_like(ids)))
    assert hidden_states.isfinite().all()
    assert len(FastEngine(tiny_hybrid).generate([(3, 4, 5)], [2])[0]) > 0


def test_grouped_attention_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_model("llama", num_attention_heads=4, num_key_value_heads=2)
    ids = torch.arange(3, 21).view(3, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    original = sdpa_attention.repeat_kv
    calls = []

    def counting(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", counting)
    with torch.no_grad():
        expected = network(input_ids=ids, attention_mask=mask).logits
        assert len(calls) == 2 * network.config.num_hidden_layers
        with grouped_attention():
            found = network(input_ids=ids, attention_mask=mask).logits
        assert len(calls) == 2 * network.config.num_hidden_layers
        with pytest.raises(RuntimeError, match="stop"), grouped_attention():
            raise RuntimeError("stop")
        network(input_ids=ids, attention_mask=mask)
    assert len(calls) == 4 * network.config.num_hidden_layers
    assert torch.equal(found, expected)
