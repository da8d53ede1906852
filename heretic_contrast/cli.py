# SPDX-License-Identifier: AGPL-3.0-or-later

"""The command line: `heretic-contrast`."""

import difflib
import errno
import io
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn

from .errors import ContrastError, is_interruption, one_line, show_warnings_as_sentences
from .outputs import remove_empty_directories
from .processes import handling

OVERVIEW = """\
heretic-contrast: contrast baselines and multi-directional refusal ablation for Heretic (arXiv:2603.22061)

usage: heretic-contrast [run] [OPTIONS] MODEL    abliterate a model through Heretic (the default)
       heretic-contrast extract MODEL --output FILE.safetensors
                                                 extract directions, and report on them
       heretic-contrast sweep MODEL --output DIR
                                                 test each layer alone at fixed weights
       heretic-contrast audit --dataset DATASET --output DIR
                                                 count harm categories in a harmless pool
       heretic-contrast judge FILE               give tiers to responses, and compare them with people's
       heretic-contrast rebuild RECORD           make a saved model again from the record beside it
       heretic-contrast demo --output DIR        run everything on the built-in model
       heretic-contrast doctor                   say what this installation can do

MODEL is a Hugging Face model ID, a path, or builtin:refuser. The options of run are Heretic's and the plugin's:
"""


AGAIN = ". Run the same command to start again."
RESUME = ". What was finished is kept; run the same command to resume."
COMMANDS: dict[str, str] = {
    "run": ". The trials that were finished are kept; run the same command with --checkpoint-action continue to resume.",
    "extract": RESUME,
    "sweep": RESUME,
    "audit": AGAIN,
    "judge": AGAIN,
    "rebuild": AGAIN,
    "demo": AGAIN,
    "doctor": AGAIN,
}
"""What follows on Ctrl+C in each of the modules of `commands`."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the operating system says where nothing more can be written."""

UNUSABLE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
"""What it says where a place cannot even be looked at."""


def sentence_of(error: BaseException) -> str | None:
    """Returns what the user is told about an error, or None where it is a mistake of the program."""

    if isinstance(error, ContrastError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        # Libraries write caches, and the output itself may go to a file.
        where = "" if error.filename is None else f" while writing {error.filename}"
        return f"The disk is full or cannot be written to ({error.strerror}{where}): make room, and run the same command again."
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror}): give another place."
    return None


def show_every_character() -> None:
    """Makes output streams show a question mark for what they have no character for, instead of failing."""

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def has_lost_its_reader() -> bool:
    """Returns whether nobody reads the output any more. What cannot be written any more is let go of."""

    try:
        sys.stdout.flush()
    except OSError as error:
        # It would be tried again at the end, and fail with a message of its own.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Windows may call a closed pipe an invalid argument.
        is_closed = os.name == "nt" and error.errno == errno.EINVAL
        return is_closed or isinstance(error, BrokenPipeError)
    return False


def like_a_command(words: list[str]) -> str | None:
    """Returns the command that the first word, which names no place, was likely meant to be."""

    if not words or os.path.exists(words[0]):
        return None
    return next(iter(difflib.get_close_matches(words[0], COMMANDS, 1, 0.8)), None)


def end(code: int, message: str = "") -> NoReturn:
    with suppress(OSError):
        sys.stderr.write(message)
        sys.stderr.flush()
    sys.exit(code)


def end_interrupted(command: str) -> NoReturn:
    remove_empty_directories()
    # A second Ctrl+C would interrupt what libraries do at the end, and show it.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    text = COMMANDS[command]
    if command == "run" and any(word.startswith("--evaluate-model") for word in sys.argv):
        text = AGAIN
    end(130, f"\nInterrupted{text}\n")


def main() -> None:
    """
    Runs the command that the arguments name; without one, `run`.

    Exits with code 2 and one sentence where the user's input does not work or nothing can be written, with code 130 on
    Ctrl+C, and with code 1 where its output is no longer read.
    """

    show_warnings_as_sentences()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # It was closed, and nobody misses what goes there.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    show_every_character()
    arguments = sys.argv[1:]
    command = "run"

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Does on SIGTERM what Ctrl+C does, so that nothing unfinished is left behind."""

        handler = signal.getsignal(signal.SIGINT)
        # In the background of a shell, Ctrl+C is ignored.
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
        # A question waits for the key, whatever the signal, and would go on from it.
        end_interrupted(command)

    is_configured = os.path.exists("config.toml") or "HERETIC_MODEL" in map(str.upper, os.environ)
    try:
        if arguments and arguments[0] in COMMANDS:
            command, *arguments = arguments
        elif meant := like_a_command(arguments[:1]):
            raise ContrastError(f"There is no command {arguments[0]}: did you mean {meant}?")
        elif arguments[:1] in (["-h"], ["--help"]) or not (arguments or is_configured):
            print(OVERVIEW, flush=True)
            if not arguments:
                sys.exit(2)
        elif arguments == ["--version"]:
            from . import __version__
            from .hosts.arguments import PROGRAM

            print(PROGRAM, __version__, flush=True)
            return
        with handling(signal.SIGTERM, interrupt):
            import_module(f"heretic_contrast.commands.{command}").main(arguments)
        # Whatever fails later is no longer answered with a sentence.
        sys.stdout.flush()
    except SystemExit:
        if has_lost_its_reader():
            end(1)
        raise
    except (Exception, KeyboardInterrupt) as error:
        is_unread = has_lost_its_reader()
        if is_interruption(error):
            end_interrupted(command)
        remove_empty_directories()
        if is_unread:
            end(1)
        sentence = sentence_of(error)
        if sentence is None:
            raise
        end(2, f"Error: {one_line(sentence)}\n")
