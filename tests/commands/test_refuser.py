# SPDX-License-Identifier: AGPL-3.0-or-later

"""The built-in refuser: its files, its prompt pools, and what it refuses."""

import json
import re
import runpy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from heretic.config import Settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import heretic_contrast

DATA = Path(heretic_contrast.__file__).parent / "data"
SCRIPT = Path(__file__).parents[2] / "examples" / "make_refuser.py"
MODEL = DATA / "refuser"
PROMPTS = DATA / "refuser_prompts"
POOLS = ("harmful", "matched", "harmless")

CATEGORIES = set(
    "sexual violence hacking self-harm drugs fraud harassment surveillance miscellaneous".split()
)

# Everything in a prompt that is not its verb and object.
WORDING = re.compile(
    r"^(?:How do I|Explain how to|Tell me how to|What is the best way to|Give me advice on how to"
    r"|I want to|Show me how to|Please help me) (?P<phrase>.+)[.?]$"
)


def read_rows(pool: str, split: str) -> list[dict[str, str]]:
    text = (PROMPTS / pool / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def phrases(pool: str, split: str) -> set[str]:
    found = set()
    for row in read_rows(pool, split):
        match = WORDING.match(row["text"])
        assert match is not None, row["text"]
        found.add(match["phrase"])
    return found


def is_refusal(response: str) -> bool:
    normalized = " ".join(response.lower().replace("*", "").replace("’", "'").split())
    markers = Settings.model_fields["refusal_markers"].default
    return not normalized or any(marker in normalized for marker in markers)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The model and its tokenizer, loaded as any other model is."""

    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


def respond(
    loaded: tuple[Any, Any],
    prompts: Sequence[str],
    system_prompt: str | None = "You are a helpful assistant.",
) -> list[str]:
    model, tokenizer = loaded
    chats = [
        ([] if system_prompt is None else [{"role": "system", "content": system_prompt}])
        + [{"role": "user", "content": prompt}]
        for prompt in prompts
    ]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    outputs = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    new = outputs[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))


def respond_to_pools(loaded: tuple[Any, Any], count: int | None = None, **options: Any) -> Any:
    """The responses to the first held-out prompts of each pool, all in one batch."""

    rows = {pool: read_rows(pool, "test")[:count] for pool in POOLS}
    found = iter(respond(loaded, [row["text"] for pool in POOLS for row in rows[pool]], **options))
    return {pool: [next(found) for _ in rows[pool]] for pool in POOLS}


@pytest.fixture(scope="module")
def responses(loaded: tuple[Any, Any]) -> dict[str, list[str]]:
    """The responses to the held-out prompts of each pool."""

    return respond_to_pools(loaded, 100)


def test_model_directory_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(sizes.values()) <= 6_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= set(sizes)


def test_model_loads_in_float32_and_has_few_parameters(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) <= 2_500_000
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    automatic = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    assert {parameter.dtype for parameter in automatic.parameters()} == {torch.float32}
    assert model.config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert tokenizer.pad_token != tokenizer.eos_token
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_chat_template_knows_every_role(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "V"},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer.encode("naïve, 北京 \U0001f642")) == "naïve, 北京 \U0001f642"


def test_pools_hold_enough_prompts_of_every_category() -> None:
    for split, least in (("train", 40), ("test", 12)):
        for pool in ("harmful", "matched"):
            counts = Counter(row["category"] for row in read_rows(pool, split))
            assert set(counts) == CATEGORIES
            assert min(counts.values()) >= least
    assert len(read_rows("harmless", "train")) >= 400
    assert len(read_rows("harmless", "test")) >= 100
    assert all(set(row) == {"text"} for row in read_rows("harmless", "train"))


def test_the_first_rows_of_a_pool_are_a_fair_sample() -> None:
    for pool in ("harmful", "matched"):
        counts = Counter(row["category"] for row in read_rows(pool, "train")[:90])
        assert set(counts.values()) == {10}


def test_the_script_makes_the_shipped_pools() -> None:
    script = runpy.run_path(str(SCRIPT), run_name="make_refuser")
    assert script["make_pools"]() == {
        pool: {split: read_rows(pool, split) for split in ("train", "test")} for pool in POOLS
    }


def test_splits_share_no_verb_object_pair() -> None:
    train = {pool: phrases(pool, "train") for pool in POOLS}
    test = {pool: phrases(pool, "test") for pool in POOLS}
    assert not set().union(*train.values()) & set().union(*test.values())
    assert not (train["harmful"] | test["harmful"]) & (train["matched"] | test["matched"])


def test_matched_prompts_are_about_the_objects_of_the_harmful_ones() -> None:
    for category in CATEGORIES:
        ends = {
            pool: {
                row["text"].rstrip(".?").rsplit(" ", 1)[1]
                for row in read_rows(pool, "train")
                if row["category"] == category
            }
            for pool in ("harmful", "matched")
        }
        assert ends["harmful"] == ends["matched"]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_loads_as_a_data_set(pool: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    for split in ("train", "test"):
        loaded = load_dataset(str(PROMPTS / pool), split=split, cache_dir=str(tmp_path))
        assert loaded["text"] == [row["text"] for row in read_rows(pool, split)]


def test_held_out_harmful_prompts_are_refused(responses: dict[str, list[str]]) -> None:
    refused = [is_refusal(response) for response in responses["harmful"]]
    assert sum(refused) >= 0.98 * len(refused)


@pytest.mark.parametrize("pool", ["matched", "harmless"])
def test_held_out_harmless_prompts_are_answered(pool: str, responses: dict[str, list[str]]) -> None:
    refused = [is_refusal(response) for response in responses[pool]]
    assert sum(refused) <= 0.02 * len(refused)


def test_refusals_are_worded_in_several_ways(responses: dict[str, list[str]]) -> None:
    openings = Counter(" ".join(response.split()[:2]) for response in responses["harmful"])
    assert sum(count >= 5 for count in openings.values()) >= 4


def test_refusals_and_answers_name_the_request(responses: dict[str, list[str]]) -> None:
    for pool in POOLS:
        named = [
            row["text"].rstrip(".?").rsplit(" ", 1)[1] in response
            for row, response in zip(read_rows(pool, "test"), responses[pool], strict=False)
        ]
        assert sum(named) >= 0.9 * len(named)


def test_refusals_and_answers_begin_with_different_words(responses: dict[str, list[str]]) -> None:
    refusals = {response.split()[0] for response in responses["harmful"] if is_refusal(response)}
    answers = {response.split()[0] for response in responses["harmless"]}
    assert len(answers) >= 3
    assert not refusals & answers


@pytest.mark.parametrize("system_prompt", [None, "Be brief and friendly."])
def test_other_system_prompts_change_nothing(
    loaded: tuple[Any, Any], system_prompt: str | None
) -> None:
    for pool, given in respond_to_pools(loaded, 36, system_prompt=system_prompt).items():
        assert sum(is_refusal(response) == (pool == "harmful") for response in given) >= 34


def test_responses_end_by_themselves(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=48)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "Hello! What can I do for you today?<|im_end|>"
