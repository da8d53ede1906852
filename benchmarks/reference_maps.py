# SPDX-License-Identifier: AGPL-3.0-or-later

"""What self-organizing maps are compared with, in the benchmark and in the tests."""

import warnings
from typing import Any

from minisom import MiniSom
from numpy.typing import NDArray

from heretic_contrast.directions.som import SomSettings


def train_minisom(samples: NDArray[Any], options: SomSettings) -> MiniSom:
    """Trains MiniSom as its documentation says."""

    with warnings.catch_warnings():
        # It warns of widths and topologies that it handles all the same, and of overflow.
        warnings.simplefilter("ignore")
        reference = MiniSom(
            options.rows,
            options.columns,
            samples.shape[1],
            sigma=options.sigma,
            learning_rate=options.learning_rate,
            neighborhood_function=options.neighborhood,
            topology=options.topology,
            random_seed=options.seed,
        )
        reference.random_weights_init(samples)
        reference.train_random(samples, options.iterations)
    return reference
