# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What is done to class directions after they are trained: pure functions of tensors.

SVD (paper, section 3.2 c), and the controls of what the paper explains its failures by.
"""

import torch
from torch import Tensor

from ..vectors import unit_vectors


def orthogonalize(
    vectors: Tensor, mean_direction: Tensor, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """
    Returns the right singular vectors of each layer's directions, and their singular values (paper, section 3.2 c).

    D_l = U S Vᵀ; the rows of Vᵀ, ordered by singular value, replace the directions, each with the sign that
    gives it a non-negative product with the mean direction. Where D_l has a lower rank, rows are zero.

    `vectors`: Tensor of shape (n_layers + 1, n_directions, hidden_size), float64.
    `mean_direction`: Tensor of shape (n_layers + 1, hidden_size).
    Returns tensors of shape (n_layers + 1, rank, hidden_size) and (n_layers + 1, rank).
    """

    _, singular_values, rows = torch.linalg.svd(vectors, full_matrices=False)
    singular_values, rows = singular_values[:, :rank], rows[:, :rank]
    # Directions below rounding are arbitrary: an ablation along them would be noise.
    meaningful = singular_values > 1e-6 * singular_values[:, :1]
    signs = torch.where((rows * mean_direction[:, None]).sum(-1) < 0, -1.0, 1.0)
    rows = rows * (signs * meaningful)[..., None]
    return rows, singular_values * meaningful


SHARED = "shared"
"""The name of the direction that all classes have in common."""


def around_shared(vectors: Tensor) -> Tensor:
    """
    Returns the first direction of each layer, and orthonormal directions of what the others add to it.

    With the others' unit vectors less their parts along the first, R = U S Qᵀ, these are the rows of U Qᵀ, the orthonormal ones
    nearest to those of R (Löwdin), so that each still belongs to its class. Where R has a lower rank, they are as near to
    orthonormal as its span allows, and no combination with weights up to 1 removes more than all of it.

    Tensor of shape (n_layers + 1, n_directions, hidden_size), to one of the same shape, float64.
    """

    return with_orthonormal_rest(unit_vectors(vectors)[0])


def with_orthonormal_rest(vectors: Tensor) -> Tensor:
    """
    Returns the first direction at length 1, and orthonormal ones, as `around_shared` does, of what the others, as long as they are, add.

    Tensor of shape (..., n_directions, hidden_size), to one of the same shape, float64.
    """

    shared, others = unit_vectors(vectors[..., :1, :])[0], vectors[..., 1:, :].to(torch.float64)
    left, sizes, rows = torch.linalg.svd(others - others @ shared.mT * shared, full_matrices=False)
    # What is below rounding has no direction.
    return torch.cat([shared, (left * (sizes > 1e-6)[..., None, :]) @ rows], dim=-2)


def without_harmless(vectors: Tensor, harmless_means: Tensor) -> Tensor:
    """
    Returns directions without their parts along the mean residual of harmless prompts.

    Implements https://huggingface.co/blog/grimjim/projected-abliteration, as Heretic does.

    `vectors`: Tensor of shape (n_layers + 1, n_directions, hidden_size), to one of the same shape. `harmless_means`: Tensor of
    shape (n_layers + 1, hidden_size).
    """

    harmless = unit_vectors(harmless_means)[0][:, None]
    return vectors - (vectors * harmless).sum(-1, keepdim=True) * harmless


def random_directions(vectors: Tensor, seed: int) -> Tensor:
    """
    Returns random directions of the same count, norms and mutual cosines: the floor for every comparison (paper, section 5.2).

    With D = U S Vᵀ, the result is U S Qᵀ with Q a random orthonormal basis of the same size, so that the
    Gram matrix of the directions is exactly that of D.

    Tensor of shape (n_layers + 1, n_directions, hidden_size), float64, to one of the same shape.
    """

    generator = torch.Generator().manual_seed(seed)
    left, singular_values, rows = torch.linalg.svd(vectors, full_matrices=False)
    noise = torch.randn(
        vectors.shape[0], vectors.shape[2], rows.shape[1], generator=generator, dtype=vectors.dtype
    )
    basis, _ = torch.linalg.qr(noise)
    return (left * singular_values[:, None]) @ basis.transpose(1, 2)
