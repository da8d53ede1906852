# SPDX-License-Identifier: AGPL-3.0-or-later

"""Geometry against dense matrices, and activations against one pass per step over everything."""

import json
from dataclasses import asdict
from itertools import chain
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from heretic_contrast.ablation.hooks import output_projections
from heretic_contrast.ablation.operator import compose
from heretic_contrast.engine.observation import observe_decoding, passing_layers
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.evaluation.capture import measure_capture, span_basis
from heretic_contrast.evaluation.geometry import (
    angle,
    compare,
    measure_activities,
    measure_geometry,
    measure_layer,
    observe_outputs,
    perturbation,
    principal_angles,
)
from heretic_contrast.evaluation.plan import Configuration
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel, hooked
from heretic_contrast.prompts import Prompt
from tests.architectures import FAMILIES
from tests.made_directions import make_directions, random_tensor

PROMPTS = [Prompt("Bake a cake"), Prompt("Tell me about trains in the snow"), Prompt("Sing")]


def test_layer_geometry_equals_dense_formulas() -> None:
    trained = random_tensor(3, 4, 12) + 1
    tensor = torch.nn.functional.normalize(trained, dim=-1)
    measured = measure_layer("a", Configuration(make_directions(tensor, trained)), 1)
    rows = trained[2].double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    cosines = (rows @ rows.T) / np.outer(norms, norms)
    np.testing.assert_allclose(measured.norms, norms)
    np.testing.assert_allclose(measured.cosines, cosines, rtol=1e-12)
    assert measured.mean_cosine == pytest.approx(cosines[np.triu_indices(4, 1)].mean())
    singular_values = np.linalg.svd(rows, compute_uv=False)
    np.testing.assert_allclose(measured.singular_values, singular_values)
    assert measured.first_share == pytest.approx(singular_values[0] ** 2 / (rows**2).sum())
    dense = sum(np.outer(v, v) for v in tensor[2].double().numpy())
    assert measured.effective_weight == pytest.approx(np.linalg.eigvalsh(dense)[-1])
    mean = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    assert measured.weight_along_mean == pytest.approx(mean @ dense @ mean)


@pytest.mark.parametrize("composition", ["sum", "capped", "sequential"])
@pytest.mark.parametrize("is_equal", [True, False])
def test_effective_weight_is_that_of_the_configuration(composition: str, is_equal: bool) -> None:
    trained = random_tensor(3, 4, 12) + 1
    tensor = torch.nn.functional.normalize(trained, dim=-1)
    configuration = Configuration(make_directions(tensor, trained), composition, is_equal)
    measured = measure_layer("a", configuration, 1)
    unit = tensor[2].double().numpy()
    largest = np.linalg.eigvalsh(unit.T @ unit)[-1]
    if is_equal and composition == "sequential":
        # There is no formula of the weight.
        assert measured.effective_weight == pytest.approx(1, rel=1e-5)
        return
    weight = 1 / largest if is_equal and composition == "sum" else 1.0
    if composition == "sequential":
        kept = np.eye(12)
        for v in unit:
            kept = kept @ (np.eye(12) - weight * np.outer(v, v))
        dense = np.eye(12) - kept
    else:
        values, basis = np.linalg.eigh(weight * unit.T @ unit)
        cap = 1.0 if composition == "capped" else np.inf
        dense = basis @ np.diag(values.clip(max=cap)) @ basis.T
    assert measured.effective_weight == pytest.approx(np.linalg.norm(dense, ord=2), rel=1e-5)
    rows = trained[2].double().numpy()
    mean = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    assert measured.weight_along_mean == pytest.approx(mean @ dense @ mean, rel=1e-5)


def test_zero_directions_have_no_geometry() -> None:
    measured = measure_layer("a", Configuration(make_directions(torch.zeros(2, 3, 5))), 0)
    assert measured.first_share is None
    assert measured.effective_weight == 0
    assert measured.mean_cosine == 0
    assert (
        measure_layer("a", Configuration(make_directions(torch.ones(2, 1, 5))), 0).mean_cosine
        is None
    )
    assert measured.cosines == ((0.0, 0.0, 0.0),) * 3


def test_angles() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert angle(x, y) == pytest.approx(90)
    assert angle(x, -2 * x) == pytest.approx(180)
    assert angle(x, x + 1e-9 * y) == pytest.approx(np.rad2deg(3e-9), rel=1e-3, abs=1e-7)
    assert np.isnan(angle(x, torch.zeros(2)))


