# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The compiled trainer of self-organizing maps.

`som` draws what MiniSom would draw and tabulates MiniSom's neighborhoods; this module does the arithmetic. All of it lies
in one file, because Numba's cache notices changes of the file of a function, not of the files of those that it calls.

A map is trained in one of two ways.

In the span: weights start at samples and only move along lines through samples, so that they never leave the samples'
affine span. With coordinates C of the n samples in it (n × r, r < n), distances are the same as in full dimension,
and an iteration costs r operations per neuron instead of hidden_size. Only rounding differs. Where that could decide
which neuron wins, the attempt is given up.

In full dimension: MiniSom's own arithmetic, operation by operation, including numpy's order of summation where it
decides a winner. It takes over where an attempt in the span is given up, and where it is cheaper anyway (many samples).

Both record the winner of each iteration only. As the weights of neuron j are Σ_i A_ji x_i with rows of A that sum to 1,
and A follows from the winners, A is all that is kept of a map.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# Two neurons are equally near for all that is known when their distances from a sample differ by less than this, relative
# to the scale of distances. Rounding moves a distance by a few times 2.2e-16 per iteration at most, and hardly adds up.
TOLERANCE = 1e-11

# What became of a map.
TRAINED = 0
DIVERGED = 1


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with its cache on disk where there is a writable place for one, and without it otherwise."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            # Neither the package's directory nor the user's cache directory can be written.
            return numba.njit(**options)(function)

    return decorate


# The order of these sums is left to the compiler, which makes them several times faster. The last bits therefore depend
# on the processor; whatever could depend on the last bits does not use them.
ANY_ORDER = {"reassoc", "contract"}


@compiled(fastmath=ANY_ORDER)
def dot_product(first: Any, second: Any) -> Any:
    total = 0.0
    for k in range(first.shape[0]):
        total += first[k] * second[k]
    return total


@compiled(fastmath=ANY_ORDER)
def squared_distance(first: Any, second: Any) -> Any:
    total = 0.0
    for k in range(first.shape[0]):
        difference = first[k] - second[k]
        total += difference * difference
    return total


@compiled()
def squared_distance_as_numpy(first: Any, second: Any) -> Any:
    """The squared distance, summed pairwise as numpy sums the last axis of an array."""

    count = first.shape[0]
    if count > 128:
        half = count // 2
        half -= half % 8
        return squared_distance_as_numpy(first[:half], second[:half]) + squared_distance_as_numpy(
            first[half:], second[half:]
        )

    total = 0.0
    whole = count - count % 8
    if whole > 0:
        lanes = np.zeros(8)
        for start in range(0, whole, 8):
            for lane in range(8):
                difference = first[start + lane] - second[start + lane]
                lanes[lane] += difference * difference
        total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
            (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
        )
    for k in range(whole, count):
        difference = first[k] - second[k]
        total += difference * difference
    return total


@compiled()
def equal(first: Any, second: Any) -> Any:
    # Numba compiles no generator expressions.
    for k in range(first.shape[0]):  # noqa: SIM110
        if first[k] != second[k]:
            return False
    return True


@compiled()
def move(weight: Any, sample: Any, rate: Any) -> None:
    """Moves a weight vector towards a sample, in MiniSom's order of operations."""

    for k in range(weight.shape[0]):
        weight[k] += rate * (sample[k] - weight[k])


@compiled(fastmath=ANY_ORDER)
def subtract_multiple(target: Any, source: Any, factor: Any) -> None:
    for k in range(target.shape[0]):
        target[k] -= factor * source[k]


@compiled()
def span_coordinates(samples: Any) -> Any:
    """
    Returns coordinates of the samples in their affine span, with the first sample as the origin.

    Modified Gram-Schmidt: its triangular factor, which is all that is wanted, is as accurate as Householder's. Samples that
    are equal in every bit get coordinates that are, so that they win and lose together.

    Array of shape (n_samples, rank), float64.
    """

    n_samples, hidden_size = samples.shape
    origin = samples[0]
    rest = np.empty((n_samples, hidden_size))
    for i in range(n_samples):
        for k in range(hidden_size):
            rest[i, k] = np.float64(samples[i, k]) - np.float64(origin[k])

    coordinates = np.zeros((n_samples, n_samples))
    twins = np.full(n_samples, -1)
    rank = 0
    for i in range(1, n_samples):
        for earlier in range(i):
            if equal(samples[i], samples[earlier]):
                twins[i] = earlier
                break
        if twins[i] >= 0:
            continue
        length = np.sqrt(dot_product(rest[i], rest[i]))
        if length == 0.0:
            continue
        coordinates[i, rank] = length
        for later in range(i + 1, n_samples):
            product = dot_product(rest[i], rest[later])
            coordinates[later, rank] = product / length
            subtract_multiple(rest[later], rest[i], product / length / length)
        rank += 1

    for i in range(1, n_samples):
        if twins[i] >= 0:
            coordinates[i] = coordinates[twins[i]]
    return coordinates[:, :rank].copy()


@compiled()
def find_winner(sample: Any, weights: Any, scale: Any, in_span: Any, distances: Any) -> Any:
    """
    Returns the neuron nearest to a sample (the first of several), or -1 where the span cannot tell.

    Leaves the distances of all neurons in `distances`.
    """

    winner = 0
    for j in range(weights.shape[0]):
        distances[j] = np.sqrt(squared_distance(sample, weights[j]))
        if distances[j] < distances[winner]:
            winner = j

    doubtful = False
    for j in range(weights.shape[0]):
        margin = TOLERANCE * (scale + distances[j])
        if j != winner and distances[j] - distances[winner] <= margin:
            # Neurons that started at one sample and moved alike are equal, here as in full dimension, and the first wins.
            doubtful = doubtful or not equal(weights[j], weights[winner])
    if not doubtful:
        return winner
    if in_span:
        return -1

    winner = 0
    for j in range(weights.shape[0]):
        distances[j] = np.sqrt(squared_distance_as_numpy(sample, weights[j]))
        if distances[j] < distances[winner]:
            winner = j
    return winner


