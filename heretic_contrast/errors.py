# SPDX-License-Identifier: AGPL-3.0-or-later

"""The one exception and the one warning that a user is meant to read, and how they are shown."""

import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from unicodedata import category

LONGEST_SENTENCE = 2_000
"""How many characters of a message are shown."""

STEERING = ("Cc", "Cs", "Zl", "Zp")
"""Categories of Unicode that steer a terminal, or cannot be shown in one."""

ORDERS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the order of others round."""

ErrorType = TypeVar("ErrorType", bound=BaseException)


class ContrastError(ValueError):
    """
    What the user asked for cannot be done.

    The message is one sentence that names what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2. It is a `ValueError`, so that pydantic validators may raise it.
    """


class ContrastWarning(UserWarning):
    """What the user should know of a result, in one sentence. The command line prints it without a place in the program."""


def warn(sentence: str) -> None:
    """Gives a `ContrastWarning`, each sentence once."""

    warnings.warn(sentence, ContrastWarning, stacklevel=3)


def show_warnings_as_sentences() -> None:
    """Lets a `ContrastWarning` appear as its sentence on standard error."""

    previous = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, ContrastWarning):
            # Nobody may read it, or it may be closed.
            with suppress(OSError, AttributeError):
                sys.stderr.write(f"Warning: {one_line(str(message))}\n")
        else:
            previous(message, category, *place, **options)

    warnings.showwarning = show


def one_line(text: str) -> str:
    """
    Returns a message as it is shown: on one line, and without characters that steer a terminal.

    Messages quote what they complain about, and files of strangers may hold anything.
    """

    line = " ".join(text.split())
    if len(line) > LONGEST_SENTENCE:
        half = LONGEST_SENTENCE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return printable(line)


def printable(text: str) -> str:
    """Returns text, with its lines, in which characters that steer a terminal are written as escapes."""

    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character not in "\n\t" and (category(character) in STEERING or character in ORDERS)
        else character
        for character in text
    )


def require_choice(what: str, value: str, choices: Collection[str]) -> None:
    """Raises `ContrastError` when a value is none of the choices."""

    if value not in choices:
        raise ContrastError(f'There is no {what} "{value}": choose {", ".join(choices)}.')


def find_cause(error: BaseException | None, kind: type[ErrorType]) -> ErrorType | None:
    """
    Returns the first error of a kind among an error and those that it was raised from, or None.

    Libraries raise errors of their own while they clean up after an error, which hides the one that matters.
    """

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def is_interruption(error: BaseException) -> bool:
    """Returns whether an error comes from Ctrl+C."""

    mistyped = find_cause(error, TypeError)
    # What CPython raises, and nothing else, when the key is pressed while it words why a name cannot be imported.
    is_lost = mistyped is not None and str(mistyped) == "expected a message argument"
    return is_lost or find_cause(error, KeyboardInterrupt) is not None


@contextmanager
def raising_causes() -> Iterator[None]:
    """Raises, instead of an error of a library, the interruption or the `ContrastError` that it came from."""

    try:
        yield
    except Exception as error:
        # Optuna and transformers raise errors of their own while they clean up.
        cause = find_cause(error, KeyboardInterrupt) or find_cause(error, ContrastError)
        if cause in (None, error):
            raise
        raise cause from error
