# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Contrast baselines: what the residuals of harmful prompts are contrasted against (design, section 5).

A baseline is a pure function from the residuals of one layer to difference vectors d = h(p) − μ(p, c), one
per harmful prompt p of class c. Means are taken in float64, so that the order of the prompts does not matter.

Packages outside this one add baselines through the entry point group `heretic_contrast.baselines`: the entry's
name is the baseline's, and it points to a function with the signature of `Baseline`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ContrastError
from ..settings import ContrastSettings, other_baselines
from ..vectors import unit_vectors
from .classes import ClassSelection


@dataclass(frozen=True)
class Residuals:
    """
    The residuals of all pools, at all layers or at one.

    `harmful`: Tensor of shape (n_harmful, n_layers + 1, hidden_size), float32, with a class each in `harmful_classes`.
    `bulk`: Tensor of shape (n_bulk, n_layers + 1, hidden_size), the general harmless prompts G.
    `matched`: Tensor of shape (n_matched, n_layers + 1, hidden_size), the harmless prompts G_c on the subjects of the
    classes, with the class each in `matched_classes`; empty where no matched pool is used.
    Those of one layer, which baselines get, lack the dimension of the layers.
    """

    harmful: Tensor
    harmful_classes: tuple[str, ...]
    bulk: Tensor
    matched: Tensor
    matched_classes: tuple[str, ...]

    def layer(self, index: int) -> "Residuals":
        return replace(
            self,
            harmful=self.harmful[:, index],
            bulk=self.bulk[:, index],
            matched=self.matched[:, index],
        )

    def of(self, selection: ClassSelection) -> "Residuals":
        kept = list(selection.kept)
        return replace(
            self,
            harmful=self.harmful[kept] if len(kept) < len(self.harmful) else self.harmful,
            harmful_classes=selection.harmful_classes,
            matched_classes=selection.matched_classes,
        )


Baseline = Callable[[Residuals, ContrastSettings], Tensor]
"""Returns the difference vectors, Tensor of shape (n_harmful, hidden_size), float32."""

NEEDS_MATCHED = frozenset({"matched", "mixed", "residualized"})
"""The built-in baselines that need a matched pool."""


def mean(residuals: Tensor) -> Tensor:
    """Returns the mean over prompts. Tensor of shape (n, hidden_size) to (hidden_size,), float64."""

    return residuals.to(torch.float64).mean(dim=0)


def require_matched(harmful_classes: Iterable[str], matched_classes: Iterable[str]) -> None:
    """Raises `ContrastError` when a class of harmful prompts has no matched ones."""

    for name in sorted(set(harmful_classes) - set(matched_classes)):
        raise ContrastError(
            f'The class "{name}" has no matched harmless prompts: add some to the matched pool, '
            "or use the baseline unmatched."
        )


def require_neighbors(n_neighbors: int, n_bulk: int) -> None:
    """Raises `ContrastError` when the general harmless pool has fewer prompts than neighbors are asked for."""

    if not 1 <= n_neighbors <= n_bulk:
        raise ContrastError(
            f"The baseline nearest asks for {n_neighbors} neighbors of each prompt, but the pool has "
            f"{n_bulk} prompts: choose between 1 and {n_bulk}."
        )


def class_means(layer: Residuals) -> dict[str, Tensor]:
    """Returns mean(G_c) for every class c of the harmful prompts: float64 tensors of shape (hidden_size,)."""

    require_matched(layer.harmful_classes, layer.matched_classes)
    means = {}
    for name in sorted(set(layer.harmful_classes)):
        chosen = [index for index, category in enumerate(layer.matched_classes) if category == name]
        means[name] = mean(layer.matched[chosen])
    return means


def unmatched(layer: Residuals, settings: ContrastSettings) -> Tensor:
    """μ = mean of h over G, the paper's standard methodology (section 3.2 a)."""

    return (layer.harmful.to(torch.float64) - mean(layer.bulk)).float()


