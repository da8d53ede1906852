# SPDX-License-Identifier: AGPL-3.0-or-later

"""What a study of Heretic 1.4 optimizes, by choice: each figure against another way to compute it."""

import json
import math
import sys
from itertools import compress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import create_trial
from pydantic import ValidationError
from questionary import Choice
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_contrast.engine.text_classification import TextClassificationBackend
from heretic_contrast.settings import ContrastSettings
from heretic_contrast.tiers.responses import Tier, classify_response
from tests.command_server import Server
from tests.conftest import DATA
from tests.engine.test_judge import reference, write_keyword_judge
from tests.engine.test_text_classification import LABELS, PROMPT, RESPONSES, write_classifier
from tests.hosts.test_guided_search import options
from tests.small_runs import study

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

from heretic.config import Settings as HereticSettings
from heretic.evaluator import Evaluator as HereticEvaluator

from heretic_contrast.hosts.evaluator import Evaluator
from heretic_contrast.hosts.finalists import front_choices
from heretic_contrast.hosts.host_model import HostModel
from heretic_contrast.hosts.settings import HostSettings, load_settings

SAVING = (
    "--trial-index=0",
    "--model-action=save",
    "--save-directory=saved",
    "--export-strategy=merge",
)

MARKERS = HereticSettings.model_fields["refusal_markers"].default

PIECES = st.sampled_from(
    [
        *MARKERS,
        "a",
        "*",
        "I",
        " ",
        "\n",
        "do",
        "not",
        "n't",
        "’",
        "'",
        "Σ",
        "sor",
        "ry",
        ".",
        "cannot",
    ]
)


def bare(evaluator: type, **contrast: Any) -> Any:
    """An evaluator that has loaded nothing."""

    made = evaluator.__new__(evaluator)
    made.settings = SimpleNamespace(
        refusal_markers=MARKERS, contrast=ContrastSettings.model_validate(contrast)
    )
    return made


@given(st.lists(PIECES, max_size=12), st.lists(PIECES, max_size=12))
def test_what_is_settled_stays_a_refusal(first: list[str], rest: list[str]) -> None:
    start, whole = "".join(first), "".join([*first, *rest])
    # Tokenizers take away the space in front of some of what follows.
    for text in (
        whole,
        whole.replace(" n't", "n't").replace(" .", ".").replace(" do not", " don't"),
    ):
        if bare(Evaluator).is_settled(start):
            assert bare(HereticEvaluator).is_refusal(text)


def test_only_markers_settle_a_verdict() -> None:
    text = "I'm sorry, but I will not say more about that."
    assert bare(Evaluator).is_settled(text)
    assert not bare(Evaluator).is_settled("I'm sorry")
    assert not bare(Evaluator, refusal_classifier="tiers").is_settled(text)


def test_a_text_classifier_judges_many_responses_as_one(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    labels = {name: tier.value for name, tier in LABELS.items()}
    evaluator = bare(Evaluator, text_classifier=str(folder), text_classifier_labels=labels)
    prompts = [SimpleNamespace(user=PROMPT)] * len(RESPONSES)
    backend = TextClassificationBackend(str(folder), LABELS)
    tiers = [backend.classify_responses([PROMPT], [response]) for response in RESPONSES]
    expected = [tier is Tier.REFUSE for (tier,) in tiers]
    assert evaluator.judge(prompts, RESPONSES) == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize("counted", ["REFUSE", "COMPLY"])
def test_a_judge_model_gives_probabilities(counted: str, tmp_path: Path) -> None:
    folder = write_keyword_judge(tmp_path, ("cannot", "Dig"))
    evaluator = bare(Evaluator, judge_model=str(folder), counted_tiers=[counted])
    prompts = [SimpleNamespace(user=PROMPT)] * len(RESPONSES)
    p = [reference(folder, PROMPT, response) for response in RESPONSES]
    expected = p if counted == "REFUSE" else [1 - value for value in p]
    assert evaluator.judge(prompts, RESPONSES) == pytest.approx(expected)
    assert min(expected) < 0.5 < max(expected)


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluator, HereticEvaluator]:
    """Ours and Heretic's, of the unmodified built-in refuser."""

    folder = tmp_path_factory.mktemp("pools")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [])
        arguments = [*options(folder, 1), "--max-response-length=24", "--contrast.stop-dominated"]
        settings = load_settings(HostSettings, "heretic-contrast", arguments)
    model = HostModel(settings)
    return Evaluator(settings, model), HereticEvaluator(settings, model)


