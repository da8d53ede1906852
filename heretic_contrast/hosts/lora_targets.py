# SPDX-License-Identifier: AGPL-3.0-or-later

"""
LoRA adapters on just the modules that Heretic names.

PEFT takes the targets of a mixture of experts for names of transformers 4, where every expert was a module. Heretic's
"model.layers.0.mlp.down_proj", a dense layer of the loaded model, becomes the routed experts of all layers, and the
dense layer, which is to be ablated, gets no adapter.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from peft.utils import transformers_weight_conversion

from ..errors import ContrastError


@contextmanager
def literal_targets() -> Iterator[list[str]]:
    """
    Makes PEFT take the names of LoRA targets literally, for as long as the context lasts.

    Yields a list, which then holds the targets that PEFT would have misread.
    """

    original = transformers_weight_conversion.convert_peft_config_for_transformers
    misread: list[str] = []

    def keep(configuration: Any, **kwargs: Any) -> None:
        """Converts a copy of the configuration, only to compare it."""

        converted = copy.deepcopy(configuration)
        original(converted, **kwargs)
        misread.extend(sorted(set(configuration.target_modules) - set(converted.target_modules)))

    transformers_weight_conversion.convert_peft_config_for_transformers = keep
    try:
        yield misread
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = original


def refuse_saving_adapter(*args: Any, **kwargs: Any) -> NoReturn:
    """
    Stands in for saving an adapter that PEFT would apply to other modules when it is loaded.

    Raises `ContrastError`.
    """

    raise ContrastError(
        "The adapter of this mixture of experts cannot be saved by itself, since PEFT would put what belongs to the "
        "dense layers into the experts: merge it, and save the full model."
    )


@contextmanager
def adapters_on_named_modules(heretic_model: Any) -> Iterator[None]:
    """
    Lets Heretic apply LoRA adapters to just the modules that it names, for as long as the context lasts.

    Where PEFT would have misread the names, it is kept from doing so afterwards: in a merge, which applies the adapters
    of a quantized model anew, and by an adapter that is saved by itself.
    """

    with literal_targets() as misread:
        yield
    if misread:
        heretic_model.model.save_pretrained = refuse_saving_adapter
        heretic_model.get_merged_model = partial(merge, heretic_model)


def merge(heretic_model: Any) -> Any:
    """Merges the adapters as Heretic's model does, with the names of targets taken literally."""

    with literal_targets():
        return type(heretic_model).get_merged_model(heretic_model)
