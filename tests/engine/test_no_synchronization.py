# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Hooks and the divergence never wait for the device: no copy between devices, no number read back, per call.

The device "meta" stands for a GPU, and the recorder sees every operation between it and the CPU. What waits inside
transformers itself is measured without hooks and must stay the same with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heretic_contrast.ablation.hooks import BatchOperator, ablated, output_projections
from heretic_contrast.ablation.operator import Operator, compose
from heretic_contrast.engine.compat import CACHE
from heretic_contrast.engine.fast import decoder as decoder_module
from heretic_contrast.engine.fast.decoder import Decoder, TokenBatch
from heretic_contrast.evaluation.divergence import SparseLogProbabilities, divergences
from heretic_contrast.evaluation.geometry import observe_outputs
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.sweep import SweepEvaluator
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.tiers.responses import Tier
from tests.devices import PretendedDevices
from tests.plain_sweeps import CANARIES, HARMFUL, REFERENCES, random_directions
from tests.tiny_models import make_model, make_tokenizer

HIDDEN = 32

DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")
"""Operations whose result's shape or value the CPU must know before it goes on."""


class Recorder(TorchDispatchMode):
    """Records operations that make the CPU and a device wait for each other, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.products = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in inputs}
        # Making a tensor on a device does not copy: the keyword counts only beside inputs.
        if inputs and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        masks = name.startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )
        if len(devices) > 1 or name in DATA_DEPENDENT or masks:
            self.waits.append(name)
        self.products += name in ("mm", "bmm", "addmm", "baddbmm")
        if name == "_local_scalar_dense" and inputs[0].device.type == "meta":
            # There is no number to read: transformers asks here whether a mask is all ones.
            return True
        return operation(*args, **kwargs)


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Records operations without gradients."""

    with torch.no_grad(), Recorder() as recorder:
        yield recorder


def some_operator(seed: int = 0, n_directions: int = 3) -> Operator:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(
        torch.randn(n_directions, HIDDEN, generator=generator), dim=1
    )
    return compose(vectors, torch.full((n_directions,), 0.7), "sequential")


def some_operators(kind: str, n_samples: int) -> Operator | BatchOperator:
    if kind == "one":
        return some_operator()
    return BatchOperator.stack(
        [some_operator(seed, 1 + seed % 3) if seed else None for seed in range(n_samples)], HIDDEN
    )


@pytest.fixture(scope="module")
def on_device() -> LanguageModel:
    """A random Llama on the device."""

    model = wrap(make_model("llama"), make_tokenizer(), name="on-device", batch_size=4)
    # What the model consists of is found out while it has numbers.
    model.model.to("meta")
    return model


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: torch.ones(4, 4).to(x.device),
        lambda x: torch.ones(4, 4, device=x.device).copy_(torch.ones(4, 4)),
        lambda x: torch.ones(4, 4) @ x,
        lambda x: x[torch.arange(2)],
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
    ],
)
def test_recorder_sees_what_waits(wait: Any) -> None:
    x = torch.ones(4, 4, device="meta")
    # There is nothing to copy from this device: the attempt fails, and is recorded.
    with recorded() as recorder, suppress(NotImplementedError, RuntimeError):
        wait(x)
    assert recorder.waits


def test_recorder_lets_pass_what_does_not_wait() -> None:
    x = torch.ones(4, 4, device="meta")
    with recorded() as recorder:
        y = (x @ x)[1:3].float().log_softmax(1) * 2.0
        y.gather(1, torch.zeros(2, 1, dtype=torch.long, device=x.device)).sum()
    assert recorder.waits == []
    assert recorder.products == 1


@pytest.mark.parametrize("kind", ["one", "per sample"])
def test_operators_are_moved_when_hooks_are_registered_and_not_in_calls(kind: str) -> None:
    modules = [torch.nn.Linear(8, HIDDEN, bias=bias, device="meta") for bias in (False, True)]
    operator = some_operators(kind, 2)
    inputs = torch.ones(2, 5, 8, device="meta")
    with recorded() as registration, ablated([*modules, *modules], operator):
        pass
    # The vectors and the small matrix, once for all modules.
    assert registration.waits == ["_to_copy", "_to_copy"]
    with ablated(modules, operator):
        for module in modules:
            module(inputs)
        for module in modules:
            with recorded() as recorder:
                assert module(inputs).device.type == "meta"
            assert recorder.waits == []
            # The module's own product, Vᵀ y, and V K times that: V K itself is known.
            assert recorder.products == 3


@pytest.mark.parametrize("kind", ["one", "per sample"])
def test_decoding_step_waits_as_often_with_hooks_as_without(
    kind: str, on_device: LanguageModel
) -> None:
    modules = [module for i in (1, 2) for module in output_projections(on_device, i, None)]
    prompt = torch.ones(3, 6, dtype=torch.long, device="meta")
    mask = torch.ones(3, 7, dtype=torch.long, device="meta")

    def waits(operator: Operator | BatchOperator | None) -> tuple[list[str], list[str], int]:
        with ablated(modules if operator is not None else [], operator or some_operator()):
            with recorded() as prefill:
                output = on_device.model(
                    input_ids=prompt, attention_mask=mask[:, :6], use_cache=True
                )
            with recorded() as step:
                output = on_device.model(
                    input_ids=prompt[:, :1],
                    attention_mask=mask,
                    **{CACHE: getattr(output, CACHE)},
                    use_cache=True,
                )
        assert output.logits.device.type == "meta"
        return prefill.waits, step.waits, step.products

    plain = waits(None)
    hooked = waits(some_operators(kind, 3))
    assert hooked[:2] == plain[:2]
    assert hooked[2] == plain[2] + 2 * len(modules)


