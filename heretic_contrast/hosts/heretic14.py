# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The host for Heretic 1.4: runs the Heretic 2.0 modifier inside 1.4's own `run()`.

Heretic 1.4 has no plugins, but its `run()` reads the classes and functions that it works with from its module's
globals. The host substitutes a few of them for one run, and restores them.
"""

import json
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import heretic.evaluator
import heretic.main
import heretic.utils
import rich.traceback
import torch
from heretic.config import ExportStrategy
from heretic.config import RowNormalization as HereticRowNormalization
from optuna import Trial
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter
from questionary import Choice
from torch import Tensor

from .. import __version__
from ..ablation.lora import require_mergeable
from ..directions.sources import DirectionSources
from ..errors import ContrastError, find_cause
from ..files import require_writable_directory, require_writable_file
from ..identity import Identity, differences, identify, program_digest
from ..journal import CheckedJournal
from ..prompts import Prompt, load_pool
from ..search.parameters import Parameters, configuration_digest
from ..search.samplers import make_sampler
from ..settings import EXTRACTION_FIELDS
from ..tiers import responses, rules, text
from ..tiers.responses import classify_response
from .checkpoint import repair_checkpoints
from .loading import ChatModel
from .lora_targets import adapters_on_named_modules
from .model_folder import CONFIGURATIONS, UNFINISHED, publish_model, require_other_folder
from .settings import HostSettings, prompt_sources
from .surface import heretic_prompts, language_model, log

if TYPE_CHECKING:
    from ..modifier import ContrastAbliteration

SEAMS = (
    "Settings",
    "Model",
    "Evaluator",
    "TPESampler",
    "load_prompts",
    "get_trial_parameters",
    "get_readme_intro",
    "prompt_select",
    "prompt_path",
    "upload_reproduce_folder",
    "format_exception",
    "JournalFileBackend",
)
"""The names in `heretic.main` that are substituted."""

OTHER_SEAMS = (
    # Heretic's evaluator loads its own prompts.
    (heretic.evaluator, "load_prompts"),
    # The model card of Heretic calls this one in its own module.
    (heretic.utils, "get_trial_parameters"),
)
"""Where else these names are substituted."""

POOLS = {
    "good_prompts": "harmless",
    "bad_prompts": "harmful",
    "good_evaluation_prompts": "harmless evaluation",
    "bad_evaluation_prompts": "harmful evaluation",
}
"""Heretic's own pools: the names of their settings, and what messages call them."""

TRIAL_KEY = "contrast"
"""The trial's user attribute that holds the plugin's parameters."""

IDENTITY_KEY = "identity"
"""The trial's user attribute that says what decided its numbers."""

CHECKPOINT_QUESTION = "How would you like to proceed?"
TRIAL_QUESTION = "Which trial do you want to use?"
ACTION_QUESTION = "What do you want to do with the decensored model?"
EXPORT_QUESTION = "How do you want to export the model?"
REPRODUCIBILITY_QUESTION = "Which reproducibility information do you want to add?"
ACTIONS = {
    "none": "",
    "save": "Save the model to a local folder",
    "upload": "Upload the model to Hugging Face",
}


class HostModel(ChatModel):
    """Heretic 1.4's model, with LoRA adapters on request, as in Heretic 2.0."""

    lora_rank: int | None = None

    def apply_lora(self, rank: int) -> None:
        """Applies LoRA adapters of a rank, now and after every reload."""

        self.lora_rank = rank
        self._apply_lora()
        if self.settings.export_strategy == ExportStrategy.MERGE:
            # Hours before the merge.
            require_mergeable(self.model)

    def _apply_lora(self) -> None:
        # Heretic's constructor calls this before the directions are known.
        if self.lora_rank is None:
            return
        # Heretic reads the rank from its settings under "full" row normalization, and takes 1 otherwise.
        settings = self.settings  # type: ignore[has-type]
        self.settings = settings.model_copy(
            update={
                "row_normalization": HereticRowNormalization.FULL,
                "full_normalization_lora_rank": self.lora_rank,
            }
        )
        try:
            with adapters_on_named_modules(self):
                super()._apply_lora()
        finally:
            self.settings = settings

    def get_merged_model(self) -> Any:
        """
        Merges the adapters; those of a model that Heretic has quantized are applied anew to one in full precision.

        Raises `ContrastError` when the weights are kept as codes to which nothing can be added.
        """

        require_mergeable(self.model)
        return super().get_merged_model()

    def reset_model(self) -> bool:
        """Resets the model; the adapters are in place afterwards, which Heretic 2.0 reports as True."""

        super().reset_model()
        return True