@pytest.mark.parametrize(("n_first", "n_second", "size"), [(3, 3, 10), (2, 5, 10), (5, 2, 6)])
def test_principal_angles_equal_those_of_scipy(n_first: int, n_second: int, size: int) -> None:
    first, second = random_tensor(n_first, size), random_tensor(n_second, size, seed=1)
    expected = np.sort(
        np.rad2deg(subspace_angles(first.double().numpy().T, second.double().numpy().T))
    )
    found = principal_angles(span_basis(first), span_basis(second))
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_principal_angles_of_equal_and_orthogonal_spans() -> None:
    rows = torch.eye(6)
    mixed = torch.tensor([[1.0, 2.0], [3.0, -1.0]]) @ rows[:2]
    np.testing.assert_allclose(
        principal_angles(rows[:2].double(), span_basis(mixed)), [0, 0], atol=1e-9
    )
    np.testing.assert_allclose(principal_angles(rows[:2], rows[2:4]), [90, 90])
    np.testing.assert_allclose(principal_angles(rows[:2], rows[1:3]), [0, 90], atol=1e-9)
    assert len(principal_angles(rows[:2], span_basis(torch.zeros(2, 6)))) == 0


def test_comparison_of_two_configurations() -> None:
    trained = random_tensor(2, 3, 8)
    first = make_directions(trained)
    second = make_directions(trained * torch.tensor([0.5, 0.5, 0.5])[None, :, None])
    same = compare("a", first, "b", second, 0)
    assert same.norm_ratio == pytest.approx(0.5)
    assert same.class_angles == pytest.approx(dict.fromkeys(same.class_angles, 0.0), abs=1e-4)
    np.testing.assert_allclose(same.principal_angles, 0, atol=1e-4)
    third = make_directions(random_tensor(2, 3, 8, seed=4))
    other = compare("a", first, "c", third, 0)
    # Layer 0 stands behind the embedding.
    rows = [item.tensor[1].double().numpy() for item in (first, third)]
    products = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*rows, strict=True)]
    assert other.class_angles == pytest.approx(
        {f"class {index}": np.rad2deg(np.arccos(value)) for index, value in enumerate(products)}
    )
    expected = np.sort(np.rad2deg(subspace_angles(rows[0].T, rows[1].T)))
    np.testing.assert_allclose(other.principal_angles, expected)
    lengths = [np.linalg.norm(item, axis=1).sum() for item in rows]
    assert other.norm_ratio == pytest.approx(lengths[1] / lengths[0])
    assert other.mean_class_angle == pytest.approx(np.mean(list(other.class_angles.values())))
    geometry = measure_geometry({"a": first, "b": second})
    assert geometry.configurations() == ["a", "b"]
    assert len(geometry.comparisons) == 1
    json.dumps(asdict(geometry), allow_nan=False)


def test_the_basis_of_each_span_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    configurations = {
        name: make_directions(random_tensor(3, 2, 8, seed=ord(name))) for name in "abcd"
    }
    found = Mock(wraps=torch.linalg.svd)
    monkeypatch.setattr(torch.linalg, "svd", found)
    geometry = measure_geometry(configurations)
    assert found.call_count == 4 * 2
    measure_capture("a", configurations["a"], random_tensor(5, 3, 8))
    assert found.call_count == 4 * 2 + 2
    pairs = [(item.first + item.second, item.layer) for item in geometry.comparisons]
    assert pairs == [(pair, layer) for pair in "ab ac ad bc bd cd".split() for layer in (0, 1)]


