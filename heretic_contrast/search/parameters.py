# SPDX-License-Identifier: AGPL-3.0-or-later

"""The parameters of a trial, and the space that Optuna searches them in (design, section 5)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter, ValidationError
from rich.markup import escape
from torch import Tensor

from ..ablation.writers import EMBEDDINGS
from ..directions.directions import Directions
from ..directions.transforms import with_orthonormal_rest
from ..errors import ContrastError, one_line
from ..files import digest
from ..settings import HERETIC_RANGES, Range, Scale, general_parameter

if TYPE_CHECKING:
    from optuna import Trial


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class Kernel:
    """
    Heretic's weight as a function of the layer, for one component.

    It falls linearly from `max_weight` at layer `max_weight_position` to `min_weight` at a distance of
    `min_weight_distance` layers, and is 0 beyond.
    """

    max_weight: Number
    max_weight_position: Number
    min_weight: Number
    min_weight_distance: Number

    def weight(self, layer_index: int) -> float:
        distance = abs(layer_index - self.max_weight_position)
        if distance > self.min_weight_distance:
            return 0.0
        if distance == 0:
            return self.max_weight
        return self.max_weight + (distance / self.min_weight_distance) * (
            self.min_weight - self.max_weight
        )


@dataclass(frozen=True)
class Parameters:
    """
    What one trial does to the model: w_k(l) = s_k · kernel(l) for direction k, layer l and each component.

    `direction_index`: index of the layer whose directions are used for all layers (interpolated between
    neighbors where it is fractional), or None for directions per layer.
    `kernels`: by component. `scales`: s_k by name of the direction. `configuration`: see `configuration_digest`; "" where it is not
    known.
    """

    direction_index: Number | None
    kernels: dict[str, Kernel]
    scales: dict[str, Number]
    configuration: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values that `from_dict` turns into the same parameters, bit for bit."""

        return asdict(self)

    def to_presentation_dict(self) -> dict[str, str]:
        shown = {
            "direction_index": "per layer"
            if self.direction_index is None
            else f"{self.direction_index:.2f}"
        }
        for component, kernel in self.kernels.items():
            for name, value in asdict(kernel).items():
                # Embeddings have no other.
                if component != EMBEDDINGS or name == "max_weight":
                    shown[f"{component}.{name}"] = f"{value:.2f}"
        for name, value in self.scales.items():
            # Heretic prints names as markup; in Markdown, a bracket that is escaped is the same.
            shown[f"scale.{escape(one_line(name))}"] = f"{value:.2f}"
        return shown

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Parameters":
        """Restores parameters. Raises `ContrastError` when something else has stored them."""

        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise ContrastError(
                "The checkpoint holds trials of another modifier: start from scratch (checkpoint action restart), "
                "or give another study_checkpoint_dir."
            ) from error

    def require_fit(
        self, directions: Directions, components: Sequence[str], configuration: str = ""
    ) -> None:
        """Raises `ContrastError` when the parameters belong to another configuration, or to a model with other components."""

        # Directions have one index more than the model has decoder layers, for the embedding.
        last_layer_index = len(directions.tensor) - 2
        if (
            set(self.scales) != set(directions.names)
            or not 0 <= (self.direction_index or 0) <= last_layer_index
            or set(self.kernels) != set(components)
            or len({self.configuration, configuration} - {""}) > 1
        ):
            raise ContrastError(
                "The parameters of this trial belong to another configuration of the plugin: give the settings, prompts, directions and "
                "model, and the kind of device and versions of the libraries, that it was made with, start from scratch (checkpoint "
                "action restart), or give another study_checkpoint_dir."
            )


def configuration_digest(directions: Directions, settings: Mapping[str, Any]) -> str:
    """
    Returns a digest of what decides, beside a trial's parameters, what the trial does to a model.

    That is what directions were made from (their names, settings, prompts and model), their numbers where that does not say these,
    and the settings of ablation, as JSON values.
    """

    content = {
        "names": list(directions.names),
        **{name: directions.provenance.get(name) for name in ("settings", "prompts", "identity")},
        "ablation": dict(settings),
    }
    equalizes = settings.get("equal_effective_weight") and settings["composition"] != "sum"
    if equalizes or directions.has_shared:
        # Earlier versions equalized every composition as a sum, and mixed directions around a shared one otherwise between layers.
        content["revision"] = 2
    made, own = directions.provenance, directions.digest()
    # What was extracted is told by what it was made from, since its last digits may differ; earlier files do not say their numbers.
    if made.get("digest", own if "identity" in made else None) != own:
        content["digest"] = own
    return digest(content)[:16]


EMBEDDINGS_RANGES: dict[str, Range] = {f"{EMBEDDINGS}.max_weight": (-0.25, 1.5)}
"""What is searched of the embeddings, which can be left alone as well."""

HERETIC_20_RANGES: dict[str, Range] = {"mlp.down_proj.max_weight": (-0.25, 1.5)}
"""What Heretic 2.0 searches otherwise: a weight below 0 counts as 0, so that the MLP can be left alone."""


