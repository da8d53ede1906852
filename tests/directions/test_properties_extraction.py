# SPDX-License-Identifier: AGPL-3.0-or-later

"""Properties of everything from residuals to a trial's parameters: baselines, maps, directions, search."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from heretic_contrast.directions.baselines import BASELINES, Residuals
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.extraction import extract_directions
from heretic_contrast.directions.som import SomSettings, train_maps
from heretic_contrast.directions.transforms import orthogonalize, random_directions
from heretic_contrast.errors import ContrastError
from heretic_contrast.language_model import winsorize
from heretic_contrast.search.parameters import Kernel, Parameters, layer_vectors, suggest_parameters
from heretic_contrast.settings import ContrastSettings, Scale
from heretic_contrast.vectors import unit_vectors
from tests.directions.test_som import assert_same_map
from tests.strategies import (
    CLASSES,
    changed,
    direction_sets,
    fewer,
    json_values,
    normal,
    pools,
    seeds,
    shuffled,
)

baselines = st.sampled_from(list(BASELINES))
# Powers of two from about 1e-30 to 1e30: float numbers are scaled by them without rounding.
powers = st.integers(-100, 100).map(lambda exponent: 2.0**exponent)


def differences(name: str, layer: Residuals, options: ContrastSettings) -> Tensor:
    """Returns a baseline's differences, or leaves the example out where subjects span everything."""

    try:
        found = BASELINES[name](layer, options)
    except ContrastError as error:
        assert "span all" in str(error)
        assume(False)
    assert found.shape == layer.harmful.shape and found.dtype == torch.float32
    assert bool(found.isfinite().all())
    return found


@st.composite
def options_for(draw: st.DrawFn, residuals: Residuals) -> ContrastSettings:
    numbers = {
        "mixing": draw(st.floats(0, 1)),
        "n_neighbors": draw(st.integers(1, len(residuals.bulk))),
    }
    return ContrastSettings().model_copy(update=numbers)


def close(found: Tensor, expected: Tensor, scale: float, tolerance: float = 1e-5) -> bool:
    return float((found.double() - expected.double()).abs().max()) <= tolerance * scale


@given(st.data(), pools(), baselines, seeds)
def test_baselines_do_not_depend_on_the_order_of_prompts(
    data: st.DataObject, residuals: Residuals, name: str, seed: int
) -> None:
    options, layer = data.draw(options_for(residuals)), residuals.layer(0)
    other, order = shuffled(layer, seed)
    found, expected = differences(name, other, options), differences(name, layer, options)[order]
    assert close(found, expected, float(layer.harmful.abs().max()))


@given(st.data(), pools(whole=True), baselines, seeds)
def test_baselines_do_not_depend_on_the_origin(
    data: st.DataObject, residuals: Residuals, name: str, seed: int
) -> None:
    options = data.draw(options_for(residuals))
    constant = (50 * normal(residuals.bulk.shape[2], seed=seed)).round()
    moved = changed(residuals, lambda pool: pool + constant)
    found = differences(name, moved.layer(0), options)
    expected = differences(name, residuals.layer(0), options)
    assert close(found, expected, 100)


@given(st.data(), pools())
def test_baselines_scale_with_residuals(data: st.DataObject, residuals: Residuals) -> None:
    options = data.draw(options_for(residuals))
    for name in BASELINES:
        expected = differences(name, residuals.layer(0), options)
        for factor in (2.0**-100, 2.0**100):
            scaled = changed(residuals, lambda pool, factor=factor: pool * factor)
            found = differences(name, scaled.layer(0), options) / factor
            assert close(found, expected, float(residuals.harmful.abs().max()))


@given(pools(), st.floats(0, 1))
def test_mixed_lies_between_unmatched_and_matched(residuals: Residuals, mixing: float) -> None:
    layer = residuals.layer(0)
    mixed, unmatched, matched = (
        differences(name, layer, ContrastSettings(baseline="mixed", mixing=mixing)).double()
        for name in ("mixed", "unmatched", "matched")
    )
    assert torch.allclose(mixed, (1 - mixing) * unmatched + mixing * matched, atol=1e-5)


