# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Refusal directions: from residuals to the tensor that is ablated (design, section 5).

Difference vectors come from a contrast baseline, a self-organizing map per class and layer (or the mean) turns
them into class directions, an optional SVD orthogonalizes those, and the scale decides their length.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..errors import ContrastError, warn
from ..files import write_bytes_atomically
from ..identity import OF_THE_MODEL, OF_THE_RUN, differences
from ..language_model import LanguageModel, Progress
from ..settings import ContrastSettings, Control, Method, Scale
from ..vectors import unit_vectors
from .baselines import BaselineOptions, LayerResiduals, get_baseline, mean
from .classes import ClassSelection, select_classes
from .file import TENSORS, directions_file, read_directions
from .som import SomSettings, TrainedMap, train_maps


@dataclass(frozen=True)
class PoolResiduals:
    """
    The residuals of all pools, at all layers.

    `harmful`: Tensor of shape (n_harmful, n_layers + 1, hidden_size), float32, with a class each.
    `bulk`: Tensor of shape (n_bulk, n_layers + 1, hidden_size), general harmless prompts.
    `matched`: Tensor of shape (n_matched, n_layers + 1, hidden_size), with a class each; may be empty.
    """

    harmful: Tensor
    harmful_classes: tuple[str, ...]
    bulk: Tensor
    matched: Tensor
    matched_classes: tuple[str, ...]

    def layer(self, index: int) -> LayerResiduals:
        """Returns views of the residuals of one layer."""

        return LayerResiduals(
            harmful=self.harmful[:, index],
            harmful_classes=self.harmful_classes,
            bulk=self.bulk[:, index],
            matched=self.matched[:, index],
            matched_classes=self.matched_classes,
        )


