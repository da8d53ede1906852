# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Prompts as a model reads them: the chat template, and the tokens of what it gives.

Templates and tokenizers overlap. Many templates write the token that begins a text, which the tokenizer adds again; the
model was trained on one. Some tokenizers end every text with a token, after which no response begins. And some templates
refuse a system message.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .errors import ContrastError, one_line
from .files import digest

Chat: TypeAlias = list[dict[str, str]]
"""Messages with a role and a content each."""

SYSTEM_MESSAGE = "Be brief."
"""One to try a chat template with."""

_written: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
"""The texts of chats by tokenizer, and by a digest of what they were made from: templates are long."""


def require_chat(tokenizer: Any, name: str) -> None:
    """Raises `ContrastError` when the tokenizer of a model cannot write a prompt as chat, or fill the shorter prompts of a batch."""

    if tokenizer.chat_template is None:
        raise ContrastError(
            f"The tokenizer of {name} has no chat template, so there is no way to put a prompt to the model: use the "
            "instruction-tuned model, or add a chat_template.jinja to its folder."
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ContrastError(
            f"The tokenizer of {name} has neither a padding token nor an end-of-sequence token, so prompts of different "
            "lengths cannot share a batch: name one as pad_token or eos_token in its tokenizer_config.json."
        )
    try:
        (text,) = chat_texts(tokenizer, [[{"role": "user", "content": "Hello"}]])
    except TemplateError as error:
        raise ContrastError(
            f"The chat template of {name} cannot write a single user message ({one_line(str(error))}): correct it."
        ) from error
    if "hello" not in text.lower():
        # Those of some models with vision write lists of parts alone, and every prompt would be the same empty one.
        raise ContrastError(
            f"The chat template of {name} leaves out what the user says: correct it to write a message's content where that is a text."
        )


def note_on_system_role(tokenizer: Any) -> str | None:
    """Returns what a user should know of a chat template that does not take a system message as one."""

    text = _with_system_message(tokenizer)
    if text is None:
        return "The chat template refuses a system message: the system prompt is put in front of the user's"
    if SYSTEM_MESSAGE not in text:
        return "The chat template leaves system messages out: system prompts make no difference to this model"
    return None


def _with_system_message(tokenizer: Any) -> str | None:
    chat = [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": "Hello"}]
    try:
        return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    except TemplateError:
        return None


def without_system_role(chat: Chat) -> Chat:
    """Returns a chat whose system message is put in front of what the user says, as Gemma 3's template does it."""

    system = [message["content"] for message in chat if message["role"] == "system"]
    others = [dict(message) for message in chat if message["role"] != "system"]
    for message in others:
        if message["role"] == "user":
            message["content"] = "\n\n".join(filter(None, [*system, message["content"]]))
            break
    return others


def chat_texts(tokenizer: Any, chats: Sequence[Chat], **options: Any) -> list[str]:
    """
    Returns chats up to where the response begins. Raises jinja2's `TemplateError` where the template refuses one.

    Each is written once and then remembered: templates that write the date would change a study at midnight.
    """

    if not chats:
        return []
    if _with_system_message(tokenizer) is None:
        chats = [without_system_role(chat) for chat in chats]
    options = {"add_generation_prompt": True, "tokenize": False, **options}
    written = _written.setdefault(tokenizer, {})
    template = str(tokenizer.chat_template)
    keys = [digest([template, chat, options]) for chat in chats]
    missing = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in written}
    if missing:
        texts = tokenizer.apply_chat_template(list(missing.values()), **options)
        written.update(zip(missing, texts, strict=True))
    return [written[key] for key in keys]


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns tokens of texts. What the tokenizer puts in front stands there once, and nothing behind, where responses follow."""

    if not texts:
        return []
    plain = tokenizer([*texts, "a"], add_special_tokens=False)["input_ids"]
    *plain, probe = (tuple(ids) for ids in plain)
    whole = tuple(tokenizer("a")["input_ids"])
    n_before = next(
        (place for place in range(len(whole)) if whole[place : place + len(probe)] == probe), 0
    )
    before = whole[:n_before]
    return [ids if ids[:1] == before[:1] else before + ids for ids in plain]


def padded(
    sequences: Sequence[Sequence[int]], pad: int, side: str = "left"
) -> tuple[Tensor, Tensor]:
    """Returns tokens and mask, integer tensors of shape (n, length), padded on one side."""

    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    tokens, mask = (
        pad_sequence(part, batch_first=True, padding_value=filling, padding_side=side)
        for part, filling in ((rows, pad), ([torch.ones_like(row) for row in rows], 0))
    )
    return tokens, mask