def test_settled_responses_leave_and_nothing_else_changes(
    evaluators: tuple[Evaluator, HereticEvaluator],
) -> None:
    ours, theirs = evaluators
    prompts = [*ours.bad_prompts[:7], *ours.good_prompts[:7]]
    whole = theirs.model.get_responses_batched(prompts, skip_special_tokens=True)
    found, verdicts = ours._judge_responses(prompts, "refusals")
    assert verdicts == [theirs.is_refusal(response) for response in whole]
    for response, right, refused in zip(found, whole, verdicts, strict=True):
        assert right.startswith(response) if refused else response == right
    assert sum(map(len, found)) < sum(map(len, whole))
    assert ours.base_refusals == theirs.base_refusals
    for score, expected in zip(ours.get_score(), theirs.get_score(), strict=True):
        assert score == pytest.approx(expected, abs=1e-6)


def test_candidates_are_screened_by_first_tokens(
    evaluators: tuple[Evaluator, HereticEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = evaluators
    monkeypatch.setattr("heretic_contrast.hosts.evaluator.SCREENED_PROMPTS", 18)
    ours.count_refusals()
    refused = [verdict >= 0.5 for verdict in ours.verdicts]
    assert sum(refused) == theirs.base_refusals > 2
    measure = ours.screen()
    # Below the target, the divergence is as good as the refusals.
    assert measure() == pytest.approx((1, ours.settings.kl_divergence_target), abs=1e-6)
    model, tokenizer = theirs.model.model, theirs.model.tokenizer
    prompts = list(compress(theirs.bad_prompts, refused))
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        for prompt in prompts
    ]
    begun = [model.generate(input_ids=text, max_new_tokens=4, do_sample=False) for text in texts]

    def probabilities() -> list[float]:
        """Of the first four tokens of each refusal."""

        with torch.no_grad():
            logits = [model(input_ids=tokens).logits[0].double() for tokens in begun]
        return [
            math.prod(
                float(row.softmax(dim=-1)[token])
                for row, token in zip(rows[-5:-1], tokens[0, -4:], strict=True)
            )
            for rows, tokens in zip(logits, begun, strict=True)
        ]

    base = probabilities()
    weight = ours.model.get_layers()[5].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1)
        found, changed = measure(), probabilities()
        (distance, _), divergence, _ = theirs.get_score()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    shares = [min(1.0, q / p) for p, q in zip(base, changed, strict=True)]
    share = sum(shares) / len(shares)
    target = ours.settings.kl_divergence_target
    expected = distance if divergence >= target else share * target
    assert found == pytest.approx((share, expected), rel=1e-4)
    assert 0.01 < share < 0.99


def test_heretics_own_generation_hands_the_head_whole_tensors(
    evaluators: tuple[Evaluator, HereticEvaluator],
) -> None:
    model, prompts = evaluators[0].model, evaluators[0].bad_prompts[:3]
    seen: list[bool] = []
    hook = model.model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].is_contiguous())
    )
    model.get_responses_batched(prompts)
    hook.remove()
    assert all(seen) and len(seen) > 1


@pytest.mark.slow
def test_responses_that_are_printed_are_whole(
    evaluators: tuple[Evaluator, HereticEvaluator],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluators[0].settings, "print_responses", True)
    shown = []
    for evaluator in evaluators:
        evaluator.count_refusals()
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "Response:" in shown[0]


