# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What the plugins need of the installed Heretic, whichever it is.

Importing this module imports Heretic and PyTorch.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import heretic.config
import heretic.utils
from heretic.utils import print as log
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import Module

from ..builtin import model_name
from ..chat import require_chat
from ..errors import ContrastError
from ..language_model import LanguageModel
from ..language_model import Progress as ProgressCallback
from ..prompts import Prompt

try:
    # Present in Heretic 2.0 alone.
    from heretic.modifier import Modifier

    HAS_PLUGIN_SURFACE = True
except ImportError:
    from .base import Modifier

    HAS_PLUGIN_SURFACE = False

try:
    # Heretic's development state had scorers before it had modifiers.
    from heretic.scorer import Score, Scorer
except ImportError:
    from .base import Score, Scorer

__all__ = [
    "HAS_PLUGIN_SURFACE",
    "Context",
    "Modifier",
    "Score",
    "Scorer",
    "heretic_prompts",
    "language_model",
    "log",
    "progress_bar",
    "require_model_access",
    "scorer_entries",
    "wrap",
]


class Context(Protocol):
    """What a plugin gets from Heretic 2.0, or from the host for Heretic 1.4."""

    def get_model(self) -> Any: ...

    def get_responses(self, prompts: list[Any]) -> list[str]: ...


def require_model_access(ctx: Context, plugin: str) -> None:
    """Raises `ContrastError` when this Heretic does not let a plugin look into the model, which the plugin needs."""

    if not hasattr(ctx, "get_model"):
        raise ContrastError(
            f"{plugin} looks into the model, which this Heretic keeps to itself (its plugin context has no get_model): "
            f"use Heretic 2.0, or leave {plugin} out."
        )


def language_model(
    ctx: Context, heretic_settings: Any, batch_size: int | None = None
) -> LanguageModel:
    """Returns the wrapper around the model that Heretic has loaded at this moment."""

    return from_heretic(ctx.get_model(), heretic_settings, batch_size)


def scorer_entries(heretic_settings: Any, name: str) -> list[Any]:
    """Returns Heretic's entries in `scorers` that name a scorer, by import path or by file; none under Heretic 1.4."""

    return [
        entry
        for entry in getattr(heretic_settings, "scorers", [])
        if re.split("[.:]", entry.plugin)[-1] == name
    ]


def from_heretic(
    heretic_model: Any, heretic_settings: Any, batch_size: int | None = None
) -> LanguageModel:
    """
    Returns the wrapper around a Heretic model: its layers, its components and its chat format are Heretic's.

    Made anew for every use, because Heretic loads the model again after an export.
    """

    name = model_name(heretic_settings.model)
    layers, components = find_components(heretic_model, name)
    return LanguageModel(
        model=heretic_model.model,
        tokenizer=heretic_model.tokenizer,
        layers=layers,
        components=components,
        name=name,
        # Heretic never loads a model with adapters around it, so that these are its own.
        own_adapter="default" if isinstance(heretic_model.model, PeftModel) else None,
        revision=heretic_settings.model_commit,
        system_prompt=heretic_settings.system_prompt,
        response_prefix=heretic_settings.response_prefix or "",
        batch_size=batch_size or heretic_settings.batch_size or 32,
    )


def find_components(
    heretic_model: Any, name: str
) -> tuple[tuple[Module, ...], tuple[dict[str, list[Module]], ...]]:
    """
    Returns the layers that Heretic finds in its model, and the output projections of each.

    Raises `ContrastError` when Heretic finds no layers, or nothing to ablate in one of them.
    """

    try:
        layers = tuple(heretic_model.get_layers())
    except AttributeError as error:
        raise ContrastError(
            f"Heretic finds no layers in {name} ({architecture(heretic_model)}): its architecture is not supported."
        ) from error
    components = []
    for index in range(len(layers)):
        try:
            components.append(heretic_model.get_layer_modules(index))
        except AssertionError as error:
            raise ContrastError(
                f"Heretic finds nothing to ablate in layer {index} of {name} ({architecture(heretic_model)}): "
                "its architecture is not supported."
            ) from error
    return layers, tuple(components)


def architecture(heretic_model: Any) -> str:
    model = heretic_model.model
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def wrap(
    model: Any,
    tokenizer: Any,
    name: str,
    system_prompt: str = "You are a helpful assistant.",
    batch_size: int = 32,
) -> LanguageModel:
    """
    Returns the wrapper around a plain transformers model, with the components that Heretic finds in it.

    `name` is recorded in results. Raises `ContrastError` as `find_components`, and where the tokenizer has no chat template, or
    neither a padding nor an end-of-sequence token.
    """

    from heretic.model import Model

    require_chat(tokenizer, name)

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Heretic's constructor loads a model; finding components needs only the attribute.
    shell = Model.__new__(Model)
    shell.model = model
    layers, components = find_components(shell, name)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        layers=layers,
        components=components,
        name=name,
        system_prompt=system_prompt,
        batch_size=batch_size,
    )


def heretic_prompts(prompts: Sequence[Prompt], heretic_settings: Any) -> list[Any]:
    """Returns Heretic's own prompt objects, which its plugin context takes."""

    return [
        heretic.utils.Prompt(
            system=heretic_settings.system_prompt if prompt.system is None else prompt.system,
            user=prompt.text,
        )
        for prompt in prompts
    ]


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Shows a progress bar for work that is counted in steps; each first step starts a new count."""

    with Progress(
        TextColumn("  "),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
