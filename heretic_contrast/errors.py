# SPDX-License-Identifier: AGPL-3.0-or-later

"""The one exception that a user is meant to read, and what hides behind other exceptions."""

from typing import TypeVar

ErrorType = TypeVar("ErrorType", bound=BaseException)


class ContrastError(ValueError):
    """
    Something the user gave does not work.

    The message is one sentence that names what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2. It is a `ValueError`, so that pydantic validators may raise it.
    """


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
