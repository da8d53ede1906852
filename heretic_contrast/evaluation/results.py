# SPDX-License-Identifier: AGPL-3.0-or-later

"""What is measured of directions, as typed results that a report shows; this module imports no PyTorch."""

from dataclasses import dataclass
from typing import Generic, TypeVar

N_PROMPTS = 64
"""Prompts of each pool that the activations of an extraction are observed on."""

MAX_RESPONSE_LENGTH = 50
"""Decoding steps of an extraction, as in the paper's divergence, and tokens that show whether a prompt is refused."""


@dataclass(frozen=True)
class AtLayer:
    """What is measured of one configuration at the output of one decoder layer."""

    configuration: str
    layer: int


Layer = TypeVar("Layer", bound=AtLayer)


class ByConfiguration(Generic[Layer]):
    """Results of several configurations at each decoder layer."""

    layers: tuple[Layer, ...]

    def configurations(self) -> list[str]:
        return list(dict.fromkeys(layer.configuration for layer in self.layers))

    def of(self, configuration: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.configuration == configuration]


@dataclass(frozen=True)
class Pair:
    """Two prompts on the same subject: one that a model refuses, and one that it answers."""

    refused: str
    answered: str
    category: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A pair that does not behave as assumed, with the tiers of the responses to its two prompts."""

    pair: Pair
    refused_tier: str
    answered_tier: str


@dataclass(frozen=True)
class LayerCapture(AtLayer):
    """
    Capture at the output of one decoder layer, averaged over pairs, with standard errors over pairs.

    `rank` is the dimension of the directions' span; `random_subspace` is √(rank / hidden_size), about what as many
    random directions capture. Averages are None where no pair has a difference; errors where fewer than two have.
    """

    subspace: float | None
    subspace_error: float | None
    max_cosine: float | None
    max_cosine_error: float | None
    rank: int
    random_subspace: float


@dataclass(frozen=True)
class CaptureResult(ByConfiguration[LayerCapture]):
    """Capture of every configuration at every decoder layer, and which pairs were left out."""

    n_pairs: int
    layers: tuple[LayerCapture, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class LayerGeometry(AtLayer):
    """
    The directions of one configuration at one decoder layer.

    `norms`, `cosines`, `mean_cosine`, `singular_values` and `first_share` are of the class directions as trained, before
    SVD and scale. `mean_cosine` is over pairs of them, also of one class, None for a single one. `first_share` is
    σ₁² / Σ σ², None where all directions are zero. `effective_weight` is the spectral norm of C, as the configuration composes it at
    weight 1, λ_max(Σ v vᵀ) of a sum; `weight_along_mean` is r̂ᵀ C r̂ for the mean direction r̂.
    """

    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    mean_cosine: float | None
    singular_values: tuple[float, ...]
    first_share: float | None
    effective_weight: float
    weight_along_mean: float

    @property
    def mean_norm(self) -> float:
        return sum(self.norms) / len(self.norms)


@dataclass(frozen=True)
class Comparison:
    """
    Two configurations at one decoder layer.

    `norm_ratio`: mean norm of the class directions as trained, second over first, over the classes of both.
    `class_angles`: degrees between the directions of each class. `principal_angles`: degrees between the spans
    of the directions as ablated, smallest first.
    """

    first: str
    second: str
    layer: int
    norm_ratio: float | None
    class_angles: dict[str, float]
    principal_angles: tuple[float, ...]

    @property
    def mean_class_angle(self) -> float | None:
        angles = self.class_angles.values()
        return sum(angles) / len(angles) if angles else None


@dataclass(frozen=True)
class Activity(AtLayer):
    """
    What a model's activations have to do with one configuration's directions at one decoder layer.

    y is what the layer's output projections add to the residual stream, those that are ablated, without biases that are not. `occupancy_harmful` and
    `occupancy_harmless`: per direction, the root mean square of v̂·y over prompts, at their last position, over that of
    ‖y‖. `perturbations`: by weight, the root mean square of ‖C y‖ over decoding steps of harmless prompts, over the
    root mean square deviation of the layer's output over these steps: below 1 it is smaller than the
    model's natural variation, the paper's noise floor (section 5.1).
    """

    occupancy_harmful: tuple[float, ...]
    occupancy_harmless: tuple[float, ...]
    natural_variation: float
    perturbations: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True)
class Geometry(ByConfiguration[LayerGeometry]):
    """Everything that is measured of some configurations' directions."""

    layers: tuple[LayerGeometry, ...]
    comparisons: tuple[Comparison, ...] = ()
    activities: tuple[Activity, ...] = ()
    class_names: tuple[tuple[str, tuple[str, ...]], ...] = ()
