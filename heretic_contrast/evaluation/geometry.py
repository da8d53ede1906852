# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The geometry of directions, and how much a model's activations have to do with them (design, section 5).

Three explanations of a failing baseline can be told apart here: directions of small magnitude (norms,
perturbation), parallel directions that add up (cosines, singular values, effective weight), and a lost subject (angles
between baselines, occupancy). Layers are decoder layers, counted from 0: layer i is residual index i + 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import torch
from torch import Tensor

from ..ablation.operator import Operator, effective_weight, weight_along
from ..directions.directions import Directions
from ..engine.observation import (
    Components,
    Passing,
    can_be_told,
    observe_decoding,
    passing_layers,
)
from ..engine.text_classification import Classifier
from ..language_model import Batches, LanguageModel
from ..prompts import Prompt
from ..tiers.responses import classify_response
from ..vectors import exactly, to_device, unit_vectors
from .capture import capture_pairs, span_basis
from .plan import Configuration, Configurations, complete
from .plan_settings import WEIGHTS
from .results import (
    MAX_RESPONSE_LENGTH,
    Activity,
    CaptureResult,
    Comparison,
    Geometry,
    LayerGeometry,
    Pair,
)


def angle(first: Tensor, second: Tensor) -> float:
    """Returns the angle between two directions of shape (hidden_size,), in degrees; NaN where one is zero."""

    (a, b), lengths = unit_vectors(torch.stack([first, second]))
    if not bool(lengths.all()):
        return math.nan
    # The arc cosine loses half of the digits near 0 and 180 degrees; this form does not.
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """
    Returns the principal angles between two spans, in degrees, smallest first.

    Orthonormal bases of shape (rank, hidden_size) to a Tensor of shape (min(rank, rank),), float64. From the sines where
    cosines are near 1, as Björck and Golub (1973) propose.
    """

    smaller, larger = sorted((first, second), key=len)
    if not len(smaller):
        return torch.zeros(0, dtype=torch.float64)
    cosines = torch.linalg.svdvals(smaller @ larger.T).clamp(0, 1)
    rest = smaller - (smaller @ larger.T) @ larger
    sines = torch.linalg.svdvals(rest).flip(0)[: len(cosines)].clamp(0, 1)
    return torch.where(cosines**2 < 0.5, cosines.arccos(), sines.arcsin()).rad2deg()


def measure_layer(name: str, configuration: Configuration, layer: int) -> LayerGeometry:
    """Returns the geometry of one configuration at one decoder layer (paper, section 5.2)."""

    directions, index = configuration.directions, layer + 1
    trained = directions.class_directions[index].to(torch.float64)
    unit, _ = unit_vectors(trained)
    cosines = unit @ unit.T
    n = len(trained)
    singular_values = torch.linalg.svdvals(trained)
    energy = float((singular_values**2).sum())
    operator = configuration.operator(layer, 1.0)
    return LayerGeometry(
        configuration=name,
        layer=layer,
        norms=tuple(trained.norm(dim=-1).tolist()),
        cosines=tuple(tuple(row) for row in cosines.tolist()),
        mean_cosine=(
            float(cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)) if n > 1 else None
        ),
        singular_values=tuple(singular_values.tolist()),
        first_share=float(singular_values[0] ** 2) / energy if energy else None,
        effective_weight=effective_weight(operator),
        weight_along_mean=weight_along(operator, directions.mean_direction[index]),
    )


def compare(
    first_name: str,
    first: Directions,
    second_name: str,
    second: Directions,
    layer: int,
    spans: Sequence[Tensor] = (),
) -> Comparison:
    """
    Returns how the directions of two configurations lie to each other at one decoder layer (paper, section 5.1).

    `spans`: the `span_basis` of both there, where it is known.
    """

    index = layer + 1
    spans = spans or [span_basis(item.tensor[index]) for item in (first, second)]
    # Several neurons of one class share its name; only single ones can be told to belong together.
    rows = [
        dict(zip(item.class_direction_names, item.class_directions[index], strict=True))
        for item in (first, second)
    ]
    common = [name for name in rows[0] if name in rows[1]]
    lengths = [sum(float(side[name].norm()) for name in common) for side in rows]
    angles = {name: angle(rows[0][name], rows[1][name]) for name in common}
    return Comparison(
        first=first_name,
        second=second_name,
        layer=layer,
        norm_ratio=lengths[1] / lengths[0] if lengths[0] else None,
        class_angles={name: value for name, value in angles.items() if not math.isnan(value)},
        principal_angles=tuple(principal_angles(*spans).tolist()),
    )


