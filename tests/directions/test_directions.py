# SPDX-License-Identifier: AGPL-3.0-or-later

"""Directions: extraction against independent computations, saving and loading."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minisom import MiniSom
from pydantic import ValidationError
from torch import Tensor

from heretic_contrast.directions.baselines import Residuals
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.extraction import extract_directions, names_before_extraction
from heretic_contrast.directions.pools import Pools
from heretic_contrast.directions.transforms import around_shared, orthogonalize, random_directions
from heretic_contrast.errors import ContrastError
from heretic_contrast.prompts import Prompt
from heretic_contrast.settings import ContrastSettings
from tests.made_directions import make_directions, random_tensor

LAYERS, HIDDEN = 4, 20
CLASSES = ("drugs", "fraud", "hacking")


def make_residuals(seed: int = 0) -> Residuals:
    generator = torch.Generator().manual_seed(seed)
    refusal = torch.randn(LAYERS, HIDDEN, generator=generator) * 2
    topics = torch.randn(3, LAYERS, HIDDEN, generator=generator)
    harmful_classes = tuple(CLASSES[index % 3] for index in range(42))
    matched_classes = tuple(CLASSES[index % 3] for index in range(30))
    noise = 0.5 * torch.randn(42 + 30 + 25, LAYERS, HIDDEN, generator=generator)
    harmful = noise[:42] + refusal + topics[[index % 3 for index in range(42)]]
    matched = noise[42:72] + topics[[index % 3 for index in range(30)]]
    bulk = noise[72:]
    # The embedding of a common last token is the same for all prompts.
    for pool in (harmful, matched, bulk):
        pool[:, 0] = 1.0
    return Residuals(harmful, harmful_classes, bulk, matched, matched_classes)


def settings(**values: Any) -> ContrastSettings:
    return ContrastSettings.model_validate(
        {
            "method": "som",
            "classes": "category",
            "som_iterations": 300,
            "orthogonalize_direction": False,
            **values,
        }
    )


def by_class(residuals: Residuals, name: str, layer: int) -> Tensor:
    chosen = [index for index, other in enumerate(residuals.harmful_classes) if other == name]
    return residuals.harmful[chosen, layer].double()


def test_mean_directions_are_differences_in_means() -> None:
    residuals = make_residuals()
    directions = extract_directions(residuals, settings(method="mean", scale="raw"))
    assert directions.tensor.shape == (LAYERS, 3, HIDDEN) and directions.names == CLASSES
    for layer in range(LAYERS):
        for index, name in enumerate(CLASSES):
            expected = by_class(residuals, name, layer).mean(0) - residuals.bulk[
                :, layer
            ].double().mean(0)
            assert torch.allclose(directions.tensor[layer, index].double(), expected, atol=1e-5)


def test_som_directions_are_the_densest_neurons_of_minisom() -> None:
    residuals = make_residuals()
    directions = extract_directions(residuals, settings(baseline="matched", scale="raw", seed=5))
    for layer in range(1, LAYERS):
        for index, name in enumerate(CLASSES):
            chosen = [i for i, other in enumerate(residuals.matched_classes) if other == name]
            reference = residuals.matched[chosen, layer].double().mean(0)
            samples = (by_class(residuals, name, layer) - reference).float().double().numpy()
            som = MiniSom(3, 3, HIDDEN, sigma=1.0, learning_rate=0.5, random_seed=5)
            som.random_weights_init(samples)
            som.train(samples, 300, random_order=True)
            weights = som.get_weights().reshape(9, HIDDEN)
            distances = np.linalg.norm(samples[:, None] - weights[None], axis=2)
            winners = distances.argmin(1)
            hits = np.bincount(winners, minlength=9)
            best = min(
                range(9),
                key=lambda n: (
                    -hits[n],
                    distances[winners == n, n].mean() if hits[n] else np.inf,
                    n,
                ),
            )
            assert np.allclose(directions.tensor[layer, index].numpy(), weights[best], atol=1e-5)
            assert directions.hits[layer, index].tolist() == hits.tolist()


def test_unit_scale_keeps_zero_directions_zero() -> None:
    directions = extract_directions(make_residuals(), settings())
    norms = directions.tensor.norm(dim=-1)
    assert torch.equal(norms[0], torch.zeros(3))
    assert torch.allclose(norms[1:], torch.ones(LAYERS - 1, 3))
    assert (directions.class_directions[1:].norm(dim=-1) > 0.5).all()


@pytest.mark.parametrize("svd", [False, True])
@pytest.mark.parametrize("control", ["none", "random"])
@pytest.mark.parametrize("baseline", ["matched", "unmatched"])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_unmatched_scale_has_the_norms_of_the_unmatched_baseline(
    orthogonalize: bool, baseline: str, control: str, svd: bool
) -> None:
    residuals = make_residuals()

    def directions(**values: Any) -> Tensor:
        found = settings(method="mean", orthogonalize_direction=orthogonalize, svd=svd, **values)
        return extract_directions(residuals, found).tensor

    scaled = directions(baseline=baseline, control=control, scale="unmatched")
    for layer in range(1, LAYERS):
        mean = residuals.bulk[:, layer].double().mean(dim=0)
        expected = torch.stack(
            [by_class(residuals, name, layer).mean(0) - mean for name in CLASSES]
        )
        if orthogonalize:
            expected -= (expected @ mean)[:, None] * mean / (mean @ mean)
        lengths = torch.linalg.svdvals(expected) if svd else expected.norm(dim=-1)
        assert torch.allclose(scaled[layer].norm(dim=-1).double(), lengths, atol=1e-5)
    unit = directions(baseline=baseline, control=control)
    assert torch.allclose(torch.nn.functional.normalize(scaled, dim=-1), unit, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_svd_rows_are_right_singular_vectors(rank: int | None) -> None:
    residuals = make_residuals()
    plain = extract_directions(residuals, settings(scale="raw"))
    directions = extract_directions(residuals, settings(svd=True, svd_rank=rank))
    raw = extract_directions(residuals, settings(svd=True, svd_rank=rank, scale="raw"))
    assert directions.n_directions == (rank or 3) and not directions.aligned
    for layer in range(1, LAYERS):
        matrix = plain.tensor[layer].double().numpy()
        _, values, rows = np.linalg.svd(matrix, full_matrices=False)
        lengths = raw.tensor[layer].norm(dim=-1).numpy()
        assert np.allclose(lengths, values[: rank or 3], rtol=1e-4)
        found = directions.tensor[layer].double().numpy()
        assert np.allclose(np.abs((found * rows[: rank or 3]).sum(1)), 1, atol=1e-4)
        assert (found @ directions.mean_direction[layer].double().numpy() >= -1e-6).all()


def test_svd_of_dependent_directions_has_zero_rows() -> None:
    vectors = torch.randn(1, 1, HIDDEN, dtype=torch.float64).repeat(1, 3, 1)
    rows, values = orthogonalize(vectors, vectors[:, 0])
    assert torch.allclose(rows.norm(dim=-1), torch.tensor([[1.0, 0, 0]], dtype=torch.float64))
    assert (values[0, 1:] == 0).all()


def test_raw_svd_preserves_the_operator_of_the_sum() -> None:
    residuals = make_residuals()
    plain = extract_directions(residuals, settings(scale="raw")).tensor.double()
    rotated = extract_directions(residuals, settings(scale="raw", svd=True)).tensor.double()
    assert torch.allclose(
        plain.transpose(1, 2) @ plain, rotated.transpose(1, 2) @ rotated, atol=1e-3
    )


def test_orthogonalized_directions_have_no_part_along_the_harmless_mean() -> None:
    residuals = make_residuals()
    residuals.bulk[:, 1:] += 3
    directions = extract_directions(residuals, settings(orthogonalize_direction=True))
    harmless = residuals.bulk.mean(0)
    products = (directions.tensor * harmless[:, None]).sum(-1)
    assert products.abs().max() < 1e-4


@pytest.mark.parametrize("orthogonalize_direction", [False, True])
@pytest.mark.parametrize("method", ["som", "mean"])
def test_what_classes_add_to_the_shared_direction(
    method: str, orthogonalize_direction: bool
) -> None:
    residuals = make_residuals()
    options = {"method": method, "orthogonalize_direction": orthogonalize_direction}
    plain = extract_directions(residuals, settings(**options))
    found = extract_directions(residuals, settings(**options, shared_direction=True))
    assert found.names == ("shared", *CLASSES) and found.has_shared and not plain.has_shared
    assert torch.equal(found.class_directions, plain.class_directions)
    for layer in range(1, LAYERS):
        good = residuals.bulk[:, layer].double().mean(0)
        shared = residuals.harmful[:, layer].double().mean(0) - good
        if orthogonalize_direction:
            shared = shared - (shared @ good) / (good @ good) * good
        shared = shared / shared.norm()
        rows = found.tensor[layer].double()
        assert torch.allclose(rows[0], shared, atol=1e-6)
        # The projectors on both spans are the same. The differences of class means add up to nothing.
        span = torch.linalg.svd(torch.cat([shared[None], plain.tensor[layer].double()]))
        rank = 4 if method == "som" else 3
        expected = span.Vh[:rank].T @ span.Vh[:rank]
        assert torch.allclose(rows.T @ rows, expected, atol=1e-5)
        # Each belongs to its class more than to any other.
        assert (rows[1:] @ plain.tensor[layer].double().T).argmax(dim=1).tolist() == [0, 1, 2]


def test_what_classes_add_is_the_nearest_orthonormal_set() -> None:
    """Löwdin's (R Rᵀ)^(−1/2) R, in which the lengths that directions were trained to have no part."""

    shared, *others = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double()
    lengths = (1.0, 9.0, 0.2)
    vectors = torch.stack([shared, *(a * b for a, b in zip(others, lengths, strict=True))])[None]
    r = shared.numpy() / np.linalg.norm(shared)
    rest = np.stack([v / np.linalg.norm(v) for v in (other.numpy() for other in others)])
    rest = rest - np.outer(rest @ r, r)
    values, basis = np.linalg.eigh(rest @ rest.T)
    expected = basis @ np.diag(values**-0.5) @ basis.T @ rest
    np.testing.assert_allclose(around_shared(vectors)[0], np.stack([r, *expected]), atol=1e-9)


