# SPDX-License-Identifier: AGPL-3.0-or-later

"""The one exception that a user is meant to read."""


class ContrastError(ValueError):
    """
    Something the user gave does not work.

    The message is one sentence that names what is wrong, where, and what to do. The command line prints it
    without a traceback and exits with code 2. It is a `ValueError`, so that pydantic validators may raise it.
    """
