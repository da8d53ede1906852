# SPDX-License-Identifier: AGPL-3.0-or-later

"""What holds on a CPU holds on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from heretic_contrast.ablation.hooks import Intervention, ablated_samples, output_projections
from heretic_contrast.ablation.lora import lora_factors
from heretic_contrast.ablation.operator import Operator, compose
from heretic_contrast.engine.check import all_logits, checked_engine
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.evaluation.geometry import observe_outputs
from heretic_contrast.evaluation.plan import SweepOptions
from heretic_contrast.evaluation.sweep import sweep
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.tiers.responses import Tier
from tests.plain_sweeps import CANARIES, HARMFUL, REFERENCES, random_directions
from tests.tiny_models import make_model, make_tokenizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use"),
]

ARCHITECTURES = ("llama", "qwen3_5")


def on_device(
    architecture: str, device: str = "cuda", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A random model; the same numbers on every device."""

    network = make_model(architecture).to(device, dtype)
    return wrap(network, make_tokenizer(), name=f"tiny-{architecture}", batch_size=16)


def interventions(model: LanguageModel) -> list[Intervention]:
    """Some on one layer, with several weights, and one on two."""

    tensor = random_directions(model, 2, 0).tensor
    operators = {
        (layer, weight): compose(tensor[layer + 1], torch.full((2,), weight))
        for layer in (1, 2)
        for weight in (0.5, 1.5)
    }
    single = [Intervention({layer: operator}) for (layer, _), operator in operators.items()]
    return [*single, Intervention({1: operators[1, 1.5], 2: operators[2, 1.5]})]


def known(model: LanguageModel) -> Continuations:
    tokens = tuple(model.token_ids([*HARMFUL, *CANARIES]))
    return Continuations(tokens, tuple(PlainEngine(model).generate(tokens, [12] * len(tokens))))


@contextmanager
def changed(model: LanguageModel, intervention: Intervention) -> Iterator[None]:
    """Changes weights to W − C W."""

    originals = []
    for layer, operator in intervention.operators.items():
        matrix = (operator.vectors.T @ operator.mixed_vectors).double().cuda()
        for module in output_projections(model, layer, None):
            weight: Any = module.weight
            originals.append((weight, weight.data))
            weight.data = (weight.double() - matrix.T @ weight.double()).to(weight.dtype)
    try:
        yield
    finally:
        for weight, data in originals:
            weight.data = data


def error(found: Tensor, expected: Tensor) -> float:
    return float(
        (found.float().cpu() - expected.float().cpu()).norm() / expected.float().cpu().norm()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_equal_changed_weights(architecture: str) -> None:
    model = on_device(architecture)
    continuations = known(model)
    for intervention in interventions(model):
        for engine in (PlainEngine(model), FastEngine(model)):
            (found,) = all_logits(engine, continuations, [intervention])
            with changed(model, intervention):
                (expected,) = all_logits(PlainEngine(model), continuations, None)
            (unmodified,) = all_logits(PlainEngine(model), continuations, None)
            assert error(found, expected) <= 1e-3 < 0.01 < error(unmodified, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fast_engine_is_taken(architecture: str, dtype: torch.dtype) -> None:
    model = on_device(architecture, dtype=dtype)
    assert type(checked_engine(model, model.token_ids(HARMFUL))) is FastEngine


def test_the_fast_engine_equals_the_plain_one() -> None:
    model = on_device("llama")
    continuations, chosen = known(model), interventions(model)
    found, expected = (
        engine.respond(continuations, 12, chosen)
        for engine in (FastEngine(model), PlainEngine(model))
    )
    assert found == expected
    assert any(row != list(continuations.tokens) for row in found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_residuals_and_activities_equal_those_on_a_cpu(architecture: str) -> None:
    model, expected = on_device(architecture), on_device(architecture, "cpu")
    residuals = model.residuals(HARMFUL)
    assert residuals.device.type == "cpu"
    assert error(residuals, expected.residuals(HARMFUL)) <= 1e-3
    vectors = random_directions(model, 2, 0).tensor[1:]
    moments, others = (observe_outputs(item, HARMFUL, vectors, 1, {}) for item in (model, expected))
    assert moments.n_steps == others.n_steps
    for name in ("second", "energy"):
        assert error(getattr(moments, name), getattr(others, name)) <= 1e-3
    rounded = on_device(architecture, dtype=torch.bfloat16).residuals(HARMFUL)
    assert error(rounded, residuals) <= 0.1


def test_a_sweep_equals_that_on_a_cpu() -> None:
    options = SweepOptions(layers=(1, 2), weights=(0.5, 1.5), max_new_tokens=8, kl_tokens=8)
    results = []
    for device in ("cuda", "cpu"):
        model = on_device("llama", device)
        arguments = (
            {"two": random_directions(model, 2, 1)},
            HARMFUL,
            CANARIES,
            REFERENCES,
            options,
        )
        results.append(sweep(model, *arguments, classify=lambda *_: Tier.REFUSE))
    for cell, other in zip(results[0].cells, results[1].cells, strict=True):
        assert cell.responses == other.responses
        assert cell.measurement.kl_divergence == pytest.approx(
            other.measurement.kl_divergence, rel=1e-2, abs=1e-5
        )


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_full_row_normalization_equals_heretic(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).cuda()
    vector = torch.nn.functional.normalize(torch.randn(1, shape[0], generator=generator), dim=1)
    factor_a, factor_b = lora_factors(
        Operator(vector, torch.full((1, 1), 0.8)), weight, "full", rank=3, seed=7
    )
    # As Heretic computes it.
    norms = weight.norm(dim=1, keepdim=True)
    changed = weight / norms
    vector = vector.cuda()
    changed = changed - 0.8 * vector.T @ (vector @ changed)
    change = torch.nn.functional.normalize(changed, dim=1) * norms - weight
    torch.manual_seed(7)
    left, sizes, right = torch.svd_lowrank(change, q=10, niter=6)
    expected = left[:, :3] @ torch.diag(sizes[:3]) @ right[:, :3].T
    assert error(factor_b @ factor_a, expected) <= 1e-4 < 0.01 < error(change, expected)


@pytest.mark.parametrize("same", [True, False])
def test_hooks_wait_for_nothing(same: bool) -> None:
    model = on_device("llama")
    vectors = torch.nn.functional.normalize(torch.randn(2, model.hidden_size), dim=1)
    some = [Intervention({1: Operator(vectors, w * torch.eye(2))}) for w in (0.5, 1.0)]
    (module, *_) = output_projections(model, 1, None)
    weight: Any = module.weight
    inputs = torch.randn(2, 3, weight.shape[1], device="cuda")
    expected = module(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with ablated_samples(model, some[:1] * 2 if same else some):
            found = module(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(found, expected) > 0.01


def test_attention_makes_no_plan_for_every_length() -> None:
    on_device("llama")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
