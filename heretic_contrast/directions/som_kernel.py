# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The compiled trainer of self-organizing maps.

`som` draws what MiniSom would draw and tabulates MiniSom's neighborhoods; this module does the arithmetic. All of it lies
in one file, because Numba's cache notices changes of the file of a function, not of the files of those that it calls.

A map is trained in one of two ways.

In the span: weights start at samples and only move along lines through samples, so that they never leave the samples'
affine span. With coordinates of the n samples in it (n × n), distances are the same as in full dimension,
and an iteration costs n operations per neuron instead of hidden_size. Only rounding differs. Where rounding could decide
which neuron wins, the history of the neurons in question is repeated as MiniSom computes it, bit by bit, including
numpy's order of summation.

In full dimension, with the same care: where there are more samples than dimensions, or so many that their coordinates cost more than
the training, or so many doubts that repetitions cost more than the span saves.

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


# The order of these sums is left to the compiler, which makes them several times faster. The last bits therefore depend
# on the processor; whatever could depend on the last bits does not use them.
ANY_ORDER = {"reassoc", "contract"}


@compiled(fastmath=ANY_ORDER)
def dot_product(first: Any, second: Any) -> Any:
    total = 0.0
    for k in range(first.shape[0]):
        total += first[k] * second[k]
    return total


@compiled(nogil=True)
def span_coordinates(samples: Any, firsts: Any) -> Any:
    """
    Returns coordinates of the samples in their affine span, with the first sample as the origin.

    Modified Gram-Schmidt: its triangular factor, which is all that is wanted, is as accurate as Householder's, and libraries share
    the work of one among threads that are at work already. Equal samples (`firsts`: for each the index of the first one) get equal
    coordinates, so that they win and lose together.

    Array of shape (n_samples, n_samples), float64.
    """

    rest = samples - samples[0]
    coordinates = np.zeros((len(samples), len(samples)))
    for i in range(1, len(samples)):
        length = np.sqrt(dot_product(rest[i], rest[i]))
        if firsts[i] == i and length > 0.0:
            rest[i] /= length
            coordinates[i, i] = length
            for later in range(i + 1, len(samples)):
                product = dot_product(rest[i], rest[later])
                coordinates[later, i] = product
                rest[later] -= product * rest[i]
    return coordinates[firsts]


@compiled(fastmath=ANY_ORDER)
def measure(sample: Any, weights: Any, distances: Any) -> None:
    """Fills `distances` with the squared distances of the neurons from a sample."""

    for j in range(weights.shape[0]):
        total = 0.0
        for k in range(weights.shape[1]):
            difference = sample[k] - weights[j, k]
            total += difference * difference
        distances[j] = total


@compiled()
def move(sample: Any, weights: Any, rates: Any, columns: Any) -> None:
    """Moves the neurons towards a sample, in MiniSom's order of operations."""

    for j in range(weights.shape[0]):
        rate = rates[columns[j]]
        if rate != 0.0:
            for k in range(weights.shape[1]):
                weights[j, k] += rate * (sample[k] - weights[j, k])


@compiled()
def repeated_training(neurons: Any, t: Any, samples: Any, schedule: Any, winners: Any) -> Any:
    """Returns the weights of some neurons before iteration t, in full dimension, from the winners so far."""

    order, initial, rates, rate_columns = schedule
    weights = samples[initial[neurons]]
    for earlier in range(t):
        columns = rate_columns[winners[earlier]][neurons]
        move(samples[order[earlier]], weights, rates[earlier], columns)
    return weights


@compiled()
def settle(sample: Any, neurons: Any, weights: Any) -> Any:
    """Returns which of some neurons MiniSom finds nearest to a sample, by their weights in full dimension."""

    winner = 0
    nearest = np.inf
    for j in range(len(neurons)):
        distance = np.sqrt(squared_distance_as_numpy(sample, weights[j]))
        if distance < nearest:
            winner = neurons[j]
            nearest = distance
    return winner


@compiled(nogil=True)
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
    Trains one map on `points`, the coordinates of the samples or the samples themselves (n_samples, hidden_size), float64.

    - `schedule`: which sample every iteration visits (iterations), at which the neurons start (n_neurons), `rates` (iterations,
      n_columns) and `rate_columns` (n_neurons, n_neurons): when c wins in iteration t, neuron j moves by
      `rates[t, rate_columns[c, j]]` of its way to the sample.
    - Filled: `weights` (n_neurons, n_coordinates), the winner of each iteration, and for each neuron its hits and quantization
      error.

    Returns whether it got to the end: the span is given up where doubts take too much time. Other threads may run meanwhile.
    """

    order, initial, rates, rate_columns = schedule
    n_neurons = weights.shape[0]
    n_iterations = order.shape[0]
    n_samples = points.shape[0]
    distances = np.empty(n_samples)
    measure(points[0], points, distances)
    # The largest squared distance of a sample from the first one.
    scale = distances.max()

    weights[:] = points[initial]
    hits[:] = 0
    errors[:] = 0.0
    distances = np.empty(n_neurons)
    n_repeated = 0
    # After the iterations, each sample visits the trained map once.
    for t in range(n_iterations + n_samples):
        visited = order[t] if t < n_iterations else t - n_iterations
        measure(points[visited], weights, distances)
        nearest = distances.min()
        limit = nearest + TOLERANCE * (scale + 3.0 * nearest)
        winner, n_near = 0, 0
        for j in range(n_neurons - 1, -1, -1):
            if distances[j] <= limit:
                winner, n_near = j, n_near + 1
        # Where all samples are equal, so are all weights, and the first neuron wins.
        if n_near > 1 and scale > 0.0:
            doubtful = np.flatnonzero(distances <= limit)
            if in_span:
                before = min(t, n_iterations)
                n_repeated += before * len(doubtful)
                if n_repeated > n_iterations:
                    return False
                exact = repeated_training(doubtful, before, samples, schedule, winners)
            else:
                exact = weights[doubtful]
            winner = settle(samples[visited], doubtful, exact)

        if t < n_iterations:
            winners[t] = winner
            move(points[visited], weights, rates[t], rate_columns[winner])
        else:
            hits[winner] += 1
            errors[winner] += np.sqrt(distances[winner])
    for j in range(n_neurons):
        errors[j] = errors[j] / hits[j] if hits[j] > 0 else np.inf
    return True


@compiled(nogil=True)
def mix(winners: Any, firsts: Any, schedule: Any, mixture: Any) -> None:
    """
    Fills `mixture` with the matrix A (n_neurons × n_samples) of weights = A samples.

    `firsts`: for each sample the index of the first one that is equal to it.

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