@given(pools())
def test_differences_of_a_pool_from_itself(residuals: Residuals) -> None:
    # With the harmful prompts as matched pool, the differences of each class add up to nothing.
    layer = residuals.layer(0)
    layer = replace(layer, matched=layer.harmful, matched_classes=layer.harmful_classes)
    found = differences("matched", layer, ContrastSettings()).double()
    for name in set(layer.harmful_classes):
        chosen = [index for index, other in enumerate(layer.harmful_classes) if other == name]
        assert float(found[chosen].sum(dim=0).abs().max()) < 1e-4


@given(pools())
def test_residualized_is_the_part_of_unmatched_beside_the_subjects(
    residuals: Residuals,
) -> None:
    layer = residuals.layer(0)
    found = differences("residualized", layer, ContrastSettings()).double()
    unmatched = differences("unmatched", layer, ContrastSettings()).double()
    scale = 1 + float(unmatched.norm(dim=1).max())
    assert bool((found.norm(dim=1) <= unmatched.norm(dim=1) + 1e-5 * scale).all())
    # A projection: what was removed is at right angles to what is left, and lies along subjects.
    assert float(((unmatched - found) * found).sum(dim=1).abs().max()) < 1e-5 * scale**2
    center = layer.bulk.double().mean(dim=0)
    topics = torch.stack(
        [
            layer.matched[[other == name for other in layer.matched_classes]].double().mean(dim=0)
            for name in sorted(set(layer.harmful_classes))
        ]
    )
    topics = topics - center
    assert float((found @ topics.T).abs().max()) < 1e-4 * scale * (1 + float(topics.norm()))
    projector = topics.T @ torch.linalg.pinv(topics.T, rtol=1e-6)
    assert close(unmatched - found, (unmatched @ projector), scale, 1e-4)