@dataclass(frozen=True)
class Directions:
    """
    Directions of every layer, with what is needed to trust them.

    `tensor`: Tensor of shape (n_layers + 1, n_directions, hidden_size), float32; index 0 is the embedding.
    `names`: one per direction: its class (with the rank of the neuron where there are several), or "svd 1" ....
    `aligned`: whether direction k of neighboring layers belongs to the same class, so that interpolating
    between layers has a meaning.
    `class_directions`: Tensor of shape (n_layers + 1, n_class_directions, hidden_size), as trained, before SVD and
    scale; named by `class_names`.
    `mean_direction`: Tensor of shape (n_layers + 1, hidden_size), mean harmful minus mean general harmless residual.
    `hits`: Tensor of shape (n_layers + 1, n_classes, n_neurons), int64, the prompts that each neuron wins;
    empty for `method = "mean"`.
    `provenance`: model, prompts' digests, settings and versions; JSON. In files of earlier versions, "prompt_digests" is
    missing: the digests of the texts of all prompts that the directions came from.
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
        """The number of directions per layer."""

        return self.tensor.shape[1]

    def digest(self) -> str:
        """Returns a digest of the tensor and its names."""

        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(self.tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """
        Saves everything as one safetensors file, through a temporary file.

        The same directions give the same bytes. Raises `ContrastError` when the file cannot be written.
        """

        # Tensors that share memory, as unit directions and class directions may, cannot be stored as they are.
        tensors = {name: getattr(self, name).contiguous().clone() for name in TENSORS}
        content = {
            "names": self.names,
            "class_names": self.class_names,
            "aligned": self.aligned,
            "provenance": self.provenance,
        }
        write_bytes_atomically(Path(path), directions_file(tensors, content))

    @classmethod
    def load(cls, path: Path | str) -> "Directions":
        """
        Loads directions.

        Reads that file and no other, and takes nothing in it for code or for a name to look up.

        Raises `ContrastError` when the file is missing, is not a whole directions file, holds damaged or non-finite
        numbers, or contradicts itself.
        """

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


def extract_directions(
    residuals: PoolResiduals,
    settings: ContrastSettings,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Directions:
    """
    Extracts directions from residuals.

    Deterministic: the same residuals, settings and versions give the same bytes.

    Raises `ContrastError` when residuals are not finite, a class is too small, a baseline lacks the prompts it
    needs, or no class is left.
    """

    for what, tensor in (
        ("harmful", residuals.harmful),
        ("general harmless", residuals.bulk),
        ("matched harmless", residuals.matched),
    ):
        if not bool(torch.isfinite(tensor).all()):
            raise ContrastError(
                f"The residuals of the {what} prompts are not all finite, so no direction can be extracted: "
                "load the model with another dtype, for example --dtypes float32."
            )
    for what, tensor in (("harmful", residuals.harmful), ("general harmless", residuals.bulk)):
        if len(tensor) == 0:
            raise ContrastError(f"The pool of {what} prompts is empty: give one with prompts.")

    selection = select_classes(residuals.harmful_classes, residuals.matched_classes, settings)
    residuals, class_names = with_selected_classes(residuals, selection), selection.names
    as_trained, hits, names = class_directions(residuals, class_names, settings, progress)

    bulk_means = torch.stack(
        [mean(residuals.bulk[:, index]) for index in range(residuals.bulk.shape[1])]
    )
    mean_direction = (
        torch.stack(
            [mean(residuals.harmful[:, index]) for index in range(residuals.harmful.shape[1])]
        )
        - bulk_means
    )

    if settings.orthogonalize_direction:
        # Implements https://huggingface.co/blog/grimjim/projected-abliteration, as Heretic does.
        harmless = unit_vectors(bulk_means)[0][:, None]
        as_trained = as_trained - (as_trained * harmless).sum(-1, keepdim=True) * harmless

    if settings.control is Control.RANDOM:
        as_trained = random_directions(as_trained, settings.seed)

    if settings.svd:
        vectors, norms = orthogonalize(as_trained, mean_direction, settings.svd_rank)
        names = tuple(f"svd {index + 1}" for index in range(vectors.shape[1]))
    else:
        vectors, norms = unit_vectors(as_trained)

    if settings.scale is Scale.RAW:
        vectors = vectors * norms[..., None]
    elif settings.scale is Scale.UNMATCHED:
        vectors = vectors * unmatched_norms(residuals, class_names, settings, as_trained)[..., None]

    tensors = {
        "tensor": vectors.float().contiguous(),
        "class_directions": as_trained.float().contiguous(),
        "mean_direction": mean_direction.float(),
    }
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ContrastError(
            "The residuals are so large that their directions do not fit into float32, so none can be extracted: look for "
            "a broken model."
        )
    return Directions(
        **tensors,
        names=names,
        aligned=not settings.svd,
        class_names=tuple(class_names),
        hits=hits,
        provenance={
            **(provenance or {}),
            "settings": extraction_settings(settings),
            "n_prompts": {
                "harmful": dict(
                    sorted(
                        (name, residuals.harmful_classes.count(name))
                        for name in set(residuals.harmful_classes)
                    )
                ),
                "harmless": len(residuals.bulk),
                "matched": len(residuals.matched),
            },
            "versions": {
                "heretic-contrast": __version__,
                **{name: version(name) for name in ("minisom", "numpy", "torch", "transformers")},
            },
        },
    )


EXTRACTION_FIELDS = (
    "baseline",
    "mixing",
    "n_neighbors",
    "classes",
    "category_source",
    "exclude_categories",
    "small_classes",
    "method",
    "som_rows",
    "som_columns",
    "som_iterations",
    "som_sigma",
    "som_learning_rate",
    "som_neighborhood",
    "som_topology",
    "winners",
    "svd",
    "svd_rank",
    "scale",
    "winsorization_quantile",
    "orthogonalize_direction",
    "control",
    "drop_misbehaving",
    "seed",
)
"""The settings that decide directions."""


def extraction_settings(settings: ContrastSettings) -> dict[str, Any]:
    """Returns the settings that decide directions, as JSON values."""

    return settings.model_dump(mode="json", include=set(EXTRACTION_FIELDS))


def with_selected_classes(residuals: PoolResiduals, selection: ClassSelection) -> PoolResiduals:
    """Returns the residuals of the classes that get directions."""

    kept = list(selection.kept)
    return replace(
        residuals,
        harmful=residuals.harmful[kept]
        if len(kept) < len(residuals.harmful)
        else residuals.harmful,
        harmful_classes=selection.harmful_classes,
        matched_classes=selection.matched_classes,
    )


def baseline_options(settings: ContrastSettings) -> BaselineOptions:
    """Returns the numbers that the baseline needs."""

    return BaselineOptions(mixing=settings.mixing, n_neighbors=settings.n_neighbors)


def class_directions(
    residuals: PoolResiduals,
    class_names: Sequence[str],
    settings: ContrastSettings,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """
    Returns class directions as trained, the hits of their maps, and the directions' names.

    Directions: Tensor of shape (n_layers + 1, n_classes * winners, hidden_size), float64.
    Hits: Tensor of shape (n_layers + 1, n_classes, n_neurons), int64; no neurons for `method = "mean"`.
    """

    baseline = get_baseline(settings.baseline)
    options = baseline_options(settings)
    members = {
        name: [index for index, other in enumerate(residuals.harmful_classes) if other == name]
        for name in class_names
    }
    n_layers = residuals.harmful.shape[1]
    directions: list[Tensor] = []
    hits: list[Tensor] = []
    for index in range(n_layers):
        # One layer at a time, so that differences of all layers never exist beside the residuals.
        differences = baseline(residuals.layer(index), options)
        samples = [differences[members[name]].numpy() for name in class_names]
        if settings.method is Method.MEAN:
            means = [torch.from_numpy(sample.mean(axis=0, dtype=np.float64)) for sample in samples]
            directions.append(torch.stack(means))
            hits.append(torch.zeros(len(class_names), 0, dtype=torch.int64))
        else:
            maps = train_maps(samples, som_settings(settings), backend=settings.som_backend)
            directions.append(torch.cat([winning_neurons(item, settings.winners) for item in maps]))
            hits.append(torch.from_numpy(np.stack([item.hits for item in maps]).astype(np.int64)))
        if progress is not None:
            progress(index + 1, n_layers)
    n_winners = 1 if settings.method is Method.MEAN else settings.winners
    names = tuple(
        name if n_winners == 1 else f"{name} {rank + 1}"
        for name in class_names
        for rank in range(n_winners)
    )
    return torch.stack(directions), torch.stack(hits), names


def winning_neurons(trained: TrainedMap, count: int) -> Tensor:
    """
    Returns the weights of the densest neurons. Tensor of shape (count, hidden_size), float64.

    Where fewer neurons win, as at the embedding of a common last token, the rest are zero: no direction.
    """

    n_winning = min(count, int((trained.hits > 0).sum()))
    found = torch.from_numpy(trained.vectors(trained.densest(n_winning)))
    return F.pad(found, (0, 0, 0, count - n_winning))


def som_settings(settings: ContrastSettings) -> SomSettings:
    """Returns the settings of the maps alone."""

    return SomSettings(
        rows=settings.som_rows,
        columns=settings.som_columns,
        iterations=settings.som_iterations,
        sigma=settings.som_sigma,
        learning_rate=settings.som_learning_rate,
        neighborhood=settings.som_neighborhood,
        topology=settings.som_topology,
        seed=settings.seed,
    )


def orthogonalize(
    vectors: Tensor, mean_direction: Tensor, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """
    Returns the right singular vectors of each layer's directions, and their singular values.

    D_l = U S Vᵀ; the rows of Vᵀ, ordered by singular value, replace the directions, each with the sign that
    gives it a non-negative product with the mean direction. Where D_l has a lower rank, rows are zero.

    `vectors`: Tensor of shape (n_layers + 1, n_directions, hidden_size), float64.
    `mean_direction`: Tensor of shape (n_layers + 1, hidden_size).
    Returns tensors of shape (n_layers + 1, rank, hidden_size) and (n_layers + 1, rank).
    """

    _, singular_values, rows = torch.linalg.svd(vectors, full_matrices=False)
    n_rows = min(rank or rows.shape[1], rows.shape[1])
    singular_values, rows = singular_values[:, :n_rows], rows[:, :n_rows]
    # Directions below rounding are arbitrary: an ablation along them would be noise.
    relative = 1e-6 * singular_values[:, :1]
    meaningful = (singular_values > relative) & (singular_values > 0)
    signs = torch.where((rows * mean_direction[:, None]).sum(-1) < 0, -1.0, 1.0)
    rows = rows * (signs * meaningful)[..., None]
    return rows, singular_values * meaningful


def unmatched_norms(
    residuals: PoolResiduals,
    class_names: Sequence[str],
    settings: ContrastSettings,
    as_trained: Tensor,
) -> Tensor:
    """
    Returns the lengths that the unmatched baseline gives for the same classes and layers.

    Tensor of shape (n_layers + 1, n_directions). After SVD these are the singular values of the unmatched
    directions.
    """

    if settings.baseline == "unmatched" and settings.control is Control.NONE:
        unmatched = as_trained
    else:
        unmatched, _, _ = class_directions(
            residuals, class_names, settings.model_copy(update={"baseline": "unmatched"})
        )
    if not settings.svd:
        return unmatched.norm(dim=-1)
    singular_values = torch.linalg.svdvals(unmatched)
    n_values = singular_values.shape[1]
    return singular_values[:, : min(settings.svd_rank or n_values, n_values)]


def random_directions(vectors: Tensor, seed: int) -> Tensor:
    """
    Returns random directions of the same count, norms and mutual cosines: the floor for every comparison.

    With D = U S Vᵀ, the result is U S Qᵀ with Q a random orthonormal basis of the same size, so that the
    Gram matrix of the directions is exactly that of D.

    Tensor of shape (n_layers + 1, n_directions, hidden_size), float64, to one of the same shape.
    """

    generator = torch.Generator().manual_seed(seed)
    left, singular_values, rows = torch.linalg.svd(vectors, full_matrices=False)
    noise = torch.randn(
        vectors.shape[0], vectors.shape[2], rows.shape[1], generator=generator, dtype=vectors.dtype
    )
    basis, _ = torch.linalg.qr(noise)
    return (left * singular_values[:, None]) @ basis.transpose(1, 2)
