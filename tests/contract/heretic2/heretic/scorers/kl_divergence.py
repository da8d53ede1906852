# SPDX-License-Identifier: AGPL-3.0-or-later

"""The divergence of the first token."""

from typing import Any

import torch
from pydantic import BaseModel

from ..config import DatasetSpecification, default_prompts
from ..plugin import Context
from ..scorer import Score, Scorer


class Settings(BaseModel):
    prompts: DatasetSpecification = default_prompts("harmless_alpaca", "test[:100]")


class KLDivergence(Scorer):
    settings: Settings
    prompts: list[Any]
    base: torch.Tensor

    def init(self, ctx: Context) -> None:
        self.prompts = ctx.load_prompts(self.settings.prompts)
        self.base = ctx.get_logits(self.prompts).log_softmax(dim=-1)

    def get_score(self, ctx: Context) -> Score:
        logprobs = ctx.get_logits(self.prompts).log_softmax(dim=-1)
        divergence = float((self.base.exp() * (self.base - logprobs)).sum(dim=-1).mean())
        return Score(divergence, f"{divergence:.4f}", f"{divergence:.4f}")