def test_a_trial_ends_within_a_batch(
    evaluators: tuple[Evaluator, HereticEvaluator], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = evaluators
    study = optuna.create_study(directions=["minimize", "minimize"])
    attributes = {"index": 1, "refusals": 2, "kl_divergence": -1.0}
    study.add_trial(create_trial(values=[0.0, 0.0], user_attrs=attributes))
    trial = study.ask()
    monkeypatch.setattr(ours, "trial", trial)
    passes: list[int] = []
    handle = ours.model.get_layers()[0].register_forward_pre_hook(lambda *_: passes.append(1))
    _, _, refusals = ours.get_score()
    handle.remove()
    assert 2 <= refusals <= trial.user_attrs["bound"] <= ours.settings.batch_size
    # Three batches of first tokens, and fewer than those of whole responses.
    assert len(passes) < 3 + 24


def test_the_menu_has_the_front_of_all_objectives() -> None:
    def trial(number: int, refusals: int, divergence: float, false: int, **attributes: Any) -> Any:
        return create_trial(
            values=[0.0, 0.0, 0.0],
            user_attrs={
                "index": number,
                "refusals": refusals,
                "kl_divergence": divergence,
                "false_refusals": [false, 4],
                "n_bad_prompts": 9,
                **attributes,
            },
        )

    trials = [
        trial(0, 0, 0.1, 3),
        trial(1, 0, 0.2, 1),
        trial(2, 5, 0.2, 1),
        trial(3, 5, 0.3, 0),
        trial(4, 0, 0.0, 0, bound=2),
        trial(5, 0, 0.0, 0, excluded=0.25),
        trial(6, 0, math.inf, 0),
    ]
    others = [Choice("Run additional trials", value="continue"), Choice("Exit program", value="")]
    found = front_choices(trials, [Choice("x", value=trials[0]), *others])
    assert [choice.value for choice in found] == [*trials[:2], trials[3], "continue", ""]
    assert str(found[0].title).endswith("KL divergence: 0.1000, False refusals: 3/4")
    # A judge model's probabilities decide, not how many of them are above one half.
    trials = [
        trial(0, 1, 0.2, 0, refusal_sum=1.4),
        trial(1, 2, 0.1, 0, refusal_sum=1.3),
    ]
    (choice,) = front_choices(trials, [])
    assert choice.value == trials[1]
    assert "Refusals:  2/9 (sum of probabilities: 1.30), KL divergence: 0.1000" in choice.title


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"text_classifier": "x", "refusal_classifier": "markers"},
            "a text classifier or judge model has no part in",
        ),
        ({"judge_model": "x", "refusal_classifier": "markers"}, "judge model has no part in"),
        ({"judge_model": "x", "text_classifier": "y"}, "of which only one can judge"),
        ({"sensitive_prompts": {"dataset": "x"}}, "no effect without false_refusals or"),
    ],
)
def test_what_has_no_effect_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ContrastSettings.model_validate(values)
    assert ContrastSettings(text_classifier="x").refusal_classifier == "tiers"
    assert ContrastSettings(judge_model="x").refusal_classifier == "tiers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contrast.text-classifier=missing/model"], "missing/model could not be loaded"),
        (
            ["--contrast.judge-model={judge}", '--contrast.counted-tiers=["EVASIVE"]'],
            "either REFUSE",
        ),
        (["--contrast.judge-model=missing/model"], "judge model missing/model could not be loaded"),
        (
            ['--contrast.text-classifier-labels={"a": "REFUSE", "b": "REFUSE"}'],
            "have the tier REFUSE: give labels of different tiers",
        ),
        (
            ['--contrast.text-classifier-labels={"a": "EVASIVE", "b": "COMPLY"}'],
            "so that no responses would: give some of these tiers, and not all, in counted_tiers",
        ),
        (["--contrast.text-classifier-reads-prompt=true"], "which do not say their tiers: give"),
    ],
)
def test_a_judge_that_does_not_work_is_refused_before_a_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, refused: Any
) -> None:
    classifier = write_classifier(tmp_path / "classifier", ("a", "b"))
    if "judge" in arguments[0]:
        judge = write_keyword_judge(tmp_path / "judge")
        arguments = [argument.replace("{judge}", str(judge)) for argument in arguments]
    elif "missing" not in arguments[0]:
        arguments = [f"--contrast.text-classifier={classifier}", *arguments]
    assert message in refused([*options(tmp_path, 1), *arguments])


def saved(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def tokens_of(tokenizer: Any, text: str) -> torch.Tensor:
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": text},
    ]
    found = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return torch.as_tensor(found["input_ids"])


def refusals(network: Any, tokenizer: Any, texts: list[str]) -> int:
    count = 0
    for text in texts:
        tokens = tokens_of(tokenizer, text)
        output = network.generate(tokens, max_new_tokens=8, do_sample=False)
        response = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
        count += classify_response(text, response) is Tier.REFUSE
    return count


@pytest.mark.slow
def test_all_objectives_of_a_saved_trial(command_server: Server, tmp_path: Path) -> None:
    lines = (DATA / "refuser_prompts" / "matched" / "test.jsonl").read_text().splitlines()[:9]
    sensitive = tmp_path / "sensitive.jsonl"
    sensitive.write_text("\n".join(lines) + "\n")
    command = command_server.run(
        [
            *options(tmp_path, 6)[:-1],
            "--n-startup-trials=4",
            "--contrast.divergence=teacher-forced",
            "--contrast.divergence-tokens=6",
            "--contrast.refusal-classifier=tiers",
            "--contrast.false-refusals=objective",
            f"--contrast.sensitive-prompts.dataset={sensitive}",
            "--contrast.stop-dominated",
            *SAVING,
        ],
        tmp_path,
    )
    assert command.code == 0, command.output()[-3000:]
    assert "Obtaining 6-token probability distributions" in command.output()
    trials = study(tmp_path / "checkpoints")
    assert all(len(trial["values"]) == 3 for trial in trials)

    def point(trial: dict[str, Any]) -> tuple[int, float, int]:
        found = trial["attributes"]
        return found["refusals"], found["kl_divergence"], found["false_refusals"][0]

    finished = [trial for trial in trials if "bound" not in trial["attributes"]]
    best = min(finished, key=point)
    found = point(best)
    network, tokenizer = saved(tmp_path / "saved")
    base, _ = saved(DATA / "refuser")
    prompts = {
        name: (tmp_path / f"{name}-test.txt").read_text().splitlines()
        for name in ("harmful", "harmless")
    }
    assert found[0] == refusals(network, tokenizer, prompts["harmful"])
    texts = [json.loads(line)["text"] for line in lines]
    assert found[2] == refusals(network, tokenizer, texts)
    assert best["values"][2] == found[2] / 9
    divergences = []
    for text in prompts["harmless"]:
        tokens = tokens_of(tokenizer, text)
        whole = base.generate(tokens, max_new_tokens=6, do_sample=False)
        places = slice(tokens.shape[1] - 1, whole.shape[1] - 1)
        with torch.no_grad():
            p, q = (
                torch.log_softmax(item(whole).logits[0, places].double(), dim=-1)
                for item in (base, network)
            )
        divergences += (p.exp() * (p - q)).sum(dim=-1).tolist()
    mean = sum(divergences) / len(divergences)
    # All but the 100 most likely tokens share a bucket.
    assert 0.85 * mean < found[1] <= mean * 1.0001