def test_one_direction_has_nothing_beside_it() -> None:
    options = {"classes": "single", "method": "mean"}
    plain, found = (
        extract_directions(make_residuals(), settings(**options, shared_direction=shared))
        for shared in (False, True)
    )
    assert torch.equal(plain.tensor, found.tensor) and not found.has_shared


@pytest.mark.parametrize("options", [{"svd": True}, {"scale": "raw"}])
def test_a_shared_direction_takes_no_other_transform(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="leave out svd and scale"):
        settings(shared_direction=True, **options)


def test_random_directions_have_the_gram_matrix_of_the_real_ones() -> None:
    vectors = torch.randn(LAYERS, 3, HIDDEN, dtype=torch.float64)
    found = random_directions(vectors, 1)
    assert torch.allclose(found @ found.transpose(1, 2), vectors @ vectors.transpose(1, 2))
    assert torch.equal(found, random_directions(vectors, 1))
    assert not torch.allclose(found, random_directions(vectors, 2))
    cosines = torch.nn.functional.cosine_similarity(found, vectors, dim=-1)
    assert cosines.abs().max() < 0.9


def test_leaving_a_category_out_changes_no_other_class() -> None:
    residuals = make_residuals()
    everything = extract_directions(residuals, settings())
    without = extract_directions(residuals, settings(exclude_categories=["fraud"]))
    assert without.names == ("drugs", "hacking")
    assert torch.equal(without.tensor, everything.tensor[:, [0, 2]])