def require_ranges(space: Mapping[str, Range], kind: str, known: Sequence[str] | None) -> None:
    """Raises `ContrastError` when a range of the `kind`, "component" or "direction", is for none of those `known`, if any."""

    if known is None:
        return
    has_no_scale = kind == "direction" and len(known) == 1
    reason = (
        "but one direction has no scale of its own: leave it out"
        if has_no_scale
        else f"but there are {', '.join(known)}: name one of these"
    )
    for name in space:
        if has_no_scale and name in ("scale", "rest"):
            raise ContrastError(f"search_space has a range for {name}, {reason}.")
        if name.startswith("scale."):
            owner = name.removeprefix("scale.") if kind == "direction" else ""
        else:
            owner = name.rpartition(".")[0] if kind == "component" else ""
        if owner and (has_no_scale or owner not in known):
            raise ContrastError(f'search_space has a range for the {kind} "{owner}", {reason}.')


def require_ranges_of(directions: Directions, space: Mapping[str, Range]) -> None:
    """Raises `ContrastError` when a range is for the scale of none of the directions."""

    # The scale of a shared direction is 1.
    require_ranges(space, "direction", directions.names[int(directions.has_shared) :])
    if "rest" in space and not directions.has_shared:
        raise ContrastError(
            'The range of "rest" in search_space has no effect on directions of which none is shared: leave it out, or extract '
            "them with shared_direction."
        )


def suggest_parameters(
    trial: "Trial",
    components: Sequence[str],
    n_layers: int,
    directions: Directions,
    space: Mapping[str, Range] | None = None,
    default: Mapping[str, Range] | None = None,
    configuration: str = "",
) -> Parameters:
    """
    Samples the parameters of a trial (paper, section 2.1).

    Names and ranges of the kernel and the direction index are Heretic's, so that one direction searches exactly
    Heretic's space. Several directions add one scale each; parallel directions add up, so the range of the
    kernel's maximum then reaches down to where their sum is as strong as Heretic's weakest single one. Beside a shared direction,
    which is Heretic's and has its kernel, what the classes add has scales that are 0 where `rest` is not above 0. Embeddings
    have a weight instead of a kernel.

    `space`: ranges that the user has given, and `default`: those in which the installed Heretic differs from 1.4. In
    both, a range of one component or direction stands before that of all. `configuration`: as in `Parameters`.
    """

    last_layer_index = n_layers - 1
    direction_index = None
    # After SVD, direction k of neighboring layers has nothing in common, and interpolating it no meaning.
    if directions.aligned:
        scope = trial.suggest_categorical("direction_scope", ["global", "per layer"])
        # Always sampled, because multivariate TPE does not work with conditional parameters.
        index = trial.suggest_float(
            "direction_index", 0.4 * last_layer_index, 0.9 * last_layer_index
        )
        direction_index = index if scope == "global" else None

    n_directions = directions.n_directions
    lowest, highest = HERETIC_RANGES["max_weight"]
    if n_directions > 1 and not directions.has_shared:
        # The average scale is 0.5, so n parallel directions remove n / 2 times the kernel's weight.
        lowest = 2 * lowest / n_directions
    ranges = {**HERETIC_RANGES, **EMBEDDINGS_RANGES, "max_weight": (lowest, highest)}
    spaces = (space or {}, default or {}, ranges)

    def suggest(name: str, unit: float = 1.0, least: float = -math.inf) -> float:
        keys = (name, general_parameter(name))
        limits = next(item[key] for item in spaces for key in keys if key in item)
        low, high = (max(least, limit * unit) for limit in limits)
        return trial.suggest_float(name, low, high)

    kernels = {}
    for component in components:
        max_weight = max(0.0, suggest(f"{component}.max_weight"))
        if component == EMBEDDINGS:
            # They stand before the first layer alone.
            kernels[component] = Kernel(max_weight, 0.0, 0.0, 0.0)
            continue
        position = suggest(f"{component}.max_weight_position", last_layer_index)
        # A fraction of max_weight, again because ranges must not vary.
        min_weight = suggest(f"{component}.min_weight") * max_weight
        distance = suggest(f"{component}.min_weight_distance", last_layer_index, least=1.0)
        kernels[component] = Kernel(max_weight, position, min_weight, distance)

    if n_directions == 1:
        # A single scale would only repeat the kernel's maximum.
        scales = {directions.names[0]: 1.0}
    else:
        n_shared = int(directions.has_shared)
        rest = max(0.0, suggest("rest")) if n_shared else 1.0
        scales = dict.fromkeys(directions.names[:n_shared], 1.0) | {
            name: rest * suggest(f"scale.{name}") for name in directions.names[n_shared:]
        }
    return Parameters(
        direction_index=direction_index,
        kernels=kernels,
        scales=scales,
        configuration=configuration,
    )


def layer_vectors(
    directions: Directions, direction_index: float | None, layer_index: int, scale: Scale
) -> Tensor:
    """
    Returns the directions that are ablated at a decoder layer.

    Tensor of shape (n_directions, hidden_size). The index is shifted by 1, because index 0 of the tensor is the
    embedding. Directions interpolated between layers have length 1 again under `scale = "unit"`, and those around a shared one are
    orthonormal again.
    """

    if direction_index is None:
        return directions.tensor[layer_index + 1]
    fraction, index = math.modf(direction_index + 1)
    lower = directions.tensor[int(index)]
    upper = directions.tensor[min(int(index) + 1, len(directions.tensor) - 1)]
    vectors = torch.lerp(lower, upper, fraction)
    if directions.has_shared:
        return with_orthonormal_rest(vectors).float()
    return F.normalize(vectors, dim=1) if scale == "unit" else vectors
