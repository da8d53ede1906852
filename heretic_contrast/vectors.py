# SPDX-License-Identifier: AGPL-3.0-or-later

"""Vectors of length 1, where tensors are, how exactly is computed there, and which differences are rounding."""

import math
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


def exact_type(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 for devices that have no float64: Apple's, and some of Intel's."""

    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def exactly(tensor: Tensor) -> Tensor:
    """Returns a tensor in the exact type of its device."""

    return tensor.to(exact_type(tensor.device))


def gpu_or_cpu() -> str:
    """Returns the type of the GPU that PyTorch can use here, whoever made it, or "cpu"."""

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def to_device(values: Any, device: torch.device) -> Tensor:
    """Returns a Tensor, or numbers as one, on a device. The CPU does not wait for NVIDIA's and AMD's."""

    # To other GPUs, what is copied here may be let go of before it is read: Apple's then get wrong numbers.
    return torch.as_tensor(values).to(device, non_blocking=device.type == "cuda")


def logits_tolerance(dtype: torch.dtype) -> float:
    """Returns the `logits_difference` that rounding explains in a model of a data type."""

    return 5e-3 if dtype in (torch.float32, torch.float64) else 0.1


def logits_difference(found: Tensor, expected: Tensor) -> float:
    """Returns by which share logits differ, but for what adds to all of them; infinite where others are infinite, or none."""

    is_number = expected.isfinite()
    if found.shape != expected.shape or not found.isfinite().equal(is_number):
        return math.inf
    found, expected = (torch.where(is_number, item, 0) for item in (found, expected))
    scale = (expected - expected.mean(dim=-1, keepdim=True)).norm()
    return float((found - expected).norm() / scale.clamp_min(1e-30))
