# SPDX-License-Identifier: AGPL-3.0-or-later

"""The questions of Heretic 1.4, which has no headless mode, and where it saves what was answered."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import heretic.utils
from questionary import Choice
from rich.markup import escape

from ..errors import ContrastError, one_line
from ..outputs import require_writable_directory
from ..processes import alone_in, handling
from .model_folder import UNFINISHED, publish_model, require_other_folder, with_final_name
from .settings import HostSettings
from .surface import log

CHECKPOINT_QUESTION = "How would you like to proceed?"
PROCESSED = "You have already processed this model"
TRIAL_QUESTION = "Which trial do you want to use?"
ACTION_QUESTION = "What do you want to do with the decensored model?"
EXPORT_QUESTION = "How do you want to export the model?"
REPRODUCIBILITY_QUESTION = "Which reproducibility information do you want to add?"
WRITTEN = ("* Resetting model...", "Model saved to ")
"""How the line begins that Heretic prints when all files of a merged model are written, or of an adapter."""

UPLOADED = "Model uploaded to "
"""How the line begins that Heretic prints when a model is uploaded, with its card."""

ACTIONS = {
    "none": "",
    "save": "Save the model to a local folder",
    "upload": "Upload the model to Hugging Face",
}


class Answers:
    """
    Answers from the settings of headless mode, or from the user; a model that is saved replaces another as a whole.

    `describe` writes into the folder of a saved model what it was made with.
    """

    def __init__(self, settings: HostSettings, describe: Callable[[Path], None]) -> None:
        self.settings = settings
        self.describe = describe
        self.trial_was_chosen = False
        self.action_was_taken = False
        self.is_by_hand = False
        self.given_directory = settings.save_directory
        self.was_interrupted = False
        self.saved: Path | None = None
        self.was_uploaded = False
        self.unfinished: Path | None = None
        self.failure: Exception | None = None
        self._saving = ExitStack()

    def select(self, message: str, choices: list[Any]) -> Any:
        if message != EXPORT_QUESTION:
            # Whatever else Heretic asks next, it has finished saving, or failed to.
            self.discard_unfinished()
        settings = self.settings
        if message == CHECKPOINT_QUESTION and settings.contrast.storage is not None:
            return "continue"
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
            log("The study is kept: give --checkpoint-action continue to choose a trial.")
            return ""
        if message == ACTION_QUESTION and settings.model_action is not None:
            if not self.action_was_taken:
                self.action_was_taken = True
                return ACTIONS[settings.model_action]
            if settings.trial_index is not None:
                return ""
            # Whoever chooses trials by hand may want another one, or more of this one.
            self.is_by_hand = True
        if message == REPRODUCIBILITY_QUESTION:
            log("Reproducibility information is left out, since it could not rebuild this model.")
            return "none"
        answer = heretic.utils.prompt_select(message, choices)
        last = [CHECKPOINT_QUESTION, TRIAL_QUESTION]
        if settings.trial_index is not None:
            # There is no menu of trials to go back to.
            last.append(ACTION_QUESTION)
        if answer is None and message in last:
            # Ctrl+C, which would end the program as if all was done.
            raise KeyboardInterrupt
        return answer

    def require_uninterrupted(self) -> None:
        """Raises `KeyboardInterrupt` where Heretic would choose from the trials that it has, which nobody asked for who pressed Ctrl+C."""

        asks = self.settings.trial_index is None and self.settings.model_action != "none"
        if self.was_interrupted and not asks and not self.trial_was_chosen:
            raise KeyboardInterrupt

    def noticing_interruption(self) -> AbstractContextManager[None]:
        """Notices Ctrl+C, which Heretic handles by itself during a trial."""

        previous = signal.getsignal(signal.SIGINT)
        if not callable(previous):
            return nullcontext()

        def notice(number: int, frame: FrameType | None) -> Any:
            self.was_interrupted = True
            return previous(number, frame)

        return handling(signal.SIGINT, notice)

    def _choose_trial(self, choices: list[Any], index: int) -> Any:
        """Returns a trial of the Pareto front once, and then the answer that ends the program."""

        if self.trial_was_chosen:
            return ""
        self.trial_was_chosen = True
        trials = [choice.value for choice in choices if not isinstance(choice.value, str)]
        if not trials:
            raise ContrastError(
                "The Pareto front has no trial, since all break the model: search smaller weights (--contrast.search-space), or run more trials."
            )
        if index >= len(trials):
            raise ContrastError(
                f"Trial index {index} is asked for, but the Pareto front has {len(trials)} trial"
                f"{'s' if len(trials) > 1 else ''}: give an index below {len(trials)}; the study is kept and can be continued."
            )
        return trials[index]

    def path(self, message: str) -> str:
        """Returns the folder to save to, inside the one that is given once, or asked for. Raises `ContrastError` when that cannot be written to."""

        answer, self.given_directory = self.given_directory, None
        if answer is None:
            # No shell has looked at it.
            answer = os.path.expanduser(or_nothing(heretic.utils.prompt_path)(message) or "")
        if not answer:
            # The user changed their mind.
            return ""
        directory = Path(answer)
        require_other_folder(directory, self.settings.model)
        require_writable_directory(directory)
        self._saving.enter_context(alone_in(directory, "choose another folder"))
        self.unfinished = directory / UNFINISHED
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return str(self.unfinished)

    def show(self, *values: Any, **options: Any) -> None:
        """
        Prints what Heretic prints, in which a folder where a model is not yet whole goes by the name it will have.

        Raises `ContrastError` when a model has been saved and cannot be moved to where it belongs.
        """

        line = str(values[0]) if values else ""
        self.was_uploaded |= line.startswith(UPLOADED)
        if line.startswith(WRITTEN):
            # Before Heretic loads its model again, which may fail, and leaves none to describe.
            self.finish_saving()
        if self.settings.contrast.storage is not None and PROCESSED in line:
            values = ("There is a study in the storage, which goes on.",)
        folder = self.saved if self.unfinished is None else self.unfinished.parent
        if folder is not None:
            values = with_final_name(values, folder)
        log(*values, **options)

    def format_exception(self, error: Exception) -> str:
        """Returns the message of an error; Heretic shows it and goes on, so that it is remembered here."""

        if self.action_was_taken and not self.is_by_hand:
            self.failure = error
        return escape(heretic.utils.format_exception(error))

    def finish_saving(self) -> None:
        """Moves a saved model, if there is one, to where it belongs. Raises `ContrastError` when it cannot be moved."""

        unfinished = self.unfinished
        if unfinished is None:
            return
        self.describe(unfinished)
        # It is whole, and stays there where it cannot be moved.
        self.unfinished = None
        publish_model(unfinished, unfinished.parent)
        self.saved = unfinished.parent

    def discard_unfinished(self) -> None:
        if self.unfinished is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished = None
        self._saving.close()

    def require_success(self) -> None:
        """Raises `ContrastError` when the action of headless mode failed, or was not taken to its end."""

        action, folder = self.settings.model_action, self.settings.save_directory
        is_done = self.was_uploaded if action == "upload" else self.saved is not None
        is_asked = action not in (None, "none") and self.settings.evaluate_model is None
        if not is_asked or (is_done and (self.failure is None or self.is_by_hand)):
            return
        what = "uploaded" if action == "upload" else f"saved to {folder}" if folder else "saved"
        reason = ", since a question about it was not answered"
        if self.failure is not None:
            reason = f" ({type(self.failure).__name__}: {one_line(str(self.failure))[:300]})"
        if isinstance(self.failure, ContrastError) and (self.saved or action == "upload"):
            # It says by itself what to do.
            done = f"saved to {self.saved}, but" if self.saved else "not uploaded to its end:"
            raise ContrastError(f"The model was {done} {self.failure}")
        if self.saved is not None:
            raise ContrastError(
                f"The model was saved to {self.saved} and is whole, but the original could not be loaded again "
                f"afterwards{reason}: use it, and give --checkpoint-action continue to save another trial."
            )
        raise ContrastError(
            f"The model could not be {what}{reason}; the study and what was there before are kept: "
            "give --checkpoint-action continue to try again."
        )


def or_nothing(ask: Callable[..., str | None]) -> Callable[..., str | None]:
    """Returns what asks for a line, and gives none for Ctrl+D, as Heretic's own prompts do for Ctrl+C."""

    def asked(*args: Any, **options: Any) -> str | None:
        try:
            return ask(*args, **options)
        except EOFError:
            return None

    return asked