@torch.no_grad()
def reference_steps(
    model: LanguageModel, prompt: Prompt, n_tokens: int, components: tuple[str, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Outputs and states at every decoding step of one prompt, from one pass over all of its tokens.

    Tensors of shape (n_steps, n_layers, hidden_size), float64.
    """

    tokens = model.token_ids([prompt])[0]
    continuation = PlainEngine(model).generate([tokens], [n_tokens])[0]
    written: dict[int, list[torch.Tensor]] = {index: [] for index in range(model.n_layers)}
    states: dict[int, torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(model.layers):
        for module in output_projections(model, index, components):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, output, index=index: written[index].append(
                        torch.nn.functional.linear(args[0], module.weight)[0].double()
                    )
                )
            )
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output, index=index: states.__setitem__(
                    index, (output[0] if isinstance(output, tuple) else output)[0].double()
                )
            )
        )
    try:
        model.model(input_ids=torch.tensor([[*tokens, *continuation]]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    steps = slice(len(tokens) - 1, len(tokens) - 1 + len(continuation))
    y = torch.stack([torch.stack(item).sum(0)[steps] for item in written.values()], dim=1)
    h = torch.stack([states[index][steps] for index in range(model.n_layers)], dim=1)
    return y, h


@pytest.mark.parametrize(
    ("fixture", "ends"), [("tiny_llama", False), ("tiny_llama", True), ("tiny_hybrid", False)]
)
def test_moments_equal_those_of_all_positions(
    fixture: str, ends: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: LanguageModel = request.getfixturevalue(fixture)
    if ends:
        # A token that responses have at different places, so that some end before others.
        responses = PlainEngine(model).generate(model.token_ids(PROMPTS), [6] * len(PROMPTS))
        end = next(
            token
            for token in sorted({*chain(*responses)})
            if len({[*response[:-1], token].index(token) for response in responses}) > 1
        )
        monkeypatch.setattr(model.model.generation_config, "eos_token_id", end)
    vectors = random_tensor(model.n_layers, 3, model.hidden_size)
    moments = observe_outputs(model, PROMPTS, vectors, 6, {})
    steps = [reference_steps(model, prompt, 6) for prompt in PROMPTS]
    assert (len({len(y) for y, _ in steps}) > 1) == ends
    outputs = torch.cat([y for y, _ in steps])
    assert moments.n_steps == len(outputs)
    for layer in range(model.n_layers):
        y, v = outputs[:, layer], vectors[layer].double()
        second = sum(torch.outer(v @ row, v @ row) for row in y) / len(y)
        torch.testing.assert_close(moments.second[layer], second, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(
            moments.energy[layer], (y**2).sum(1).mean(), rtol=1e-3, atol=1e-9
        )
        deviations = torch.cat([h[:, layer] - h[:, layer].mean(0) for _, h in steps])
        torch.testing.assert_close(
            moments.variation[layer], (deviations**2).sum(1).mean(), rtol=1e-3, atol=1e-9
        )
        for composition in ("sum", "sequential", "capped"):
            operator = compose(vectors[layer], torch.tensor([0.3, 0.7, 1.0]), composition)
            rows = operator.vectors.double()
            dense = (rows.T @ operator.kernel.double() @ rows).numpy()
            expected = np.sqrt(np.mean(np.sum((y.numpy() @ dense.T) ** 2, axis=1)))
            inverse = torch.linalg.pinv(v)
            assert perturbation(moments.second[layer], inverse, operator) == pytest.approx(
                expected, rel=1e-3
            )


def test_activities_of_planted_directions(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pinv = Mock(wraps=torch.linalg.pinv)
    monkeypatch.setattr(torch.linalg, "pinv", pinv)
    # The outputs at one prompt's last position are directions themselves: one prompt lies wholly along its own.
    outputs, _ = reference_steps(tiny_llama, PROMPTS[0], 1)
    tensor = torch.zeros(tiny_llama.n_layers + 1, 2, tiny_llama.hidden_size)
    tensor[1:, 0] = outputs[0].float() * 7
    random = make_directions(random_tensor(*tensor.shape))
    activities = measure_activities(
        tiny_llama,
        {"own": make_directions(tensor), "random": random},
        PROMPTS[:1],
        PROMPTS,
        (0.5, 1.0),
        max_new_tokens=4,
    )
    assert len(activities) == 2 * tiny_llama.n_layers
    # It is that of the directions, whatever their weight.
    assert pinv.call_count == len(activities)
    alone = measure_activities(
        tiny_llama, {"random": random}, PROMPTS[:1], PROMPTS, (0.5, 1.0), max_new_tokens=4
    )
    for found, expected in zip(activities[tiny_llama.n_layers :], alone, strict=True):
        assert found.occupancy_harmful == pytest.approx(expected.occupancy_harmful)
        assert found.perturbations[1] == pytest.approx(expected.perturbations[1])
    for activity in activities[: tiny_llama.n_layers]:
        assert activity.configuration == "own"
        assert activity.occupancy_harmful[0] == pytest.approx(1, abs=1e-4)
        assert activity.occupancy_harmful[1] == 0
        assert activity.occupancy_harmless[0] < 1
        (_, half), (_, whole) = activity.perturbations
        # The perturbation of a sum is proportional to the weight.
        assert half is not None and whole == pytest.approx(2 * half)
        assert activity.natural_variation > 0


@pytest.mark.parametrize(
    ("strengths", "is_equal"),
    [(("weight", "effective"), False), (("effective",), False), ((), True)],
)
def test_activities_of_some_components_at_the_strength_that_is_swept(
    strengths: tuple[str, ...], is_equal: bool, tiny_llama: Any
) -> None:
    components = ("attn.o_proj",)
    tensor = random_tensor(tiny_llama.n_layers + 1, 2, tiny_llama.hidden_size) + 1
    configuration = Configuration(make_directions(tensor), equal_effective_weight=is_equal)
    activities = measure_activities(
        tiny_llama, {"own": configuration}, PROMPTS, PROMPTS, (0.5,), 4, components, strengths
    )
    whole = measure_activities(tiny_llama, {"own": configuration}, PROMPTS, PROMPTS, (0.5,), 4)
    steps = [reference_steps(tiny_llama, prompt, 4, components)[0] for prompt in PROMPTS]
    for layer, activity in enumerate(activities):
        v = tensor[layer + 1].double().numpy()
        largest = 1.0 if "weight" in strengths else np.linalg.eigvalsh(v @ v.T)[-1]
        y = torch.cat(steps)[:, layer].numpy()
        expected = 0.5 / largest * np.sqrt(np.mean(np.sum((y @ v.T @ v) ** 2, axis=1)))
        (_, found), (_, by_all) = activity.perturbations[0], whole[layer].perturbations[0]
        assert found == pytest.approx(expected / activity.natural_variation, rel=1e-3)
        assert found != pytest.approx(by_all, rel=1e-2)
        last = np.stack([y[0, layer].numpy() for y in steps])
        share = np.sum((last @ v[0]) ** 2) / np.sum(v[0] ** 2) / np.sum(last**2)
        assert activity.occupancy_harmful[0] == pytest.approx(np.sqrt(share), rel=1e-3)
        # Of harmless prompts, too, the last position counts alone.
        assert activity.occupancy_harmless[0] == pytest.approx(np.sqrt(share), rel=1e-3)
    assert len(activities) == tiny_llama.n_layers


@pytest.mark.parametrize("name", ["Granite", "Gemma 2", "Gemma 4 MoE"])
def test_components_that_cannot_be_told_from_others_are_left_out(name: str) -> None:
    family = FAMILIES[name]
    model = wrap(family.make_model().eval(), family.make_tokenizer(), name)
    configurations = {
        "own": make_directions(random_tensor(model.n_layers + 1, 1, model.hidden_size))
    }
    # Behind a norm of its own, attention can be told; what a number multiplies cannot.
    activities = measure_activities(
        model, configurations, PROMPTS[:1], PROMPTS[:1], (1.0,), 2, ("attn.o_proj",)
    )
    assert len(activities) == (0 if name == "Granite" else model.n_layers)
    # A dense MLP and experts share the norm behind them.
    shared = measure_activities(
        model, configurations, PROMPTS[:1], PROMPTS[:1], (1.0,), 2, ("mlp.down_proj",)
    )
    assert len(shared) == (model.n_layers if name == "Gemma 2" else 0)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        "Granite",
        "Qwen2 MoE",
        "Llama 4, text",
        pytest.param("Qwen3-Next", marks=pytest.mark.slow),
        pytest.param("Granite MoE hybrid", marks=pytest.mark.slow),
    ],
)
def test_what_layers_add_is_seen_behind_numbers_and_gates(name: str, factor: float) -> None:
    """Against the difference between what a layer returns and takes, where it may multiply the stream as well."""

    family = FAMILIES[name]
    model = wrap(family.make_model().eval(), family.make_tokenizer(), name)
    tokens = (5, 6, 7, 8, 9)
    found: list[torch.Tensor] = []
    entered: list[torch.Tensor] = []
    added: list[torch.Tensor] = []

    def scale(module: Any, args: Any, output: Any) -> Any:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    def enter(module: Any, args: Any, options: Any) -> None:
        entered.append((args[0] if args else options["hidden_states"])[0, -1].double())

    def leave(module: Any, args: Any, output: Any) -> None:
        state = (output[0] if isinstance(output, tuple) else output)[0, -1].double()
        added.append(state - factor * entered[-1])

    with hooked(after=[(layer, scale) for layer in model.layers]):
        passing = passing_layers(model)
        assert passing is not None
        observe_decoding(model, [tokens], 1, lambda _, y, __: found.append(y[0]), passing)
        with hooked(
            [(layer, enter) for layer in model.layers], [(layer, leave) for layer in model.layers]
        ):
            model.model(input_ids=torch.tensor([tokens]), use_cache=False)
    torch.testing.assert_close(found[0], torch.stack(added), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "is_multiplied"),
    [("Llama", False), ("Gemma 2", False), ("Command R7B", False), ("Granite", True)],
)
def test_layers_that_multiply_are_told_in_16_bits(
    name: str, is_multiplied: bool, dtype: torch.dtype
) -> None:
    """Of a stream whose rounding is longer than what layers add, as at the first position of real models."""

    family = FAMILIES[name]
    network = family.make_model().eval().to(dtype)
    network.get_input_embeddings().weight *= 1000
    model = wrap(network, family.make_tokenizer(), name)
    passing = passing_layers(model)
    assert passing is not None
    assert list(passing) == (list(range(model.n_layers)) if is_multiplied else [])


def test_activities_of_a_model_that_mixes_several_streams_are_left_out() -> None:
    family = FAMILIES["Gemma 3n"]
    model = wrap(family.make_model().eval(), family.make_tokenizer(), "Gemma 3n")
    directions = make_directions(random_tensor(model.n_layers + 1, 2, model.hidden_size))
    assert not measure_activities(model, {"own": directions}, PROMPTS, PROMPTS, (1.0,), 2)
