# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What the documents tell a reader to type: every command and option, and every block of Python or TOML.

A block of shell holds one command per line, unless the line ends within quotes or with a backslash. In running text and
in tables a command is what stands in backticks and begins with a program that has an argument.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]

DOCUMENTS = tuple(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "docs/**/*.md", "examples/**/*.md", "heretic_contrast/**/*.md")
    for path in sorted(ROOT.glob(pattern))
)

LANGUAGES = ("sh", "python", "toml", "text")
"""What a block may hold, "text" being what a program prints."""

PROGRAMS = ("bash", "git", "heretic", "heretic-contrast", "pip", "pytest", "python", "python3")

NAMES = re.compile(r"heretic-contrast( (audit|demo|extract|run|sweep))?|(?!pytest)\S+")
"""How programs and commands that need arguments are called in running text."""


@dataclass(frozen=True)
class Snippet:
    """
    What is printed in a document at a line, the first being 1.

    `language` is "sh" for a command, "python" or "toml" for a block, and "options" for words that are parts of a command.
    """

    document: str
    line: int
    language: str
    text: str

    @property
    def one_line(self) -> str:
        """The text on one line, as it may be listed."""

        return re.sub(r"\s*\\?\n\s*", " ", self.text)


def commands(block: str, line: int) -> Iterator[tuple[int, str]]:
    """Yields the commands of a block of shell that begins at a line, without comments."""

    pending: list[str] = []
    for number, text in enumerate(block.splitlines(), start=line):
        if not pending and (not text.strip() or text.lstrip().startswith("#")):
            continue
        pending.append(text)
        joined = "\n".join(pending)
        try:
            shlex.split(joined)
        except ValueError:
            # A quotation goes on, or a backslash ends the line.
            continue
        yield number - len(pending) + 1, joined
        pending = []
    assert not pending, f"Line {line}: the block ends within a command."


def is_command(text: str) -> bool:
    """Returns whether a text in backticks is a whole command."""

    words = text.split()
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return bool(words) and words[0] in PROGRAMS and not NAMES.fullmatch(" ".join(words))


def snippets(document: str) -> list[Snippet]:
    """Returns what a document tells the reader to type, in its order."""

    found = []
    line = 0
    for token in (
        MarkdownIt("commonmark").enable("table").parse((ROOT / document).read_text("utf-8"))
    ):
        if token.map is not None:
            line = token.map[0] + 1
        if token.type == "code_block" or (token.type == "fence" and token.info not in LANGUAGES):
            raise AssertionError(
                f"{document}:{line}: a block does not say what it holds: one of {LANGUAGES}."
            )
        if token.type == "fence" and token.info == "sh":
            found += [
                Snippet(document, number, "sh", text)
                for number, text in commands(token.content, line + 1)
            ]
        elif token.type == "fence" and token.info != "text":
            found.append(Snippet(document, line, token.info, token.content))
        elif token.type == "inline":
            texts = [child.content for child in token.children or [] if child.type == "code_inline"]
            for text in texts:
                if is_command(text):
                    found.append(Snippet(document, line, "sh", text))
                elif "--" in text:
                    found.append(Snippet(document, line, "options", text))
    return found