class HostContext:
    """Heretic 2.0's plugin context, on top of Heretic 1.4's model."""

    def __init__(self, model: heretic.main.Model, settings: HostSettings) -> None:
        self._model = model
        self._settings = settings

    def get_model(self) -> Any:
        """Returns Heretic's model."""

        return self._model

    def get_responses(self, prompts: list[Any]) -> list[str]:
        """Returns the model's responses."""

        return self._model.get_responses_batched(prompts, skip_special_tokens=True)


class Host:
    """One run of the modifier inside Heretic 1.4."""

    def __init__(
        self, settings: HostSettings, modifier_class: type["ContrastAbliteration"]
    ) -> None:
        self.settings = settings
        self.modifier_class = modifier_class
        self.modifier: ContrastAbliteration | None = None
        self.context: HostContext | None = None
        self.evaluator: heretic.main.Evaluator | None = None
        self.identity: Identity = {}
        self.parameters: Parameters | None = None
        self.trial_was_chosen = False
        self.action_was_taken = False
        self.unfinished: Path | None = None
        self.failure: Exception | None = None
        self.model_was_saved = False
        self.was_interrupted = False
        self.pools: dict[str, list[Prompt]] = {}

    def settings_class(host) -> type[HostSettings]:
        """Returns the class that stands in for Heretic's settings, which gives those of this run to a study that goes on."""

        class Settings(type(host.settings)):  # type: ignore[misc]
            @classmethod
            def model_validate_json(cls, json_data: Any, **options: Any) -> HostSettings:
                return host.continued(json.loads(json_data))

        return Settings

    def continued(self, stored: dict[str, Any]) -> HostSettings:
        """
        Returns the settings that a study goes on with: those that are given, and what was decided when it began.

        `stored`: those that it began with. All that decides trials is equal, or it would be another study.
        """

        fields, given = type(self.settings).model_fields, self.settings.model_fields_set
        return self.settings.model_copy(
            update={
                name: TypeAdapter(fields[name].annotation).validate_python(stored[name])
                for name in ("seed", "batch_size", "response_prefix", "n_trials")
                if name not in given or getattr(self.settings, name) is None
            }
        )

    def load_prompts(self, settings: HostSettings, specification: Any) -> list[Any]:
        """
        Returns the prompts of one of Heretic's own pools, in any format; each is read once.

        Raises `ContrastError` when it cannot be read.
        """

        key = specification.model_dump_json()
        if key not in self.pools:
            name = next(name for name in POOLS if getattr(settings, name) == specification)
            self.pools[key] = load_pool(prompt_sources(specification), POOLS[name], f"--{name}.")
        return heretic_prompts(self.pools[key], settings)

    def start(self, model: HostModel) -> None:
        """Runs the modifier's `init` at the point where Heretic computes its own directions."""

        if self.modifier is None:
            settings = model.settings
            self.context = HostContext(model, settings)
            self.modifier = self.modifier_class(
                heretic_settings=settings, settings=settings.contrast
            )
            self.modifier.init(self.context)
            self.identity = self._identify(settings)

    def _identify(self, settings: HostSettings) -> Identity:
        """Returns what decides the trials of a study, after everything has been loaded."""

        assert self.modifier is not None and self.context is not None and self.evaluator is not None
        model = replace(
            language_model(self.context, settings), known_identity=self.modifier.identity
        )
        pools = {
            "harmful evaluation prompts": self.evaluator.bad_prompts,
            "harmless evaluation prompts": self.evaluator.good_prompts,
        }
        found = identify(
            model,
            {
                name: [Prompt(text=prompt.user, system=prompt.system) for prompt in prompts]
                for name, prompts in pools.items()
            },
            directions=configuration_digest(self.modifier.directions),
            rules=program_digest((responses, rules, text), classify_response),
        )
        # As a checkpoint gives it back.
        return dict(json.loads(json.dumps(found)))

    def _require_own(self, trials: Iterable[FrozenTrial]) -> None:
        """Raises `ContrastError` when trials were measured on something else than what has been loaded."""

        for trial in trials:
            different = differences(trial.user_attrs.get(IDENTITY_KEY, {}), self.identity)
            if different:
                raise ContrastError(
                    f"The checkpoint in {self.settings.study_checkpoint_dir} holds trials that were measured with other "
                    f"{different}: give --checkpoint-action restart to start from scratch, or another --study-checkpoint-dir."
                )

    def model_class(host) -> type[HostModel]:
        """Returns the class that stands in for Heretic's model."""

        class Model(HostModel):
            def get_residuals_mean(self, prompts: list[Any]) -> Tensor:
                # Heretic's own direction is never used, so its forward passes are saved.
                host.start(self)
                return torch.zeros(len(self.get_layers()) + 1, 1)

            def get_residuals_batched(self, prompts: list[Any]) -> Tensor:
                # Called for plots and printed geometry, which show the real residuals.
                host.start(self)
                return super().get_residuals_batched(prompts)

            def get_abliterable_components(self) -> list[str]:
                # Without components, Heretic leaves the search space to the plugin.
                return []

            def abliterate(self, *args: Any, **kwargs: Any) -> None:
                assert host.modifier is not None and host.context is not None
                assert host.parameters is not None
                host.modifier.modify_model(host.context, host.parameters)

        return Model

    def get_trial_parameters(self, trial: Any) -> dict[str, str]:
        """
        Returns what is shown of a trial's parameters.

        Heretic calls this once before each modification: with the live trial, which is sampled here, or with a stored
        one, which is restored here.
        """

        assert self.modifier is not None and self.context is not None
        if isinstance(trial, Trial):
            self._require_own(trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
            trial.set_user_attr(IDENTITY_KEY, self.identity)
            self.parameters = self.modifier.suggest_parameters(self.context, trial)
            trial.set_user_attr(TRIAL_KEY, self.parameters.to_dict())
        else:
            stored = trial.user_attrs.get(TRIAL_KEY)
            if stored is None:
                raise ContrastError(
                    f"Trial {trial.number + 1} of the checkpoint was not made by heretic-contrast: start from scratch."
                )
            self._require_own([trial])
            self.parameters = Parameters.from_dict(stored)
        return self.parameters.to_presentation_dict()

    def make_sampler(self, *args: Any, seed: int, n_startup_trials: int, **kwargs: Any) -> Any:
        """Returns the study's sampler."""

        assert self.modifier is not None
        contrast = self.modifier.settings
        # Heretic samples these itself; where they have no meaning they are kept out of the search.
        fixed = (
            {}
            if self.modifier.directions.aligned
            else {"direction_scope": "per layer", "direction_index": None}
        )
        return make_sampler(contrast.sampler, seed, n_startup_trials, fixed)

    def evaluator_class(host) -> type[heretic.main.Evaluator]:
        """Returns Heretic's evaluator, which may judge refusals by tiers."""

        class Evaluator(heretic.main.Evaluator):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                host.evaluator = self

            def is_refusal(self, response: str) -> bool:
                contrast = self.settings.contrast
                if contrast.refusal_classifier == "markers":
                    return super().is_refusal(response)
                # Heretic judges the responses in the order of its prompts, and hands over the response alone.
                prompt = self.bad_prompts[self.n_judged % len(self.bad_prompts)]
                self.n_judged += 1
                return classify_response(prompt.user, response).value in contrast.counted_tiers

            def count_refusals(self) -> int:
                self.n_judged = 0
                return super().count_refusals()

        return Evaluator

    def prompt_select(self, message: str, choices: list[Any]) -> Any:
        """Answers Heretic's questions from the settings of headless mode, or asks the user."""

        if message != EXPORT_QUESTION:
            # Whatever else Heretic asks next, it has finished saving, or failed to.
            self.finish_saving()
        settings = self.settings
        if message == CHECKPOINT_QUESTION and settings.checkpoint_action is not None:
            return settings.checkpoint_action
        if message == CHECKPOINT_QUESTION and not has_terminal():
            raise ContrastError(
                "There is a checkpoint of this configuration and no terminal to ask in: "
                "give --checkpoint-action continue or --checkpoint-action restart."
            )
        if message == TRIAL_QUESTION and settings.trial_index is not None:
            return self._choose_trial(choices, settings.trial_index)
        if message == TRIAL_QUESTION and settings.model_action == "none":
            if self.was_interrupted:
                raise KeyboardInterrupt
            log("The study is kept: give --checkpoint-action continue to choose a trial.")
            return ""
        if message == ACTION_QUESTION and settings.model_action is not None:
            if self.action_was_taken:
                return ""
            self.action_was_taken = True
            return ACTIONS[settings.model_action]
        if message == REPRODUCIBILITY_QUESTION:
            log("Reproducibility information is left out, since it could not rebuild this model.")
            return "none"
        answer = heretic.utils.prompt_select(message, choices)
        if answer is None and message in (CHECKPOINT_QUESTION, TRIAL_QUESTION):
            # Ctrl+C, which would end the program as if all was done.
            raise KeyboardInterrupt
        return answer

    def _choose_trial(self, choices: list[Any], index: int) -> Any:
        """Returns a trial of the Pareto front once, and then the answer that ends the program."""

        if self.trial_was_chosen:
            return ""
        if self.was_interrupted:
            # Heretic goes on with the trials that it has, which nobody asked for who pressed Ctrl+C.
            raise KeyboardInterrupt
        self.trial_was_chosen = True
        trials = [
            choice.value
            for choice in choices
            if isinstance(choice, Choice) and choice.value not in ("", "continue")
        ]
        if index >= len(trials):
            raise ContrastError(
                f"Trial index {index} is asked for, but the Pareto front has {len(trials)} trials: "
                f"choose between 0 and {len(trials) - 1}; the study is kept and can be continued."
            )
        return trials[index]

    def prompt_path(self, message: str) -> str:
        """
        Returns the folder to save to: one inside that of the settings or of the user's answer, until all is there.

        Raises `ContrastError` when it cannot be written to, or holds the original model.
        """

        answer = self.settings.save_directory
        if answer is None:
            answer = heretic.utils.prompt_path(message)
        if not answer:
            # The user changed their mind.
            return ""
        directory = Path(answer)
        require_other_folder(directory, self.settings.model)
        require_writable_directory(directory)
        self.failure = None
        self.unfinished = directory / UNFINISHED
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return str(self.unfinished)

    def format_exception(self, error: Exception) -> str:
        """Returns the message of an error; Heretic shows it and goes on, so that it is remembered here."""

        if self.action_was_taken or self.unfinished is not None:
            self.failure = error
        return heretic.utils.format_exception(error)

    def finish_saving(self) -> None:
        """
        Moves a saved model to where it belongs, or removes what there is of it, so that an earlier one is kept whole.

        Raises `ContrastError` when it cannot be moved.
        """

        if self.unfinished is None:
            return
        unfinished, self.unfinished = self.unfinished, None
        if self.failure is None and any((unfinished / name).exists() for name in CONFIGURATIONS):
            publish_model(unfinished, unfinished.parent)
            self.model_was_saved = True
            log(f"Moved to [bold]{unfinished.parent}[/].")
        else:
            shutil.rmtree(unfinished, ignore_errors=True)

    def require_success(self) -> None:
        """Raises `ContrastError` when the action of headless mode failed."""

        action = self.settings.model_action
        if action in (None, "none") or (
            self.failure is None and (action != "save" or self.model_was_saved)
        ):
            return
        what = "uploaded" if action == "upload" else f"saved to {self.settings.save_directory}"
        reason = ""
        if self.failure is not None:
            reason = f" ({' '.join(heretic.utils.format_exception(self.failure).split())[:300]})"
        raise ContrastError(
            f"The model could not be {what}{reason}; the study and what was there before are kept: "
            "give --checkpoint-action continue to try again."
        )

    def get_readme_intro(self, *args: Any, **kwargs: Any) -> str:
        """Returns the model card's introduction, which names the plugin and its settings."""

        assert self.modifier is not None
        intro = heretic.utils.get_readme_intro(*args, **kwargs)
        contrast = self.modifier.settings
        excluded = {
            "good_prompts",
            "bad_prompts",
            "matched_prompts",
            "residual_cache",
            "directions",
            "save_directions",
        }
        if contrast.directions is not None:
            # They were made with other settings, which the file knows.
            excluded |= {"preset", "som_backend", *EXTRACTION_FIELDS}
        values = {
            **contrast.model_dump(mode="json", exclude=excluded),
            **self.modifier.directions.provenance.get("settings", {}),
        }
        rows = "\n".join(f"| **{name}** | {value} |" for name, value in values.items())
        plugin = (
            f"\nThe directions were made by heretic-contrast v{__version__} (arXiv:2603.22061), "
            "without which Heretic cannot rebuild this model.\n\n"
            f"| heretic-contrast setting | Value |\n| :------- | :---: |\n{rows}\n"
        )
        heading, separator, rest = intro.partition("## Performance")
        return heading + plugin.lstrip("\n") + "\n" + separator + rest

    def substitutes(self) -> dict[str, Any]:
        """Returns what stands in for each seam."""

        def no_reproduce_folder(*args: Any, **kwargs: Any) -> None:
            """Plain Heretic could not rebuild the model from a reproduce.json, so none is written."""

        return {
            "Settings": self.settings_class(),
            "Model": self.model_class(),
            "Evaluator": self.evaluator_class(),
            "TPESampler": self.make_sampler,
            "load_prompts": self.load_prompts,
            "get_trial_parameters": self.get_trial_parameters,
            "get_readme_intro": self.get_readme_intro,
            "prompt_select": self.prompt_select,
            "prompt_path": self.prompt_path,
            "upload_reproduce_folder": no_reproduce_folder,
            "format_exception": self.format_exception,
            "JournalFileBackend": CheckedJournal,
        }


def count_refusals(
    settings: HostSettings, prompts: Sequence[Prompt], responses: Sequence[str]
) -> int:
    """Returns how many responses Heretic's markers take for refusals."""

    # Heretic's judgement needs the settings and nothing else of an evaluator.
    evaluator = heretic.main.Evaluator.__new__(heretic.main.Evaluator)
    evaluator.settings = settings
    return sum(map(evaluator.is_refusal, responses))


@contextmanager
def substituted(substitutes: dict[str, Any]) -> Iterator[None]:
    """
    Substitutes names in `heretic.main`, and restores them.

    Raises `ContrastError` when one is missing: this Heretic is not the one the host was written for.
    """

    missing = [name for name in substitutes if not hasattr(heretic.main, name)]
    if missing:
        raise ContrastError(
            f"The installed Heretic has no {missing[0]} in heretic.main, so the plugin cannot be hosted in it: "
            "install heretic-llm 1.4, or use Heretic 2.0's --modifiers."
        )
    places = [*((heretic.main, name) for name in substitutes), *OTHER_SEAMS]
    originals = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, substitutes[name])
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


