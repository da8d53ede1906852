# SPDX-License-Identifier: AGPL-3.0-or-later

"""Modules that do something else for a while."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.nn import Module


@contextmanager
def replaced_forwards(replacements: Sequence[tuple[Module, Callable[..., Any]]]) -> Iterator[None]:
    """Makes modules do something else, for as long as the context lasts. Their hooks go on to run."""

    originals = [vars(module).get("forward") for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.forward = forward
        yield
    finally:
        for (module, _), original in zip(replacements, originals, strict=True):
            # That of their class is found again when nothing stands in front of it.
            if original is None:
                vars(module).pop("forward", None)
            else:
                module.forward = original
