# SPDX-License-Identifier: AGPL-3.0-or-later

"""Tiers by a text-classification model of the user's choice, instead of the one that comes with the plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from heretic_contrast.engine.judge import JudgeModel, load_pretrained, loaded_judge
from heretic_contrast.errors import ContrastError
from heretic_contrast.identity import weights_digest
from heretic_contrast.settings import TextClassifierSettings
from heretic_contrast.tiers.agreement import TIERS_OF_LABELS
from heretic_contrast.tiers.responses import Tier
from heretic_contrast.tiers.text import strip_markup


class TextClassificationBackend:
    """
    Gives a response the tier that a classifier's most probable label is mapped to.

    The model is any that `AutoModelForSequenceClassification` loads; code from its repository is never run. `labels`
    maps every label name of the model's configuration to a tier, so a model that knows only refused or not gives
    REFUSE and COMPLY; it may be left out where the names say so themselves (`tiers.agreement.TIERS_OF_LABELS`). Most refusal classifiers read the response alone; with `with_prompt` the prompt is the first
    segment and the response the second. What exceeds the model's length is cut from the response's end.

    Thinking blocks and special tokens are stripped first, and an empty response is REFUSE, as for the rules.

    Raises `ContrastError` when the model cannot be loaded, has fewer than two labels, or has other labels than `labels`.
    """

    def __init__(
        self,
        model_name_or_path: str,
        labels: Mapping[str, Tier] | None = None,
        *,
        with_prompt: bool = False,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ContrastError(f"The batch size {batch_size} is too small: give at least 1.")
        self.tokenizer, self.model, _ = load_pretrained(
            AutoModelForSequenceClassification,
            model_name_or_path,
            "response classifier",
            "text-classification model",
            revision=revision,
        )
        self.model.to(device or "cpu")
        names = [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]
        if len(names) < 2:
            raise ContrastError(
                f"The response classifier {model_name_or_path} has the one label {names}: give a model with two or more."
            )
        given = labels
        labels = labels or {
            name: TIERS_OF_LABELS[name.lower()] for name in names if name.lower() in TIERS_OF_LABELS
        }
        if set(names) != set(labels):
            problem = "which do not say their tiers: give that of each in text_classifier_labels"
            if given:
                problem = (
                    f"but tiers are given for {sorted(labels)}: map exactly the model's labels"
                )
            raise ContrastError(
                f"The response classifier {model_name_or_path} has the labels {sorted(names)}, {problem}."
            )
        self.tiers = [Tier(labels[name]) for name in names]
        self.with_prompt = with_prompt
        # Without a padding token, rows of different lengths cannot share a batch.
        self.batch_size = batch_size if self.tokenizer.pad_token is not None else 1
        # A tokenizer that knows no limit states an absurd one. The model's own counts two positions too many in the
        # RoBERTa family, which numbers positions from 2.
        positions = getattr(self.model.config, "max_position_embeddings", None)
        limit = self.tokenizer.model_max_length
        self.max_length = min(limit, positions - 2) if positions else limit

    def probabilities(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """
        Label probabilities, a tensor of shape (n_responses, n_labels), float32 on the CPU.

        Raises `ContrastError` when there are not as many prompts as responses.
        """
        if len(prompts) != len(responses):
            raise ContrastError(
                f"There are {len(prompts)} prompts for {len(responses)} responses: give one prompt for each."
            )
        rows = [torch.empty(0, len(self.tiers))]
        for start in range(0, len(responses), self.batch_size):
            stop = start + self.batch_size
            texts = [strip_markup(response) for response in responses[start:stop]]
            segments = (list(prompts[start:stop]), texts) if self.with_prompt else (texts,)
            encoded = self.tokenizer(
                *segments,
                return_tensors="pt",
                padding=self.batch_size > 1,
                truncation="only_second" if self.with_prompt else True,
                max_length=self.max_length,
            ).to(self.model.device)
            with torch.inference_mode():
                rows.append(self.model(**encoded).logits.float().softmax(dim=-1).cpu())
        return torch.cat(rows)

    def classify_responses(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Tier]:
        """Tiers of many responses, in batches. Raises as `probabilities` does."""
        likeliest = self.probabilities(prompts, responses).argmax(dim=-1).tolist()
        return [
            self.tiers[index] if strip_markup(response) else Tier.REFUSE
            for index, response in zip(likeliest, responses, strict=True)
        ]

    def classify_response(self, prompt: str, response: str) -> Tier:
        """Tier of one response, with the signature of `tiers.classify_response`."""
        return self.classify_responses([prompt], [response])[0]


@lru_cache(maxsize=1)
def _loaded(
    name: str, labels: tuple[tuple[str, str], ...], reads_prompt: bool
) -> TextClassificationBackend:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiers = {label: Tier(tier) for label, tier in labels}
    return TextClassificationBackend(name, tiers, with_prompt=reads_prompt, device=device)


def classifier_of(settings: TextClassifierSettings) -> TextClassificationBackend | JudgeModel:
    """The text classifier or judge model that settings name, loaded once. Raises `ContrastError` as these do."""
    if settings.judge_model is not None:
        return loaded_judge(settings.judge_model)
    assert settings.text_classifier is not None
    return _loaded(
        settings.text_classifier,
        tuple(sorted(settings.text_classifier_labels.items())),
        settings.text_classifier_reads_prompt,
    )


def classifier_identity(settings: TextClassifierSettings) -> list[Any] | None:
    """What decides the verdicts of what settings name: weights, tiers and segments, or the question. None where they name none."""
    if settings.classifier_name is None:
        return None
    backend = classifier_of(settings)
    if isinstance(backend, JudgeModel):
        return backend.identity()
    return [
        weights_digest(backend.model),
        [tier.value for tier in backend.tiers],
        backend.with_prompt,
    ]
