# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The gated delta rule, the recurrence of linear attention in Qwen3-Next and Qwen 3.5, compiled for CPUs.

For each head, with the state S of shape (key_dim, value_dim), in arXiv:2412.06464's formula (10) transposed:

    S ← exp(g) S,  S ← S + β k (v − Sᵀ k)ᵀ,  o = Sᵀ q / √key_dim

transformers computes many tokens at once, through matrices of every pair of tokens and dozens of temporary tensors, which
suits a GPU. On a CPU it is several times faster to keep the state of a head in the cache and go from token to token.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ...directions.som_kernel import compiled

EPSILON = 1e-6
"""What transformers adds to squared lengths of queries and keys."""


@compiled()
def _inverse_length(vector: Any) -> Any:
    total = np.float32(EPSILON)
    for i in range(vector.shape[0]):
        total += vector[i] * vector[i]
    return np.float32(1.0) / np.sqrt(total)


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

    n_samples, n_tokens, n_key_heads, key_dim = key.shape
    n_heads, value_dim = value.shape[2:]
    n_sharing = n_heads // n_key_heads
    n_whole = key_dim - key_dim % 4
    for place in numba.prange(n_samples * n_heads):
        sample, head = place // n_heads, place % n_heads
        key_head = head // n_sharing
        memory = state[sample, head]
        keys, queries = np.empty(key_dim, np.float32), np.empty(key_dim, np.float32)
        change, read = np.empty(value_dim, np.float32), np.empty(value_dim, np.float32)
        for token in range(n_tokens):
            key_scale, query_scale = np.float32(1.0), np.float32(1.0 / np.sqrt(key_dim))
            if normalize:
                key_scale = _inverse_length(key[sample, token, key_head])
                query_scale *= _inverse_length(query[sample, token, key_head])
            agreement = np.float32(0.0)
            for i in range(key_dim):
                keys[i] = key[sample, token, key_head, i] * key_scale
                queries[i] = query[sample, token, key_head, i] * query_scale
                agreement += keys[i] * queries[i]
            decay = np.exp(log_decay[sample, token, head])
            rate = beta[sample, token, head]
            # What key and query find in the old state, in one pass over it: four rows at a time, so that sums are
            # loaded and stored less often.
            change[:] = 0
            read[:] = 0
            for i in range(0, n_whole, 4):
                k0, k1, k2, k3 = keys[i], keys[i + 1], keys[i + 2], keys[i + 3]
                q0, q1, q2, q3 = queries[i], queries[i + 1], queries[i + 2], queries[i + 3]
                for j in range(value_dim):
                    s0, s1 = memory[i, j], memory[i + 1, j]
                    s2, s3 = memory[i + 2, j], memory[i + 3, j]
                    change[j] += s0 * k0 + s1 * k1 + s2 * k2 + s3 * k3
                    read[j] += s0 * q0 + s1 * q1 + s2 * q2 + s3 * q3
            for i in range(n_whole, key_dim):
                for j in range(value_dim):
                    change[j] += memory[i, j] * keys[i]
                    read[j] += memory[i, j] * queries[i]
            for j in range(value_dim):
                change[j] = rate * (value[sample, token, head, j] - decay * change[j])
                # The query finds what is added now as well: Sᵀ q = exp(g) S_oldᵀ q + (k · q) change.
                output[sample, token, head, j] = decay * read[j] + agreement * change[j]
            for i in range(key_dim):
                weight = keys[i]
                for j in range(value_dim):
                    memory[i, j] = memory[i, j] * decay + weight * change[j]


@cache
def _compiled_run() -> Any:
    """Returns `_run`, compiled once for inputs of any strides, which are most often parts of a larger tensor."""

    strided = [numba.float32[(slice(None),) * n] for n in (4, 4, 4, 3, 3)]
    whole = [numba.float32[:, :, :, ::1]] * 2
    signature = numba.void(*strided, numba.boolean, *whole)
    # To start Numba's threads sets PyTorch's number to theirs, since both are OpenMP's: processes that were told to use one
    # thread each would compete for the cores. They are started here, once.
    n_threads = torch.get_num_threads()
    run = compiled(signature, parallel=True)(_run)
    numba.get_num_threads()
    torch.set_num_threads(n_threads)
    return run


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

    `query` and `key`: Tensors of shape (batch, length, n_key_heads, key_dim), on the CPU. `value`: (batch, length, n_heads,
    value_dim), where as many neighboring heads share one of the queries and keys as it takes (one before transformers 5.24).
    `g` and `beta`: (batch, length, n_heads), the logarithm of the decay and the rate of learning. `initial_state`:
    (batch, n_heads, key_dim, value_dim), zeros if not given. Outputs have the shape of `value` and the dtype of `query`,
    states are float32, and so is the computation. Names and order of the arguments are transformers', whose
    others, such as the size of chunks, make no difference here.
    """

    batch, _length, n_heads, value_dim = value.shape
    shape = (batch, n_heads, key.shape[3], value_dim)
    state = torch.zeros(shape) if initial_state is None else initial_state.float().clone()
    output = torch.empty(value.shape)
    if output.numel() > 0:
        run = _compiled_run()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        run(
            *(item.float().numpy() for item in (query, key, value, g, beta)),
            use_qk_l2norm_in_kernel,
            state.numpy(),
            output.numpy(),
        )
    return output.to(query.dtype), state if output_final_state else None
