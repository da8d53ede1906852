# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A folder that holds one model.

transformers and PEFT load whatever they know by name: weights beside an adapter, shards, a tokenizer. What an earlier
save left would become part of the new model, so that it goes when the new one comes. All other files stay.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..errors import ContrastError
from ..files import replace, usual_mode

UNFINISHED = ".unfinished"
"""The folder inside the one that a model is saved to where it lies until it is whole."""

PREVIOUS = ".previous"
"""The folder inside it where the model that was there lies while the new one takes its place."""

WEIGHTS = re.compile(
    # Shards, variants such as "fp16", and the indices of both.
    r"(model|adapter_model|pytorch_model|tf_model|flax_model)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?"
    r"\.(safetensors|bin|h5|msgpack)(\.index(\.\w+)?\.json)?"
    r"|consolidated(\.\d+)?\.(pth|safetensors)"
)

RECORD = "heretic-contrast.json"
"""What a model was made with: see `record`."""

CONFIGURATIONS = ("config.json", "adapter_config.json")
"""The files without which nothing is a model."""

OTHERS = {
    *CONFIGURATIONS,
    RECORD,
    *"""
    generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model sentencepiece.model
    sentencepiece.bpe.model spiece.model spm.model tekken.json chat_template.jinja
    chat_template.json additional_chat_templates preprocessor_config.json processor_config.json
    video_preprocessor_config.json audio_tokenizer_config.json
    """.split(),
}
"""What is saved and loaded beside weights."""

CARD = "README.md"


def is_of_a_model(path: Path) -> bool:
    """Returns whether a file was saved with a model, and would be loaded with it."""

    if path.name == CARD and path.is_file():
        # PEFT writes one that calls the folder an adapter, and asks for more. What people write stays.
        text = path.read_text(encoding="utf-8", errors="replace")
        return "library_name: peft" in text and "[More Information Needed]" in text
    return path.name in OTHERS or WEIGHTS.fullmatch(path.name) is not None


def configuration_last(path: Path) -> tuple[bool, str]:
    return path.name in CONFIGURATIONS, path.name


def require_other_folder(folder: Path, model: str) -> None:
    """Raises `ContrastError` when a model is to be saved to the folder that it is made from."""

    if folder.is_dir() and os.path.isdir(model) and os.path.samefile(folder, model):
        raise ContrastError(
            f"{folder} holds the model that is abliterated, which saving there would overwrite: choose another folder."
        )


def with_final_name(values: tuple[Any, ...], folder: Path) -> tuple[Any, ...]:
    """Returns what Heretic prints, in which the place in a folder where a model is not yet whole goes by the name it will have."""

    names = str(folder / UNFINISHED), escape(str(folder))
    return tuple(value.replace(*names) if isinstance(value, str) else value for value in values)


@contextmanager
def replaced_as_a_whole(folder: Path) -> Iterator[Path]:
    """
    Gives a place inside a folder to save a model to, which takes the place of the folder's own where nothing was raised.

    Else nothing is left of it. Raises `ContrastError` as `publish_model`, after which the new one still lies there.
    """

    unfinished = folder / UNFINISHED
    # What a process that was killed has left.
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    publish_model(unfinished, folder)


def publish_model(source: Path, target: Path) -> None:
    """
    Moves a model from a folder to one on the same disk, where it takes the place of the model that is there.

    A process that is killed in between leaves a folder without a configuration, which nothing loads, and all files of
    both models. Raises `ContrastError` when a file cannot be moved; then the earlier model is as it was.
    """

    previous = target / PREVIOUS
    card = target / CARD
    keeps_card = card.exists() and not is_of_a_model(card)
    try:
        for path in source.iterdir():
            if path.is_file():
                # Libraries save weights as private files; network shares may refuse to change that.
                with suppress(OSError):
                    path.chmod(usual_mode())
        # What a process that was killed here has moved into it is replaced anyway.
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        leaving = sorted(filter(is_of_a_model, target.iterdir()), key=configuration_last)
        arriving = sorted(source.iterdir(), key=configuration_last)
        # The configuration, without which nothing is a model, leaves first and arrives last.
        moves = [(path, previous / path.name) for path in reversed(leaving)]
        moves += [
            (path, target / path.name)
            for path in arriving
            if not (path.name == CARD and keeps_card)
        ]
        with ExitStack() as undoing:
            undoing.callback(previous.rmdir)
            for origin, place in moves:
                undoing.callback(_move_back, origin, place)
                replace(origin, place)
            undoing.pop_all()
    except OSError as error:
        raise ContrastError(
            f"The model was saved to {source} but could not be moved to {target} ({error.strerror or error}): correct that, and save "
            "it again."
        ) from error
    for folder in (previous, source):
        shutil.rmtree(folder, ignore_errors=True)


def _move_back(origin: Path, place: Path) -> None:
    # What was interrupted may not have been moved.
    if not os.path.lexists(origin):
        replace(place, origin)
