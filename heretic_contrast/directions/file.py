# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The file that directions are kept in: safetensors, with everything that is no tensor as JSON in the metadata.

The same directions give the same bytes. A file may come from a stranger: it is read as numbers and texts, and every
number, shape and digest is checked before anything is made of it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, Json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import ContrastError
from ..files import digest, write_bytes_atomically

FORMAT = "heretic-contrast directions 1"

TENSORS = {
    **dict.fromkeys(("tensor", "class_directions", "mean_direction"), torch.float32),
    "hits": torch.int64,
}
"""The fields of `Directions` that are tensors, and their data types."""

NESTING = 32
"""How deep the provenance may be nested: what is nested deeper cannot be written to JSON again everywhere."""


def write_directions(path: Path | str, fields: Mapping[str, Any]) -> None:
    """Writes the fields of `Directions`. Raises `ContrastError` when the file cannot be written."""

    # Tensors that share memory, as unit directions and class directions may, cannot be stored as they are.
    tensors = {name: fields[name].contiguous().clone() for name in TENSORS}
    metadata = {
        "format": FORMAT,
        **{
            name: json.dumps(value, sort_keys=True)
            for name, value in fields.items()
            if name not in TENSORS
        },
        "digest": content_digest(tensors),
    }
    metadata["metadata_digest"] = _metadata_digest(metadata)
    write_bytes_atomically(Path(path), _canonical_safetensors(tensors, metadata))


def read_directions(path: Path | str) -> dict[str, Any]:
    """Returns the fields of `Directions` from a file. Raises `ContrastError` as `Directions.load` does."""

    # A pipe would be waited for, and a device read without an end.
    if not os.path.isfile(path):
        raise ContrastError(
            f"There is no directions file {path}: make one with heretic-contrast extract."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise ContrastError(
                    f"{path} is not a directions file of this version of heretic-contrast: "
                    "make one with heretic-contrast extract."
                )
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        fields = _read_metadata(metadata)
    except ContrastError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ContrastError(
            f"{path} cannot be read as a directions file, it may be cut off or damaged: extract it again."
        ) from error
    fault = _fault(tensors, fields, metadata)
    if fault is not None:
        raise ContrastError(f"The directions file {path} {fault}: extract it again.")
    return {**tensors, **fields}


def _fault(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], metadata: Mapping[str, str]
) -> str | None:
    if any(tensor.dtype != TENSORS[name] for name, tensor in tensors.items()):
        return "holds numbers of other types than this version writes"
    digests = content_digest(tensors), _metadata_digest(metadata)
    if (metadata.get("digest"), metadata.get("metadata_digest")) != digests:
        return "does not match its digest, so it is damaged"
    if not _shapes_agree(tensors, len(fields["names"]), len(fields["class_names"])):
        return "has shapes that contradict each other, so it is damaged"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return "holds numbers that are not finite"
    return None


class _Provenance(BaseModel):
    """What is looked up in a provenance, which may say anything else as well."""

    model_config = ConfigDict(strict=True)

    settings: dict[str, Any] = {}
    ablation: dict[str, Any] = {}
    known_prompts: list[str] = []
    sources: list[str] = []
    response_prefix: str = ""
    system_prompt: str = ""


class _Metadata(BaseModel):
    model_config = ConfigDict(strict=True)

    names: Json[Annotated[tuple[str, ...], Field(min_length=1)]]
    class_names: Json[Annotated[tuple[str, ...], Field(min_length=1)]]
    aligned: Json[bool]
    provenance: Json[dict[str, Any]]


def _read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields that are no tensors. Raises `ValueError` when one of them is missing or is not what it should be."""

    fields = dict(_Metadata.model_validate(metadata))
    for name in ("names", "class_names"):
        if len(set(fields[name])) != len(fields[name]):
            raise ValueError("Names must be different.")
    _Provenance.model_validate(fields["provenance"])
    level: list[Any] = [fields["provenance"]]
    for _ in range(NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError("The provenance is nested too deeply.")
    # Reports hold all of it, and can store neither infinite numbers nor halves of characters.
    json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    return fields


def _shapes_agree(tensors: Mapping[str, Tensor], n_directions: int, n_classes: int) -> bool:
    directions, class_directions, mean_direction, hits = (tensors[name].shape for name in TENSORS)
    if not len(directions) == len(class_directions) == len(hits) == 3:
        return False
    n_indices, _, hidden_size = directions
    n_class_directions = class_directions[1]
    return (
        n_indices > 1
        and hidden_size > 0
        and directions[1] == n_directions
        and class_directions == (n_indices, n_class_directions, hidden_size)
        and n_class_directions > 0
        and n_class_directions % n_classes == 0
        and mean_direction == (n_indices, hidden_size)
        and hits[:2] == (n_indices, n_classes)
    )


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        found.update(tensors[name].contiguous().numpy().data)
    return found.hexdigest()


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    return digest({name: text for name, text in metadata.items() if name != "metadata_digest"})


def _canonical_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """
    Returns a safetensors file whose bytes depend on its content alone.

    The library writes its metadata in the order of a hash map with a random seed, so the header is written anew
    with sorted keys. Its length stays the same.
    """

    content = save(tensors, metadata)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    canonical += b" " * (-len(canonical) % 8)
    return len(canonical).to_bytes(8, "little") + canonical + content[8 + length :]
