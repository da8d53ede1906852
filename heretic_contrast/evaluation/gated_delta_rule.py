# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The gated delta rule, the recurrence of linear attention in Qwen3-Next and Qwen 3.5, compiled for CPUs.

For each head, with the state S of shape (key_dim, value_dim), in arXiv:2412.06464's formula (10) transposed:

    S ← exp(g) S,  S ← S + β k (v − Sᵀ k)ᵀ,  o = Sᵀ q / √key_dim

transformers computes many tokens at once, through matrices of every pair of tokens and dozens of temporary tensors, which
suits a GPU. On a CPU it is several times faster to keep the state of a head in the cache and go from token to token.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..som_kernel import compiled

EPSILON = 1e-6
"""What transformers adds to squared lengths of queries and keys."""


@compiled(fastmath={"contract"})
def _inverse_length(vector: Any) -> Any:
    total = np.float32(EPSILON)
    for i in range(vector.shape[0]):
        total += vector[i] * vector[i]
    return np.float32(1.0) / np.sqrt(total)


@compiled(parallel=True, fastmath={"contract"})
def _run(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    beta: Any,
    normalize: bool,
    state: Any,
    output: Any,
) -> None:
    """Fills in the outputs of all tokens, and changes the states to those after the last one."""

    n_samples, n_tokens, n_heads, key_dim = key.shape
    value_dim = value.shape[3]
    for place in numba.prange(n_samples * n_heads):
        sample, head = place // n_heads, place % n_heads
        memory = state[sample, head]
        change = np.empty(value_dim, np.float32)
        for token in range(n_tokens):
            read = output[sample, token, head]
            keys, queries = key[sample, token, head], query[sample, token, head]
            key_scale, query_scale = np.float32(1.0), np.float32(1.0 / np.sqrt(key_dim))
            if normalize:
                key_scale = _inverse_length(keys)
                query_scale *= _inverse_length(queries)
            decay = np.exp(log_decay[sample, token, head])
            change[:] = 0
            for i in range(key_dim):
                weight = keys[i] * key_scale
                for j in range(value_dim):
                    memory[i, j] *= decay
                    change[j] += memory[i, j] * weight
            for j in range(value_dim):
                change[j] = beta[sample, token, head] * (value[sample, token, head, j] - change[j])
            read[:] = 0
            for i in range(key_dim):
                weight = keys[i] * key_scale
                question = queries[i] * query_scale
                for j in range(value_dim):
                    memory[i, j] += weight * change[j]
                    read[j] += memory[i, j] * question


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    Returns the outputs, and the states after the last token if they are asked for.

    `query` and `key`: Tensors of shape (batch, length, n_heads, key_dim), on the CPU. `value`: (batch, length, n_heads, value_dim).
    `g` and `beta`: (batch, length, n_heads), the logarithm of the decay and the rate of learning. `initial_state`:
    (batch, n_heads, key_dim, value_dim), zeros if not given. Outputs have the shape of `value` and the dtype of `query`,
    states are float32, and so is the computation. Names and order of the arguments are transformers', whose
    others, such as the size of chunks, make no difference here.
    """

    batch, _length, n_heads, key_dim = key.shape
    shape = (batch, n_heads, key_dim, value.shape[3])
    state = torch.zeros(shape) if initial_state is None else initial_state.float().clone()
    output = torch.empty(value.shape)
    if output.numel() > 0:
        n_threads = numba.get_num_threads()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        try:
            _run(
                *(item.float().contiguous().numpy() for item in (query, key, value, g, beta)),
                use_qk_l2norm_in_kernel,
                state.numpy(),
                output.numpy(),
            )
        finally:
            numba.set_num_threads(n_threads)
    return output.to(query.dtype), state if output_final_state else None