@contextmanager
def failed_trials_in_one_line() -> Iterator[None]:
    """Keeps Optuna from printing the traceback of what ended a trial, and the study with it, which is said at the end."""

    def without_traceback(record: logging.LogRecord) -> bool:
        record.exc_info = None
        return True

    logger = logging.getLogger("optuna.study._optimize")
    logger.addFilter(without_traceback)
    try:
        yield
    finally:
        logger.removeFilter(without_traceback)


@contextmanager
def noticing_interruption(host: Host) -> Iterator[None]:
    """Tells the host of Ctrl+C, which Heretic handles by itself during a trial."""

    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return

    def notice(number: int, frame: FrameType | None) -> Any:
        host.was_interrupted = True
        return previous(number, frame)

    signal.signal(signal.SIGINT, notice)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def has_terminal() -> bool:
    """Returns whether the user can be asked something."""

    return heretic.utils.is_notebook() or (sys.stdin is not None and sys.stdin.isatty())


def require_answers(settings: HostSettings) -> None:
    """Raises `ContrastError` when Heretic would ask what neither the settings nor a user answer."""

    if has_terminal() or settings.evaluate_model is not None or settings.model_action == "none":
        return
    if settings.model_action == "upload":
        raise ContrastError(
            "Uploading asks for the name of a repository and who may see it, and there is no terminal to ask in: "
            "run it in a terminal, or give --model-action save."
        )
    answers = {
        "--trial-index 0": settings.trial_index,
        "--model-action save": settings.model_action,
        "--save-directory DIR": settings.save_directory,
        "--export-strategy merge": settings.export_strategy,
    }
    missing = [flag for flag, answer in answers.items() if answer is None]
    if missing:
        raise ContrastError(
            f"There is no terminal to ask in what to do after the study: give {' '.join(missing)}, "
            "or --model-action none to choose a trial later, in a terminal."
        )


