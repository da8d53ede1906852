# SPDX-License-Identifier: AGPL-3.0-or-later

"""The command line: `heretic-contrast`."""

import sys
from collections.abc import Callable, Sequence

from .errors import ContrastError, one_line

PROGRAM = "heretic-contrast"

OVERVIEW = """\
heretic-contrast: contrast baselines and multi-directional refusal ablation for Heretic (arXiv:2603.22061)

usage: heretic-contrast [run] [OPTIONS] MODEL    abliterate a model through Heretic (the default)
       heretic-contrast extract MODEL --output FILE.safetensors
                                                 extract directions, and report on them
       heretic-contrast sweep MODEL --output DIR
                                                 test each layer alone at fixed weights
       heretic-contrast audit --dataset DATASET --output DIR
                                                 count harm categories in a harmless pool
       heretic-contrast demo --output DIR        run everything on the built-in model
       heretic-contrast doctor                   say what this installation can do

MODEL is a Hugging Face model ID, a path, or builtin:refuser. The options of run are Heretic's and the plugin's:
"""


def run(arguments: Sequence[str]) -> None:
    """Abliterates a model through Heretic 1.4."""

    from .commands.run import main

    main(arguments)


def extract(arguments: Sequence[str]) -> None:
    """Extracts directions."""

    from .commands.extract import main

    main(arguments)


def sweep(arguments: Sequence[str]) -> None:
    """Tests each layer alone at fixed weights."""

    from .commands.sweep import main

    main(arguments)


def audit(arguments: Sequence[str]) -> None:
    """Counts harm categories in a harmless pool."""

    from .commands.audit import main

    main(arguments)


def demo(arguments: Sequence[str]) -> None:
    """Runs everything on the built-in model."""

    from .commands.demo import main

    main(arguments)


def doctor(arguments: Sequence[str]) -> None:
    """Says what this installation can do."""

    from .commands.doctor import main

    main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": run,
    "extract": extract,
    "sweep": sweep,
    "audit": audit,
    "demo": demo,
    "doctor": doctor,
}


def main() -> None:
    """
    Runs the command that the arguments name; without one, `run`.

    Exits with code 2 and one sentence where the user's input does not work.
    """

    arguments = sys.argv[1:]
    command: Callable[[Sequence[str]], None] = run
    if arguments and arguments[0] in COMMANDS:
        command = COMMANDS[arguments[0]]
        arguments = arguments[1:]
    elif not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(OVERVIEW + "\n")
        sys.stdout.flush()
        if not arguments:
            sys.exit(2)
    elif arguments == ["--version"]:
        from . import __version__

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return
    try:
        command(arguments)
    except ContrastError as error:
        sys.stdout.flush()
        sys.stderr.write(f"Error: {one_line(str(error))}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nInterrupted. What was finished is kept; run the same command to resume.\n"
        )
        sys.exit(130)
