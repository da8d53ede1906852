# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast run`: abliterates a model through Heretic 1.4."""

import sys
from collections.abc import Sequence

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


def choose_baseline() -> str:
    """Asks the user for the contrast baseline, in Heretic's style. Raises `KeyboardInterrupt` when the user leaves the menu."""

    import questionary
    from questionary import Choice, Style

    baseline = questionary.select(
        "Which contrast baseline do you want to use?",
        choices=[Choice(title=title, value=name) for name, title in BASELINE_CHOICES.items()],
        style=Style([("highlighted", "reverse")]),
    ).ask()
    if baseline is None:
        raise KeyboardInterrupt
    return str(baseline)


def main(arguments: Sequence[str]) -> None:
    """
    Runs Heretic 1.4 with the plugin.

    Raises `ContrastError` when the settings do not work, or this Heretic needs no launcher.
    """

    require_heretic("run", arguments)
    settings = load_settings(HostSettings, PROGRAM, arguments)
    settings.contrast.require_single_configuration()
    undecided = not {"baseline", "preset", "directions"} & settings.contrast.model_fields_set
    headless = settings.trial_index is not None or settings.model_action is not None
    can_be_asked = sys.stdin is not None and sys.stdin.isatty()
    if undecided and not headless and can_be_asked and settings.evaluate_model is None:
        arguments = ["--contrast.baseline", choose_baseline(), *arguments]
        settings = load_settings(HostSettings, PROGRAM, arguments)

    # Heavy imports come last, so that bad settings are answered at once.
    from ..hosts import heretic14
    from ..modifier import ContrastAbliteration

    heretic14.run(settings, ContrastAbliteration)
