# SPDX-License-Identifier: AGPL-3.0-or-later

"""Contrast baselines and multi-directional refusal ablation for Heretic (arXiv:2603.22061)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .directions.directions import Directions as Directions
    from .directions.extraction import extract_directions as extract_directions
    from .evaluation.sweep import sweep as sweep
    from .hosts.surface import wrap as wrap
    from .modifier import ContrastAbliteration as ContrastAbliteration
    from .response_scorers import FalseRefusals as FalseRefusals
    from .response_scorers import RefusalTiers as RefusalTiers
    from .scorers import FixedWeightSweep as FixedWeightSweep
    from .scorers import TeacherForcedDivergence as TeacherForcedDivergence

# Names are imported on first use, since PyTorch and Heretic take seconds and --help needs neither. Heretic 2.0 can load this
# file by its path, outside of any package, so that theirs are absolute.
_HOMES = {
    "ContrastAbliteration": "heretic_contrast.modifier",
    "Directions": "heretic_contrast.directions.directions",
    "FalseRefusals": "heretic_contrast.response_scorers",
    "FixedWeightSweep": "heretic_contrast.scorers",
    "RefusalTiers": "heretic_contrast.response_scorers",
    "TeacherForcedDivergence": "heretic_contrast.scorers",
    "extract_directions": "heretic_contrast.directions.extraction",
    "sweep": "heretic_contrast.evaluation.sweep",
    "wrap": "heretic_contrast.hosts.surface",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
