# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The words of a command line: which are options, which their values, and which one is the model, or what else a command is about.

Heretic takes the last word for the model where it starts with no dash. Whether it does depends on the option before it,
which the parser knows.
"""

import difflib
import os
import sys
from argparse import Action
from collections.abc import Sequence
from functools import cache
from unittest.mock import patch

from pydantic_settings import BaseSettings, CliSettingsSource, InitSettingsSource

from ..errors import ContrastError

PROGRAM = "heretic-contrast"

SWITCH_VALUES = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
"""What may stand behind an option that is on or off."""


@cache
def command_line_options(settings_class: type[BaseSettings]) -> dict[str, Action]:
    nothing = InitSettingsSource(settings_class, {})
    # The parser reads the command line as soon as it is made.
    with patch.multiple(sys, argv=[PROGRAM]):
        sources = settings_class.settings_customise_sources(
            settings_class, nothing, nothing, nothing, nothing
        )
    (source,) = (source for source in sources if isinstance(source, CliSettingsSource))
    return {
        name: action for action in source.root_parser._actions for name in action.option_strings
    }


def normalize_arguments(settings_class: type[BaseSettings], arguments: Sequence[str]) -> list[str]:
    """
    Returns the arguments with each value joined to its option, and what needs no option behind its own.

    That is the model, or what the class names as `positional`. It may be the first word, as commands with many options are
    written, or the last, as Heretic takes it, or stand anywhere between options. What the command line names counts more than the environment and `config.toml`.

    Raises `ContrastError` when an option does not exist, or a word is nothing's value.
    """

    options = command_line_options(settings_class)
    normalized: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            words += rest
            break
        if not is_option(argument):
            words.append(argument)
            continue
        option, separator, value = argument.partition("=")
        if option not in options:
            nearest = difflib.get_close_matches(option, options, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"see {PROGRAM} --help."
            raise ContrastError(f"There is no option {option}: {hint}")
        takes_value = options[option].nargs != 0
        follows = bool(rest) and not is_option(rest[0])
        may_be_switched = follows and "-h" not in options[option].option_strings
        if value.startswith("~/"):
            # Shells leave it where it stands behind a sign.
            value = os.path.expanduser(value)
        if separator:
            normalized.append(f"{option}={value}" if takes_value else switch(option, value))
        elif takes_value and follows:
            normalized.append(f"{option}={rest.pop(0)}")
        elif may_be_switched and rest[0].lower() in SWITCH_VALUES:
            normalized.append(switch(option, rest.pop(0)))
        else:
            normalized.append(argument)
    given = dict(argument.partition("=")[::2] for argument in normalized)
    for option in given:
        outer = option.rpartition(".")[0]
        if given.get(outer, "").lstrip().startswith("["):
            raise ContrastError(
                f"{option} is given beside a list for {outer}, where it has no effect: write it into the items of the list."
            )
    if not words:
        return normalized
    name = getattr(settings_class, "positional", "model")
    own = f"--{name}"
    if len(words) > 1 or own in given or own not in options:
        named = ", ".join(f'"{word}"' for word in words)
        hint = f"give one {name}" if own in options else "leave it out"
        hint += ", and a command first" if own in options and name == "model" else ""
        lists = [option for option in given if str(options[option].metavar).startswith("list")]
        if lists:
            hint = f"write several values of {lists[0]} as a list ([FIRST,SECOND]), or else {hint}"
        raise ContrastError(
            f"There is no option that {named} could belong to: {hint}, or see {PROGRAM} --help."
        )
    return [*normalized, f"{own}={words[0]}"]


def is_option(word: str) -> bool:
    """Returns whether a word names an option. Negative numbers are values."""

    try:
        float(word)
    except ValueError:
        return word.startswith("-") and len(word) > 1
    return False


def switch(name: str, value: str) -> str:
    """Returns the option that turns something on or off. Raises `ContrastError` when the value is neither."""

    if value.lower() not in SWITCH_VALUES:
        raise ContrastError(
            f'{name} is an option without a value, which "{value}" cannot be: write {name} true or {name} false.'
        )
    if SWITCH_VALUES[value.lower()]:
        return name
    bare = name.removeprefix("--")
    return f"--{bare.removeprefix('no-')}" if bare.startswith("no-") else f"--no-{bare}"