def run(settings: HostSettings, modifier_class: type["ContrastAbliteration"]) -> None:
    """
    Runs Heretic 1.4 with the modifier.

    `sys.argv` must be what `settings` were parsed from, since Heretic parses it again.

    Raises `ContrastError` when the settings do not work, or the model was not saved in headless mode.
    """

    settings.contrast.require_single_configuration()
    if settings.reproduce is not None or settings.collect_reproducibles is not None:
        raise ContrastError(
            "Reproducing and collecting models is plain Heretic's task, which knows no plugin: run heretic instead."
        )
    require_writable_directory(Path(settings.study_checkpoint_dir))
    if settings.save_directory is not None:
        require_other_folder(Path(settings.save_directory), settings.model)
        require_writable_directory(Path(settings.save_directory))
    if settings.contrast.save_directions is not None:
        require_writable_file(Path(settings.contrast.save_directions))
    host = Host(settings, modifier_class)
    for name in POOLS:
        # Heretic loads its model first, and then finds out that a pool cannot be read.
        host.load_prompts(settings, getattr(settings, name))
    if settings.evaluate_model is None:
        # Whatever can be wrong with prompts, or with a file of directions, is said before Heretic loads a model.
        DirectionSources.read({"": settings.contrast}, "")
    require_answers(settings)
    if settings.checkpoint_action != "restart":
        repair_checkpoints(Path(settings.study_checkpoint_dir))
    else:
        shutil.rmtree(settings.study_checkpoint_dir, ignore_errors=True)
    # Heretic's main() would show an interruption as an ordinary end.
    rich.traceback.install()
    with substituted(host.substitutes()), noticing_interruption(host), failed_trials_in_one_line():
        try:
            heretic.main.run()
        except Exception as error:
            # Optuna and transformers raise errors of their own while they clean up.
            cause = find_cause(error, KeyboardInterrupt) or find_cause(error, ContrastError)
            if cause is not None:
                raise cause from error
            if find_cause(error, EOFError) is not None:
                raise ContrastError(
                    "The terminal was closed at a question; the study is kept: give --checkpoint-action continue to go on."
                ) from error
            raise
        finally:
            if host.unfinished is not None:
                shutil.rmtree(host.unfinished, ignore_errors=True)
    host.require_success()
