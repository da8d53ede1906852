# SPDX-License-Identifier: AGPL-3.0-or-later

"""Prompts, and loading them with their categories."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import ContrastError
from .settings import PromptSource


@dataclass(frozen=True)
class Prompt:
    """
    One user message of a pool.

    `category` is the harm category (see `categories.CATEGORIES`) or a class of the user's own; None where a pool has none.
    `system` replaces the model's default system prompt where it is not None.
    """

    text: str
    category: str | None = None
    system: str | None = None


PromptLoader = Callable[[PromptSource], list[Prompt]]
"""Loads the prompts of a dataset or text file; offered by the hosts, which let Heretic do it."""


def load_pool(source: PromptSource, load: PromptLoader, what: str) -> list[Prompt]:
    """
    Loads a pool of prompts, with categories where the source has a column of them.

    JSON Lines files are read here. Everything else goes through `load`, which knows Heretic's specifications;
    it is called a second time for the category column.

    Raises `ContrastError` when the source cannot be read, or is empty; `what` names the pool in the message.
    """

    path = Path(source.dataset)
    try:
        if path.suffix == ".jsonl" and path.is_file():
            prompts = read_json_lines(path, source)
        else:
            prompts = load(source)
            if source.category_column is not None:
                categories = load(
                    source.model_copy(
                        update={"column": source.category_column, "prefix": "", "suffix": ""}
                    )
                )
                prompts = [
                    replace(prompt, category=category.text)
                    for prompt, category in zip(prompts, categories, strict=True)
                ]
    except ContrastError:
        raise
    except Exception as error:
        # Whatever a dataset library raises, the user needs to know which pool it was.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ContrastError(
            f"The {what} prompts could not be loaded from {source.dataset} ({reason}): "
            "check the dataset, its split and its column."
        ) from error
    for prompt in prompts:
        if not (is_text(prompt.text) and is_text(prompt.category or "")):
            raise ContrastError(
                f"The {what} prompts in {source.dataset} hold a prompt or a category that is not text, or half a character: "
                "correct it."
            )
    if not prompts:
        raise ContrastError(
            f"The pool of {what} prompts in {source.dataset} is empty: give one with prompts."
        )
    return prompts


def is_text(value: object) -> bool:
    """Returns whether a value is text that can be encoded: the escapes of JSON can write half a character alone."""

    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json_lines(path: Path, source: PromptSource) -> list[Prompt]:
    """
    Reads a JSON Lines file with one object per prompt.

    Raises `ContrastError` when a line is not an object with the text column.
    """

    text_column = source.column or "text"
    category_column = source.category_column or "category"
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row[text_column]
            category = row.get(category_column)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ContrastError(
                f'Line {number} of {path} is not a JSON object with a "{text_column}": correct the line.'
            ) from error
        if not isinstance(text, str) or not isinstance(category, str | None):
            raise ContrastError(
                f'Line {number} of {path} has a "{text_column}" or a "{category_column}" that is not text: correct the line.'
            )
        text = " ".join(part for part in (source.prefix, text, source.suffix) if part)
        prompts.append(Prompt(text=text, category=category, system=source.system_prompt))
    if source.split is not None:
        raise ContrastError(
            f"The split {source.split} is given for {path}, but a JSON Lines file has no splits: leave it out."
        )
    return prompts


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of a pool: its texts, categories and system prompts, in order."""

    content = json.dumps(
        [(prompt.text, prompt.category, prompt.system) for prompt in prompts], ensure_ascii=False
    )
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
