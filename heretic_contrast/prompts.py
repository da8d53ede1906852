# SPDX-License-Identifier: AGPL-3.0-or-later

"""Prompts."""

from dataclasses import dataclass


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
