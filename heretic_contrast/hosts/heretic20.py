# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A headless run of Heretic 2.0, which loads the modifier by itself.

`heretic` takes the settings of a plugin from `config.toml` alone. A command of this package has them on its own command line,
and hands them over where Heretic makes its settings.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import heretic.main
import heretic.plugin
import heretic.utils
import rich.traceback
from heretic.config import Settings, SingleDatasetSpecification
from heretic.scorers.keyword_rate import KeywordRate

from ..errors import ContrastError, raising_causes
from ..outputs import require_writable_directory
from ..processes import alone_in
from ..prompts import Prompt, load_pool
from ..search.parameters import Parameters
from ..settings import PromptSources
from .model_folder import replaced_as_a_whole, with_final_name
from .record import Made
from .settings import PLUGIN, TABLE, HostSettings, listed, prompt_sources
from .surface import Context, heretic_prompts, log

if TYPE_CHECKING:
    from ..modifier import ContrastAbliteration


def plugin_settings(settings: HostSettings) -> dict[str, Any]:
    pools = {
        "KeywordRate": settings.bad_evaluation_prompts,
        "KLDivergence": settings.good_evaluation_prompts,
    }
    return {
        **{
            name: getattr(settings, name)
            for name in Settings.model_fields
            if name in settings.model_fields_set
        },
        "modifiers": [{"plugin": PLUGIN}],
        "modifier": {
            TABLE: settings.contrast.model_dump(
                mode="json", include=settings.contrast.model_fields_set, exclude_none=True
            )
        },
        "scorer": {name: {"prompts": specifications(sources)} for name, sources in pools.items()},
    }


def specifications(sources: PromptSources) -> list[dict[str, Any]]:
    known = set(SingleDatasetSpecification.model_fields)
    return [source.model_dump(include=known, exclude_none=True) for source in listed(sources)]


def load_prompts(settings: Any, specification: Any) -> list[Any]:
    """Returns the prompts of a scorer of Heretic's, which would take each line of any file for one."""

    return heretic_prompts(load_pool(prompt_sources(specification), "evaluation"), settings)


def run(settings: HostSettings, modifier_class: type["ContrastAbliteration"]) -> None:
    """
    Runs Heretic 2.0 headless; the model that it saves replaces another as a whole.

    Raises `ContrastError` when the settings do not work, or the model was not saved.
    """

    settings.contrast.require_single_configuration()
    # Without a folder to save to, `heretic` itself would do.
    assert settings.save_directory is not None
    folder = Path(settings.save_directory)
    for directory in (Path(settings.study_checkpoint_dir), folder):
        require_writable_directory(directory)
    rich.traceback.install()
    # Heretic does not tell a modifier what it saves, and modifies the model for the last time before that.
    modified: list[tuple[ContrastAbliteration, Context, Parameters]] = []
    failures: list[Exception] = []
    modify_model, reset_model = modifier_class.modify_model, modifier_class.reset_model

    def is_saved() -> bool:
        # Heretic writes the tokenizer behind the weights, and then loads the original again: nobody needs it, and it may fail.
        return (unfinished / "tokenizer_config.json").exists()

    def reset(modifier: "ContrastAbliteration", ctx: Context) -> None:
        if not is_saved():
            reset_model(modifier, ctx)

    def remember(modifier: "ContrastAbliteration", ctx: Context, parameters: Parameters) -> None:
        if is_saved():
            return
        modified[:] = [(modifier, ctx, parameters)]
        failures.clear()
        modify_model(modifier, ctx, parameters)

    def format_exception(error: Exception) -> str:
        # Heretic shows an error, and goes on.
        failures.append(error)
        return str(heretic.utils.format_exception(error))

    def show(*values: Any, **options: Any) -> None:
        log(*with_final_name(values, folder), **options)

    with alone_in(folder, "choose another folder"), replaced_as_a_whole(folder) as unfinished:
        given = {**plugin_settings(settings), "save_directory": str(unfinished)}

        class GivenSettings(Settings):
            def __init__(self, **stored: Any) -> None:
                # A study of other settings has another checkpoint, so that what is stored of one decides nothing else.
                super().__init__(**{**stored, **given})

        with (
            # What stands on the command line is in the settings already.
            patch.multiple(sys, argv=["heretic"]),
            patch.multiple(modifier_class, modify_model=remember, reset_model=reset),
            patch.multiple(
                heretic.main,
                Settings=GivenSettings,
                format_exception=format_exception,
                print=show,
            ),
            patch.multiple(heretic.plugin, load_prompts=load_prompts),
            raising_causes(),
        ):
            heretic.main.run()
        if failures or not any(unfinished.glob("*.safetensors")):
            raise ContrastError(
                f"Heretic did not save the model to {folder}: its message above says why, and what was there before is kept."
            )
        modifier, ctx, parameters = modified[0]
        made = Made(
            modifier.heretic_settings,
            modifier.settings,
            replace(modifier.model(ctx), known_identity=modifier.identity),
            modifier.directions,
            parameters,
            {} if modifier.known_pools is None else modifier.known_pools.named(),
        )
        made.record(unfinished).write(unfinished)


def count_refusals(
    settings: HostSettings, prompts: Sequence[Prompt], responses: Sequence[str]
) -> int:
    class Given:
        def load_prompts(self, specification: Any) -> list[Any]:
            return heretic_prompts(prompts, settings)

        def get_responses(self, asked: list[Any]) -> list[str]:
            return list(responses)

    scorer = KeywordRate(heretic_settings=settings, settings=KeywordRate.validate_settings({}))
    # It announces the dataset that prompts are loaded from, and these are not.
    with redirect_stdout(StringIO()):
        scorer.init(Given())
    return round(scorer.get_score(Given()).value * len(responses))
