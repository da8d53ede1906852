# SPDX-License-Identifier: AGPL-3.0-or-later

"""Evaluation of responses and of models: tiers, coherence, divergence, the sweep."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .responses import Tier, classify_response

__all__ = ["Tier", "classify_response"]

# Names are imported on first use, so that importing one module of the package does not load the others.
_HOMES = {
    "Tier": ".responses",
    "classify_response": ".responses",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
