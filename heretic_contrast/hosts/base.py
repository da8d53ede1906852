# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Heretic 2.0's plugin surface, where the installed Heretic has none.

The classes here have just what the plugins of this package use, so that the same plugin classes run under
Heretic 1.4. They are not a copy of Heretic's: loading by import path and validation are not needed there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Parameters = TypeVar("Parameters")


class Plugin:
    def __init__(self, *, heretic_settings: Any, settings: Any = None) -> None:
        self.heretic_settings = heretic_settings
        self.settings = settings


class Modifier(Plugin, Generic[Parameters]):
    """A plugin that modifies the model in each trial, by `suggest_parameters`, `modify_model` and `reset_model`."""


@dataclass
class Score:
    value: float
    rich_display: str
    md_display: str


class Scorer(Plugin, ABC):
    @abstractmethod
    def get_score(self, ctx: Any) -> Score: ...

    def get_baseline_score(self, ctx: Any) -> Score:
        return self.get_score(ctx)