def choose(question: str, choices: Mapping[str, str]) -> str:
    """Asks the user for the name of a choice, as Heretic asks. Raises `KeyboardInterrupt` when the user leaves the menu."""

    titled = [Choice(title=title, value=name) for name, title in choices.items()]
    answer = or_nothing(heretic.utils.prompt_select)(question, titled)
    if answer is None:
        raise KeyboardInterrupt
    return answer


def has_terminal() -> bool:
    return heretic.utils.is_notebook() or (sys.stdin is not None and sys.stdin.isatty())


def require_answers(settings: HostSettings) -> None:
    """Raises `ContrastError` when Heretic would ask what neither the settings nor a user answer."""

    if has_terminal() or settings.evaluate_model is not None or settings.model_action == "none":
        return
    # Uploading asks for more.
    action = None if settings.model_action == "upload" else settings.model_action
    answers = {
        "--trial-index 0": settings.trial_index,
        "--model-action save": action,
        "--save-directory DIR": settings.save_directory,
        "--export-strategy merge": settings.export_strategy,
    }
    missing = [flag for flag, answer in answers.items() if answer is None]
    if missing:
        raise ContrastError(
            f"There is no terminal to ask in what to do after the study: give {' '.join(missing)}, "
            "or --model-action none to choose a trial later, or upload it, in a terminal."
        )
