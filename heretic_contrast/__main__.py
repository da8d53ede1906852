# SPDX-License-Identifier: AGPL-3.0-or-later

"""`python -m heretic_contrast`, where the command is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