@pytest.mark.parametrize("baseline", ["matched", "mixed", "residualized"])
def test_one_direction_sees_nothing_of_a_category_that_is_left_out(baseline: str) -> None:
    residuals = make_residuals()
    is_other = torch.tensor([name != "fraud" for name in residuals.matched_classes])
    found = extract_directions(
        residuals,
        settings(classes="single", method="mean", baseline=baseline, exclude_categories=["fraud"]),
    )
    harmful = torch.cat([by_class(residuals, name, 2) for name in ("drugs", "hacking")])
    general = residuals.bulk[:, 2].double().mean(dim=0)
    mean_direction = harmful.double().mean(dim=0) - general
    assert torch.allclose(found.mean_direction[2].double(), mean_direction, atol=1e-5)
    subjects = residuals.matched[is_other, 2].double().mean(dim=0)
    expected = (
        harmful.mean(dim=0)
        - {
            "matched": subjects,
            "mixed": (subjects + general) / 2,
            "residualized": general,
        }[baseline]
    )
    if baseline == "residualized":
        topic = torch.nn.functional.normalize(subjects - general, dim=0)
        expected -= topic * (topic @ expected)
    expected = torch.nn.functional.normalize(expected, dim=0)
    assert torch.allclose(found.tensor[2, 0].double(), expected, atol=1e-5)
    assert found.provenance["n_prompts"]["matched"] == int(is_other.sum())


def test_the_shared_direction_is_of_classes_too_small_for_their_own() -> None:
    residuals = make_residuals()
    names = [*residuals.harmful_classes[:-2], "small", "small"]
    found = extract_directions(
        replace(residuals, harmful_classes=tuple(names)), settings(shared_direction=True)
    )
    assert found.names == ("shared", *CLASSES)
    expected = residuals.harmful.double().mean(dim=0) - residuals.bulk.double().mean(dim=0)
    expected = torch.nn.functional.normalize(expected, dim=1)
    assert torch.allclose(found.tensor[:, 0].double(), expected, atol=1e-5)


