# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Which Heretic is installed, and what can be run with it.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from ..builtin import REFUSER
from ..errors import ContrastError

Surface = Literal["1.4", "scorers", "2.0"]
"""
What Heretic offers a plugin: modifiers and scorers ("2.0"), scorers alone ("scorers", its development state of July 2026), or
nothing ("1.4").
"""


def installed_surface() -> Surface:
    """Returns what the installed Heretic offers. Raises `ImportError` where none is installed."""

    if find_spec("heretic.modifier") is not None:
        return "2.0"
    if find_spec("heretic.scorer") is not None:
        return "scorers"
    return "1.4"


def obstacle(command: str, surface: Surface) -> str | None:
    """Returns why a command of the command line cannot be run with a Heretic, as one sentence; None where it can."""

    if surface == "2.0" and command == "run":
        return (
            "This Heretic loads plugins itself, so it needs no launcher: run heretic --modifiers "
            '\'[{"plugin": "heretic_contrast.ContrastAbliteration"}]\' --model MODEL.'
        )
    if surface == "scorers" and command in ("run", "rebuild", "demo"):
        return (
            f"This Heretic has scorers but no modifiers yet, so that {command} has nothing to run the plugin in: "
            "install Heretic 1.4 or 2.0."
        )
    return None


def require_heretic(command: str, arguments: Sequence[str]) -> None:
    """Raises `ContrastError` when a command cannot be run with the installed Heretic; its help can always be asked for."""

    if not {"-h", "--help"}.isdisjoint(arguments):
        return
    surface = installed_surface()
    sentence = obstacle(command, surface)
    if sentence is not None:
        if surface == "2.0" and any(REFUSER in word for word in arguments):
            sentence = "Heretic 2.0 knows no built-in model: run heretic-contrast demo --output DIR, which runs it on that."
        raise ContrastError(sentence)
