# SPDX-License-Identifier: AGPL-3.0-or-later

"""Scorers of Heretic 2.0."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .plugin import Context, Plugin


@dataclass
class Score:
    value: float
    rich_display: str
    md_display: str


class Scorer(Plugin, ABC):
    @property
    def score_name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def get_score(self, ctx: Context) -> Score: ...

    def get_baseline_score(self, ctx: Context) -> Score:
        return self.get_score(ctx)
