# SPDX-License-Identifier: AGPL-3.0-or-later

"""
From pools of prompts, by their residuals, to directions (paper, section 3.2).

Difference vectors come from a contrast baseline, a self-organizing map per class and layer (or the mean) turns
them into class directions, an optional SVD orthogonalizes those, and the scale decides their length.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.markup import escape
from torch import Tensor

from .. import __version__
from ..errors import ContrastError, one_line
from ..language_model import LanguageModel, Progress
from ..prompts import prompts_digest
from ..settings import EXTRACTION_FIELDS, ContrastSettings
from ..vectors import unit_vectors
from .baselines import Residuals, get_baseline, mean
from .classes import not_excluded, select_classes
from .directions import Directions, names_of_winners
from .pools import (
    Log,
    Pools,
    class_names_of,
    filter_by_behavior,
    needs_model,
    select,
    with_categories,
)
from .residuals import cached_residuals
from .som import SomSettings, TrainedMap, train_maps
from .transforms import SHARED, around_shared, orthogonalize, random_directions, without_harmless


def direction_names(class_names: Sequence[str], settings: ContrastSettings) -> tuple[str, ...]:
    """Returns the names of the directions that classes get, of which SVD may find fewer in a small model."""

    n_winners = 1 if settings.method == "mean" else settings.winners
    names = names_of_winners(class_names, n_winners)
    if settings.svd:
        return tuple(f"svd {rank}" for rank, _ in enumerate(names[: settings.svd_rank], 1))
    return (SHARED, *names) if settings.shared_direction and len(names) > 1 else names


def names_before_extraction(pools: Pools, settings: ContrastSettings) -> tuple[str, ...] | None:
    """Returns the names of the directions that pools give, or None where the model decides what becomes of the prompts."""

    if needs_model(settings) or settings.drop_misbehaving:
        return None
    return direction_names(select(pools, settings).names, settings)


def extract(
    model: LanguageModel,
    pools: Pools,
    settings: ContrastSettings,
    log: Log,
    progress: Progress | None = None,
    max_response_length: int = 50,
) -> Directions:
    """
    Extracts directions for a loaded model.

    `pools`: as `load_pools` gives them. `max_response_length`: in tokens, of the responses that show whether a prompt is
    refused. Raises `ContrastError` as `load_pools` and `extract_directions` do.
    """

    model = replace(model.identified(), winsorization_quantile=settings.winsorization_quantile)
    # Those that a filter drops are chosen by the model's responses, so that nothing may be judged on them either.
    digests = pools.digests()
    if needs_model(settings):
        log("* Asking the model for the categories...")
        pools = with_categories(pools, settings, model)
    if settings.drop_misbehaving:
        log("* Checking which prompts the model refuses...")
        pools = filter_by_behavior(pools, model, max_response_length)
        for name, dropped, total in pools.dropped:
            log(f"* Dropped [bold]{dropped}[/] of [bold]{total}[/] {name} prompts")
    _log_classes(pools, settings, log)
    log(
        f"* Obtaining residuals for [bold]{len(pools.harmful)}[/] harmful, [bold]{len(pools.bulk)}[/] harmless and "
        f"[bold]{len(pools.matched)}[/] matched prompts..."
    )
    cache = None if settings.residual_cache is None else Path(settings.residual_cache)
    harmful, bulk, matched = (
        cached_residuals(model, pool, cache, progress) for pool in pools.named().values()
    )
    classes, matched_classes = (class_names_of(pool) for pool in (pools.harmful, pools.matched))
    residuals = Residuals(harmful, classes, bulk, matched, matched_classes)
    log(f"* Extracting directions (baseline [bold]{settings.baseline}[/])...")
    return extract_directions(
        residuals,
        settings,
        provenance={
            "model": model.name,
            "revision": model.revision,
            "identity": model.identity(),
            "system_prompt": model.system_prompt,
            "response_prefix": model.response_prefix,
            "prompts": {name: prompts_digest(pool) for name, pool in pools.named().items()},
            "known_prompts": sorted(digests),
            "sources": list(pools.sources),
            "dropped": [list(entry) for entry in pools.dropped],
        },
    )


def _log_classes(pools: Pools, settings: ContrastSettings, log: Log) -> None:
    """Says what gets directions, before any residual is collected, so that no time is lost to pools that do not work."""

    if settings.classes == "category":
        counts = Counter(prompt.category for prompt in pools.harmful)
        listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=str))
        log(f"* Harmful prompts by category: {escape(one_line(listed))}")
    for name, pool in pools.named().items():
        n_repeated = len(pool) - len(set(pool))
        if n_repeated:
            log(f"* [bold]{n_repeated}[/] of the {len(pool)} {name} prompts repeat another")
    selection = select(pools, settings)
    if selection.note:
        log(f"* {escape(one_line(selection.note))}")
    n_directions = len(selection.names) * (settings.winners if settings.method == "som" else 1)
    if settings.svd and (settings.svd_rank or 0) > n_directions:
        log(
            f"* All [bold]{n_directions}[/] singular vectors are kept, since there are no more of them"
        )


def extract_directions(
    residuals: Residuals,
    settings: ContrastSettings,
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """
    Extracts directions from residuals (paper, section 3.2).

    Deterministic: the same residuals, settings and versions give the same bytes.

    Raises `ContrastError` when residuals are not finite, a class is too small, a baseline lacks the prompts it
    needs, or no class is left.
    """

    _require_usable(residuals)
    # 1. The classes that get directions.
    selection = select_classes(residuals.harmful_classes, residuals.matched_classes, settings)
    # Prompts of classes that are too small for a direction of their own are part of Heretic's.
    everything = not_excluded(residuals.harmful_classes, settings.exclude_categories)
    bulk_means = _layer_means(residuals.bulk)
    mean_direction = _layer_means(residuals.harmful, everything) - bulk_means
    residuals, class_names = residuals.of(selection), selection.names
    # 2. Differences from the baseline, and a map (or a mean) of those of each class.
    as_trained, hits = class_directions(residuals, class_names, settings)
    names = direction_names(class_names, settings)
    # 3. What may change or replace them.
    n_shared = int(settings.shared_direction and len(names) > 1)
    if n_shared:
        as_trained = torch.cat([mean_direction[:, None], as_trained], dim=1)
    if settings.orthogonalize_direction:
        as_trained = without_harmless(as_trained, bulk_means)
    if settings.control == "random":
        as_trained = random_directions(as_trained, settings.seed)
    # 4. SVD, or what classes add to what they share.
    if settings.svd:
        vectors, norms = orthogonalize(as_trained, mean_direction, settings.svd_rank)
        names = names[: vectors.shape[1]]
    elif n_shared:
        vectors = around_shared(as_trained)
    else:
        vectors, norms = unit_vectors(as_trained)
    # 5. Scale.
    if settings.scale == "unmatched":
        norms = _unmatched_norms(residuals, class_names, settings, bulk_means, as_trained)
    if settings.scale != "unit":
        vectors = vectors * norms[..., None]
    tensors = {
        "tensor": vectors.float().contiguous(),
        "class_directions": as_trained[:, n_shared:].float().contiguous(),
        "mean_direction": mean_direction.float(),
    }
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ContrastError(
            "The residuals are so large that their directions do not fit into float32, so none can be extracted: look for "
            "a broken model."
        )
    directions = Directions(
        **tensors,
        names=names,
        aligned=not settings.svd,
        class_names=tuple(class_names),
        hits=hits,
        provenance={
            **(provenance or {}),
            "settings": settings.model_dump(mode="json", include=EXTRACTION_FIELDS),
            "ablation": settings.ablation(),
            "n_prompts": {
                "harmful": dict(sorted(Counter(residuals.harmful_classes).items())),
                "harmless": len(residuals.bulk),
                "matched": sum(name in class_names for name in residuals.matched_classes),
            },
            "versions": {
                "heretic-contrast": __version__,
                **{name: version(name) for name in ("numba", "numpy", "torch", "transformers")},
            },
        },
    )
    directions.provenance["digest"] = directions.digest()
    return directions


def _require_usable(residuals: Residuals) -> None:
    """Raises `ContrastError` when residuals are not finite, or a pool is empty that every baseline needs."""

    for what, tensor, needed in (
        ("harmful", residuals.harmful, True),
        ("general harmless", residuals.bulk, True),
        ("matched harmless", residuals.matched, False),
    ):
        # One prompt at a time, since the test takes more memory than what is tested.
        if not all(bool(torch.isfinite(rows).all()) for rows in tensor):
            raise ContrastError(
                f"The residuals of the {what} prompts are not all finite, so no direction can be extracted: "
                "load the model with another dtype, for example --dtypes float32."
            )
        if needed and len(tensor) == 0:
            raise ContrastError(f"The pool of {what} prompts is empty: give one with prompts.")


def _layer_means(residuals: Tensor, rows: slice | Sequence[int] = slice(None)) -> Tensor:
    """Returns the means over prompts, one layer at a time. Tensor of shape (n_layers + 1, hidden_size), float64."""

    return torch.stack([mean(residuals[rows, index]) for index in range(residuals.shape[1])])


def class_directions(
    residuals: Residuals, class_names: Sequence[str], settings: ContrastSettings
) -> tuple[Tensor, Tensor]:
    """
    Returns class directions as trained, and the hits of their maps.

    Directions: Tensor of shape (n_layers + 1, n_classes * winners, hidden_size), float64.
    Hits: Tensor of shape (n_layers + 1, n_classes, n_neurons), int64; no neurons for `method = "mean"`.
    """

    baseline = get_baseline(settings.baseline)
    members = {
        name: [index for index, other in enumerate(residuals.harmful_classes) if other == name]
        for name in class_names
    }
    directions: list[Tensor] = []
    hits: list[Tensor] = []
    for index in range(residuals.harmful.shape[1]):
        # One layer at a time, so that differences of all layers never exist beside the residuals.
        differences = baseline(residuals.layer(index), settings)
        samples = [differences[members[name]].numpy() for name in class_names]
        if settings.method == "mean":
            means = [torch.from_numpy(sample.mean(axis=0, dtype=np.float64)) for sample in samples]
            directions.append(torch.stack(means))
            hits.append(torch.zeros(len(class_names), 0, dtype=torch.int64))
        else:
            maps = train_maps(samples, _som_settings(settings))
            directions.append(torch.cat([winning_neurons(item, settings.winners) for item in maps]))
            hits.append(torch.from_numpy(np.stack([item.hits for item in maps]).astype(np.int64)))
    return torch.stack(directions), torch.stack(hits)


def winning_neurons(trained: TrainedMap, count: int) -> Tensor:
    """
    Returns the weights of the densest neurons. Tensor of shape (count, hidden_size), float64.

    Where fewer neurons win, as at the embedding of a common last token, the rest are zero: no direction.
    """

    n_winning = min(count, int((trained.hits > 0).sum()))
    found = torch.from_numpy(trained.vectors(trained.densest(n_winning)))
    return F.pad(found, (0, 0, 0, count - n_winning))


def _som_settings(settings: ContrastSettings) -> SomSettings:
    names = [item.name for item in fields(SomSettings) if item.name != "seed"]
    own = {name: getattr(settings, f"som_{name}") for name in names}
    return SomSettings(**own, seed=settings.seed)


def _unmatched_norms(
    residuals: Residuals,
    class_names: Sequence[str],
    settings: ContrastSettings,
    bulk_means: Tensor,
    as_trained: Tensor,
) -> Tensor:
    """
    Returns the lengths that the unmatched baseline gives for the same classes and layers under the same settings.

    Tensor of shape (n_layers + 1, n_directions). After SVD these are the singular values of the unmatched
    directions.
    """

    # Random directions have the lengths and the singular values of those that they replace.
    unmatched = as_trained
    if settings.baseline != "unmatched":
        unmatched, _ = class_directions(
            residuals, class_names, settings.model_copy(update={"baseline": "unmatched"})
        )
        if settings.orthogonalize_direction:
            unmatched = without_harmless(unmatched, bulk_means)
    if not settings.svd:
        return unmatched.norm(dim=-1)
    return torch.linalg.svdvals(unmatched)[:, : settings.svd_rank]