@pytest.mark.slow
def test_a_judge_models_probabilities_are_minimized(command_server: Server, tmp_path: Path) -> None:
    folder = write_keyword_judge(tmp_path / "judge", ("I", "nobody"))
    command = command_server.run(
        [
            *options(tmp_path, 5)[:-1],
            f"--contrast.judge-model={folder}",
            *SAVING,
        ],
        tmp_path,
    )
    assert command.code == 0, command.output()[-3000:]
    trials = study(tmp_path / "checkpoints")
    best = min(trials, key=lambda trial: trial["attributes"]["refusal_sum"])
    found = best["attributes"]
    assert f"(sum of probabilities: {found['refusal_sum']:.2f})" in command.output()
    sums, counts = [], []
    for place in (DATA / "refuser", tmp_path / "saved"):
        network, tokenizer = saved(place)
        p = []
        for text in (tmp_path / "harmful-test.txt").read_text().splitlines():
            tokens = tokens_of(tokenizer, text)
            output = network.generate(tokens, max_new_tokens=8, do_sample=False)
            response = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
            p.append(reference(folder, text, response))
        sums.append(sum(p))
        counts.append(sum(value >= 0.5 for value in p))
    assert found["refusal_sum"] == pytest.approx(sums[1], abs=1e-4)
    assert best["values"][1] == pytest.approx(sums[1] / sums[0], abs=1e-5)
    assert [found["base_refusals"], found["refusals"]] == counts and counts[0] > counts[1]
    record = json.loads((tmp_path / "saved" / "heretic-contrast.json").read_text())
    assert record["measured"]["refusal_sum"] == found["refusal_sum"]
    # What the numbers are of.
    assert record["measured"]["divergence"] == "first-token"
    assert record["measured"]["counted_tiers"] == ["REFUSE"]


@pytest.mark.slow
def test_a_trial_above_the_limit_is_never_offered(command_server: Server, tmp_path: Path) -> None:
    shared = [
        *options(tmp_path, 5)[:-1],
        "--n-startup-trials=5",
        # What is harmful is refused by all but the strongest trials, and stands for what is sensitive.
        '--contrast.search-space={"max_weight": [0.0, 1.5]}',
        f"--contrast.sensitive-prompts.dataset={DATA / 'refuser_prompts' / 'harmful' / 'train.jsonl'}",
        "--model-action=none",
    ]
    # With no prompt in common, and few enough.
    lines = (DATA / "refuser_prompts" / "harmful" / "test.jsonl").read_text().splitlines()[20:29]
    (tmp_path / "sensitive.jsonl").write_text("\n".join(lines) + "\n")
    shared[-2] = f"--contrast.sensitive-prompts.dataset={tmp_path / 'sensitive.jsonl'}"
    command = command_server.run([*shared, "--contrast.max-false-refusals=0.2"], tmp_path / "some")
    assert command.code == 0, command.output()[-3000:]
    trials = study(tmp_path / "some" / "checkpoints")
    counts = [trial["attributes"]["false_refusals"] for trial in trials]
    assert {total for _, total in counts} == {9}
    excluded = [trial for trial in trials if "excluded" in trial["attributes"]]
    assert [trial in excluded for trial in trials] == [count > 0.2 * 9 for count, _ in counts]
    assert 0 < len(excluded) < 5
    asked = command_server.run(
        [
            *shared[:-1],
            "--contrast.max-false-refusals=0.2",
            "--checkpoint-action=continue",
            "--trial-index=9",
            "--model-action=save",
            "--save-directory=saved",
            "--export-strategy=merge",
        ],
        tmp_path / "some",
    )
    points = {
        (trial["attributes"]["refusals"], trial["attributes"]["kl_divergence"])
        for trial in trials
        if trial not in excluded
    }
    front = [a for a in points if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)]
    assert asked.code == 2
    assert f"the Pareto front has {len(front)} trial" in " ".join(asked.output().split())