def test_no_category_has_the_name_of_the_shared_direction() -> None:
    harmful = [Prompt("a", "shared"), Prompt("b", "fraud")]
    pools = Pools(tuple(harmful), (Prompt("c"),), ())
    with pytest.raises(ContrastError, match="rename it"):
        names_before_extraction(pools, settings(shared_direction=True, method="mean"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, CLASSES),
        ({"winners": 2}, [f"{name} {rank}" for name in CLASSES for rank in (1, 2)]),
        ({"winners": 2, "method": "mean"}, CLASSES),
        ({"svd": True}, ["svd 1", "svd 2", "svd 3"]),
        ({"svd": True, "svd_rank": 2}, ["svd 1", "svd 2"]),
        ({"svd": True, "svd_rank": 9}, ["svd 1", "svd 2", "svd 3"]),
        ({"shared_direction": True}, ["shared", *CLASSES]),
        ({"shared_direction": True, "classes": "single"}, ["all"]),
        ({"exclude_categories": CLASSES[1:]}, CLASSES[:1]),
        ({"drop_misbehaving": True}, None),
        ({"category_source": "model"}, None),
    ],
)
def test_names_are_known_before_extraction(
    options: dict[str, Any], expected: list[str] | None
) -> None:
    residuals = make_residuals()
    harmful, matched = (
        tuple(Prompt(f"{name} {index}", name) for index, name in enumerate(classes))
        for classes in (residuals.harmful_classes, residuals.matched_classes)
    )
    pools = Pools(harmful, (Prompt("Bake a cake"),), matched)
    found = names_before_extraction(pools, settings(**options))
    assert found == (expected and tuple(expected))
    if expected is not None:
        assert extract_directions(residuals, settings(**options)).names == found


def test_single_class_and_winners() -> None:
    directions = extract_directions(make_residuals(), settings(classes="single", winners=3))
    assert directions.names == ("all 1", "all 2", "all 3")
    hits = directions.hits[1, 0]
    assert hits.sum() == 42


@pytest.mark.parametrize("pool", ["harmful", "bulk", "matched"])
def test_non_finite_residuals_are_refused(pool: str) -> None:
    residuals = make_residuals()
    getattr(residuals, pool)[2, 1, 3] = float("nan")
    with pytest.raises(ContrastError, match="not all finite"):
        extract_directions(residuals, settings())


def test_saving_is_deterministic_and_lossless(tmp_path: Path) -> None:
    for name in ("a", "b"):
        extract_directions(make_residuals(), settings(), {"model": "m", "fingerprint": None}).save(
            tmp_path / name
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    original = extract_directions(make_residuals(), settings(), {"model": "m", "fingerprint": None})
    loaded = Directions.load(tmp_path / "a")
    assert loaded.names == original.names and loaded.provenance == original.provenance
    for name in (
        "tensor",
        "class_directions",
        "mean_direction",
        "hits",
    ):
        assert torch.equal(getattr(loaded, name), getattr(original, name))
    assert loaded.provenance["settings"]["baseline"] == "unmatched"


@pytest.mark.parametrize("name", ["tensor", "class_directions", "mean_direction"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_of_a_file_are_finite(name: str, number: float, tmp_path: Path) -> None:
    tensor = random_tensor(3, 2, 5)
    damaged = getattr(made := make_directions(tensor), name).clone()
    damaged.flatten()[-1] = number
    replace(made, **{name: damaged}).save(tmp_path / "file")
    with pytest.raises(ContrastError, match="holds numbers that are not finite"):
        Directions.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "first", "scale", "has_shared"),
    [
        ({}, "shared", "unit", False),
        ({"scale": "unit", "shared_direction": True}, "shared", "unit", True),
        ({"scale": "raw", "shared_direction": True}, "fraud", "raw", False),
        ({"scale": "unmatched", "shared_direction": False}, "shared", "raw", False),
        # What a file of a stranger may say.
        ({"scale": 1, "shared_direction": "yes"}, "shared", "raw", False),
    ],
)
def test_what_the_settings_of_an_extraction_say(
    settings: dict[str, Any], first: str, scale: str, has_shared: bool
) -> None:
    directions = make_directions(
        random_tensor(3, 2, 5), names=(first, "theft"), provenance={"settings": settings}
    )
    assert (directions.scale, directions.has_shared) == (scale, has_shared)


def test_model_of_another_shape_is_refused(tmp_path: Path, tiny_llama: Any) -> None:
    directions = extract_directions(make_residuals(), settings())
    with pytest.raises(ContrastError, match="3 layers of 20 dimensions"):
        directions.require_model(tiny_llama, "file")
