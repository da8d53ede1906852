# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Heretic 2.0's plugin surface, where the installed Heretic has none.

The classes here have just what the plugins of this package use, so that the same plugin classes run under
Heretic 1.4. They are not a copy of Heretic's: loading by import path and validation are not needed there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from optuna import Trial
from pydantic import BaseModel


class Serializable(Protocol):
    """Parameters that a trial can store and show."""

    def to_dict(self) -> dict[str, Any]: ...

    def to_presentation_dict(self) -> dict[str, str]: ...

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Serializable": ...


Parameters = TypeVar("Parameters", bound=Serializable)


class Plugin:
    settings: Any
    heretic_settings: Any

    def __init__(self, *, heretic_settings: Any, settings: BaseModel | None = None) -> None:
        self.heretic_settings = heretic_settings
        self.settings = settings

    def init(self, ctx: Any) -> None:
        """Runs once, before anything else."""


class Modifier(Plugin, ABC, Generic[Parameters]):
    @abstractmethod
    def suggest_parameters(self, ctx: Any, trial: Trial) -> Parameters: ...

    @abstractmethod
    def modify_model(self, ctx: Any, parameters: Parameters) -> None: ...

    @abstractmethod
    def reset_model(self, ctx: Any) -> None: ...


@dataclass
class Score:
    """A scorer's result: the number to optimize, and how it is shown."""

    value: float
    rich_display: str
    md_display: str


class Scorer(Plugin, ABC):
    @abstractmethod
    def get_score(self, ctx: Any) -> Score: ...

    def get_baseline_score(self, ctx: Any) -> Score:
        """The score of the unmodified model."""

        return self.get_score(ctx)
