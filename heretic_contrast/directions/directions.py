# SPDX-License-Identifier: AGPL-3.0-or-later

"""Refusal directions: the tensor that is ablated, and what is needed to trust it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ContrastError, warn
from ..identity import OF_THE_MODEL, OF_THE_RUN, differences
from ..language_model import LanguageModel
from ..settings import Scale
from .transforms import SHARED


def names_of_winners(class_names: Sequence[str], n_winners: int) -> tuple[str, ...]:
    """Returns a name for each winning neuron: its class, with its rank where there are several."""

    if n_winners == 1:
        return tuple(class_names)
    return tuple(f"{name} {rank + 1}" for name in class_names for rank in range(n_winners))


@dataclass(frozen=True)
class Directions:
    """
    Directions of every layer, with what is needed to trust them (paper, section 3.2).

    `tensor`: Tensor of shape (n_layers + 1, n_directions, hidden_size), float32; index 0 is the embedding.
    `names`: one per direction: its class (with the rank of the neuron where there are several), or "svd 1" ....
    `aligned`: whether direction k of neighboring layers belongs to the same class, so that interpolating
    between layers has a meaning.
    `class_directions`: Tensor of shape (n_layers + 1, n_class_directions, hidden_size), as trained, before SVD and
    scale; named by `class_names`.
    `mean_direction`: Tensor of shape (n_layers + 1, hidden_size), mean harmful minus mean general harmless residual.
    `hits`: Tensor of shape (n_layers + 1, n_classes, n_neurons), int64, the prompts that each neuron wins;
    empty for `method = "mean"`.
    `provenance`: model, prompts' digests, settings and versions; JSON.
    """

    tensor: Tensor
    names: tuple[str, ...]
    aligned: bool
    class_directions: Tensor
    class_names: tuple[str, ...]
    mean_direction: Tensor
    hits: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def n_directions(self) -> int:
        return self.tensor.shape[1]

    @property
    def class_direction_names(self) -> tuple[str, ...]:
        n_winners = self.class_directions.shape[1] // len(self.class_names)
        return names_of_winners(self.class_names, n_winners)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the extraction, as far as they are said."""

        return self.provenance.get("settings", {})

    @property
    def scale(self) -> Scale:
        """The length of the directions, unit where it is not said; what is neither is left as it is."""

        value = self.settings.get("scale", "unit")
        return "unit" if value == "unit" else "raw"

    @property
    def winsorization_quantile(self) -> float:
        """That of the residuals that the directions were made from, 1 where it is not said."""

        value = self.settings.get("winsorization_quantile")
        return value if isinstance(value, float) else 1.0

    @property
    def has_shared(self) -> bool:
        """Whether the first direction is Heretic's, and the others are what classes add to it."""

        return self.names[0] == SHARED and self.settings.get("shared_direction") is True

    def digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(self.tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """
        Saves everything as one safetensors file, through a temporary file.

        The same directions give the same bytes. Raises `ContrastError` when the file cannot be written.
        """

        # Directions that are made anew, and not kept, need no file.
        from .file import write_directions

        write_directions(path, vars(self))

    @classmethod
    def load(cls, path: Path | str) -> "Directions":
        """
        Loads directions.

        Reads that file and no other, and takes nothing in it for code or for a name to look up.

        Raises `ContrastError` when the file is missing, is not a whole directions file, holds damaged or non-finite
        numbers, or contradicts itself.
        """

        from .file import read_directions

        return cls(**read_directions(path))

    def require_model(self, model: LanguageModel, source: str) -> None:
        """
        Checks that the directions belong to the model.

        `source` names where they come from in the message. Warns when it cannot be told which model they were made for, or
        when they were made on another device or by other versions, which rounds them differently.

        Raises `ContrastError` when the shape does not fit, or weights, data type, configuration or tokens are others.
        """

        expected = (model.n_layers + 1, model.hidden_size)
        found = (self.tensor.shape[0], self.tensor.shape[2])
        if found != expected:
            raise ContrastError(
                f"The directions in {source} were made for a model with {found[0] - 1} layers of {found[1]} dimensions, "
                f"but {model.name} has {expected[0] - 1} layers of {expected[1]}: extract directions for this model."
            )
        made_for, found_here = self.provenance.get("identity"), model.identity()
        if not isinstance(made_for, dict):
            warn(
                f"The directions in {source} do not say which model they were made for in a way that this version can compare: "
                f"if that was not {model.name} as it is now, extract them again."
            )
            return
        different = differences(made_for, found_here, OF_THE_MODEL)
        if different:
            raise ContrastError(
                f"The directions in {source} were made for another model of the same shape "
                f"({self.provenance.get('model')}) than {model.name}, or for an earlier state of it: other {different}; "
                "extract directions for this model."
            )
        different = differences(made_for, found_here, OF_THE_RUN)
        if different:
            warn(
                f"The directions in {source} were made with another {different}, so that extracting them here would give other "
                "last digits."
            )

    def asked_otherwise(self, model: LanguageModel, source: str) -> list[str]:
        """Returns sentences on what the model is asked with otherwise than it was when residuals were taken, where that is said."""

        asked = {"response prefix": model.response_prefix, "system prompt": model.system_prompt}
        return [
            f"The directions in {source} were extracted with the {name} {made_with!r}, and are evaluated with {now!r}."
            for name, now in asked.items()
            if (made_with := self.provenance.get(name.replace(" ", "_"), now)) != now
        ]
