# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The residuals of all pools, and residuals on disk, so that a second baseline or preset on the same model runs no forward pass.

The key covers everything that decides the numbers: see `identity.identify`.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import ContrastError
from ..files import write_bytes_atomically
from ..identity import digest, identify
from ..language_model import LanguageModel, Progress
from ..prompts import Prompt
from .baselines import LayerResiduals
from .classes import ClassSelection


@dataclass(frozen=True)
class PoolResiduals:
    """
    The residuals of all pools, at all layers.

    `harmful`: Tensor of shape (n_harmful, n_layers + 1, hidden_size), float32, with a class each.
    `bulk`: Tensor of shape (n_bulk, n_layers + 1, hidden_size), general harmless prompts.
    `matched`: Tensor of shape (n_matched, n_layers + 1, hidden_size), with a class each; may be empty.
    """

    harmful: Tensor
    harmful_classes: tuple[str, ...]
    bulk: Tensor
    matched: Tensor
    matched_classes: tuple[str, ...]

    def layer(self, index: int) -> LayerResiduals:
        """Returns views of the residuals of one layer."""

        return LayerResiduals(
            harmful=self.harmful[:, index],
            harmful_classes=self.harmful_classes,
            bulk=self.bulk[:, index],
            matched=self.matched[:, index],
            matched_classes=self.matched_classes,
        )

    def of(self, selection: ClassSelection) -> "PoolResiduals":
        """Returns the residuals of the classes that get directions."""

        kept = list(selection.kept)
        return replace(
            self,
            harmful=self.harmful[kept] if len(kept) < len(self.harmful) else self.harmful,
            harmful_classes=selection.harmful_classes,
            matched_classes=selection.matched_classes,
        )


def default_directory() -> Path:
    """Returns the folder for residuals in the user's cache directory."""

    return Path(platformdirs.user_cache_dir("heretic-contrast")) / "residuals"


def cache_key(model: LanguageModel, prompts: Sequence[Prompt]) -> str:
    """Returns the name of the file that holds the residuals of `prompts`."""

    # Prompts that share a batch are padded, which changes rounding.
    options = [model.winsorization_quantile, model.batch_size]
    return digest(identify(model, {"prompts": prompts}, options=options))


def _digest(residuals: Tensor) -> str:
    return hashlib.sha256(residuals.contiguous().numpy().tobytes()).hexdigest()


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
    path = (directory or default_directory()) / f"{cache_key(model, prompts)}.safetensors"
    residuals = load(path, (len(prompts), model.n_layers + 1, model.hidden_size))
    if residuals is None:
        residuals = model.residuals(prompts, progress)
        # The cache only saves time, so failing to fill it must not lose the work.
        with suppress(ContrastError):
            write_bytes_atomically(
                path, save({"residuals": residuals}, {"digest": _digest(residuals)})
            )
    return residuals
