# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The record that lies beside a saved model: what its weights were made with, and digests of what they were made from.

Places (of the model and of prompts) are where somebody had them, and no part of what makes the weights: they may be edited.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from .. import __version__
from ..builtin import REFUSER, is_builtin, with_refuser_pools
from ..directions.directions import Directions
from ..errors import ContrastError
from ..files import digest, file_digest, write_text_atomically
from ..identity import LIBRARIES, identify, versions
from ..language_model import LanguageModel
from ..outputs import json_text
from ..prompts import Prompt, prompts_digest
from ..search.parameters import Parameters
from ..settings import EXTRACTION_FIELDS, ContrastSettings, datasets_of
from .model_folder import RECORD
from .settings import POOLS
from .unused import ONLY_UNDER_14

if TYPE_CHECKING:
    from ..modifier import ContrastAbliteration

FORMAT = "heretic-contrast record 1"

OF_HERETIC = """
    seed model_commit dtypes quantization device_map max_memory system_prompt response_prefix max_response_length max_shard_size
""".split()
"""Heretic's settings that decide weights, or the files that they are saved as."""

OF_THE_SEARCH = {
    *POOLS,
    *"directions save_directions residual_cache preset search_space".split(),
    *ONLY_UNDER_14,
    # Of earlier versions, which trained the same maps with both of its values.
    "som_backend",
}
"""Settings of the plugin that decide no weights once a trial is chosen, and those that are kept as places."""

OF_DIRECTIONS = EXTRACTION_FIELDS - {"seed"}
"""Those that decide nothing beside a file of directions, which were made with other settings, which the file knows."""

COMPUTING = (*LIBRARIES, "heretic-llm", "numba", "numpy", "safetensors")
"""The libraries that decide bytes."""


@dataclass(frozen=True)
class Made:
    """
    A modified model, and what it was made from.

    `heretic_settings`: of the run, with the response prefix that was found. `model`: the original, with its identity. `prompts`: the
    pools of the directions by name; none where these came from a file. `measured`: what the search has measured of the trial.
    """

    heretic_settings: Any
    settings: ContrastSettings
    model: LanguageModel
    directions: Directions
    parameters: Parameters
    prompts: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def record(self, folder: Path | None = None) -> "Record":
        """Returns the record of the model, with the digests of its files where it was saved to a folder."""

        settings = self.heretic_settings
        values = {name: getattr(settings, name) for name in OF_HERETIC if hasattr(settings, name)}
        files = sorted(folder.glob("*.safetensors")) if folder is not None else []
        adapter = folder is not None and (folder / "adapter_config.json").exists()
        of_directions = set() if self.settings.directions is None else OF_DIRECTIONS
        content = {
            "format": FORMAT,
            "places": _places(settings.model, self.settings),
            "export_strategy": "adapter" if adapter else "merge",
            "settings": {name: getattr(value, "value", value) for name, value in values.items()},
            "contrast": self.settings.model_dump(
                mode="json", exclude=OF_THE_SEARCH | of_directions
            ),
            "parameters": self.parameters.to_dict(),
            "measured": dict(self.measured),
            "identity": identify(self.model, dict(self.prompts)),
            "prompts": {name: prompts_digest(pool) for name, pool in self.prompts.items()},
            "directions": self.directions.digest(),
            "versions": versions(COMPUTING),
            "files": {path.name: file_digest(path) for path in files},
        }
        return Record.model_validate_json(json_text({**content, "digest": _digest(content)}))


