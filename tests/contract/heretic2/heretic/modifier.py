# SPDX-License-Identifier: AGPL-3.0-or-later

"""Modifiers of Heretic 2.0."""

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar, get_args

from optuna import Trial

from .plugin import Context, Plugin


class Serializable(Protocol):
    def to_dict(self) -> dict[str, Any]: ...

    def to_presentation_dict(self) -> dict[str, str]: ...

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Serializable": ...


Parameters = TypeVar("Parameters", bound=Serializable)


class Modifier(Plugin, ABC, Generic[Parameters]):
    @property
    def modifier_name(self) -> str:
        return type(self).__name__

    @property
    def parameters_class(self) -> type[Parameters]:
        return get_args(type(self).__orig_bases__[0])[0]  # type: ignore[attr-defined]

    @abstractmethod
    def suggest_parameters(self, ctx: Context, trial: Trial) -> Parameters: ...

    @abstractmethod
    def modify_model(self, ctx: Context, parameters: Parameters) -> None: ...

    @abstractmethod
    def reset_model(self, ctx: Context) -> None: ...
