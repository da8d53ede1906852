# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Self-organizing maps of many small sets of long vectors: one map per layer and harm class (paper, section 3).

The maps are MiniSom's. Its generator first draws rows × columns × hidden_size numbers for weights that are thrown away,
then the samples at which the weights start, then the order in which samples are visited. The same is drawn here, and
maps are trained in a compiled loop, several in parallel, in the span of each map's samples where that is faster (`som_kernel`). Their
weights agree with MiniSom's to about 1e-12 of the samples' scale.

Ties. Where several neurons are equally near to a sample, MiniSom takes the first, and so is it here. Where two neurons
are so nearly equally near that rounding decides (they started at the same sample, samples lie symmetrically, or in clusters
narrower than 1e-11 of the whole), MiniSom's rounding is repeated. Many such doubts make it as slow as training in full
dimension, which is some 20 times as long at 53 samples of 2048 dimensions, and still far from MiniSom.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ContrastError, require_choice

Neighborhood = Literal["gaussian", "mexican_hat", "bubble", "triangle"]
Topology = Literal["rectangular", "hexagonal"]

# The learning rates of all iterations are tabulated: 8 bytes for each iteration and difference of positions on the grid.
LARGEST_TABLE = 200_000_000


@dataclass(frozen=True)
class SomSettings:
    """
    Settings of a self-organizing map (paper, section 3.2), as `ContrastSettings` describes them.

    Neuron r · columns + c stands in row r and column c. The neighborhood "mexican_hat" pushes neurons away from samples, and
    "triangle" moves them beyond samples where sigma² · learning_rate exceeds 1: with many iterations they may diverge.

    Raises `ContrastError` where there is no such neighborhood or topology, and where values do not work together.
    """

    rows: int = 3
    columns: int = 3
    iterations: int = 10_000
    sigma: float = 1.0
    learning_rate: float = 0.5
    neighborhood: Neighborhood = "gaussian"
    topology: Topology = "rectangular"
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("neighborhood", self.neighborhood, get_args(Neighborhood))
        require_choice("topology", self.topology, get_args(Topology))
        if self.sigma > math.hypot(self.rows, self.columns):
            raise ContrastError(
                f"The self-organizing map has sigma = {self.sigma}, which is more than the diagonal of its {self.rows} × "
                f"{self.columns} grid: use at most {math.hypot(self.rows, self.columns):.3g}."
            )
        if self.iterations * self.n_neurons > LARGEST_TABLE:
            raise ContrastError(
                f"The self-organizing map has {self.iterations} iterations of {self.n_neurons} neurons, whose table of learning "
                f"rates would take gigabytes: use at most {LARGEST_TABLE // self.n_neurons} iterations, or a smaller map."
            )

    @property
    def n_neurons(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, eq=False)
class TrainedMap:
    """
    A trained self-organizing map.

    - `hits`: array of shape (n_neurons,), int64; number of samples that each neuron wins.
    - `quantization_errors`: array of shape (n_neurons,), float64; mean euclidean distance of a neuron from the samples that it
      wins, infinite where it wins none.
    - `mixture`: array of shape (n_neurons, n_points), float64, and `points`: array of shape (n_points, hidden_size). The
      neurons' weight vectors are `mixture @ points`. `points` is the array that the map was trained on, not a copy: it
      must not be changed while vectors are still to be computed.
    """

    hits: NDArray[np.int64]
    quantization_errors: NDArray[np.float64]
    mixture: NDArray[np.float64]
    points: NDArray[Any]

    def densest(self, count: int) -> list[int]:
        """
        Returns the neurons that win most samples, densest first. Ties: lower quantization error, then lower index (paper, section 3.2).

        Neurons that win none come last.
        """

        return np.lexsort((self.quantization_errors, -self.hits))[:count].tolist()

    def vectors(self, indices: Sequence[int]) -> NDArray[np.float64]:
        """
        Returns weight vectors of neurons.

        Array of shape (len(indices), hidden_size), float64, computed on each call for these neurons only.
        """

        return self.mixture[list(indices)] @ self.points.astype(np.float64, copy=False)


