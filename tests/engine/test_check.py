# SPDX-License-Identifier: AGPL-3.0-or-later

"""The plain engine is right, and taken wherever the fast one is not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heretic_contrast.ablation.hooks import Intervention
from heretic_contrast.ablation.operator import compose
from heretic_contrast.engine.check import checked_engine
from heretic_contrast.engine.fast.decoder import Decoder
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import AloneEngine, PlainEngine
from heretic_contrast.errors import ContrastWarning
from heretic_contrast.evaluation.geometry import measure_activities
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import DEVICE_FAILS, LanguageModel, Tokens
from heretic_contrast.prompts import Prompt
from tests.architectures import FAMILIES, Family, text
from tests.plain_sweeps import HARMFUL, changed_weights, random_directions
from tests.tiny_models import make_model, make_tokenizer


@pytest.fixture(params=["tiny_llama", "tiny_hybrid"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@torch.no_grad()
def greedy(model: LanguageModel, tokens: Tokens, limit: int) -> tuple[Tokens, Tensor]:
    """Decodes by hand, the whole sequence for every token; with the logits of each step."""

    found: Tokens = ()
    logits = []
    while len(found) < limit and found[-1:] != (model.model.generation_config.eos_token_id,):
        ids = torch.tensor([tokens + found])
        logits.append(model.model(input_ids=ids, use_cache=False).logits[0, -1])
        found += (int(logits[-1].argmax()),)
    return found, torch.stack(logits)


def test_the_plain_engine_equals_changed_weights(model: LanguageModel) -> None:
    prompts = model.token_ids(HARMFUL[:3])
    plain = PlainEngine(replace(model, batch_size=2))
    limits = [9, 4, 9]
    expected = [greedy(model, tokens, n) for tokens, n in zip(prompts, limits, strict=True)]
    assert plain.generate(prompts, limits) == [tokens for tokens, _ in expected]
    known = Continuations(tuple(prompts), tuple(tokens for tokens, _ in expected))
    logits = torch.cat([item for _, item in expected])
    vectors = random_directions(model, 2, 0).tensor[2]
    weights = torch.tensor([0.9, 0.4])
    intervention = Intervention({1: compose(vectors, weights)})
    change = vectors.double().T @ (weights.double()[:, None] * vectors.double())
    with changed_weights(model, 1, change):
        changed = [greedy(model, tokens, 9)[0] for tokens in prompts]
        again = PlainEngine(model).logits(known)
        expected_logits = torch.cat([item.values for item in again])
    assert plain.respond(known, 9, [intervention]) == [changed]
    assert changed != plain.generate(prompts, [9] * 3)
    for chosen, values in ((None, logits), ([intervention], expected_logits)):
        counts: list[int] = []
        found = list(plain.logits(known, chosen, counts.append))
        assert sum(counts) == 3
        assert torch.cat([item.positions for item in found]).equal(torch.arange(len(values)))
        torch.testing.assert_close(
            torch.cat([item.values for item in found]), values, rtol=1e-4, atol=1e-4
        )


def test_models_that_give_the_logits_of_all_positions_are_read_at_the_same(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tuple(model.token_ids(HARMFUL[:3]))
    known = Continuations(prompts, tuple(greedy(model, tokens, 4)[0] for tokens in prompts))
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda *args, logits_to_keep=0, **options: forward(*args, **options),
    )
    expected = torch.cat([greedy(model, tokens, 4)[1] for tokens in prompts])
    found = torch.cat([item.values for item in PlainEngine(model).logits(known)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_fast_engine_is_taken_where_it_is_right(model: LanguageModel) -> None:
    assert type(checked_engine(model, model.token_ids(HARMFUL))) is FastEngine
    assert type(checked_engine(model, model.token_ids(HARMFUL[:1]))) is FastEngine


@pytest.mark.parametrize("name", ["Llama, bfloat16", "Llama, float16", "Gemma 4, shared keys"])
def test_rounding_and_shared_keys_are_no_reason_against_it(name: str) -> None:
    network = wrap(FAMILIES[name].make_model(), FAMILIES[name].make_tokenizer(), name)
    assert type(checked_engine(network, network.token_ids(HARMFUL))) is FastEngine


def test_the_plain_engine_is_taken_where_layers_pass_on_more_than_hidden_states() -> None:
    family = FAMILIES["GLM-5"]
    network = wrap(family.make_model(), family.make_tokenizer(), "tiny-glm")
    with pytest.warns(ContrastWarning, match=r"tiny-glm \(its (layers pass on more|logits differ)"):
        assert type(checked_engine(network, network.token_ids(HARMFUL))) is PlainEngine


def wrong_logits(patch: pytest.MonkeyPatch) -> None:
    original = Decoder.run

    def run(self: Decoder, *args: Any, **options: Any) -> Tensor:
        return (
            1.1 * original(self, *args, **options)[:, [0, *range(args[0].input_ids.shape[1] - 1)]]
        )

    patch.setattr(Decoder, "run", run)


def wrong_responses(patch: pytest.MonkeyPatch) -> None:
    original = FastEngine.respond

    def respond(self: FastEngine, *args: Any) -> list[list[Tokens]]:
        # Each one that of the other intervention.
        return original(self, *args)[::-1]

    patch.setattr(FastEngine, "respond", respond)


def failing(patch: pytest.MonkeyPatch) -> None:
    def logits(self: Decoder, hidden_states: Tensor) -> Tensor:
        raise AttributeError("no such thing")

    patch.setattr(Decoder, "logits", logits)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrong_logits, "its logits differ"),
        (wrong_responses, "its responses differ"),
        (failing, "no such thing"),
    ],
)
def test_the_plain_engine_is_taken_where_the_fast_one_is_wrong(
    tiny_llama: LanguageModel, change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    with pytest.warns(ContrastWarning, match=rf"tiny-llama \({reason}\)"):
        engine = checked_engine(tiny_llama, tiny_llama.token_ids(HARMFUL))
    assert type(engine) is PlainEngine


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        DEVICE_FAILS("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_exhausted_memory_and_failing_devices_are_no_reason_to_go_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = wrap(make_model("llama"), make_tokenizer(), "tiny", batch_size=4)

    def logits(self: Decoder, hidden_states: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(Decoder, "logits", logits)
    with pytest.raises(type(error)):
        checked_engine(network, network.token_ids(HARMFUL))


def growing_rope() -> LanguageModel:
    """Returns a model whose positions mean something else in a batch that holds a long prompt."""

    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": 80,
        "factor": 8.0,
    }
    configuration = text(
        "Phi3Config",
        head_dim=8,
        max_position_embeddings=640,
        original_max_position_embeddings=80,
        rope_parameters=rope,
    )
    family = Family("Phi3ForCausalLM", configuration)
    return wrap(family.make_model().eval(), family.make_tokenizer(), "tiny-phi", batch_size=8)


@torch.no_grad()
def test_prompts_are_run_alone_where_longer_ones_beside_them_matter() -> None:
    model = growing_rope()
    long = Prompt("word " * 90)
    short = model.token_ids(HARMFUL)
    assert max(map(len, short)) < 76 and len(model.token_ids([long])[0]) > 80
    assert type(checked_engine(model, short)) is FastEngine
    prompts = model.token_ids([*HARMFUL, long])
    with pytest.warns(ContrastWarning, match="every prompt is run alone"):
        engine = checked_engine(model, prompts)
    expected = [greedy(model, tokens, 2)[0] for tokens in prompts]
    assert engine.generate(prompts, [2] * len(prompts)) == expected
    # Scorers and sweeps make it again, of the same kind.
    assert type(engine)(model).generate(prompts, [2] * len(prompts)) == expected

    # So does whatever else reads them together.
    everything = [*HARMFUL, long]
    with pytest.warns(ContrastWarning, match="every prompt is run alone"):
        responses = model.generate(everything, 2, special_tokens=True)
    assert responses == model.tokenizer.batch_decode(list(map(list, expected)))
    configurations = {"one": random_directions(model, 1, 0)}
    activities: list[Any] = [configurations, everything, everything, [1.0], 2]
    with pytest.warns(ContrastWarning, match="every prompt is run alone"):
        together = measure_activities(model, *activities)
    assert together == measure_activities(replace(model, batch_size=1), *activities)

    with pytest.warns(ContrastWarning, match="every prompt is run alone"):
        found = model.residuals(everything)
    for index, tokens in enumerate(prompts):
        states = model.model(
            input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False
        ).hidden_states
        right = torch.stack([state[0, -1] for state in states])
        torch.testing.assert_close(found[index], right, rtol=1e-4, atol=1e-4)


def test_prompts_are_run_alone_where_what_is_cached_of_others_matters() -> None:
    network = wrap(make_model("llama"), make_tokenizer(), "tiny", batch_size=4)

    def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
        return 1.5 * output if len(output) > 1 and output.shape[1] == 1 else output

    network.layers[0].mlp.register_forward_hook(disturb)
    with pytest.warns(ContrastWarning, match="every prompt is run alone"):
        assert type(checked_engine(network, network.token_ids(HARMFUL))) is AloneEngine


def test_a_wrong_engine_is_told_from_rounding_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["Llama, bfloat16"]
    network = wrap(family.make_model(), family.make_tokenizer(), "tiny-16")
    wrong_logits(monkeypatch)
    with pytest.warns(ContrastWarning, match="its logits differ"):
        assert type(checked_engine(network, network.token_ids(HARMFUL))) is PlainEngine
