# SPDX-License-Identifier: AGPL-3.0-or-later

"""Vectors of length 1, and where tensors are."""

from typing import Any

import torch
from torch import Tensor


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns vectors of length 1, and the lengths that they had.

    Tensor of shape (..., hidden_size) to tensors of shapes (..., hidden_size) and (...,), both float64. A zero vector,
    such as every difference at the embedding of a common last token, stays zero. No other is taken for zero, however
    short it is, which `torch.nn.functional.normalize` does below 1e-12. In float64 no float32 vector overflows.
    """

    exact = vectors.to(torch.float64)
    norms = exact.norm(dim=-1)
    return exact / norms.where(norms > 0, torch.ones_like(norms))[..., None], norms


def to_device(values: Any, device: torch.device) -> Tensor:
    """Returns a Tensor, or numbers as one, on a device. The CPU waits for no other device that it copies to."""

    # On the way back it would read what is not there yet.
    return torch.as_tensor(values).to(device, non_blocking=device.type != "cpu")
