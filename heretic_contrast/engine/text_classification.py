# SPDX-License-Identifier: AGPL-3.0-or-later

"""Tiers by a text-classification model of the user's choice, instead of the one that comes with the plugin."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from ..errors import ContrastError
from ..identity import program_digest, reading_digest
from ..language_model import Batches
from ..settings import TextClassifierSettings
from ..tiers import coherence, linear, responses, text
from ..tiers.agreement import TIERS_OF_LABELS
from ..tiers.responses import Tier, classify_response
from ..tiers.text import strip_markup
from ..vectors import gpu_or_cpu
from .judge import JudgeModel, load_pretrained, loaded_judge


class TextClassificationBackend:
    """
    Gives a response the tier that a classifier's most probable label is mapped to.

    The model is any that `AutoModelForSequenceClassification` loads; code from its repository is never run. `labels` maps
    every label name of its configuration to a tier, unless the names say so themselves (`tiers.agreement.TIERS_OF_LABELS`).
    Most refusal classifiers read the response alone; with `with_prompt` the prompt is the first segment and the response the
    second. What exceeds the model's length is cut from the response's end, and from the prompt's where that is the longer one.

    Thinking blocks and special tokens are stripped first, and an empty response is REFUSE, as for the rules.

    Raises `ContrastError` when the model cannot be loaded, lacks weights of its head, has fewer than two labels or tiers, does not name
    all labels, or has others than `labels`.
    """

    def __init__(
        self,
        name: str,
        labels: Mapping[str, Tier] | None = None,
        with_prompt: bool = False,
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        self.name = name
        self.tokenizer, self.model, found = load_pretrained(
            AutoModelForSequenceClassification,
            name,
            "response classifier",
            "text-classification model",
        )
        if found["missing_keys"]:
            # They would be random numbers.
            raise ContrastError(
                f"The response classifier {name} has no weights for {', '.join(sorted(found['missing_keys']))}, so that it cannot "
                "classify: give a text-classification model."
            )
        # A refusal begins a response, which is cut from its end, whatever the tokenizer was saved with.
        self.tokenizer.truncation_side = "right"
        self.model.to(device)
        configuration = self.model.config
        if set(configuration.id2label) != set(range(configuration.num_labels)):
            raise ContrastError(
                f"The response classifier {name} numbers its labels {sorted(configuration.id2label)}: correct id2label in its "
                "config.json, which counts from 0."
            )
        names = [str(configuration.id2label[index]) for index in range(configuration.num_labels)]
        if len(names) < 2:
            raise ContrastError(
                f"The response classifier {name} has the one label {names}: give a model with two or more."
            )
        given = labels
        labels = labels or {
            label: TIERS_OF_LABELS[label.lower()]
            for label in names
            if label.lower() in TIERS_OF_LABELS
        }
        if set(names) != set(labels):
            problem = "which do not say their tiers: give that of each in text_classifier_labels"
            if given:
                problem = (
                    f"but tiers are given for {sorted(labels)}: map exactly the model's labels"
                )
            raise ContrastError(
                f"The response classifier {name} has the labels {sorted(names)}, {problem}."
            )
        self.tiers = [Tier(labels[label]) for label in names]
        if len(set(self.tiers)) < 2:
            raise ContrastError(
                f"All labels of the response classifier {name} have the tier {self.tiers[0].value}: give labels of different tiers in "
                "text_classifier_labels."
            )
        self.with_prompt = with_prompt
        # Without a padding token that both know, rows of different lengths cannot share a batch: causal classifiers read the label at
        # the last token that is not the configuration's.
        padding = self.tokenizer.pad_token_id
        is_known = padding is not None and padding == configuration.get_text_config().pad_token_id
        self.batch_size = batch_size if is_known else 1
        # A tokenizer that knows no limit states an absurd one. The model's own counts two positions too many in the
        # RoBERTa family, which numbers positions from 2.
        # Where there is no limit, it is negative in XLNet.
        positions = max(0, getattr(configuration, "max_position_embeddings", None) or 0)
        limit = min(self.tokenizer.model_max_length, 2**20)
        self.max_length = min(limit, positions - 2) if positions else limit

    def probabilities(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """
        Returns label probabilities, a Tensor of shape (n_responses, n_labels), float32 on the CPU.

        Raises `ContrastError` when the classifier computes something else than numbers.
        """

        pairs = [
            (prompt, strip_markup(response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

        def judge(part: slice) -> Tensor:
            segments = list(zip(*pairs[part], strict=True))
            encoded = self.tokenizer(
                *map(list, segments if self.with_prompt else segments[1:]),
                return_tensors="pt",
                padding=self.batch_size > 1,
                truncation="longest_first",
                max_length=self.max_length,
            ).to(self.model.device)
            with torch.inference_mode():
                found = self.model(**encoded).logits.float().softmax(dim=-1).cpu()
            if found.isnan().any():
                raise ContrastError(
                    f"The response classifier {self.name} computes something else than numbers: give another one."
                )
            return found

        nothing = torch.empty(0, len(self.tiers))
        return torch.cat([nothing, *Batches(self.batch_size).run(len(pairs), judge)])

    def classify_responses(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Tier]:
        pairs = list(zip(prompts, responses, strict=True))
        # A classifier whose tokenizer adds nothing could not read an empty one.
        said = [(prompt, text) for prompt, text in pairs if strip_markup(text)]
        found = self.probabilities([prompt for prompt, _ in said], [text for _, text in said])
        likeliest = iter(found.argmax(dim=-1).tolist())
        return [
            self.tiers[next(likeliest)] if strip_markup(text) else Tier.REFUSE for _, text in pairs
        ]

    def identity(self) -> list[Any]:
        """Returns what decides the verdicts: model and tokenizer, tiers and segments."""

        tiers = [tier.value for tier in self.tiers]
        return [*reading_digest(self.model, self.tokenizer), tiers, self.with_prompt]


@lru_cache(maxsize=1)
def _loaded(
    name: str, labels: tuple[tuple[str, str], ...], reads_prompt: bool
) -> TextClassificationBackend:
    tiers = {label: Tier(tier) for label, tier in labels}
    return TextClassificationBackend(name, tiers, with_prompt=reads_prompt, device=gpu_or_cpu())


ModelClassifier = TextClassificationBackend | JudgeModel

Classifier = Callable[[str, str], Tier] | ModelClassifier
"""What gives a response to a prompt its tier."""


def classify_all(
    classify: Classifier, prompts: Sequence[str], responses: Sequence[str]
) -> list[Tier]:
    """Tiers of responses. Raises what the classifier raises."""

    if isinstance(classify, ModelClassifier):
        return classify.classify_responses(prompts, responses)
    return list(map(classify, prompts, responses))


def judge_all(
    classify: Classifier,
    counted_tiers: Sequence[str],
    prompts: Sequence[str],
    responses: Sequence[str],
) -> tuple[list[Tier], list[float]]:
    """Tiers of responses, and how far each is counted: 0 or 1, or what a judge model takes for the probability."""

    if isinstance(classify, JudgeModel):
        found = classify.probabilities(prompts, responses)
        tiers = list(map(classify.tier, found))
        return tiers, found if "REFUSE" in counted_tiers else [1 - value for value in found]
    tiers = classify_all(classify, prompts, responses)
    return tiers, [float(tier.value in counted_tiers) for tier in tiers]


def classifier_of(settings: TextClassifierSettings) -> Classifier:
    """
    Returns the text classifier or judge model that settings name, loaded once, or the rules that come with the plugin.

    Raises `ContrastError` as these do.
    """

    if settings.judge_model is not None:
        return loaded_judge(settings.judge_model)
    if settings.text_classifier is None:
        return classify_response
    labels = tuple(sorted(settings.text_classifier_labels.items()))
    return _loaded(settings.text_classifier, labels, settings.text_classifier_reads_prompt)


def require_judge(settings: TextClassifierSettings, counted_tiers: Sequence[str]) -> None:
    """Raises `ContrastError` when a text classifier or judge model cannot be loaded, or cannot tell what is counted from what is not."""

    classifier = classifier_of(settings)
    if not isinstance(classifier, ModelClassifier):
        return
    tiers = {tier.value for tier in classifier.tiers}
    counted = tiers & set(counted_tiers)
    if not counted or counted == tiers:
        is_judge = settings.judge_model is not None
        remedy = "either REFUSE or COMPLY" if is_judge else "some of these tiers, and not all,"
        raise ContrastError(
            f"{settings.classifier_name} gives the tiers {', '.join(sorted(tiers))}, and {', '.join(counted_tiers)} count as "
            f"refusals, so that {'all' if counted else 'no'} responses would: give {remedy} in counted_tiers."
        )


def rules_digest(classify: Classifier) -> str:
    """Returns a digest of all that decides how responses are judged."""

    judge = classify.identity() if isinstance(classify, ModelClassifier) else classify
    rules = program_digest((responses, linear, text, coherence), judge)
    return f"{rules} {linear.numbers_digest()}"