class Record(BaseModel):
    """What `Made.record` returns: JSON values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["heretic-contrast record 1"]
    places: dict[str, Any]
    export_strategy: Literal["merge", "adapter"]
    settings: dict[str, Any]
    contrast: dict[str, Any]
    parameters: Parameters
    measured: dict[str, Any]
    identity: dict[str, Any]
    prompts: dict[str, str]
    directions: str
    versions: dict[str, str]
    files: dict[str, str]
    digest: str

    def to_json(self) -> str:
        return json_text(self.model_dump(mode="json"), sort_keys=False)

    def write(self, folder: Path) -> None:
        """Writes the record beside the model. Raises `ContrastError` when it cannot."""

        write_text_atomically(folder / RECORD, self.to_json())

    def portable(self) -> "Record":
        """Returns the record without places of this machine, as the built-in model or a dataset on the Hub are for everybody."""

        places = {
            name: place
            for name, place in self.places.items()
            if not any(
                os.path.exists(part)
                for part in [place, *datasets_of(place)]
                if isinstance(part, str)
            )
        }
        return self.model_copy(update={"places": places})


def read_record(path: Path) -> Record:
    """Reads a record, or that of a folder. Raises `ContrastError` when it is none, or anything but its places was edited."""

    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        raise ContrastError(
            f"There is no record {path}: give the {RECORD} of a model that heretic-contrast has saved, or its folder."
        )
    try:
        # Some editors put a mark in front, and places may be edited.
        text = path.read_text(encoding="utf-8-sig")
        record, content = Record.model_validate_json(text), json.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        raise ContrastError(
            f"{path} cannot be read as a record of this version of heretic-contrast, it may be cut off or damaged: "
            "take that of the model again."
        ) from error
    if record.digest != _digest(content):
        raise ContrastError(
            f"{path} was edited: only its places may be; take that of the model again."
        )
    return record


def _places(model: str, settings: ContrastSettings) -> dict[str, Any]:
    """Returns where the model and the prompts are, or the file of the directions; what the plugin brings along is left out."""

    if os.path.isdir(model) and not os.path.isabs(model):
        # So that it is not taken for a model on the Hub where there is no such folder.
        model = os.path.join(os.curdir, os.path.normpath(model))
    places: dict[str, Any] = {"model": REFUSER if is_builtin(model) else model}
    if settings.directions is not None:
        return {**places, "directions": settings.directions}
    shipped = with_refuser_pools(ContrastSettings()) if is_builtin(model) else ContrastSettings()
    for name in POOLS:
        if getattr(settings, name) not in (None, getattr(shipped, name)):
            dumped = settings.model_dump(mode="json", include={name}, exclude_defaults=True)
            places[name] = dumped[name]
    return places


def _digest(content: Mapping[str, Any]) -> str:
    """Returns a digest of all but places and itself, as JSON gives it back."""

    kept = {name: value for name, value in content.items() if name not in ("places", "digest")}
    return digest(json.loads(json_text(kept)))


PATHS = set(
    """
    good_prompts bad_prompts matched_prompts finalist_prompts sensitive_prompts residual_cache directions
    save_directions warm_start
    """.split()
)
"""Settings that name files."""


def with_plugin(introduction: str, modifier: "ContrastAbliteration", record: str) -> str:
    """Returns a model card's introduction that names the plugin and its settings before the performance, with the model's record."""

    settings = modifier.settings
    # A model on this machine says nothing to others.
    own = ("text_classifier", "judge_model")
    excluded = PATHS | {name for name in own if os.path.isdir(getattr(settings, name) or "")}
    if settings.directions is not None:
        # They were made with other settings, which the file knows.
        excluded = excluded | {"preset"} | EXTRACTION_FIELDS
    values = {
        **settings.model_dump(mode="json", exclude=excluded),
        **modifier.directions.provenance.get("settings", {}),
    }
    rows = "".join(f"| **{name}** | {value} |\n" for name, value in values.items())
    heading, separator, rest = introduction.partition("## Performance")
    return (
        f"{heading}The directions were made by heretic-contrast v{__version__} (arXiv:2603.22061), "
        "without which Heretic cannot rebuild this model.\n\n"
        f"| heretic-contrast setting | Value |\n| :------- | :---: |\n{rows}\n"
        f"With the following in a file, `heretic-contrast rebuild` makes the same weights:\n\n```json\n{record}```\n\n"
        f"{separator}{rest}"
    )
