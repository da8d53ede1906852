# SPDX-License-Identifier: AGPL-3.0-or-later

"""
LoRA adapters on just the writers that can carry them, whatever Heretic finds.

PEFT takes the targets of a mixture of experts for names of transformers 4, where every expert was a module. Heretic's
"model.layers.0.mlp.down_proj", a dense layer of the loaded model, becomes the routed experts of all layers, and the
dense layer, which is to be ablated, gets no adapter.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn
from unittest.mock import patch

from peft.tuners import tuners_utils
from peft.tuners.lora.layer import LoraLayer
from peft.utils import transformers_weight_conversion
from torch.nn import Module

from ..ablation.changes import Changes, beyond_adapters, takes_adapter
from ..ablation.lora import require_mergeable
from ..errors import ContrastError
from ..language_model import LanguageModel
from ..weights import forget_quantized_form
from .surface import find_layers, shell


@contextmanager
def literal_targets() -> Iterator[list[str]]:
    """
    Makes PEFT take the names of LoRA targets literally, for as long as the context lasts, and allow for Mamba.

    PEFT refuses the outputs of Mamba, since a kernel for training would pass by the adapter. Yields a list, which then holds the targets that PEFT would have misread.
    """

    original = transformers_weight_conversion.convert_peft_config_for_transformers
    misread: list[str] = []

    def keep(configuration: Any, **kwargs: Any) -> None:
        converted = copy.deepcopy(configuration)
        original(converted, **kwargs)
        misread.extend(sorted(set(configuration.target_modules) - set(converted.target_modules)))

    with (
        patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers", keep),
        patch.object(tuners_utils, "_check_lora_target_modules_mamba", lambda *args: None),
    ):
        yield misread


@contextmanager
def adapters_on_writers(
    heretic_model: Any, model: LanguageModel, changes: Changes
) -> Iterator[None]:
    """
    Lets Heretic apply LoRA adapters to just the writers that can carry them, for as long as the context lasts.

    `model`: the wrapper around what Heretic has loaded. `changes`: what a trial changes besides, which a merge then changes as
    well: see `merge`. With its adapters disabled the model is the original; one that would not hold everything cannot be saved by
    itself afterwards.
    """

    def layer_modules(index: int) -> dict[str, list[Module]]:
        return {
            writer.path: [writer.module] for writer in model.writers[index] if takes_adapter(writer)
        }

    beyond = beyond_adapters(model)
    with (
        patch.object(heretic_model, "get_layer_modules", layer_modules),
        literal_targets() as misread,
    ):
        yield
    if beyond or misread:
        reason = "PEFT would put what belongs to the dense layers into the experts"
        if beyond:
            reason = f"no LoRA adapter carries {', '.join(beyond)}"

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise ContrastError(
                f"The adapter of this model cannot be saved by itself, since {reason}: merge it, and save the full model "
                "(--export-strategy merge)."
            )

        heretic_model.model.save_pretrained = refuse

    @contextmanager
    def disabled() -> Iterator[None]:
        network = heretic_model.model
        with type(network).disable_adapter(network), changes.suspended():
            yield

    heretic_model.model.disable_adapter = disabled
    heretic_model.get_merged_model = partial(merge, heretic_model, changes)


def merge(heretic_model: Any, changes: Changes) -> Any:
    """
    Merges the adapters as Heretic's model does, and makes all other changes.

    Those of a model that Heretic has quantized are applied anew to one in full precision, with the names of targets taken literally.
    Whatever the weights were read from, they are saved as they are then.

    Raises `ContrastError` when the weights are kept as codes to which nothing can be added.
    """

    adapted = (item for item in heretic_model.model.modules() if isinstance(item, LoraLayer))
    require_mergeable(item.get_base_layer() for item in adapted)
    layers = find_layers(heretic_model)
    with literal_targets():
        merged = type(heretic_model).get_merged_model(heretic_model)
    forget_quantized_form(merged)
    found = find_layers(shell(merged))
    changes.write(merged, found)
    if found[0] is layers[0]:
        changes.undo()
    return merged
