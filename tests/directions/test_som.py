# SPDX-License-Identifier: AGPL-3.0-or-later

"""Self-organizing maps, against MiniSom itself."""

import os
import shutil
import subprocess
import sys
import tracemalloc
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.reference_maps import train_minisom
from heretic_contrast.directions import som, som_kernel
from heretic_contrast.directions.extraction import winning_neurons
from heretic_contrast.directions.som import (
    Neighborhood,
    SomSettings,
    Topology,
    TrainedMap,
    train_maps,
)
from heretic_contrast.errors import ContrastError

QUICK = SomSettings(iterations=300)


def assert_same_map(trained: TrainedMap, samples: NDArray[Any], options: SomSettings) -> None:
    """Compares weights, hits and quantization errors with MiniSom's."""

    reference = train_minisom(samples, options)
    weights = reference.get_weights().reshape(options.n_neurons, -1)
    scale = float(np.abs(samples).max())
    vectors = trained.vectors(range(options.n_neurons))
    assert vectors.dtype == np.float64
    for vector, weight in zip(vectors, weights, strict=True):
        # Some neighborhoods drive neurons far away from the samples.
        np.testing.assert_allclose(
            vector, weight, rtol=0, atol=1e-9 * max(scale, np.abs(weight).max())
        )

    won = reference.win_map(samples)
    for index, position in enumerate(np.ndindex(options.rows, options.columns)):
        mine = won.get(position, [])
        assert trained.hits[index] == len(mine)
        if mine:
            distances = [np.linalg.norm(sample - weights[index]) for sample in mine]
            error = trained.quantization_errors[index]
            assert error == pytest.approx(np.mean(distances), rel=1e-9, abs=1e-9 * scale)
        else:
            assert trained.quantization_errors[index] == np.inf


def noise(n_samples: int, hidden_size: int, seed: int = 0) -> NDArray[np.float32]:
    """Samples around a common mean that is longer than they are, as residuals have it."""

    generator = np.random.default_rng(seed)
    center = generator.normal(size=hidden_size) * 3
    return (center + generator.normal(size=(n_samples, hidden_size))).astype(np.float32)


def test_paper_settings() -> None:
    samples = noise(53, 512)
    (trained,) = train_maps([samples], SomSettings())
    assert_same_map(trained, samples, SomSettings())


@pytest.mark.parametrize(
    ("topology", "neighborhood"), list(product(get_args(Topology), get_args(Neighborhood)))
)
def test_every_topology_and_neighborhood(topology: Topology, neighborhood: Neighborhood) -> None:
    samples = [noise(31, 130), noise(7, 130, seed=1)]
    options = SomSettings(
        columns=4, iterations=200, sigma=2.0, neighborhood=neighborhood, topology=topology, seed=5
    )
    for trained, array in zip(train_maps(samples, options), samples, strict=True):
        assert_same_map(trained, array, options)


@pytest.mark.parametrize("topology", get_args(Topology))
def test_seeds(topology: Topology) -> None:
    # On the hexagonal grid, some seeds start two neurons at one sample and then move them alike except for the last bit.
    samples = noise(23, 70)
    vectors = []
    for seed in range(60):
        options = SomSettings(iterations=60, topology=topology, seed=seed)
        (trained,) = train_maps([samples], options)
        assert_same_map(trained, samples, options)
        vectors.append(trained.vectors([0])[0])
    assert len({vector.tobytes() for vector in vectors}) == 60


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(get_args(Topology)),
    st.integers(0, 2**32 - 1),
)
def test_any_shape_with_ties(
    n_samples: int, hidden_size: int, rows: int, columns: int, topology: Topology, seed: int
) -> None:
    # Small integers bring equal samples, symmetries, and neurons between which only rounding decides.
    samples = np.random.default_rng(seed).integers(-1, 2, size=(n_samples, hidden_size))
    options = SomSettings(rows=rows, columns=columns, iterations=100, topology=topology, seed=seed)
    (trained,) = train_maps([samples.astype(np.float32)], options)
    assert_same_map(trained, samples.astype(np.float32), options)


