# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What the plugins need of the installed Heretic, whichever it is.

Importing this module imports Heretic and PyTorch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import heretic.config
import heretic.utils
import torch
from heretic.utils import print as log
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from peft import PeftModel
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch.nn import Module, ModuleList

from ..ablation.hooks import missed_shares
from ..ablation.writers import apart, are_found, find_writers, named_writers
from ..builtin import model_name
from ..chat import require_chat
from ..errors import ContrastError
from ..language_model import LanguageModel
from ..language_model import Progress as ProgressCallback
from ..prompts import Prompt
from ..settings import Writers

try:
    # Present in Heretic 2.0 alone.
    from heretic.modifier import Modifier as Modifier

    HAS_PLUGIN_SURFACE = True
except ImportError:
    from .base import Modifier as Modifier

    HAS_PLUGIN_SURFACE = False

try:
    # Heretic's development state had scorers before it had modifiers.
    from heretic.scorer import Score as Score
    from heretic.scorer import Scorer as Scorer
except ImportError:
    from .base import Score as Score
    from .base import Scorer as Scorer


class Context(Protocol):
    """What a plugin gets from Heretic 2.0, or from the host for Heretic 1.4."""

    def get_model(self) -> Any: ...

    def get_responses(self, prompts: list[Any]) -> list[str]: ...


def checkpointed_trials(settings: Any) -> list[FrozenTrial]:
    """Returns the trials of the study that Heretic 2.0 is about to go on with, if it is: those in the checkpoint of a model."""

    name = "".join(sign if sign.isalnum() or sign in "_-" else "--" for sign in settings.model)
    path = Path(settings.study_checkpoint_dir) / f"{name}.jsonl"
    if settings.evaluate_model is not None or not path.is_file():
        return []
    storage = JournalStorage(JournalFileBackend(str(path)))
    return [
        trial
        for study in storage.get_all_studies()[:1]
        for trial in storage.get_all_trials(study._study_id)
    ]


def require_model_access(ctx: Context, plugin: str) -> None:
    """Raises `ContrastError` when this Heretic does not let a plugin look into the model, which the plugin needs."""

    if not hasattr(ctx, "get_model"):
        raise ContrastError(
            f"{plugin} looks into the model, which this Heretic keeps to itself (its plugin context has no get_model): "
            f"use Heretic 2.0, or leave {plugin} out."
        )


def require_same_vocabulary(network: Any, name: str, size: int, first: str) -> None:
    """Raises `ContrastError` when a model that Heretic evaluates has not the vocabulary of the `first`, which has a size."""

    found = network.config.get_text_config().vocab_size
    if found != size:
        # It reads the tokens of the first one, and its logits are compared with those.
        raise ContrastError(
            f"The model {name} has a vocabulary of {found}, and {first} one of {size}, so that they cannot be compared: "
            "check --evaluate-model."
        )


def from_heretic(
    heretic_model: Any,
    heretic_settings: Any,
    batch_size: int | None = None,
    writers: Writers | None = None,
) -> LanguageModel:
    """
    Returns the wrapper around a Heretic model, with Heretic's chat format.

    `writers`: as the plugin's setting of this name, which is taken from Heretic's settings under 1.4. Made anew for every use,
    because Heretic loads the model again after an export.
    """

    model = LanguageModel(
        model=heretic_model.model,
        tokenizer=heretic_model.tokenizer,
        name=model_name(heretic_settings.model),
        # Heretic never loads a model with adapters around it, so that these are its own.
        own_adapter="default" if isinstance(heretic_model.model, PeftModel) else None,
        revision=heretic_settings.model_commit,
        system_prompt=heretic_settings.system_prompt,
        response_prefix=heretic_settings.response_prefix or "",
        batch_size=batch_size or heretic_settings.batch_size or 32,
    )
    if writers is None:
        contrast = getattr(heretic_settings, "contrast", None)
        writers = "all" if contrast is None else contrast.writers
    return with_writers(model, heretic_model, writers)


