# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Residuals on disk, so that a second baseline or preset on the same model runs no forward pass.

The key covers everything that decides the numbers: see `identity.identify`.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ContrastError
from ..files import digest, write_bytes_atomically
from ..identity import identify
from ..language_model import LanguageModel, Progress
from ..prompts import Prompt


def default_directory() -> Path:
    """Returns the folder for residuals in the user's cache directory."""

    try:
        return Path(platformdirs.user_cache_dir("heretic-contrast")) / "residuals"
    except RuntimeError:
        # A user without a home has no such folder: this one cannot be made.
        return Path(os.devnull) / "residuals"


def _digest(residuals: Tensor) -> str:
    return hashlib.sha256(residuals.contiguous().numpy().data).hexdigest()


def _header(residuals: Tensor) -> bytes:
    """Returns what safetensors writes before the numbers; its `save` would hold them in memory three times."""

    place = {"dtype": "F32", "shape": residuals.shape, "data_offsets": [0, residuals.nbytes]}
    content = {"__metadata__": {"digest": _digest(residuals)}, "residuals": place}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def load(path: Path, shape: tuple[int, int, int]) -> Tensor | None:
    """Returns cached residuals of a shape, or None where the file is missing, cut off or damaged."""

    try:
        with safe_open(str(path), framework="pt") as file:
            residuals = file.get_tensor("residuals")
            digest = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError, RuntimeError, ValueError):
        return None
    whole = residuals.shape == shape and residuals.dtype == torch.float32
    return residuals if whole and digest == _digest(residuals) else None


def cached_residuals(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    directory: Path | None,
    progress: Progress | None = None,
) -> Tensor:
    """
    Returns the residuals of prompts, from the cache where they are there.

    Tensor of shape (n_prompts, n_layers + 1, hidden_size), float32. A damaged file is computed anew. Where the
    cache cannot be written, for example because the disk is full, the result is returned all the same. Reads all weights for
    the key, unless the model is identified already.
    """

    if not prompts:
        return torch.zeros(0, model.n_layers + 1, model.hidden_size)
    # Prompts that share a batch are padded, which changes rounding.
    options = [model.winsorization_quantile, model.batch_size]
    key = digest(identify(model, {"prompts": prompts}, options=options))
    path = (directory or default_directory()) / f"{key}.safetensors"
    residuals = load(path, (len(prompts), model.n_layers + 1, model.hidden_size))
    if residuals is None:
        residuals = model.residuals(prompts, progress)
        # The cache only saves time, so failing to fill it must not lose the work.
        with suppress(ContrastError):
            write_bytes_atomically(path, _header(residuals), residuals.numpy().data)
    return residuals
