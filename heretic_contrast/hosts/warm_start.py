# SPDX-License-Identifier: AGPL-3.0-or-later

"""The trials that a study of Heretic 1.4 begins with: from a sweep, or an earlier study."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from ..builtin import model_name
from ..errors import ContrastError
from ..evaluation.cells import SweepResult, single_cells
from ..identity import Identity
from ..leases import open_storage, without_password
from ..search.stopping import front
from ..settings import ContrastSettings, has_several_directions
from .guidance import Values, measured
from .studies import IDENTITY_KEY, STUDY_NAME

SWEPT = "swept directions"
"""What the identity of a sweep holds the digest of its configuration's directions by."""

MAX_FIRST_TRIALS = 10
"""A sweep may have as many cells on its front as it has prompts, which differ in little."""


def first_trials(settings: ContrastSettings, model: str) -> tuple[list[Values], Identity]:
    """
    Returns trials to begin with, the fewest refusals first, and what decided their numbers; empty where nothing says it.

    Raises `ContrastError` when they cannot be read, or do not fit.
    """

    if settings.warm_start is None:
        return [], {}
    source = settings.warm_start
    place, path = without_password(source), Path(source)
    is_url = "://" in source
    if not is_url and path.is_dir():
        studies = [str(item) for item in sorted(path.rglob("*.jsonl"))]
        raise ContrastError(
            f"{path} is a folder: give the file of an earlier study for a warm start, there "
            f"{'is ' + ', '.join(studies[:3]) if studies else 'is none in it'}."
        )
    if not is_url and not path.is_file():
        raise ContrastError(
            f"There is no file {path} for a warm start: give the sweep.json of a sweep, or an earlier study (.jsonl, .journal)."
        )
    read = _of_study if is_url or path.suffix in (".jsonl", ".journal") else _of_sweep
    name, found, identity = read(source, settings)
    if model_name(name) != model_name(model):
        raise ContrastError(
            f"{place} was made for {model_name(name)} and not for {model_name(model)}: give one of this model for a warm start."
        )
    if not found:
        raise ContrastError(
            f"Nothing in {place} refuses less than the unmodified model: leave out the warm start."
        )
    return found[:MAX_FIRST_TRIALS], identity


def _of_study(source: str, settings: ContrastSettings) -> tuple[str, list[Values], Identity]:
    """
    Returns the model of a study, the parameters of its front, and the identity of the first of it.

    What classes add to a shared direction is 0 where it had none.
    """

    try:
        if source.startswith("sqlite:///") and not Path(source[10:].split("?")[0]).is_file():
            # It would be made.
            raise FileNotFoundError
        study = optuna.load_study(study_name=STUDY_NAME, storage=open_storage(source))
        stored = json.loads(study.user_attrs["settings"])
        # Plain Heretic has none of the plugin's.
        model, contrast = str(stored["model"]), dict(stored.get("contrast", {}))
        points = {trial.number: point for trial in study.trials if (point := measured(trial))}
    except ContrastError:
        raise
    except Exception as error:
        # Database drivers raise errors of their own.
        raise ContrastError(
            f"{without_password(source)} holds no study of Heretic's: give one for a warm start, or the sweep.json of a sweep."
        ) from error
    trials = [study.trials[number] for number in front(points)]
    # One direction, which has no scale, is ablated alike with all of them, here as there.
    if has_several_directions(settings) and any(
        name.startswith("scale.") for trial in trials for name in trial.params
    ):
        for name in ("composition", "equal_effective_weight"):
            own = getattr(settings, name)
            other, flag = contrast.get(name, own), f"--contrast.{name.replace('_', '-')}"
            if other != own:
                raise ContrastError(
                    f"The study {without_password(source)} was made with {flag} {other}, and this one would be with {own}: give "
                    f"{flag} {other}, or leave out the warm start."
                )
    # Plain Heretic writes none.
    identity: Identity = trials[0].user_attrs.get(IDENTITY_KEY, {}) if trials else {}
    return model, [{"rest": 0.0, **trial.params} for trial in trials], identity


def _of_sweep(path: str, settings: ContrastSettings) -> tuple[str, list[Values], Identity]:
    """Returns the model of a sweep, what makes a trial of each cell on the front of single layers, and the sweep's identity."""

    (configuration,) = settings.configurations()
    try:
        sweep = SweepResult.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        swept = dict(sweep.settings.get("directions", {}).get(configuration, {}))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ContrastError(
            f"{path} cannot be read as a sweep: give the sweep.json of heretic-contrast sweep for a warm start."
        ) from error
    strength = "effective" if settings.equal_effective_weight else "weight"
    if (configuration, strength) not in sweep.configurations():
        there = ", ".join(f"{name} ({kind})" for name, kind in sweep.configurations())
        raise ContrastError(
            f"The sweep {path} has no configuration {configuration} ({strength}) but {there}: sweep it, or choose one of these for "
            "the study."
        )
    composition = swept.get("composition", settings.composition)
    if composition != settings.composition:
        raise ContrastError(
            f"The sweep {path} has swept {configuration} with the composition {composition}, and the study ablates with "
            f"{settings.composition}: give --contrast.composition {composition}, or sweep it with {settings.composition}."
        )
    # Also those that only a synergy test has measured.
    cells = single_cells(sweep.cells, configuration, strength)
    points = {
        index: (cell.measurement.refusals, cell.measurement.kl_divergence)
        for index, cell in enumerate(cells)
        if cell.measurement.refusals < sweep.baseline.refusals
        and math.isfinite(cell.measurement.kl_divergence)
    }
    # Where some are named, the others and the embeddings were left alone.
    components = sweep.settings.get("components") or []
    found = [
        {
            "direction_scope": "per layer",
            "rest": 1.0,
            "scale.": 1.0,
            "component.max_weight": 0.0 if components else cell.weight,
            **{f"{name}.max_weight": cell.weight for name in components},
            "embeddings.max_weight": 0.0 if cell.layers[0] or components else cell.weight,
            "component.max_weight_position": cell.layers[0],
            "component.min_weight": 0.0,
            "component.min_weight_distance": 0.0,
        }
        for cell in (cells[index] for index in front(points))
    ]
    directions = {SWEPT: swept["digest"]} if "digest" in swept else {}
    return sweep.model, found, {**sweep.identity, **directions}


def fitted(
    values: Values, distributions: Mapping[str, BaseDistribution], shared: Mapping[str, str]
) -> tuple[Values, bool]:
    """
    Returns the values of the parameters that a study has, those beyond their ranges at the nearest end, and whether layers or weights are.

    `shared`: the component whose values one has that the values do not know (see `shared_components`).
    """

    found, is_moved = {}, False
    for name, distribution in distributions.items():
        component, _, parameter = name.rpartition(".")
        kind = "scale." if name.startswith("scale.") else f"component.{parameter}"
        keys = (name, f"{shared.get(component)}.{parameter}", kind)
        key = next((key for key in keys if key in values), None)
        if key is None:
            continue
        found[name] = values[key]
        if isinstance(distribution, FloatDistribution):
            found[name] = min(max(float(values[key]), distribution.low), distribution.high)
            if parameter in ("max_weight", "max_weight_position"):
                is_moved |= found[name] != values[key]
    return found, is_moved
