# SPDX-License-Identifier: AGPL-3.0-or-later

"""Prompts, and loading them with their categories."""

import ast
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import ContrastError, one_line
from ..files import digest
from ..settings import CATEGORY_COLUMN, PROMPT_COLUMNS, PromptSource, category_name
from .reading import Setting, read_rows
from .rows import Rows

TURNS = re.compile(r"\[\{\s*['\"](role|content|from)['\"]\s*:")
"""How a conversation begins where a table has written it as text."""


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


def load_pool(
    source: PromptSource | Sequence[PromptSource], what: str, where: str = ""
) -> list[Prompt]:
    """
    Reads a pool of prompts, from one source or from several, one after the other; no model is needed.

    `what` is what messages call the pool. `where` is what they put before the name of a setting of the source: a flag such as
    "--contrast.bad-prompts.", or a key of `config.toml`.

    Raises `ContrastError` when a source cannot be read, or the pool is empty.
    """

    def setting(name: str) -> str:
        if not where:
            return f'the setting "{name}"'
        return f"{where}{name}".replace("_", "-") if where.startswith("--") else f"{where}{name}"

    prompts: list[Prompt] = []
    sources = [source] if isinstance(source, PromptSource) else source
    for part in sources:
        columns = {part.column} if part.column else set(PROMPT_COLUMNS)
        try:
            rows = read_rows(part, {*columns, part.category_column or CATEGORY_COLUMN}, setting)
        except ContrastError:
            raise
        except Exception as error:
            # Whatever a dataset library raises, the user needs to know which pool it was.
            reason = one_line(str(error)) or type(error).__name__
            raise ContrastError(
                f"The {what} prompts could not be loaded from {part.dataset} ({reason}): "
                f"check {setting('dataset')}, its config, split and column."
            ) from error
        prompts += _prompts(rows, part, setting)
    if not prompts:
        names = ", ".join(part.dataset for part in sources)
        raise ContrastError(
            f"The pool of {what} prompts in {names} is empty: give one with prompts."
        )
    return prompts


def _prompts(rows: Rows, source: PromptSource, setting: Setting) -> list[Prompt]:
    """
    Returns the prompts that rows hold.

    Raises `ContrastError` when there is no column of prompts, or a cell is no prompt or no category.
    """

    column, category_column = _columns(rows, source, setting)
    labels = rows.labels.get(category_column, ())
    prompts = []
    for row in rows.rows:
        text, system = row.cells.get(column), None
        if text is None or (isinstance(text, str) and not text.strip()):
            raise ContrastError(f'{row.place} has no "{column}": write one, or remove the row.')
        if rows.columns is not None and isinstance(text, str) and text.lstrip().startswith("[{"):
            text = _written_conversation(text)
        if isinstance(text, list):
            text, system = _turns(text)
        if not (is_text(text) and is_text(system or "")):
            raise ContrastError(
                f'{row.place} has a "{column}" that is not text (or holds half a character), and no conversation with a text '
                "of the user: correct it."
            )
        category = _category(row.cells.get(category_column), labels)
        if not is_text(category):
            if source.category_column is not None:
                raise ContrastError(
                    f'{row.place} has a "{category_column}" that is neither text nor a whole number, or true or false: correct it.'
                )
            # Nobody has asked for what stands in a column that is called like one of categories.
            category = None
        prompts.append(
            Prompt(
                text=" ".join(part for part in (source.prefix, text, source.suffix) if part),
                category=category or None,
                system=system if source.system_prompt is None else source.system_prompt,
            )
        )
    return prompts


def _columns(rows: Rows, source: PromptSource, setting: Setting) -> tuple[str, str]:
    """Returns the columns of prompts and of categories; the latter may be missing where it was not asked for."""

    names = rows.columns
    if names is None:
        # As in Heretic, the column of a text file may be called anything.
        if source.category_column is not None:
            raise ContrastError(
                f"{rows.name} is a text file without columns: leave {setting('category_column')} out, "
                "or give a file with columns, such as JSON Lines or CSV."
            )
        return "text", CATEGORY_COLUMN
    if not names:
        # What is empty has no columns, which another sentence says better.
        return source.column or "text", CATEGORY_COLUMN
    for key in ("column", "category_column"):
        name = getattr(source, key)
        if name is not None and name not in names:
            raise ContrastError(
                f'{rows.name} has no column "{name}" ({rows.listed_columns()}): correct {setting(key)}.'
            )
    column = source.column or next((name for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        raise ContrastError(
            f"{rows.name} has none of the columns {', '.join(PROMPT_COLUMNS)} ({rows.listed_columns()}): "
            f"name the one that holds the prompts with {setting('column')}."
        )
    return column, source.category_column or CATEGORY_COLUMN


def _written_conversation(text: str) -> Any:
    """
    Returns the conversation that a cell of text holds as JSON or, as pandas writes it, as Python; else the text.

    One that cannot be read, such as pandas' of arrays, becomes an empty one, so that nobody is asked its brackets.
    """

    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = read(text.strip())
            if isinstance(found, list) and all(
                isinstance(m, Mapping) and "role" in m for m in found
            ):
                return found
    return [] if TURNS.match(text.lstrip()) else text


def _turns(messages: Sequence[Any]) -> tuple[Any, Any]:
    """Returns what the user says first in a conversation, and its system prompt; None for what there is not."""

    turns: dict[str, Any] = {}
    for message in messages:
        if isinstance(message, Mapping):
            turns.setdefault(str(message.get("role")), message.get("content"))
    return _content(turns.get("user")), _content(turns.get("system"))


def _content(value: Any) -> Any:
    """Returns the text of a message whose content stands in parts; anything else unchanged."""

    if isinstance(value, list) and all(
        isinstance(part, Mapping) and part.get("type", "text") == "text" for part in value
    ):
        texts = [part.get("text") for part in value]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else value
    return value


def _category(value: Any, labels: Sequence[str]) -> Any:
    """Returns the name of a category: empty where there is none, and unchanged what cannot be one."""

    if labels and str(value).isdecimal() and int(value) < len(labels):
        return category_name(labels[int(value)])
    if value is None or value != value or (labels and value == -1):
        # Missing, also as tables write it: not a number, or no label.
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    name = category_name(str(value))
    # What is true or false is an answer to a question that the name of the column may ask, and no category.
    return name == "true" if name in ("true", "false") else name


def is_text(value: object) -> bool:
    """Returns whether a value is text that can be encoded: the escapes of JSON can write half a character alone."""

    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of a pool: its texts, categories and system prompts, in order."""

    return digest([(prompt.text, prompt.category, prompt.system) for prompt in prompts])


def text_digest(text: str) -> str:
    """
    Returns a short digest of one prompt's text, by which it is known again where its text must not be kept.

    White space and capitals make no difference: the same prompt comes from files of many kinds.
    """

    return hashlib.sha256(" ".join(text.split()).casefold().encode("utf-8")).hexdigest()[:16]