def tight_cluster() -> NDArray[np.float64]:
    samples = noise(40, 200).astype(np.float64)
    samples[10:30] = samples[10] * (1 + 1e-13 * np.arange(20)[:, None])
    return samples


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(noise(1, 40), id="one sample"),
        pytest.param(noise(2, 40), id="two samples"),
        pytest.param(np.repeat(noise(1, 40), 12, axis=0), id="equal samples"),
        pytest.param(np.zeros((12, 40), dtype=np.float32), id="zeros"),
        pytest.param(np.repeat(noise(3, 40), 6, axis=0), id="repeated samples"),
        pytest.param(np.tile(noise(3, 40), (6, 1)), id="repeated samples in turn"),
        pytest.param(noise(20, 3), id="more samples than dimensions"),
        pytest.param(noise(20, 1), id="one dimension"),
        pytest.param(noise(100, 2, seed=1)[:, [0, 1, 0, 1, 0]], id="low rank"),
        pytest.param(noise(20, 40) * np.float32(1e-20), id="tiny numbers"),
        pytest.param(noise(20, 40) * np.float32(1e20), id="huge numbers"),
        pytest.param(tight_cluster(), id="cluster at the limit of precision"),
        pytest.param(noise(30, 60).astype(np.float64), id="float64"),
    ],
)
def test_degenerate_samples(samples: NDArray[Any]) -> None:
    for options in (QUICK, SomSettings(rows=1, columns=1, iterations=100)):
        (trained,) = train_maps([samples], options)
        assert_same_map(trained, samples, options)


@pytest.mark.parametrize("neighborhood", ["mexican_hat", "triangle"])
@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(noise(1, 40), id="one sample"),
        pytest.param(np.repeat(noise(1, 40), 12, axis=0), id="equal samples"),
        pytest.param(np.repeat(noise(1, 3), 12, axis=0), id="more equal samples than dimensions"),
    ],
)
def test_neurons_that_never_move(neighborhood: Neighborhood, samples: NDArray[Any]) -> None:
    # Rates below 0 or above 2 magnify every difference from the sample, but there is none. Embeddings of a last token are such samples.
    options = SomSettings(neighborhood=neighborhood, sigma=3.0, iterations=3000)
    (trained,) = train_maps([samples], options)
    assert_same_map(trained, samples, options)
    np.testing.assert_array_equal(trained.vectors([8])[0], samples[0])


def test_neurons_that_stay_at_one_of_two_samples() -> None:
    # The rate of a neuron next to the winner is exactly 0 here, and that of the neuron across is negative.
    for seed in range(40):
        options = SomSettings(
            rows=2,
            columns=2,
            iterations=1000,
            neighborhood="mexican_hat",
            topology="rectangular",
            seed=seed,
        )
        samples = noise(2, 8, seed=seed)
        (trained,) = train_maps([samples], options)
        assert_same_map(trained, samples, options)


def test_maps_do_not_depend_on_each_other() -> None:
    samples = [noise(5 + 3 * i, 64 if i % 2 else 20, seed=i) for i in range(8)]
    together = train_maps(samples, QUICK)
    reverse = train_maps(samples[::-1], QUICK)[::-1]
    alone = [train_maps([array], QUICK)[0] for array in samples]
    for other in (reverse, alone):
        for trained, again in zip(together, other, strict=True):
            np.testing.assert_array_equal(trained.mixture, again.mixture)
            np.testing.assert_array_equal(trained.hits, again.hits)
            np.testing.assert_array_equal(trained.quantization_errors, again.quantization_errors)


def test_views_and_iterables() -> None:
    residuals = noise(30, 6 * 40).reshape(30, 6, 40)
    views = [residuals[:15, layer] for layer in range(6)]
    for view, from_view, from_copy in zip(
        views,
        train_maps(iter(views), QUICK),
        train_maps([view.copy() for view in views], QUICK),
        strict=True,
    ):
        assert from_view.points is view
        np.testing.assert_array_equal(from_view.vectors([0, 8]), from_copy.vectors([0, 8]))


def test_no_maps() -> None:
    assert train_maps([], QUICK) == []


def test_memory() -> None:
    residuals = noise(20, 60 * 5000).reshape(20, 60, 5000)
    views = [residuals[:, layer] for layer in range(60)]
    train_maps(views[:1], QUICK)
    tracemalloc.start()
    maps = train_maps(views, QUICK)
    held, peak = tracemalloc.get_traced_memory()
    # The copy in float64, and what else one map takes.
    assert peak < 2 * residuals.nbytes + 2**22
    assert held < residuals.nbytes / 20
    for trained in maps:
        assert trained.vectors(trained.densest(1)).shape == (1, 5000)
    tracemalloc.stop()