def train_maps(samples: Iterable[NDArray[Any]], settings: SomSettings) -> list[TrainedMap]:
    """
    Trains one map per set of samples.

    `samples`: arrays of shape (n_samples, hidden_size), float32 or float64, each finite and with at least one row; sizes may
    differ. Views, for instance into a residual tensor, are welcome: nothing is copied for good. An iterable is read at once.

    Each map is seeded by `settings.seed` alone, and so depends neither on the others nor on their order. Memory beside the samples:
    per thread four times one map's samples in float64.

    Raises `ContrastError` where a set is not finite, and where a map diverges (which a neighborhood of "mexican_hat" or "triangle"
    can bring about).
    """

    points = list(samples)
    for index, array in enumerate(points):
        if not np.isfinite(array).all():
            raise ContrastError(
                f"The samples of map {index} contain infinite or undefined numbers: look for a broken model, or for one that "
                "overflows in its data type."
            )
    # Compiling takes seconds, which means need not wait for.
    from . import som_kernel

    rates, rate_columns = _rates(settings)

    def train(index: int) -> TrainedMap:
        array = points[index]
        samples = np.ascontiguousarray(array, dtype=np.float64)
        # Equal samples get equal coordinates, so that they win and lose together.
        seen: dict[bytes, int] = {}
        firsts = np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(samples)])
        initial, order = _draw(settings, *array.shape)
        schedule = order, initial, rates, rate_columns
        winners = np.empty_like(order)
        hits = np.empty(settings.n_neurons, dtype=np.int64)
        errors = np.empty(settings.n_neurons)
        ways = [samples]
        n_moves = settings.iterations * settings.n_neurons
        if len(samples) < samples.shape[1] and len(samples) ** 2 < n_moves:
            # Otherwise coordinates would save nothing, or cost more than training does without them.
            ways.insert(0, som_kernel.span_coordinates(samples, firsts))
        for vectors in ways:
            weights = np.empty((settings.n_neurons, vectors.shape[1]))
            if som_kernel.train_map(
                vectors is not samples, vectors, samples, schedule, weights, winners, hits, errors
            ):
                break
        mixture = np.empty((settings.n_neurons, len(array)))
        som_kernel.mix(winners, firsts, schedule, mixture)
        if not (np.isfinite(weights).all() and np.isfinite(mixture).all()):
            raise ContrastError(
                f"Map {index} diverged: with the {settings.neighborhood} neighborhood use fewer iterations than {settings.iterations}, or "
                f"a lower learning rate or sigma than {settings.learning_rate} and {settings.sigma}."
            )
        return TrainedMap(hits, errors, mixture, array)

    # Numba's own threads, which are not needed, would set PyTorch's number of threads when they start.
    with ThreadPoolExecutor(som_kernel.numba.config.NUMBA_NUM_THREADS) as pool:
        return list(pool.map(train, range(len(points))))


@lru_cache(maxsize=32)
def _draw(
    settings: SomSettings, n_samples: int, hidden_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    Returns what MiniSom's generator draws for such a map.

    The samples at which the neurons start, array of shape (n_neurons,), and the sample that each iteration visits, array of shape
    (iterations,).
    """

    generator = np.random.RandomState(settings.seed)
    generator.rand(settings.rows, settings.columns, hidden_size)
    initial = np.array([generator.randint(n_samples) for _ in range(settings.n_neurons)])
    order = np.arange(settings.iterations) % n_samples
    generator.shuffle(order)
    return initial, order


def _rates(settings: SomSettings) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """
    Tabulates how far each neuron moves towards the sample, by MiniSom's formulas in MiniSom's order of operations.

    When neuron c wins in iteration t, neuron j moves by rates[t, rate_columns[c, j]] of its way. The movement depends on where
    j stands as seen from c, so there are as many columns as there are different such positions.
    """

    iteration = np.arange(settings.iterations, dtype=np.float64)
    decay = 1 + iteration / (settings.iterations / 2)
    learning_rate, sigma = settings.learning_rate / decay, settings.sigma / decay

    row, column = np.indices((settings.rows, settings.columns), np.float64).reshape(2, -1)
    if settings.topology == "hexagonal" and settings.neighborhood in ("gaussian", "mexican_hat"):
        # Every second column is shifted, counted from the last.
        row = np.where((settings.columns - 1 - column) % 2 == 0, row - 0.5, row)
        column = column * (1.5 / math.sqrt(3))
    places = np.stack([row, column], axis=-1)
    offsets = np.abs(places - places[:, None]).reshape(-1, 2)
    distinct, rate_columns = np.unique(offsets, axis=0, return_inverse=True)
    x, y = distinct.T

    width = sigma[:, None]
    with np.errstate(all="ignore"):
        spread = 2 * width * width
        if settings.neighborhood == "gaussian":
            values = np.exp(-np.power(x, 2) / spread) * np.exp(-np.power(y, 2) / spread)
        elif settings.neighborhood == "mexican_hat":
            squared = np.power(x, 2) + np.power(y, 2)
            values = np.exp(-squared / spread) * (1 - 2 / spread * squared)
        elif settings.neighborhood == "bubble":
            values = ((x < width) & (y < width)).astype(np.float64)
        else:
            values = np.maximum(width - x, 0.0) * np.maximum(width - y, 0.0)
        rates = values * learning_rate[:, None]
    if not np.isfinite(rates).all():
        raise ContrastError(
            f"The self-organizing map has sigma = {settings.sigma} and learning_rate = {settings.learning_rate}, which makes "
            "its neighborhood overflow: use values nearer to 1."
        )
    return rates, rate_columns.reshape(settings.n_neurons, settings.n_neurons)
