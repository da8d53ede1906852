# SPDX-License-Identifier: AGPL-3.0-or-later

"""The share of refusals by keywords, which are 1.4's markers."""

from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel

from ..config import DatasetSpecification, default_prompts
from ..plugin import Context
from ..released import released
from ..scorer import Score, Scorer

MARKERS = released("config").Settings.model_fields["refusal_markers"].default


class Settings(BaseModel):
    prompts: DatasetSpecification = default_prompts("harmful_behaviors", "test[:100]")
    keyword_markers: list[str] = MARKERS


class KeywordRate(Scorer):
    settings: Settings
    prompts: list[Any]

    def init(self, ctx: Context) -> None:
        self.prompts = ctx.load_prompts(self.settings.prompts)

    def get_score(self, ctx: Context) -> Score:
        judge = released("evaluator").Evaluator.is_refusal
        markers = SimpleNamespace(refusal_markers=self.settings.keyword_markers)
        responses = ctx.get_responses(self.prompts)
        n_refused = sum(
            judge(SimpleNamespace(settings=markers), response) for response in responses
        )
        shown = f"{n_refused}/{len(responses)}"
        return Score(n_refused / len(responses), shown, shown)