def with_writers(model: LanguageModel, heretic_model: Any, writers: Writers) -> LanguageModel:
    """
    Returns the wrapper with the layers of its model, and with their writers.

    On CUDA, cuDNN's attention is switched off for the whole process. Raises `ContrastError` when no layers are found, or nothing
    that can be ablated.
    """

    if model.device.type == "cuda":
        # It builds a plan for every new length, which takes longer than several steps of generation.
        torch.backends.cuda.enable_cudnn_sdp(False)
    all_writers = writers != "heretic"
    layers = find_layers(heretic_model, by_configuration=all_writers)
    if not layers:
        raise unsupported(f"No layers were found in {model.name}", heretic_model)
    known: list[dict[str, list[Module]]] = []
    for index in range(len(layers)):
        try:
            known.append(own(heretic_model, "get_layer_modules")(index))
        except (AssertionError, AttributeError) as error:
            if not all_writers:
                what = f"Heretic finds nothing to ablate in layer {index} of {model.name}"
                raise unsupported(what, heretic_model) from error
            # Heretic knows nothing by name here.
            known.append({})
    model = replace(model, layers=layers)
    if not all_writers:
        return replace(model, writers=named_writers(known, layers))
    is_new = not are_found(model)
    model = replace(model, writers=find_writers(model, known))
    missed = missed_shares(model) if is_new else {}
    if missed:
        log(
            f"[yellow]Layers {', '.join(map(str, missed))} of {escape(model.name)} have writers that were not found, so that up to "
            f"{100 * max(missed.values()):.3g} % of a direction stays in what a layer adds.[/]"
        )
    return apart(model) if writers == "apart" else model


def own(heretic_model: Any, method: str) -> Any:
    """Returns a method as Heretic has it, where the host for 1.4 has put another before it."""

    return getattr(heretic_model, f"heretic_{method}", getattr(heretic_model, method))


def find_layers(heretic_model: Any, by_configuration: bool = True) -> tuple[Module, ...]:
    """Returns the decoder layers that Heretic finds, or `by_configuration` those of a list as long as it says, or none."""

    try:
        return tuple(own(heretic_model, "get_layers")())
    except AttributeError:
        if not by_configuration:
            return ()
        model: Any = heretic_model.model
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        n_layers = model.config.get_text_config().num_hidden_layers
        lists = (
            module
            for module in model.get_decoder().modules()
            if isinstance(module, ModuleList) and len(module) == n_layers
        )
        return tuple(next(lists, ()))


def shell(model: Any) -> Any:
    """Returns a Heretic model around a plain transformers model, whose constructor would load one."""

    from heretic.model import Model

    made = Model.__new__(Model)
    made.model = model
    return made


def unsupported(what: str, heretic_model: Any) -> ContrastError:
    model = heretic_model.model
    architecture = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    return ContrastError(f"{what} ({architecture}): its architecture is not supported.")


def wrap(
    model: Any,
    tokenizer: Any,
    name: str,
    system_prompt: str = "You are a helpful assistant.",
    batch_size: int = 32,
    writers: Writers = "all",
) -> LanguageModel:
    """
    Returns the wrapper around a plain transformers model, with all writers, or those that Heretic finds in it.

    `name` is recorded in results. Raises `ContrastError` as `with_writers`, and where the tokenizer has no chat template, or
    neither a padding nor an end-of-sequence token.
    """

    require_chat(tokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    wrapped = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        system_prompt=system_prompt,
        batch_size=batch_size,
    )
    return with_writers(wrapped, shell(model), writers)


def heretic_prompts(prompts: Sequence[Prompt], heretic_settings: Any) -> list[Any]:
    return [
        heretic.utils.Prompt(
            system=heretic_settings.system_prompt if prompt.system is None else prompt.system,
            user=prompt.text,
        )
        for prompt in prompts
    ]


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Shows a progress bar for work that is counted in steps; each first step starts a new count."""

    columns = ("  ", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update