def matched(layer: Residuals, settings: ContrastSettings) -> Tensor:
    """μ = mean of h over G_c, the paper's topic-matched contrast (section 3.2 b)."""

    return mixed(layer, settings.model_copy(update={"mixing": 1.0}))


def mixed(layer: Residuals, settings: ContrastSettings) -> Tensor:
    """μ = (1 − λ) · unmatched + λ · matched, with λ = `settings.mixing` in [0, 1] (paper, section 6)."""

    bulk = mean(layer.bulk)
    means = class_means(layer)
    references = torch.stack(
        # Exact where both are equal, as at the embedding of a token that all prompts end with.
        [torch.lerp(bulk, means[name], settings.mixing) for name in layer.harmful_classes]
    )
    return (layer.harmful.to(torch.float64) - references).float()


def nearest(layer: Residuals, settings: ContrastSettings) -> Tensor:
    """
    μ = mean of the m prompts of G nearest to h(p) by cosine, both taken relative to the mean of G.

    m is `settings.n_neighbors`; with m = |G| this is `unmatched`. Ties go to the prompt whose residual comes
    first in lexicographic order, so that the order of the pool does not matter.
    """

    n_bulk = len(layer.bulk)
    require_neighbors(settings.n_neighbors, n_bulk)
    bulk = layer.bulk.to(torch.float64)
    harmful = layer.harmful.to(torch.float64)
    center = bulk.mean(dim=0)
    normalized_bulk, _ = unit_vectors(bulk - center)
    normalized_harmful, _ = unit_vectors(harmful - center)
    # Rounding keeps the last bits of a matrix product, which depend on the order of rows, from breaking ties.
    cosines = (normalized_harmful @ normalized_bulk.T).round(decimals=12)
    canonical = torch.tensor(
        sorted(range(n_bulk), key=lambda index: layer.bulk[index].tolist()), dtype=torch.long
    )
    ranked = torch.sort(cosines[:, canonical], dim=1, descending=True, stable=True).indices
    chosen = canonical[ranked[:, : settings.n_neighbors]]
    references = torch.stack([bulk[indices].mean(dim=0) for indices in chosen])
    return (harmful - references).float()


def residualized(layer: Residuals, settings: ContrastSettings) -> Tensor:
    """
    d = unmatched difference without its part in span{mean(G_c) − mean(G) : all classes c} (paper, section 6).

    The spanned subspace is what the subjects alone add to general prompts. Directions of it below 1e-6 of
    the largest singular value, or of the residuals' length, are rounding, and are kept in d.

    Raises `ContrastError` when nothing would be left, because the subjects span the whole space.
    """

    bulk = mean(layer.bulk)
    differences = layer.harmful.to(torch.float64) - bulk
    topics = torch.stack([topic - bulk for topic in class_means(layer).values()])
    _, singular_values, basis = torch.linalg.svd(topics, full_matrices=False)
    # What is small against the residuals themselves is rounding, too.
    scale = max(float(singular_values[0]), float(layer.bulk.to(torch.float64).norm(dim=1).max()))
    basis = basis[singular_values > 1e-6 * scale]
    if len(basis) >= differences.shape[1]:
        raise ContrastError(
            f"The subjects of {len(topics)} classes span all {differences.shape[1]} dimensions of the residuals, so the "
            "baseline residualized would leave nothing: use fewer classes or another baseline."
        )
    return (differences - (differences @ basis.T) @ basis).float()


BASELINES: dict[str, Baseline] = {
    "unmatched": unmatched,
    "matched": matched,
    "mixed": mixed,
    "nearest": nearest,
    "residualized": residualized,
}
"""The built-in baselines by name."""


def get_baseline(name: str) -> Baseline:
    """Returns the baseline with a name that the settings have checked."""

    return BASELINES[name] if name in BASELINES else other_baselines()[name].load()