def measure_geometry(
    configurations: Configurations, activities: Sequence[Activity] = ()
) -> Geometry:
    """Returns the geometry of every configuration and decoder layer, and all configurations compared in pairs."""

    completed = complete(configurations)
    directions = {name: item.directions for name, item in completed.items()}
    n_layers = min((len(item.tensor) for item in directions.values()), default=1) - 1

    def compare_all(layer: int) -> list[Comparison]:
        spans = {name: span_basis(item.tensor[layer + 1]) for name, item in directions.items()}
        return [
            compare(a, directions[a], b, directions[b], layer, (spans[a], spans[b]))
            for a, b in combinations(directions, 2)
        ]

    layers = [
        measure_layer(name, configuration, layer)
        for name, configuration in completed.items()
        for layer in range(n_layers)
    ]
    # The bases of one layer are kept at a time, and each pair's layers stand together.
    comparisons = chain.from_iterable(zip(*map(compare_all, range(n_layers)), strict=True))
    names = tuple((name, item.class_direction_names) for name, item in directions.items())
    return Geometry(tuple(layers), tuple(comparisons), tuple(activities), names)


@dataclass(frozen=True)
class OutputMoments:
    """
    What is kept of the outputs y of every layer, averaged over prompts and decoding steps, in float64 where the device has it.

    `second`: Tensor of shape (n_layers, n_vectors, n_vectors), mean of (V y)(V y)ᵀ. `energy`: Tensor of shape
    (n_layers,), mean of ‖y‖². `variation`: Tensor of shape (n_layers,), mean squared deviation of a layer's output from
    its mean over the steps of the same prompt. `n_steps`: the number of decoding steps in all.
    """

    second: Tensor
    energy: Tensor
    variation: Tensor
    n_steps: int


@torch.no_grad()
def observe_outputs(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    vectors: Tensor,
    max_new_tokens: int,
    passing: Mapping[int, Passing],
    components: Components = None,
) -> OutputMoments:
    """
    Measures what the layers write to the residual stream while the model answers prompts greedily.

    `vectors`: Tensor of shape (n_layers, n_vectors, hidden_size). The first step is the last position of the
    prompt; steps after the end of a response are not counted. Only the last position of each step is
    ever kept, and only its moments. Each step takes the most likely token, whatever the model's generation
    configuration asks for. `model`: whose batches change nothing, see `LanguageModel.for_batches`. `passing`, `components`: see
    `observe_decoding`.
    """

    vectors = exactly(to_device(vectors, model.device))
    n_layers, n_vectors, hidden_size = vectors.shape

    def observe(batch: slice) -> list[Tensor]:
        """Returns the sums over a batch, which is observed from its beginning where memory was exhausted."""

        tokens = model.token_ids(prompts[batch])
        second = vectors.new_zeros(n_layers, n_vectors, n_vectors)
        energy = vectors.new_zeros(n_layers)
        sums = vectors.new_zeros(len(tokens), n_layers, hidden_size)
        squares = vectors.new_zeros(len(tokens), n_layers)
        counts = vectors.new_zeros(len(tokens))

        def add(rows: Tensor, y: Tensor, h: Tensor) -> None:
            # Choosing rows would wait for the device: those that have ended count as zeros.
            y, h = (item.masked_fill(~rows[:, None, None], 0) for item in (y, h))
            projections = torch.einsum("plh,lkh->plk", y, vectors)
            second.add_(torch.einsum("plj,plk->ljk", projections, projections))
            energy.add_((y**2).sum(dim=(0, 2)))
            sums.add_(h)
            squares.add_((h**2).sum(dim=2))
            counts.add_(rows)

        observe_decoding(model, tokens, max_new_tokens, add, passing, components)
        deviation = squares - (sums**2).sum(dim=2) / counts[:, None]
        return [second, energy, deviation.clamp_min(0).sum(dim=0), counts.sum()]

    totals = [
        torch.stack(parts).sum(dim=0)
        for parts in zip(*Batches(model.batch_size).run(len(prompts), observe), strict=True)
    ]
    n_steps = totals.pop()
    second, energy, variation = ((item / n_steps).cpu().double() for item in totals)
    return OutputMoments(second, energy, variation, int(n_steps))