@st.composite
def sample_sets(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Draws samples of a map, from one up, with equal ones among them. Array of shape (n_samples, hidden_size)."""

    n, seed = draw(st.integers(1, 14)), draw(seeds)
    samples = normal(n, draw(st.integers(1, 12)), seed=seed).numpy()
    for target, source in draw(
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=4)
    ):
        samples[target] = samples[source]
    return samples


@st.composite
def map_settings(draw: st.DrawFn) -> SomSettings:
    return SomSettings(
        rows=draw(st.integers(1, 3)),
        columns=draw(st.integers(1, 3)),
        iterations=draw(st.integers(1, 60)),
        sigma=draw(st.floats(0.2, 1.4)),
        learning_rate=draw(st.floats(0.01, 1.0)),
        neighborhood=draw(st.sampled_from(["gaussian", "bubble"])),
        topology=draw(st.sampled_from(["rectangular", "hexagonal"])),
        seed=draw(st.integers(0, 1000)),
    )


@given(sample_sets(), map_settings(), powers)
def test_maps_stay_among_their_samples(
    samples: np.ndarray[Any, Any], settings: SomSettings, factor: float
) -> None:
    (found,) = train_maps([samples], settings)
    assert int(found.hits.sum()) == len(samples)
    assert ((found.hits == 0) == np.isinf(found.quantization_errors)).all()
    # Weights start at samples and move towards samples, so that they are mixtures of them.
    assert np.allclose(found.mixture.sum(axis=1), 1) and found.mixture.min() > -1e-9
    vectors = found.vectors(range(settings.n_neurons))
    assert (vectors <= samples.max(axis=0) + 1e-6).all()
    assert (vectors >= samples.min(axis=0) - 1e-6).all()
    winners = np.linalg.norm(samples[:, None] - vectors[None], axis=2).argmin(axis=1)
    if len(np.unique(samples, axis=0)) == 1:
        # All neurons lie where all samples do, and the first of them wins.
        assert np.allclose(vectors, samples[0]) and found.hits[0] == len(samples)
    elif settings.n_neurons == 1:
        assert (winners == 0).all()
    densest = found.densest(int((found.hits > 0).sum()))
    assert found.hits[densest].tolist() == sorted(found.hits[found.hits > 0], reverse=True)
    # Neither the size of the numbers nor the other maps have a part in it.
    other, scaled = train_maps([samples[:1], samples * np.float32(factor)], settings)
    assert other.hits.tolist() == [1] + [0] * (settings.n_neurons - 1)
    assert scaled.hits.tolist() == found.hits.tolist()
    scaled_vectors = scaled.vectors(range(settings.n_neurons)) / factor
    assert np.allclose(scaled_vectors, vectors, rtol=1e-9, atol=1e-9)


@given(sample_sets(), map_settings(), powers)
def test_maps_are_those_of_minisom_at_any_magnitude(
    samples: np.ndarray[Any, Any], settings: SomSettings, factor: float
) -> None:
    samples = samples * np.float32(factor)
    (found,) = train_maps([samples], settings)
    assert_same_map(found, samples, settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_maps_refuse_what_is_not_finite(value: float) -> None:
    samples = np.ones((4, 3))
    samples[2, 1] = value
    with pytest.raises(ContrastError, match=r"^The samples of map 1 contain infinite .*\.$"):
        train_maps([np.ones((4, 3)), samples], SomSettings(iterations=5))


@given(direction_sets(lowest=-30, highest=30, hidden=40), st.integers(1, 70), seeds)
def test_orthogonalized_directions(vectors: Tensor, rank: int, seed: int) -> None:
    exact = vectors.double()
    reference = normal(exact.shape[1], seed=seed).double()
    rows, values = orthogonalize(exact[None], reference[None], rank)
    rows, values = rows[0], values[0]
    n = min(rank, *exact.shape)
    assert rows.shape == (n, exact.shape[1]) and values.shape == (n,)
    nonzero = values > 0
    gram = rows @ rows.T
    assert torch.allclose(gram, torch.diag(nonzero.double()), atol=1e-9)
    assert bool((values.diff() <= 0).all())
    assert bool((rows @ reference >= -1e-9).all())
    expected = torch.linalg.svdvals(exact)[:n]
    largest = float(expected[0])
    assert torch.allclose(values, expected, rtol=1e-9, atol=1e-6 * largest)
    # What is left out is shorter than a millionth of the longest.
    rest = exact - (exact @ rows.T) @ rows
    if n == min(exact.shape):
        assert float(rest.norm()) <= 1e-6 * largest * math.sqrt(len(exact)) + 1e-300
    # The first row is the best single direction of all.
    if largest > 0:
        assert float((exact @ rows[0]).norm()) == pytest.approx(largest, rel=1e-9)


@given(direction_sets(lowest=-3, highest=3, hidden=40), seeds)
def test_random_directions_keep_norms_and_cosines(vectors: Tensor, seed: int) -> None:
    exact = vectors.double()[None]
    found = random_directions(exact, seed)
    assert found.shape == exact.shape
    scale = float(exact.norm() ** 2) + 1e-300
    grams = [item[0] @ item[0].T for item in (found, exact)]
    assert float((grams[0] - grams[1]).norm()) <= 1e-9 * scale
    assert torch.equal(found, random_directions(exact, seed))


@given(direction_sets(lowest=-30, highest=30))
def test_unit_vectors_of_any_length(vectors: Tensor) -> None:
    unit, norms = unit_vectors(vectors)
    exact = vectors.double()
    assert torch.allclose(unit * norms[:, None], exact, rtol=1e-12, atol=0)
    assert torch.allclose(unit.norm(dim=1), (exact != 0).any(dim=1).double())


@st.composite
def contrast_settings(draw: st.DrawFn, **fixed: Any) -> ContrastSettings:
    """Draws settings of an extraction, with small maps."""

    options: dict[str, Any] = {
        "baseline": draw(baselines),
        "mixing": draw(st.floats(0, 1)),
        "n_neighbors": draw(st.integers(1, 12)),
        "classes": draw(st.sampled_from(["category", "single"])),
        "small_classes": draw(st.sampled_from(["error", "drop", "merge"])),
        "exclude_categories": draw(st.lists(st.sampled_from(CLASSES), max_size=1)),
        "method": draw(st.sampled_from(["som", "mean"])),
        "som_rows": draw(st.integers(1, 3)),
        "som_columns": draw(st.integers(1, 2)),
        "som_iterations": draw(st.integers(1, 40)),
        "som_sigma": draw(st.floats(0.1, 1.4)),
        "svd": draw(st.booleans()),
        "svd_rank": draw(st.none() | st.integers(1, 10)),
        "scale": draw(st.sampled_from(["unit", "raw", "unmatched"])),
        "orthogonalize_direction": draw(st.booleans()),
        "control": draw(st.sampled_from(["none", "random"])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    takes_shared = not options["svd"] and options["scale"] == "unit"
    options["shared_direction"] = takes_shared and draw(st.booleans())
    options["winners"] = draw(st.integers(1, min(3, options["som_rows"] * options["som_columns"])))
    options |= fixed
    for name, baseline in (("mixing", "mixed"), ("n_neighbors", "nearest")):
        if options["baseline"] != baseline:
            del options[name]
    return ContrastSettings.model_validate(options)


def lengths_before_scale(directions: Directions) -> Tensor:
    """The lengths of class directions, or after SVD their singular values; of shape (n_layers + 1, n_directions)."""

    trained = directions.class_directions.double()
    if directions.aligned:
        return trained.norm(dim=-1)
    values = np.linalg.svd(trained.numpy(), compute_uv=False)
    return torch.from_numpy(values[:, : directions.n_directions])


@given(pools(layers=3), contrast_settings(), st.sampled_from([2.0**-100, 1.0, 2.0**100]))
def test_extraction_works_or_says_why_not(
    tmp_path: Path, residuals: Residuals, settings: ContrastSettings, factor: float
) -> None:
    # The embedding of a common last token is the same for all prompts.
    for pool in (residuals.harmful, residuals.bulk, residuals.matched):
        pool[:, 0] = 1.0
    residuals = changed(residuals, lambda pool: pool * factor)
    try:
        directions = extract_directions(residuals, settings)
    except ContrastError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
        return
    n_indices, n_directions, hidden = directions.tensor.shape
    assert (n_indices, hidden) == (3, residuals.bulk.shape[2])
    assert n_directions == len(directions.names) == len(set(directions.names))
    lengths = directions.tensor.double().norm(dim=-1)
    assert not bool(directions.tensor[0].any())
    trained = directions.class_directions.double()
    if settings.scale == "unit":
        assert torch.allclose(lengths, (lengths > 0).double(), atol=1e-5)
    elif settings.scale == "raw":
        expected = lengths_before_scale(directions)
        assert torch.allclose(lengths / factor, expected / factor, rtol=1e-4, atol=1e-4)
    if settings.svd:
        unit = unit_vectors(directions.tensor)[0]
        gram = unit @ unit.transpose(1, 2)
        assert torch.allclose(gram, torch.diag_embed((lengths > 0).double()), atol=1e-5)
        along = (unit * directions.mean_direction.double()[:, None]).sum(-1)
        assert bool((along >= -1e-5 * factor * 10).all())
    elif settings.scale == "raw":
        assert torch.allclose(
            directions.tensor / factor, directions.class_directions / factor, rtol=1e-6
        )
    if directions.has_shared:
        gram = (directions.tensor @ directions.tensor.transpose(1, 2)).double()
        assert float(gram[:, 0, 1:].abs().max()) <= 1e-5
        assert float(torch.linalg.eigvalsh(gram).max()) <= 1 + 1e-5
    if settings.orthogonalize_direction and settings.control == "none":
        harmless = unit_vectors(residuals.bulk.double().mean(dim=0))[0]
        along = (trained * harmless[:, None]).sum(-1)
        assert float(along.abs().max()) <= 1e-5 * factor * 10

    path = tmp_path / "directions.safetensors"
    directions.save(path)
    loaded = Directions.load(path)
    for name in ("names", "class_names", "aligned", "provenance"):
        assert getattr(loaded, name) == getattr(directions, name)
    for name in (
        "tensor",
        "class_directions",
        "mean_direction",
        "hits",
    ):
        assert torch.equal(getattr(loaded, name), getattr(directions, name))
    content = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == content


@given(pools(layers=2), contrast_settings(exclude_categories=[], svd_rank=None), powers)
def test_unit_directions_do_not_depend_on_magnitude(
    residuals: Residuals, settings: ContrastSettings, factor: float
) -> None:
    settings = settings.model_copy(update={"scale": "unit"})
    found = []
    for pool in (residuals, changed(residuals, lambda pool: pool * factor)):
        try:
            found.append(extract_directions(pool, settings))
        except ContrastError as error:
            found.append(str(error))
    if isinstance(found[0], str) or isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        assert found[0].names == found[1].names
        assert torch.equal(found[0].hits, found[1].hits)
        first, second = found[0].tensor.double(), found[1].tensor.double()
        # Singular vectors of equal singular values are arbitrary within their span, and so is what is all rounding.
        if settings.svd:
            first, second = (item.transpose(1, 2) @ item for item in (first, second))
        clear = lengths_before_scale(found[0]) > 1e-5
        if bool(clear.all()):
            assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("scale", get_args(Scale))
def test_more_singular_vectors_than_there_are(scale: Scale) -> None:
    classes = ("drugs", "fraud", "drugs")
    residuals = Residuals(
        harmful=normal(3, 2, 6, seed=0),
        harmful_classes=classes,
        bulk=normal(3, 2, 6, seed=1),
        matched=normal(3, 2, 6, seed=2),
        matched_classes=classes,
    )
    settings = ContrastSettings(
        method="mean",
        classes="category",
        baseline="matched",
        svd=True,
        svd_rank=10**30,
        scale=scale,
    )
    assert extract_directions(residuals, settings).n_directions == 2


@pytest.mark.parametrize("pool", ["harmful", "bulk", "matched"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["som", "mean"])
def test_residuals_that_are_not_finite_are_refused(pool: str, value: float, method: str) -> None:
    tensors = {
        name: normal(4, 2, 5, seed=index)
        for index, name in enumerate(("harmful", "bulk", "matched"))
    }
    tensors[pool][1, 1, 3] = value
    classes = ("drugs",) * 4
    residuals = Residuals(harmful_classes=classes, matched_classes=classes, **tensors)
    settings = ContrastSettings(method=method, som_rows=1, som_columns=1)
    with pytest.raises(
        ContrastError, match=r"^The residuals of the .* prompts are not all finite, .*\.$"
    ):
        extract_directions(residuals, settings)


@pytest.mark.parametrize("method", ["som", "mean"])
def test_differences_beyond_float32_are_refused(method: str) -> None:
    classes = ("drugs",) * 2
    residuals = Residuals(
        harmful=torch.full((2, 2, 4), 3e38),
        harmful_classes=classes,
        bulk=torch.full((2, 2, 4), -3e38),
        matched=torch.zeros(0, 2, 4),
        matched_classes=(),
    )
    settings = ContrastSettings(method=method, som_rows=1, som_columns=1)
    with pytest.raises(ContrastError, match=r"\.$"):
        extract_directions(residuals, settings)


@given(
    st.data(),
    st.sampled_from(["mean", "som"]),
    st.integers(1, 5),
    baselines,
    st.booleans(),
)
def test_one_prompt_per_class_is_its_own_direction(
    data: st.DataObject, method: str, n_classes: int, baseline: str, svd: bool
) -> None:
    names = tuple(f"class {index}" for index in range(n_classes))
    residuals = Residuals(
        harmful=normal(n_classes, 2, 16, seed=data.draw(seeds)),
        harmful_classes=names,
        bulk=normal(1, 2, 16, seed=data.draw(seeds)),
        matched=normal(n_classes, 2, 16, seed=data.draw(seeds)),
        matched_classes=names,
    )
    settings = ContrastSettings(
        baseline=baseline,
        classes="category",
        method=method,
        som_rows=1,
        som_columns=1,
        svd=svd,
        **({"n_neighbors": 1} if baseline == "nearest" else {}),
        orthogonalize_direction=False,
    )
    directions = extract_directions(residuals, settings)
    options = ContrastSettings(baseline="nearest", n_neighbors=1)
    for index in range(2):
        expected = BASELINES[baseline](residuals.layer(index), options)
        assert torch.allclose(directions.class_directions[index], expected, atol=1e-5)


finite = st.floats(allow_nan=False, allow_infinity=False)
kernels = st.builds(
    Kernel,
    max_weight=finite,
    max_weight_position=finite,
    min_weight=finite,
    min_weight_distance=finite,
)


@given(
    st.builds(
        Parameters,
        direction_index=st.none() | finite,
        kernels=st.dictionaries(st.text(), kernels, max_size=3),
        scales=st.dictionaries(st.text(), finite, max_size=5),
        configuration=st.text(),
    )
)
def test_parameters_survive_json(parameters: Parameters) -> None:
    stored = json.dumps(parameters.to_dict())
    restored = Parameters.from_dict(json.loads(stored))
    assert restored == parameters and json.dumps(restored.to_dict()) == stored
    assert all(isinstance(text, str) for text in parameters.to_presentation_dict().values())


@example({"direction_index": math.nan, "kernels": {}, "scales": {}})
@example({"direction_index": None, "kernels": {}, "scales": {"drugs": math.inf}})
@example({"direction_index": 10**400, "kernels": {}, "scales": {}})
@example(
    {
        "direction_index": None,
        "kernels": {
            "mlp.down_proj": {
                "max_weight": 1.0,
                "max_weight_position": 2.0,
                "min_weight": 0.0,
                "min_weight_distance": 0.0,
            }
        },
        "scales": {},
    }
)
@given(
    json_values
    | st.fixed_dictionaries(
        {"direction_index": json_values, "kernels": json_values, "scales": json_values}
    )
    | st.fixed_dictionaries(
        {
            "direction_index": st.none(),
            "kernels": st.dictionaries(
                st.text(max_size=3),
                st.fixed_dictionaries(
                    {
                        "max_weight": json_values,
                        "max_weight_position": finite,
                        "min_weight": finite,
                        "min_weight_distance": finite,
                    }
                ),
                max_size=2,
            ),
            "scales": st.dictionaries(st.text(max_size=3), json_values, max_size=2),
        }
    )
)
def test_stored_parameters_are_restored_or_refused(stored: Any) -> None:
    try:
        restored = Parameters.from_dict(stored)
    except ContrastError:
        return
    # What is accepted can be used.
    numbers = [*restored.scales.values(), restored.direction_index or 0]
    for kernel in restored.kernels.values():
        numbers += [*vars(kernel).values()]
        for layer in range(4):
            assert isinstance(kernel.weight(layer), float | int)
    assert all(math.isfinite(number) for number in numbers)
    restored.to_presentation_dict()


@given(st.floats(0, 2), st.floats(0, 40), st.floats(0, 1), st.floats(1, 30), st.integers(0, 40))
def test_kernel_falls_from_its_maximum(
    highest: float, position: float, share: float, reach: float, layer: int
) -> None:
    kernel = Kernel(highest, position, share * highest, reach)
    weight, distance = kernel.weight(layer), abs(layer - position)
    if distance > reach:
        assert weight == 0
    else:
        expected = np.interp(distance, [0, reach], [highest, share * highest])
        assert weight == pytest.approx(expected, abs=1e-9)
    if distance + 1 <= reach:
        further = layer + 1 if layer >= position else layer - 1
        assert kernel.weight(further) <= weight + 1e-12


def make_directions(vectors: Tensor, aligned: bool = True) -> Directions:
    """Returns directions with the same vectors at every layer."""

    names = tuple(f"class {index}" for index in range(vectors.shape[1]))
    return Directions(
        tensor=vectors,
        names=names,
        aligned=aligned,
        class_directions=vectors,
        class_names=names,
        mean_direction=vectors.mean(dim=1),
        hits=torch.zeros(len(vectors), vectors.shape[1], 0, dtype=torch.int64),
    )


@fewer(2)
@given(st.integers(1, 40), st.integers(1, 64), st.booleans(), seeds)
def test_suggested_parameters_fit(
    n_layers: int, n_directions: int, aligned: bool, seed: int
) -> None:
    directions = make_directions(normal(n_layers + 1, n_directions, 8, seed=seed), aligned)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    components = ["attn.o_proj", "mlp.down_proj"]
    parameters = suggest_parameters(study.ask(), components, n_layers, directions)
    parameters.require_fit(directions, components)
    restored = Parameters.from_dict(json.loads(json.dumps(parameters.to_dict())))
    assert restored == parameters
    assert aligned or parameters.direction_index is None
    for kernel in parameters.kernels.values():
        assert all(0 <= kernel.weight(layer) <= 1.5 for layer in range(n_layers))
    for layer in range(n_layers):
        for index in {parameters.direction_index, None}:
            for scale in get_args(Scale):
                vectors = layer_vectors(directions, index, layer, scale)
                assert vectors.shape == (n_directions, 8) and bool(vectors.isfinite().all())
    with pytest.raises(ContrastError, match="another configuration"):
        replace(parameters, direction_index=float(n_layers)).require_fit(directions, components)
    with pytest.raises(ContrastError, match="another configuration"):
        parameters.require_fit(directions, components[:1])


@given(direction_sets(most=6, hidden=12), st.integers(2, 6), st.floats(0, 1))
def test_interpolated_directions(vectors: Tensor, n_layers: int, fraction: float) -> None:
    tensor = torch.stack([vectors, *(vectors.roll(index, 0) for index in range(n_layers))])
    directions = make_directions(tensor)
    for layer in range(n_layers):
        own = layer_vectors(directions, None, layer, "raw")
        assert torch.equal(own, tensor[layer + 1])
        assert torch.equal(layer_vectors(directions, float(layer), 0, "raw"), own)
    between = layer_vectors(directions, fraction, 0, "unit")
    mixture = (1 - fraction) * tensor[1].double() + fraction * tensor[2].double()
    lengths = mixture.norm(dim=1)
    # Opposite directions cancel, and what rounding leaves has no direction.
    clear = lengths > 1e-3
    assert torch.allclose(between[clear].double(), mixture[clear] / lengths[clear, None], atol=1e-3)


@given(seeds, st.floats(0, 1), st.integers(1, 20))
def test_winsorized_residuals(seed: int, quantile: float, hidden: int) -> None:
    residuals = normal(3, 2, hidden, seed=seed)
    found = winsorize(residuals, quantile)
    threshold = torch.quantile(residuals.abs(), quantile, dim=-1, keepdim=True)
    assert bool((found.abs() <= threshold + 1e-6).all())
    kept = residuals.abs() <= threshold
    assert torch.equal(found[kept], residuals[kept])
    assert torch.equal(found.sign(), residuals.sign()) or bool((threshold == 0).any())


@given(
    st.dictionaries(
        st.sampled_from(sorted(ContrastSettings.model_fields)) | st.text(max_size=12),
        json_values,
        max_size=4,
    )
)
def test_settings_are_accepted_or_refused_in_one_way(values: dict[str, Any]) -> None:
    try:
        settings = ContrastSettings.model_validate(values)
    except ValidationError as error:
        assert error.errors()
        return
    # What was accepted survives storage.
    again = ContrastSettings.model_validate(json.loads(settings.model_dump_json()))
    assert again == settings


@pytest.mark.parametrize("name", ["directions", "save_directions", "residual_cache"])
def test_names_of_files_hold_no_null_characters(name: str) -> None:
    # Under Heretic 2.0 nothing else has looked at them.
    with pytest.raises(ValidationError, match="null character"):
        ContrastSettings.model_validate({name: "a\0b"})
    with pytest.raises(ValidationError, match="null character"):
        ContrastSettings.model_validate({"bad_prompts": {"dataset": "a\0b"}})
