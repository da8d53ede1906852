# SPDX-License-Identifier: AGPL-3.0-or-later

"""The model card that Heretic 1.4 writes, with the plugin and its settings."""

import os
from typing import TYPE_CHECKING

from .. import __version__
from ..settings import EXTRACTION_FIELDS

if TYPE_CHECKING:
    from ..modifier import ContrastAbliteration

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
        excluded = excluded | {"preset", "som_backend"} | EXTRACTION_FIELDS
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
