# SPDX-License-Identifier: AGPL-3.0-or-later

"""The one exception that a user is meant to read, and how it is shown."""

LONGEST_SENTENCE = 2_000
"""How many characters of a message are shown."""


class ContrastError(ValueError):
    """
    Something the user gave does not work.

    The message is one sentence that names what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2. It is a `ValueError`, so that pydantic validators may raise it.
    """


def one_line(text: str) -> str:
    """
    Returns a message as it is shown: on one line, and without characters that steer a terminal.

    Messages quote what they complain about, and files of strangers may hold anything.
    """

    line = " ".join(text.split())
    if len(line) > LONGEST_SENTENCE:
        half = LONGEST_SENTENCE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in line
    )
