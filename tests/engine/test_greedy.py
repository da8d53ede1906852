# SPDX-License-Identifier: AGPL-3.0-or-later

"""Responses are those of the model's own `generate`, whatever its generation configuration says."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from heretic_contrast.ablation.hooks import Intervention
from heretic_contrast.ablation.operator import compose
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.geometry import observe_outputs
from heretic_contrast.greedy import is_plainly_greedy
from heretic_contrast.hosts.surface import wrap
from heretic_contrast.language_model import LanguageModel, plain_settings
from heretic_contrast.prompts import Prompt
from tests.plain_sweeps import changed_weights, random_directions
from tests.tiny_models import make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")

PROMPTS = [Prompt("Hi"), Prompt("What is tea?"), Prompt("Go")]
"""Two of one length, and another."""

LIMIT = 7

PLAIN: list[dict[str, Any]] = [
    {},
    {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 0.5,
        "epsilon_cutoff": 0.2,
        "eta_cutoff": 0.2,
        "max_length": 4,
        "max_new_tokens": 2,
    },
    {
        "num_beams": 1,
        "length_penalty": 2.0,
        "early_stopping": True,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": [],
        "return_dict_in_generate": True,
        "cache_implementation": "dynamic",
    },
    {"eos_token_id": [2, 14, 265], "cache_implementation": "hybrid"},
    {"eos_token_id": None},
]

PECULIAR: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"forced_eos_token_id": 7},
    {"exponential_decay_length_penalty": (1, 4.0), "eos_token_id": [2, 5]},
    {"begin_suppress_tokens": [token for token in range(320) if token % 3]},
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 2},
    {"guidance_scale": 1.7},
    {"prompt_lookup_num_tokens": 3},
    {"a_setting_of_next_year": 3},
]

RARER: list[dict[str, Any]] = [
    {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.2, "early_stopping": True},
    {"num_beams": 2, "eos_token_id": [14, 19], "length_penalty": -1.0},
    {"forced_eos_token_id": [7, 8], "eos_token_id": [7, 8]},
    {"exponential_decay_length_penalty": (4, 9.0)},
    {"suppress_tokens": [token for token in range(320) if token % 3 == 1]},
    {"repetition_penalty": 0.5},
    {"encoder_repetition_penalty": 4.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[token] for token in range(1, 320, 2)]},
    {"min_length": 60, "eos_token_id": list(range(1, 320, 2))},
    {"min_new_tokens": 4, "eos_token_id": list(range(1, 320, 2))},
    {"forced_bos_token_id": 9},
    {"sequence_bias": [[[5], 2.0], [[14, 19], 9.0]]},
    {"watermarking_config": {"bias": 4.0}},
    {"renormalize_logits": True},
    {"remove_invalid_values": True},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prefill_chunk_size": 2},
    {"output_attentions": True, "return_dict_in_generate": True},
    {"output_hidden_states": True},
]


def named(cases: Sequence[dict[str, Any]], *marks: Any) -> list[Any]:
    """Test cases that are called after their settings."""

    return [
        pytest.param(case, id="-".join([*case, str(index)]), marks=marks)
        for index, case in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return wrap(make_model("llama", num_hidden_layers=2), make_tokenizer(), "tiny", batch_size=3)


@contextmanager
def configured(model: LanguageModel, chosen: Mapping[str, Any]) -> Iterator[None]:
    """Gives a model settings, as its generation_config.json would."""

    original = model.model.generation_config
    content = {**original.to_dict(), **chosen}
    # Of what stands in config.json, unknown settings are left out.
    del content["_from_model_config"]
    model.model.generation_config = GenerationConfig(**content)
    try:
        yield
    finally:
        model.model.generation_config = original


def alone(model: LanguageModel, tokens: Sequence[int], limit: int) -> tuple[int, ...]:
    """What `generate` of transformers gives for one sequence."""

    ids = torch.tensor([list(tokens)])
    output = model.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return tuple(sequences[0, ids.shape[1] :].tolist())


def check(model: LanguageModel) -> None:
    """Compares everything that generates with `generate` of transformers, one prompt at a time."""

    sequences = model.token_ids(PROMPTS)
    expected = [alone(model, tokens, LIMIT) for tokens in sequences]
    texts = model.tokenizer.batch_decode([list(row) for row in expected], skip_special_tokens=True)
    assert model.generate(PROMPTS, LIMIT) == texts
    expected[0] = alone(model, sequences[0], 3)
    engines = [FastEngine(replace(model, batch_size=size)) for size in (2, 5)]
    assert engines[0].generate(sequences, [3, LIMIT, LIMIT]) == expected
    # An ablated model answers as one whose weights were changed.
    layer = model.n_layers // 2
    vectors = random_directions(model, 2, 0).tensor[layer + 1]
    weights = torch.tensor([0.9, 0.4])
    intervention = Intervention({layer: compose(vectors, weights)})
    tokens = engines[1].generate(sequences, [LIMIT] * 3)
    known = Continuations(tuple(sequences), tuple(tokens))
    found = [engine.respond(known, LIMIT, [intervention])[0] for engine in engines]
    change = vectors.double().T @ (weights.double()[:, None] * vectors.double())
    with changed_weights(model, layer, change):
        changed = [alone(model, row, LIMIT) for row in sequences]
    assert found == [changed, changed]


@pytest.mark.parametrize("chosen", named(PLAIN))
def test_settings_without_influence(llama: LanguageModel, chosen: dict[str, Any]) -> None:
    with configured(llama, chosen):
        assert is_plainly_greedy(llama.model)
        check(llama)


@pytest.mark.parametrize("chosen", [*named(PECULIAR), *named(RARER, pytest.mark.slow)])
def test_settings_with_influence(llama: LanguageModel, chosen: dict[str, Any]) -> None:
    with configured(llama, chosen):
        assert not is_plainly_greedy(llama.model)
        check(llama)


@pytest.mark.parametrize(
    "chosen", named([{}, {"repetition_penalty": 1.3}, {"num_beams": 2}, {"forced_eos_token_id": 3}])
)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_hybrid", "refuser"])
def test_settings_of_other_models(
    name: str, chosen: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    with configured(model, chosen):
        check(model)


VALUES = {
    "repetition_penalty": st.sampled_from([0.8, 1.0, 1.5]),
    "no_repeat_ngram_size": st.integers(0, 3),
    "min_new_tokens": st.integers(0, 12),
    "min_length": st.integers(0, 60),
    "num_beams": st.integers(1, 3),
    "length_penalty": st.sampled_from([-1.0, 1.0, 2.0]),
    "temperature": st.sampled_from([0.2, 1.0]),
    "eos_token_id": st.lists(st.integers(0, 319), max_size=90, min_size=1),
    "suppress_tokens": st.lists(st.integers(3, 319), max_size=90),
    "begin_suppress_tokens": st.lists(st.integers(3, 319), max_size=90),
    "bad_words_ids": st.lists(st.lists(st.integers(3, 319), min_size=1, max_size=2), min_size=1),
    "forced_eos_token_id": st.integers(3, 319),
    "exponential_decay_length_penalty": st.tuples(st.integers(1, 6), st.floats(1.01, 3)),
    "renormalize_logits": st.booleans(),
    "use_cache": st.booleans(),
}


@pytest.mark.slow
@settings(max_examples=25)
@given(chosen=st.fixed_dictionaries({}, optional=VALUES))
def test_any_mixture_of_settings(llama: LanguageModel, chosen: dict[str, Any]) -> None:
    with configured(llama, chosen):
        check(llama)


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_settings_in_the_configuration_of_the_model(
    has_generation_config: bool, tmp_path: Path
) -> None:
    make_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "forced_eos_token_id": 7, "num_beams": 2}))
    if not has_generation_config:
        (tmp_path / "generation_config.json").unlink()
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = wrap(network, make_tokenizer(), "tiny", batch_size=3)
    assert is_plainly_greedy(network) == has_generation_config
    check(model)


def test_settings_under_adapters(llama: LanguageModel) -> None:
    network = make_model("llama", num_hidden_layers=2)
    configuration = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    model = wrap(network, make_tokenizer(), "tiny", batch_size=3)
    adapted = get_peft_model(network, configuration)
    model = LanguageModel(adapted, model.tokenizer, "tiny", model.layers, model.writers)
    for owner in (network, adapted):
        with configured(model, {"num_beams": 2}):
            owner.generation_config.forced_eos_token_id = 7
            assert not is_plainly_greedy(adapted)
            sequences = model.token_ids(PROMPTS)
            expected = [alone(model, tokens, LIMIT) for tokens in sequences]
            assert FastEngine(model).generate(sequences, [LIMIT] * 3) == expected
            with plain_settings(adapted):
                plain = [alone(model, tokens, LIMIT) for tokens in sequences]
            assert plain != expected


@pytest.mark.parametrize("name", ["generate", "_sample", "_get_logits_processor"])
def test_a_class_that_generates_in_its_own_way(llama: LanguageModel, name: str) -> None:
    network = make_model("llama", num_hidden_layers=2)
    original = type(network)

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(changed, self), name)(*args, **kwargs)

    changed = type(original.__name__, (original,), {name: own})
    network.__class__ = changed
    assert not is_plainly_greedy(network)
    check(wrap(network, make_tokenizer(), "tiny", batch_size=3))


@pytest.mark.parametrize(
    "chosen",
    named(
        [
            {"stop_strings": ["a"]},
            {"token_healing": True},
            {"penalty_alpha": 0.6},
            {"dola_layers": "high"},
            {"bad_words_ids": []},
            {"force_words_ids": [[5]]},
            {"is_assistant": True},
        ]
    ),
)
def test_settings_that_do_not_work_are_named(llama: LanguageModel, chosen: dict[str, Any]) -> None:
    (name,) = chosen
    with configured(llama, chosen):
        with pytest.raises(ContrastError, match=rf"(?s)tiny cannot generate .*{name}.*json\."):
            llama.generate(PROMPTS, LIMIT)
        with pytest.raises(ContrastError, match=name):
            PlainEngine(llama).generate([(3, 4, 5)], [LIMIT])


@pytest.mark.parametrize(
    "chosen", named([{"num_beams": 2}, {"guidance_scale": 3.0}, {"prompt_lookup_num_tokens": 2}])
)
def test_measurements_of_hidden_states_need_no_settings(
    llama: LanguageModel, chosen: dict[str, Any]
) -> None:
    vectors = random_directions(llama, 1, 0).tensor[1:]
    residuals = llama.residuals(PROMPTS)
    moments = observe_outputs(llama, PROMPTS, vectors, LIMIT, {})
    with configured(llama, chosen):
        assert torch.equal(llama.residuals(PROMPTS), residuals)
        again = observe_outputs(llama, PROMPTS, vectors, LIMIT, {})
        assert llama.model.generation_config.to_dict().items() >= chosen.items()
    assert torch.equal(again.second, moments.second) and again.n_steps == moments.n_steps