def test_many_samples_get_no_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of n samples take n² products of whole samples, and the training as many as neurons are moved: 2700 here."""

    coordinated: list[int] = []
    original = som_kernel.span_coordinates

    def note(samples: NDArray[Any], firsts: NDArray[Any]) -> Any:
        coordinated.append(len(samples))
        return original(samples, firsts)

    monkeypatch.setattr(som_kernel, "span_coordinates", note)
    sets = [noise(51, 130), noise(52, 130), noise(120, 130)]
    for trained, samples in zip(train_maps(sets, QUICK), sets, strict=True):
        assert_same_map(trained, samples, QUICK)
    assert coordinated == [51]


@pytest.mark.parametrize("seed", range(60))
def test_ties_fall_as_in_minisom_where_there_are_more_samples_than_dimensions(seed: int) -> None:
    generator = np.random.RandomState(seed)
    hidden_size = int(generator.choice([2, 3, 5]))
    shape = (hidden_size + int(generator.choice([0, 1, 4, 15])), hidden_size)
    samples = (
        generator.randint(0, 2, shape).astype(float),
        1 + 1e-12 * generator.randn(*shape),
        np.outer(generator.randint(-3, 4, len(shape) * 3), generator.randn(hidden_size)),
        generator.randn(*shape),
    )[seed % 4]
    options = SomSettings(iterations=(1, 7, 100, 900)[seed // 4 % 4], sigma=0.5, seed=seed)
    (trained,) = train_maps([samples], options)
    reference = train_minisom(samples, options)
    won = [np.ravel_multi_index(reference.winner(sample), (3, 3)) for sample in samples]
    np.testing.assert_array_equal(trained.hits, np.bincount(won, minlength=9))


def test_without_writable_cache(tmp_path: Path) -> None:
    # Permissions would not stop an administrator: a file stands where each cache directory would have to be.
    source = Path(som.__file__).with_name("som_kernel.py")
    shutil.copy(source, tmp_path / "som_kernel.py")
    (tmp_path / "__pycache__").write_text("")
    program = (
        "import numpy as np, som_kernel\n"
        "assert type(som_kernel.squared_distance_as_numpy._cache).__name__ == 'NullCache'\n"
        "print(som_kernel.squared_distance_as_numpy(np.full(3, 2.0), np.full(3, 5.0)))"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")
    }
    environment |= {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "27.0\n"


def make_map(hits: list[int], errors: list[float]) -> TrainedMap:
    return TrainedMap(
        hits=np.array(hits),
        quantization_errors=np.array(errors),
        mixture=np.eye(len(hits)),
        points=np.eye(len(hits), dtype=np.float32),
    )


def test_densest() -> None:
    trained = make_map([2, 5, 0, 5, 5, 2], [0.5, 3.0, np.inf, 1.0, 1.0, 0.5])
    assert trained.densest(1) == [3]
    assert trained.densest(5) == [3, 4, 1, 0, 5]
    assert trained.densest(6) == [3, 4, 1, 0, 5, 2]


def test_neurons_that_win_nothing_are_no_directions() -> None:
    trained = make_map([0, 7, 0, 1], [np.inf, 0.5, np.inf, 0.0])
    found = winning_neurons(trained, 3)
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_vectors_follow_the_indices() -> None:
    trained = make_map([1, 1, 1], [0.0, 0.0, 0.0])
    assert trained.vectors([2, 0]).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert trained.vectors([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.full((2, 4), np.nan, dtype=np.float32), "map 1 contain infinite or undefined"),
        (np.full((2, 4), np.inf, dtype=np.float32), "map 1 contain infinite or undefined"),
    ],
)
def test_bad_samples(samples: NDArray[Any], message: str) -> None:
    with pytest.raises(ContrastError, match=message):
        train_maps([noise(3, 4), samples], QUICK)


def test_divergence() -> None:
    options = SomSettings(neighborhood="triangle", sigma=4.0, learning_rate=2.0, iterations=2000)
    with pytest.raises(ContrastError, match="Map 0 diverged"):
        train_maps([noise(10, 20)], options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma": 4.3}, "diagonal of its 3 × 3 grid: use at most 4.24"),
        ({"iterations": 10**8}, "would take gigabytes"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ContrastError, match=message):
        SomSettings(**values)


@pytest.mark.parametrize("values", [{"sigma": 1e-200}, {"learning_rate": float("inf")}])
def test_neighborhood_overflow(values: dict[str, Any]) -> None:
    with pytest.raises(ContrastError, match="overflow"):
        train_maps([noise(3, 4)], SomSettings(**values))


def test_widest_sigma() -> None:
    samples = noise(9, 20)
    options = SomSettings(rows=3, columns=4, sigma=5.0, iterations=100)
    (trained,) = train_maps([samples], options)
    assert_same_map(trained, samples, options)


@pytest.mark.parametrize("name", ["neighborhood", "topology"])
def test_an_unknown_form_of_a_map_is_refused(name: str) -> None:
    with pytest.raises(ContrastError, match=f'no {name} "Bubble": choose '):
        SomSettings(**{name: "Bubble"})  # type: ignore[arg-type]
