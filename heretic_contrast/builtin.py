# SPDX-License-Identifier: AGPL-3.0-or-later

"""What is shipped with the package: the built-in refuser with its pools, and the matched pool for real models."""

import os
from pathlib import Path

from .errors import ContrastError
from .settings import ContrastSettings, PromptSource, PromptSources

DATA = Path(__file__).parent / "data"

PREFIX = "builtin:"

REFUSER = "builtin:refuser"
"""A tiny model that refuses harmful requests; see its model card."""


def is_builtin(model: str) -> bool:
    """Returns whether a model is addressed as a built-in one, or is its folder."""

    return model.startswith(PREFIX) or os.path.realpath(model) == str((DATA / "refuser").resolve())


def resolve_model(model: str) -> str:
    """
    Returns the folder of a built-in model, and any other model unchanged.

    Raises `ContrastError` when there is no built-in model of that name.
    """

    if not model.startswith(PREFIX):
        return model
    if model != REFUSER:
        raise ContrastError(f"There is no built-in model {model}: the only one is {REFUSER}.")
    return str(DATA / "refuser")


def model_name(model: str) -> str:
    """Returns what a model is called in stored results: never an absolute path."""

    if is_builtin(model):
        return REFUSER
    path = Path(model)
    return path.resolve().name if path.exists() else model


def pool_name(source: PromptSources) -> str:
    """Returns what the source of a pool is called in stored results: never an absolute path."""

    names = []
    for item in source if isinstance(source, list) else [source]:
        path = Path(item.dataset)
        name = path.name if path.exists() else item.dataset
        if path.is_relative_to(DATA):
            name = path.relative_to(DATA).as_posix()
        names.append(" ".join(filter(None, (name, item.split))))
    # A file name that is no UTF-8 has halves of characters, which no stored result can hold.
    return ", ".join(names).encode("utf-8", "replace").decode()


def refuser_pool(pool: str, split: str) -> PromptSource:
    """Returns a pool of the built-in refuser: "harmful", "matched" or "harmless", "train" or "test"."""

    # As Heretic itself reads it, too.
    return PromptSource(dataset=str(DATA / "refuser_prompts" / pool), split=split, column="text")


def with_refuser_pools(settings: ContrastSettings) -> ContrastSettings:
    """Returns settings in which every pool that was left open is one of the built-in refuser's."""

    pools = {
        "bad_prompts": refuser_pool("harmful", "train"),
        "good_prompts": refuser_pool("harmless", "train"),
        "matched_prompts": refuser_pool("matched", "train"),
    }
    if settings.directions is not None:
        # Nothing is matched, and what has no effect is refused.
        del pools["matched_prompts"]
    return settings.model_copy(
        update={name: pool for name, pool in pools.items() if getattr(settings, name) is None}
    )


def matched_pool() -> PromptSource:
    """Returns the matched pool for real models (paper, section 3.1)."""

    return PromptSource(dataset=str(DATA / "matched" / "train.jsonl"))


def harmless_pool(split: str) -> PromptSource:
    """Returns the general harmless prompts that Heretic uses by default (paper, section 3.1)."""

    return PromptSource(dataset="mlabonne/harmless_alpaca", split=split, column="text")


def harmful_pool(split: str) -> PromptSource:
    """Returns the harmful prompts that Heretic uses by default."""

    return PromptSource(dataset="mlabonne/harmful_behaviors", split=split, column="text")