@compiled()
def train_map(
    points: Any,
    order: Any,
    initial: Any,
    rates: Any,
    rate_columns: Any,
    in_span: Any,
    weights: Any,
    winners: Any,
    hits: Any,
    errors: Any,
) -> Any:
    """
    Trains one map on `points`, the coordinates of samples or the samples themselves. Returns whether every winner is certain.

    Fills `weights`, the `winners` of the iterations, and the `hits` and quantization `errors` of the trained map.
    """

    n_neurons = weights.shape[0]
    distances = np.empty(n_neurons)
    scale = 0.0
    for i in range(points.shape[0]):
        scale = max(scale, squared_distance(points[i], points[0]))
    scale = np.sqrt(scale)

    for j in range(n_neurons):
        weights[j] = points[initial[j]]
    for t in range(order.shape[0]):
        sample = points[order[t]]
        winner = find_winner(sample, weights, scale, in_span, distances)
        if winner < 0:
            return False
        winners[t] = winner
        for j in range(n_neurons):
            rate = rates[t, rate_columns[winner, j]]
            if rate != 0.0:
                move(weights[j], sample, rate)

    hits[:] = 0
    errors[:] = 0.0
    for i in range(points.shape[0]):
        winner = find_winner(points[i], weights, scale, in_span, distances)
        if winner < 0:
            return False
        hits[winner] += 1
        errors[winner] += distances[winner]
    for j in range(n_neurons):
        errors[j] = errors[j] / hits[j] if hits[j] > 0 else np.inf
    return True


@compiled()
def mix(
    winners: Any, order: Any, initial: Any, rates: Any, rate_columns: Any, mixture: Any
) -> None:
    """
    Fills `mixture` with the matrix A (n_neurons × n_samples) of weights = A samples.

    Walks back from the last iteration: what iteration t adds is multiplied by 1 − rate of all that came after it.
    """

    n_neurons = mixture.shape[0]
    mixture[:] = 0.0
    remaining = np.ones(n_neurons)
    for t in range(order.shape[0] - 1, -1, -1):
        for j in range(n_neurons):
            rate = rates[t, rate_columns[winners[t], j]]
            mixture[j, order[t]] += rate * remaining[j]
            remaining[j] *= 1.0 - rate
    for j in range(n_neurons):
        mixture[j, initial[j]] += remaining[j]


@compiled()
def cheaper_in_span(n_samples: Any, hidden_size: Any, n_iterations: Any, n_neurons: Any) -> Any:
    """Whether coordinates and training in them need fewer operations than training in full dimension."""

    visits = n_iterations * n_neurons
    in_span = n_samples * n_samples * hidden_size + 2 * visits * n_samples
    return n_samples <= hidden_size and in_span < 2 * visits * hidden_size


@compiled(parallel=True)
def train_all(
    flat_samples: Any,
    starts: Any,
    shapes: Any,
    draws: Any,
    orders: Any,
    initials: Any,
    rates: Any,
    rate_columns: Any,
    flat_mixtures: Any,
    mixture_starts: Any,
    hits: Any,
    errors: Any,
    outcomes: Any,
) -> None:
    """
    Trains every map, in parallel.

    - `flat_samples`: the samples of all maps one after the other, float32 or float64; those of map i begin at `starts[i]` and
      have the shape `shapes[i]` (n_samples, hidden_size).
    - `draws[i]`: the row of `orders` (n_draws, iterations) and `initials` (n_draws, n_neurons) that map i uses.
    - `rates` (iterations, n_columns), `rate_columns` (n_neurons, n_neurons): when c wins in iteration t, neuron j moves
      by `rates[t, rate_columns[c, j]]` of its way to the sample.
    - Filled: `flat_mixtures`, from `mixture_starts[i]` on the matrix A of map i; `hits`, `errors` (n_maps, n_neurons);
      `outcomes` (n_maps).
    """

    n_neurons = rate_columns.shape[0]
    n_iterations = orders.shape[1]
    for i in numba.prange(starts.shape[0]):
        n_samples = shapes[i, 0]
        hidden_size = shapes[i, 1]
        samples = flat_samples[starts[i] : starts[i] + n_samples * hidden_size].reshape(
            (n_samples, hidden_size)
        )
        order = orders[draws[i]]
        initial = initials[draws[i]]
        winners = np.empty(n_iterations, dtype=np.int32)

        certain = False
        finite = False
        if cheaper_in_span(n_samples, hidden_size, n_iterations, n_neurons):
            points = span_coordinates(samples)
            weights = np.empty((n_neurons, points.shape[1]))
            certain = train_map(
                points,
                order,
                initial,
                rates,
                rate_columns,
                True,
                weights,
                winners,
                hits[i],
                errors[i],
            )
            finite = bool(np.isfinite(weights).all())
        if not certain:
            weights = np.empty((n_neurons, hidden_size))
            train_map(
                samples,
                order,
                initial,
                rates,
                rate_columns,
                False,
                weights,
                winners,
                hits[i],
                errors[i],
            )
            finite = bool(np.isfinite(weights).all())

        mixture = flat_mixtures[
            mixture_starts[i] : mixture_starts[i] + n_neurons * n_samples
        ].reshape((n_neurons, n_samples))
        mix(winners, order, initial, rates, rate_columns, mixture)
        outcomes[i] = TRAINED if finite and np.isfinite(mixture).all() else DIVERGED