@pytest.mark.parametrize("kind", ["one", "per sample"])
def test_generation_reads_back_as_often_with_hooks_as_without(
    kind: str, tiny_llama: LanguageModel
) -> None:
    modules = output_projections(tiny_llama, 1, None)
    prompt = torch.full((3, 6), 7)

    def waits(operator: Operator | BatchOperator | None) -> list[str]:
        with (
            ablated(modules if operator is not None else [], operator or some_operator()),
            recorded() as recorder,
        ):
            output = tiny_llama.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
            )
        assert output.shape == (3, 11)
        return recorder.waits

    plain = waits(None)
    assert "_local_scalar_dense" in plain
    assert waits(some_operators(kind, 3)) == plain


def test_chunks_of_the_divergence_do_not_wait(
    on_device: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_positions, top_k = 20, 10
    monkeypatch.setattr(decoder_module, "LEAST_POSITIONS", 8)
    monkeypatch.setattr(decoder_module, "ELEMENTS", 1)
    base = SparseLogProbabilities(
        torch.zeros(n_positions, top_k, dtype=torch.int32, device="meta"),
        torch.zeros(n_positions, top_k, device="meta"),
        torch.zeros(n_positions, device="meta"),
    )
    hidden_states = torch.zeros(n_positions, HIDDEN, device="meta")
    positions = torch.arange(n_positions, device="meta")
    decoder = Decoder(on_device)
    tokens = torch.ones(1, 3, dtype=torch.long, device="meta")
    with recorded():
        decoder.run(TokenBatch(tokens, tokens))
    lengths = []
    with recorded() as recorder:
        for part in decoder.chunks(hidden_states):
            logits = decoder.logits(hidden_states[part])
            values = divergences(base.at(positions[part]), logits)
            lengths.append(len(values))
    assert lengths == [8, 8, 4] and values.device.type == "meta"
    assert recorder.waits == []


def test_modules_on_several_devices() -> None:
    on_cpu = torch.nn.Linear(8, HIDDEN, bias=False)
    elsewhere = torch.nn.Linear(8, HIDDEN, bias=False, device="meta")
    third = torch.nn.Linear(8, HIDDEN, bias=False)
    inputs = torch.randn(2, 5, 8)
    for kind in ("one", "per sample"):
        operator = some_operators(kind, 2)
        expected = on_cpu(inputs) - operator.apply(on_cpu(inputs))
        with recorded() as recorder, ablated([on_cpu, elsewhere, third], operator):
            registration = list(recorder.waits)
            assert torch.allclose(on_cpu(inputs), expected, atol=1e-6)
            assert elsewhere(inputs.to("meta")).device.type == "meta"
        assert registration == ["_to_copy", "_to_copy"]
        # Beside it only the input was moved.
        assert recorder.waits == [*registration, "_to_copy"]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_cells_and_geometry_wait_for_what_they_read_alone(architecture: str) -> None:
    options = SweepOptions(layers=(1, 2), weights=(1.0,), max_new_tokens=12, kl_tokens=6)
    with PretendedDevices() as devices:
        network = make_model(architecture).to("cuda")
        model = wrap(network, make_tokenizer(), name="tiny", batch_size=12)
        configurations = {str(seed): random_directions(model, 2, seed) for seed in range(3)}
        plan = plan_sweep(configurations, HARMFUL, CANARIES, REFERENCES, options)
        evaluator = SweepEvaluator(model, plan, classify=lambda *_: Tier.REFUSE)
        # Finds out whether interventions can share a batch.
        cells = evaluator.grid()
        evaluator.evaluate(cells[:1])
        devices.waits.clear()
        evaluator.evaluate(cells)
        waits = own_waits(devices)
        # Which responses depart: one look at each pass. Six cells of seven prompts; 24 rows of divergence.
        assert 4 <= waits.pop(("_verify", "tolist")) <= 6
        # Which have ended: one after eight tokens.
        assert 1 <= waits.pop(("generate_together", "tolist")) <= 8
        # The divergences of all positions, at the end.
        assert waits == {("measure", "copy"): 1}
        devices.waits.clear()
        vectors = configurations["0"].tensor[1:]
        observe_outputs(model, HARMFUL, vectors, 9, {})
        waits = own_waits(devices)
        # The results at the end, however many steps there were.
        assert sorted(name for _, name in waits) == ["__int__", "copy"]
        assert sum(waits.values()) == 4


def own_waits(devices: PretendedDevices) -> dict[tuple[str, str], int]:
    """Returns how often the package waited, and not what it calls."""

    return {
        (function, name): count
        for (module, function, name), count in devices.waits.items()
        # Rows of caches are given to transformers where it needs them.
        if module.startswith("heretic_contrast") or function == "reorder_cache"
    }


def test_module_whose_weights_are_fetched_for_each_call() -> None:
    module = torch.nn.Linear(8, HIDDEN, bias=False)
    inputs = torch.randn(2, 5, 8)
    operator = some_operator()
    expected = module(inputs) - operator.apply(module(inputs))
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert module.weight.device.type == "meta"
    with ablated([module], operator):
        assert torch.allclose(module(inputs), expected, atol=1e-6)