def occupancy(second: Tensor, energy: Tensor, vectors: Tensor) -> Tensor:
    """
    Returns the root mean square of v̂·y over that of ‖y‖, per direction.

    `second`: Tensor of shape (n_directions, n_directions), mean of (V y)(V y)ᵀ. `energy`: mean of ‖y‖².
    Tensor of shape (n_directions,), float64; 0 for a zero direction or an output of zero.
    """

    squares = vectors.to(torch.float64).square().sum(dim=-1) * energy
    return (second.diagonal() / squares.where(squares > 0, torch.ones_like(squares))).sqrt()


def perturbation(second: Tensor, inverse: Tensor, operator: Operator) -> float:
    """
    Returns the root mean square of ‖C y‖ from the mean of (D y)(D y)ᵀ, D being the directions (as rows) that C ablates.

    `second`: Tensor of shape (n_directions, n_directions). `inverse`: the pseudoinverse of D, Tensor of shape (hidden_size, n_directions).
    With C = V K Vᵀ and z = V y (vectors as rows), ‖C y‖² = zᵀ Kᵀ G K z for the Gram matrix G. V lies in the span of D.
    """

    vectors = operator.vectors.to(torch.float64)
    kernel = operator.kernel.to(torch.float64)
    coordinates = vectors @ inverse
    second = coordinates @ second @ coordinates.T
    form = kernel.T @ (vectors @ vectors.T) @ kernel
    return math.sqrt(max(float((form * second).sum()), 0.0))


def measure_activities(
    model: LanguageModel,
    configurations: Configurations,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    weights: Sequence[float],
    max_new_tokens: int = 50,
    components: Components = None,
    strengths: Sequence[str] = ("weight",),
) -> tuple[Activity, ...]:
    """
    Measures occupancy and perturbation of every configuration and decoder layer, in one run of the model (paper, section 5.1).

    `components`: what is ablated, None for all. `strengths`: what a weight may mean, of which the first counts. Without those layers where
    what components add to the stream cannot be told from what others do, and empty where what layers add cannot: see `passing_layers`.
    """

    passing = passing_layers(model) if configurations else None
    if passing is None:
        return ()
    layers = [
        layer
        for layer in range(model.n_layers)
        if components is None or (layer not in passing and can_be_told(model, layer, components))
    ]
    if not layers:
        return ()
    model = model.for_batches(model.token_ids([*harmful, *harmless]))
    completed = complete(configurations)
    vectors = torch.cat([item.directions.tensor[1:] for item in completed.values()], dim=1)
    at_harmful = observe_outputs(model, harmful, vectors, 1, passing, components)
    at_harmless = observe_outputs(model, harmless, vectors, 1, passing, components)
    decoding = observe_outputs(model, harmless, vectors, max_new_tokens, passing, components)
    activities = []
    start = 0
    for name, configuration in completed.items():
        directions = configuration.directions
        own = slice(start, start + directions.n_directions)
        start += directions.n_directions
        strength = configuration.strengths(strengths)[0]
        for layer in layers:
            variation = math.sqrt(float(decoding.variation[layer]))
            rows = directions.tensor[layer + 1]
            inverse = torch.linalg.pinv(rows.to(torch.float64))
            perturbations = []
            for weight in weights:
                operator = configuration.operator(layer, weight, strength)
                size = perturbation(decoding.second[layer, own, own], inverse, operator)
                perturbations.append((float(weight), size / variation if variation else None))
            with_harmful, with_harmless = (
                tuple(occupancy(seen.second[layer, own, own], seen.energy[layer], rows).tolist())
                for seen in (at_harmful, at_harmless)
            )
            activities.append(
                Activity(name, layer, with_harmful, with_harmless, variation, tuple(perturbations))
            )
    return tuple(activities)


def measure_directions(
    model: LanguageModel,
    configurations: Mapping[str, Configuration],
    pairs: Sequence[Pair],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    weights: Sequence[float] = WEIGHTS,
    max_new_tokens: int = MAX_RESPONSE_LENGTH,
    classify: Classifier = classify_response,
    components: Components = None,
    strengths: Sequence[str] = ("weight",),
) -> tuple[CaptureResult, Geometry]:
    """
    Returns capture with pairs, and geometry with activities observed on prompts, of every configuration.

    `classify`: says which pairs behave as assumed. `components`, `strengths`: see `measure_activities`.
    """

    directions = {name: item.directions for name, item in configurations.items()}
    capture = capture_pairs(model, directions, pairs, max_new_tokens, classify)
    activities = measure_activities(
        model,
        configurations,
        harmful,
        harmless,
        weights,
        max_new_tokens,
        components,
        strengths,
    )
    return capture, measure_geometry(configurations, activities)
