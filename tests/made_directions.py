# SPDX-License-Identifier: AGPL-3.0-or-later

"""Directions without meaning, for tests."""

from typing import Any

import torch
from torch import Tensor

from heretic_contrast.directions.directions import Directions


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed numbers."""

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_directions(
    tensor: Tensor, class_directions: Tensor | None = None, **changes: Any
) -> Directions:
    """Directions around a tensor of shape (n_layers + 1, n_directions, hidden_size), one for each class, without maps."""

    trained = tensor if class_directions is None else class_directions
    fields: dict[str, Any] = {
        "tensor": tensor,
        "names": tuple(f"class {index}" for index in range(tensor.shape[1])),
        "aligned": True,
        "class_directions": trained,
        "class_names": tuple(f"class {index}" for index in range(trained.shape[1])),
        "mean_direction": trained.mean(dim=1),
        "hits": torch.zeros(*trained.shape[:2], 0, dtype=torch.int64),
    }
    return Directions(**{**fields, **changes})
