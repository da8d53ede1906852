# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The compiled trainer of self-organizing maps.

`som` draws what MiniSom would draw and tabulates MiniSom's neighborhoods; this module does the arithmetic. All of it lies
in one file, because Numba's cache notices changes of the file of a function, not of the files of those that it calls.

A map is trained in one of two ways.

In the span: weights start at samples and only move along lines through samples, so that they never leave the samples'
affine span. With coordinates C of the n samples in it (n × r, r < n), distances are the same as in full dimension,
and an iteration costs r operations per neuron instead of hidden_size. Only rounding differs. Where rounding could decide
which neuron wins, the history of the neurons in question is repeated as MiniSom computes it, bit by bit, including
numpy's order of summation.

In full dimension, with the same care: where there are so many samples that coordinates cost more than they save, or so
many doubts that repetitions do.

Both record the winner of each iteration. The weights of neuron j are Σ_i A_ji x_i with rows of A that sum to 1, and A
follows from the winners: it is all that is kept of a map.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# Two neurons are equally near for all that is known when their distances from a sample differ by less than this, relative
# to the scale of distances. Rounding moves a distance by a few times 2.2e-16 per iteration at most, and hardly adds up.
TOLERANCE = 1e-11


def compiled(*signatures: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with its cache on disk where there is a writable place for one, and without it otherwise."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(*signatures, cache=True, **options)(function)
        except RuntimeError:
            # Neither the package's directory nor the user's cache directory can be written.
            return numba.njit(*signatures, **options)(function)

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


@compiled(fastmath=ANY_ORDER)
def subtract_multiple(target: Any, source: Any, factor: Any) -> None:
    for k in range(target.shape[0]):
        target[k] -= factor * source[k]


@compiled()
def first_equals(samples: Any) -> Any:
    """Returns for each sample the index of the first one that is equal to it. Array of shape (n_samples,), int64."""

    firsts = np.arange(samples.shape[0])
    for i in range(samples.shape[0]):
        for earlier in range(i):
            if np.array_equal(samples[i], samples[earlier]):
                firsts[i] = earlier
                break
    return firsts


@compiled()
def span_coordinates(samples: Any, firsts: Any) -> Any:
    """
    Returns coordinates of the samples in their affine span, with the first sample as the origin.

    Modified Gram-Schmidt: its triangular factor, which is all that is wanted, is as accurate as Householder's. Equal samples
    (`firsts`, see `first_equals`) get equal coordinates, so that they win and lose together.

    Array of shape (n_samples, rank), float64.
    """

    n_samples = samples.shape[0]
    rest = np.empty(samples.shape)
    for i in range(n_samples):
        rest[i] = samples[i] - samples[0]

    coordinates = np.zeros((n_samples, n_samples))
    rank = 0
    for i in range(1, n_samples):
        if firsts[i] != i:
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
        coordinates[i] = coordinates[firsts[i]]
    return coordinates[:, :rank].copy()


@compiled(fastmath=ANY_ORDER)
def measure(sample: Any, weights: Any, distances: Any) -> None:
    """Fills `distances` with the squared distances of the neurons from a sample."""

    for j in range(weights.shape[0]):
        distances[j] = squared_distance(sample, weights[j])


@compiled(fastmath=ANY_ORDER)
def move_and_measure(
    sample: Any, weights: Any, rates: Any, columns: Any, following: Any, distances: Any
) -> None:
    """Moves the neurons towards a sample, and fills `distances` with their squared distances from the following one."""

    for j in range(weights.shape[0]):
        rate = rates[columns[j]]
        total = 0.0
        for k in range(weights.shape[1]):
            weight = weights[j, k] + rate * (sample[k] - weights[j, k])
            weights[j, k] = weight
            difference = following[k] - weight
            total += difference * difference
        distances[j] = total


@compiled()
def move_as_minisom(sample: Any, weights: Any, rates: Any, columns: Any) -> None:
    """Moves the neurons towards a sample, in MiniSom's order of operations."""

    for j in range(weights.shape[0]):
        rate = rates[columns[j]]
        if rate != 0.0:
            for k in range(weights.shape[1]):
                weights[j, k] += rate * (sample[k] - weights[j, k])


@compiled()
def find_winner(distances: Any, scale: Any) -> Any:
    """
    Returns the neuron with the lowest squared distance, or -1 where another one is as near for all that is known.

    `scale`: largest squared distance of a sample from the first one.
    """

    # Processors guess badly at branches that depend on who wins, so there are none: a third of the time is saved.
    winner = 0
    nearest = distances[0]
    second = np.inf
    for j in range(1, distances.shape[0]):
        distance = distances[j]
        second = min(second, max(distance, nearest))
        winner = j if distance < nearest else winner
        nearest = min(nearest, distance)
    return winner if second > margin(nearest, scale) else -1


@compiled()
def margin(nearest: Any, scale: Any) -> Any:
    """The squared distance up to which a neuron is as near as the nearest for all that is known."""

    return nearest + TOLERANCE * (scale + 3.0 * nearest)


@compiled()
def repeat_training(weight: Any, j: Any, t: Any, samples: Any, schedule: Any, winners: Any) -> None:
    """Fills the weight vector of neuron j before iteration t, in full dimension, from the winners so far."""

    order, initial, rates, rate_columns = schedule
    weight[:] = samples[initial[j]]
    for earlier in range(t):
        rate = rates[earlier, rate_columns[winners[earlier], j]]
        if rate != 0.0:
            visited = order[earlier]
            for k in range(weight.shape[0]):
                weight[k] += rate * (samples[visited, k] - weight[k])


@compiled()
def settle(
    visited: Any,
    distances: Any,
    scale: Any,
    in_span: Any,
    weights: Any,
    t: Any,
    samples: Any,
    schedule: Any,
    winners: Any,
) -> Any:
    """
    Returns the neuron that MiniSom finds nearest to the visited sample before iteration t, where that depends on its rounding.

    Also returns how many iterations were repeated for it.
    """

    limit = margin(distances.min(), scale)
    weight = np.empty(samples.shape[1])
    winner = 0
    nearest = np.inf
    n_repeated = 0
    for j in range(distances.shape[0]):
        if distances[j] > limit:
            continue
        if in_span:
            repeat_training(weight, j, t, samples, schedule, winners)
            n_repeated += t
        else:
            weight[:] = weights[j]
        distance = np.sqrt(squared_distance_as_numpy(samples[visited], weight))
        if distance < nearest:
            winner = j
            nearest = distance
    return winner, n_repeated


@compiled()
def train_map(
    in_span: Any,
    points: Any,
    samples: Any,
    schedule: Any,
    weights: Any,
    winners: Any,
    hits: Any,
    errors: Any,
) -> Any:
    """
    Trains one map on `points`, the coordinates of the samples or the samples themselves.

    Fills `weights`, the `winners` of the iterations, and the `hits` and quantization `errors` of the trained map. Returns whether
    it got to the end: the span is given up where doubts take too much time.
    """

    order, initial, rates, rate_columns = schedule
    n_neurons = weights.shape[0]
    n_iterations = order.shape[0]
    n_samples = points.shape[0]
    distances = np.empty(n_neurons)
    n_repeated = 0
    scale = 0.0
    for i in range(n_samples):
        scale = max(scale, squared_distance(points[i], points[0]))
    # Where all samples are equal, so are all weights: their span has no dimension, and the first neuron wins.
    has_extent = points.shape[1] > 0

    for j in range(n_neurons):
        weights[j] = points[initial[j]]
    hits[:] = 0
    errors[:] = 0.0

    # After the iterations, each sample visits the trained map once.
    # In the type of what follows, or everything would be compiled once more.
    visited = np.int64(order[0])
    measure(points[visited], weights, distances)
    for t in range(n_iterations + n_samples):
        winner = find_winner(distances, scale) if has_extent else 0
        if winner < 0:
            before = min(t, n_iterations)
            winner, n_more = settle(
                visited, distances, scale, in_span, weights, before, samples, schedule, winners
            )
            n_repeated += n_more
            if n_repeated > n_iterations:
                return False

        if t >= n_iterations:
            hits[winner] += 1
            errors[winner] += np.sqrt(distances[winner])
        else:
            winners[t] = winner
        following = order[t + 1] if t + 1 < n_iterations else (t + 1 - n_iterations) % n_samples
        if t < n_iterations and in_span:
            columns = rate_columns[winner]
            move_and_measure(
                points[visited], weights, rates[t], columns, points[following], distances
            )
        else:
            if t < n_iterations:
                move_as_minisom(points[visited], weights, rates[t], rate_columns[winner])
            measure(points[following], weights, distances)
        visited = following
    for j in range(n_neurons):
        errors[j] = errors[j] / hits[j] if hits[j] > 0 else np.inf
    return True


@compiled()
def mix(winners: Any, firsts: Any, schedule: Any, mixture: Any) -> None:
    """
    Fills `mixture` with the matrix A (n_neurons × n_samples) of weights = A samples.

    Walks back from the last iteration: what iteration t adds is multiplied by 1 − rate of all that came after it. For each
    neuron the walk ends where it first left its initial sample. What came before would cancel but for rounding, which rates
    below 0 or above 2 magnify without bound.
    """

    order, initial, rates, rate_columns = schedule
    n_neurons = mixture.shape[0]
    departures = np.zeros(n_neurons, dtype=np.int64)
    for j in range(n_neurons):
        while departures[j] < order.shape[0] and (
            firsts[order[departures[j]]] == firsts[initial[j]]
            or rates[departures[j], rate_columns[winners[departures[j]], j]] == 0.0
        ):
            departures[j] += 1

    mixture[:] = 0.0
    remaining = np.ones(n_neurons)
    for t in range(order.shape[0] - 1, -1, -1):
        for j in range(n_neurons):
            if t >= departures[j]:
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


@compiled(nogil=True)
def train_one(
    samples: Any, schedule: Any, winners: Any, mixture: Any, hits: Any, errors: Any
) -> Any:
    """
    Trains the map of `samples` (n_samples, hidden_size), float64, in the cheaper of the two ways.

    - `schedule`: which sample every iteration visits (iterations), at which the neurons start (n_neurons), `rates` (iterations,
      n_columns) and `rate_columns` (n_neurons, n_neurons): when c wins in iteration t, neuron j moves by
      `rates[t, rate_columns[c, j]]` of its way to the sample.
    - Filled: the winner of each iteration, the matrix A (n_neurons, n_samples), and for each neuron its hits and quantization error.

    Returns whether everything is finite. Other threads may run meanwhile.
    """

    firsts = first_equals(samples)
    n_neurons = mixture.shape[0]
    in_span = cheaper_in_span(samples.shape[0], samples.shape[1], len(winners), n_neurons)
    while True:
        points = span_coordinates(samples, firsts) if in_span else samples
        weights = np.empty((n_neurons, points.shape[1]))
        if train_map(in_span, points, samples, schedule, weights, winners, hits, errors):
            break
        in_span = False
    mix(winners, firsts, schedule, mixture)
    return np.isfinite(weights).all() and np.isfinite(mixture).all()
