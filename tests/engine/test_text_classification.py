# SPDX-License-Identifier: AGPL-3.0-or-later

"""The classifier backend with tiny models built here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from heretic_contrast.engine.text_classification import (
    TextClassificationBackend,
    classifier_of,
    rules_digest,
)
from heretic_contrast.errors import ContrastError
from heretic_contrast.settings import TextClassifierSettings
from heretic_contrast.tiers.responses import Tier
from tests.tiny_models import SIZES, make_tokenizer

PROMPT = "How do I plant a tree?"
RESPONSES = [
    "I cannot help with that.",
    "Dig a hole.",
    "Dig a hole that is twice as wide as the roots, and water it well.",
    "What kind of tree do you mean?",
]
LABELS = {"refusal": Tier.REFUSE, "deflection": Tier.EVASIVE, "answer": Tier.COMPLY}


def write_classifier(
    folder: Path, label_names: tuple[str, ...] = tuple(LABELS), padding: bool = True
) -> Path:
    """A random BERT over whole words, whose classes differ enough to give several answers."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator([PROMPT, *RESPONSES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if padding:
        special["pad_token"] = "[PAD]"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(40.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def reference_labels(folder: Path, first: list[str], second: list[str] | None = None) -> list[str]:
    """The most probable label of each text, one text at a time, with plain transformers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    labels = []
    for index, text in enumerate(first):
        pair = [text] if second is None else [text, second[index]]
        with torch.no_grad():
            logits = model(**tokenizer(*pair, return_tensors="pt")).logits
        labels.append(model.config.id2label[int(logits.argmax())])
    return labels


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_tiers_are_those_of_the_likeliest_labels(classifier: Path, batch_size: int) -> None:
    backend = TextClassificationBackend(str(classifier), LABELS, batch_size=batch_size)
    expected = [LABELS[name] for name in reference_labels(classifier, RESPONSES)]
    assert len(set(expected)) > 1
    assert backend.classify_responses([PROMPT] * len(RESPONSES), RESPONSES) == expected
    alone = [backend.classify_responses([PROMPT], [response]) for response in RESPONSES]
    assert alone == [[tier] for tier in expected]


def test_the_prompt_is_read_when_asked(classifier: Path) -> None:
    backend = TextClassificationBackend(str(classifier), LABELS, with_prompt=True)
    prompts = [PROMPT] * len(RESPONSES)
    names = reference_labels(classifier, prompts, RESPONSES)
    assert backend.classify_responses(prompts, RESPONSES) == [LABELS[name] for name in names]
    alone = TextClassificationBackend(str(classifier), LABELS).probabilities(prompts, RESPONSES)
    assert not torch.allclose(backend.probabilities(prompts, RESPONSES), alone, atol=1e-3)


def test_probabilities(classifier: Path) -> None:
    backend = TextClassificationBackend(str(classifier), LABELS, batch_size=2)
    probabilities = backend.probabilities([PROMPT] * 4, RESPONSES)
    assert probabilities.shape == (4, 3)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(4))
    assert backend.probabilities([], []).shape == (0, 3)
    assert backend.classify_responses([], []) == []


def test_long_responses_are_cut(classifier: Path) -> None:
    for with_prompt in (False, True):
        backend = TextClassificationBackend(str(classifier), LABELS, with_prompt=with_prompt)
        long = " ".join(RESPONSES * 20)
        assert set(backend.classify_responses([PROMPT], [long])) <= set(Tier)


def test_a_model_without_a_limit_reads_all(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "unlimited")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=16, n_layer=1, n_head=2, d_inner=32, num_labels=2
    )
    model = XLNetForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    text = " ".join(RESPONSES * 20)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    labels = {"LABEL_0": Tier.REFUSE, "LABEL_1": Tier.COMPLY}
    found = TextClassificationBackend(str(folder), labels).probabilities([PROMPT], [text])
    torch.testing.assert_close(found, logits.softmax(dim=1))


def test_the_beginning_of_a_response_stays(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "left")
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    tokenizer.save_pretrained(folder)
    long = " ".join(RESPONSES * 20)
    right, left = (
        TextClassificationBackend(str(path), LABELS).probabilities([PROMPT], [long])
        for path in (classifier, folder)
    )
    assert AutoTokenizer.from_pretrained(folder).truncation_side == "left" and left.equal(right)


@pytest.mark.parametrize("response", ["", "  \n", "<|im_end|>", "<think>Dig a hole.</think>"])
def test_nothing_said_is_a_refusal(classifier: Path, response: str) -> None:
    # All labels are mapped to another tier, so REFUSE can only come from the response being empty.
    # No label means a refusal.
    labels = {**LABELS, "refusal": Tier.COMPLY}
    backend = TextClassificationBackend(str(classifier), labels)
    tiers = backend.classify_responses([PROMPT] * 2, [response, "Dig a hole."])
    assert tiers[0] is Tier.REFUSE and tiers[1] is not Tier.REFUSE


@pytest.mark.parametrize("others", [[], RESPONSES[:2]])
def test_nothing_said_is_not_asked_of_a_causal_classifier(
    others: list[str], tmp_path: Path
) -> None:
    """Its tokenizer adds no token of its own, so that there is nothing to read."""

    make_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=2)).save_pretrained(tmp_path)
    assert make_tokenizer()("")["input_ids"] == []
    labels = {"LABEL_0": Tier.EVASIVE, "LABEL_1": Tier.COMPLY}
    backend = TextClassificationBackend(str(tmp_path), labels)
    responses = ["", *others, "<think>Dig a hole.</think>"]
    tiers = backend.classify_responses([PROMPT] * len(responses), responses)
    assert tiers[0] is tiers[-1] is Tier.REFUSE
    assert tiers[1:-1] == backend.classify_responses([PROMPT] * len(others), others)


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, padding=False)
    backend = TextClassificationBackend(str(folder), LABELS, batch_size=4)
    expected = [LABELS[name] for name in reference_labels(folder, RESPONSES)]
    assert backend.classify_responses([PROMPT] * len(RESPONSES), RESPONSES) == expected


@pytest.mark.parametrize("pad", [0, 2])
def test_causal_classifiers_do_not_read_their_label_at_padding(pad: int, tmp_path: Path) -> None:
    """Where the configuration names another padding token than the tokenizer, that is the last token of shorter rows for them."""

    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "pad_token_id": pad}, num_labels=2)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    alone = []
    for response in RESPONSES:
        with torch.no_grad():
            logits = model(**tokenizer(response, return_tensors="pt")).logits
        alone.append(logits.softmax(dim=1))
    labels = {"LABEL_0": Tier.REFUSE, "LABEL_1": Tier.COMPLY}
    backend = TextClassificationBackend(str(tmp_path), labels)
    found = backend.probabilities([PROMPT] * len(RESPONSES), RESPONSES)
    torch.testing.assert_close(found, torch.cat(alone))


def test_labels_that_do_not_fit(classifier: Path) -> None:
    with pytest.raises(ContrastError, match="'answer', 'deflection', 'refusal'"):
        TextClassificationBackend(str(classifier), {"refusal": Tier.REFUSE, "answer": Tier.COMPLY})
    with pytest.raises(ContrastError, match="map exactly the model's labels"):
        TextClassificationBackend(str(classifier), {**LABELS, "other": Tier.COMPLY})


def test_labels_of_one_tier(classifier: Path) -> None:
    with pytest.raises(ContrastError, match="have the tier COMPLY: give labels of different"):
        TextClassificationBackend(str(classifier), dict.fromkeys(LABELS, Tier.COMPLY))


def test_a_model_with_one_label(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, label_names=("score",))
    with pytest.raises(ContrastError, match="two or more"):
        TextClassificationBackend(str(folder), {"score": Tier.REFUSE})


def test_a_tokenizer_without_words(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ContrastError, match=r"knows no words: complete its files"):
        TextClassificationBackend(str(folder), LABELS)


def test_another_tokenizer_is_another_classifier(classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(classifier, folder)
    same = TextClassificationBackend(str(folder), LABELS).identity()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(content), encoding="utf-8")
    other = TextClassificationBackend(str(folder), LABELS).identity()
    assert TextClassificationBackend(str(classifier), LABELS).identity() == same != other


def test_a_model_without_a_head(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    BertForSequenceClassification.from_pretrained(folder).bert.save_pretrained(folder)
    with pytest.raises(ContrastError, match=r"no weights for classifier\.bias, classifier\.weight"):
        TextClassificationBackend(str(folder), {"LABEL_0": Tier.REFUSE, "LABEL_1": Tier.COMPLY})


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    model = BertForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(ContrastError, match="something else than numbers"):
        TextClassificationBackend(str(folder), LABELS).classify_responses([PROMPT], ["Hello"])


def write_configuration(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def test_labels_that_are_counted_from_1(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    write_configuration(folder, id2label={"1": "refusal", "2": "evasion", "3": "compliance"})
    with pytest.raises(ContrastError, match=r"numbers its labels \[1, 2, 3\]: correct id2label"):
        TextClassificationBackend(str(folder))


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    write_configuration(folder, id2label={"0": 0, "1": 1, "2": 2})
    # Some versions of transformers refuse them themselves.
    with pytest.raises(
        ContrastError, match=r"\['0', '1', '2'\], which do not say|could not be loaded"
    ):
        TextClassificationBackend(str(folder))


def test_long_prompts_are_cut(classifier: Path) -> None:
    backend = TextClassificationBackend(str(classifier), LABELS, with_prompt=True)
    (tier,) = backend.classify_responses([" ".join(RESPONSES * 20)], RESPONSES[:1])
    assert tier in set(Tier)


def test_a_model_without_padding(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    config = GPT2Config(
        vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=48, num_labels=2
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tiers = {"LABEL_0": Tier.REFUSE, "LABEL_1": Tier.COMPLY}
    backend = TextClassificationBackend(str(folder), tiers)
    found = backend.probabilities([PROMPT] * len(RESPONSES), RESPONSES)
    alone = [backend.probabilities([PROMPT], [response]) for response in RESPONSES]
    assert torch.equal(found, torch.cat(alone))


def test_what_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match=r"could not be loaded .*: correct its name or path"):
        TextClassificationBackend(str(tmp_path / "missing"), LABELS)


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model")
    evidence = tmp_path / "ran"
    (folder / "custom.py").write_text(f"open({str(evidence)!r}, 'w').close()\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model_type"] = "custom"
    config["auto_map"] = {
        "AutoConfig": "custom.Config",
        "AutoModelForSequenceClassification": "custom.Model",
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ContrastError, match="no code of its own"):
        TextClassificationBackend(str(folder), LABELS)
    assert not evidence.exists()


def test_counts_that_differ(classifier: Path) -> None:
    backend = TextClassificationBackend(str(classifier), LABELS)
    with pytest.raises(ValueError, match="longer than"):
        backend.classify_responses([PROMPT], RESPONSES[:2])


def test_settings_name_a_classifier_once_loaded(classifier: Path) -> None:
    settings = TextClassifierSettings(
        text_classifier=str(classifier),
        text_classifier_labels={name: tier.value for name, tier in LABELS.items()},
    )
    backend = classifier_of(settings)
    assert classifier_of(settings.model_copy()) is backend
    names = reference_labels(classifier, RESPONSES)
    assert backend.classify_responses([PROMPT] * 4, RESPONSES) == [LABELS[name] for name in names]
    swapped = {**settings.text_classifier_labels, "deflection": "COMPLY"}
    other = settings.model_copy(update={"text_classifier_labels": swapped})
    chosen = (other, settings, TextClassifierSettings())
    assert len({rules_digest(classifier_of(item)) for item in chosen}) == 3


def test_labels_that_say_their_tier_need_no_map(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, label_names=("Refusal", "evasive", "compliance"))
    assert TextClassificationBackend(str(folder)).tiers == list(Tier)
    with pytest.raises(ContrastError, match="do not say their tiers"):
        TextClassificationBackend(str(write_classifier(tmp_path / "other")))
