# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast run`: abliterates a model through Heretic 1.4."""

from collections.abc import Collection, Sequence

from ..hosts.arguments import PROGRAM
from ..hosts.installed import require_heretic
from ..hosts.settings import HostSettings, load_settings

BASELINE_CHOICES = {
    "unmatched": "Unmatched: the mean of general harmless prompts (what Heretic does)",
    "matched": "Matched: harmless prompts on the subject of each harm category",
    "mixed": "Mixed: halfway between unmatched and matched",
    "nearest": "Nearest: the general harmless prompts most like each harmful one",
    "residualized": "Residualized: unmatched, without what the subjects alone contribute",
}


DIRECTION_CHOICES = {
    "mean": "One: the difference in means (what Heretic does; nothing was better in our measurements)",
    "som": "One self-organizing map per harm category (the paper)",
}


def choose_directions(given: Collection[str]) -> list[str]:
    """Asks for what decides the directions and is not given: the contrast baseline, and how many there are. Returns flags."""

    from ..hosts.answers import choose

    flags = []
    if "baseline" not in given:
        flags += [
            "--contrast.baseline",
            choose("Which contrast baseline do you want to use?", BASELINE_CHOICES),
        ]
    if not {"method", "classes"} & set(given):
        method = choose("How many directions do you want to ablate?", DIRECTION_CHOICES)
        if method == "som":
            flags += ["--contrast.method", "som", "--contrast.classes", "category"]
    return flags


def main(arguments: Sequence[str]) -> None:
    """Raises `ContrastError` when the settings do not work, or this Heretic needs no launcher."""

    require_heretic("run", arguments)
    settings = load_settings(HostSettings, PROGRAM, arguments)
    settings.contrast.require_single_configuration()
    given = settings.contrast.model_fields_set
    undecided = not {"preset", "directions"} & given
    headless = settings.trial_index is not None or settings.model_action is not None
    if undecided and not headless and settings.evaluate_model is None:
        from ..hosts.answers import has_terminal

        if has_terminal():
            arguments = [*choose_directions(given), *arguments]
            settings = load_settings(HostSettings, PROGRAM, arguments)

    # Heavy imports come last, so that bad settings are answered at once.
    from ..hosts import heretic14
    from ..modifier import ContrastAbliteration

    heretic14.run(settings, ContrastAbliteration)
