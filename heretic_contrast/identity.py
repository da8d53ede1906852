# SPDX-License-Identifier: AGPL-3.0-or-later

"""
What decides numbers (design, section 5): the key to everything that is kept and may be used again.

Residuals, directions, the cells of a sweep and the trials of a study belong to a model, to the tokens that it read, and to
the programs that ran it. `identify` names each of these with a digest, so that whoever finds something that was kept can
say what is different.
"""

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import __version__
from .chat import chat_texts, token_ids
from .errors import ContrastError
from .files import digest, file_digest
from .offloading import input_device, is_offloaded, loaded
from .weights import codes

if TYPE_CHECKING:
    from .language_model import LanguageModel
    from .prompts import Prompt

Identity: TypeAlias = dict[str, Any]
"""A digest, or another JSON value, of each part of what decides numbers."""

NAMES = {
    "weights": "weights",
    "dtype": "data type",
    "configuration": "configuration",
    "generation": "generation configuration",
    "tokenizer": "tokenizer or chat template",
    "tokens": "prompts as the model reads them (perhaps with the date)",
    "texts": "prompts",
    "device": "kind of device",
    "versions": "versions of the libraries",
    "rules": "rules for tiers",
    "directions": "directions",
    "options": "options",
    "writers": "writers of the residual stream",
}
"""What the parts are called in messages."""

OF_THE_MODEL = ("weights", "dtype", "configuration", "tokenizer")
"""The parts that say which model it is, whatever it reads and wherever it runs."""

OF_THE_RUN = ("device", "versions")
"""The parts that change the rounding of numbers."""

LIBRARIES = """
    torch transformers accelerate bitsandbytes causal-conv1d compressed-tensors flash-attn
    flash-linear-attention kernels mamba-ssm peft torchao
""".split()
"""What computes, where it is installed."""

CHUNK = 2**26
"""How many bytes one thread copies at a time."""

PASSING = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}
"""What a configuration holds that decides nothing: where the model lies, and what saved it."""

PROBES = (
    "How do I bake bread with 2 kg of flour, 1.25 l of water & 10 g of salt (at 230 °C)?",
    "  def f(x):\n\treturn {'a': [x**2, x != 3]}  # Ünïcödé, 你好, مرحبا, привет, 🙂\r\n\r\n",
    "THE QUICK brown fox jumpsOver the_lazy-dog; it's https://example.org/?q=1%20000,000.50!",
)
"""Texts whose tokens stand for those of all others."""


def model_identity(model: "LanguageModel") -> Identity:
    """Returns the parts that do not depend on what the model reads. Reads all weights once."""

    network = model.model
    generation = getattr(network, "generation_config", None)
    return {
        "weights": weights_digest(network, model.own_adapter),
        "dtype": str(network.dtype).removeprefix("torch."),
        "configuration": digest(_configuration(network, model.own_adapter)),
        "generation": digest(_lasting(generation.to_dict()) if generation is not None else None),
        "tokenizer": digest(_tokenizer(model.tokenizer)),
        "device": [input_device(network).type, torch.get_float32_matmul_precision()],
        "versions": versions(),
    }


def identify(
    model: "LanguageModel", prompts: Mapping[str, Sequence["Prompt"]], **others: Any
) -> Identity:
    """
    Returns everything that decides numbers.

    `prompts`: what the model reads, by any name. `others`: what else decides them, as JSON values, by a key of `NAMES`.
    """

    tokens = {name: digest(model.token_ids(pool)) for name, pool in prompts.items()}
    return {**model.identity(), "tokens": tokens, **others}


def differences(
    kept: Mapping[str, Any], found: Mapping[str, Any], parts: Sequence[str] | None = None
) -> str:
    """
    Returns the names of the parts that are not equal, for a message; empty where all are.

    `parts`: which to compare, or all of both. A part that only one of them has is a difference.
    """

    keys = dict.fromkeys([*kept, *found]) if parts is None else parts
    names = [NAMES.get(key, key) for key in keys if kept.get(key) != found.get(key)]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def weights_digest(network: Module, own_adapter: str | None = None) -> str:
    """
    Returns a digest of all bytes of all parameters and buffers, with their names, shapes and data types.

    `own_adapter`: name of the LoRA adapter that is an intervention and not the model. The same model gives the same digest
    from any folder, on any device, offloaded or not, and with adapters around it. No more than a chunk per thread is copied. A
    processor with SHA instructions takes about 0.8 s per GB, divided by the number of its cores.

    Raises `ContrastError` when a weight has no data.
    """

    found: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as pool:
        for module_name, module in network.named_modules():
            with loaded(module):
                for name, tensor in _tensors(module):
                    # Without adapters around the module.
                    full_name = f"{module_name}.{name}".removeprefix("base_model.model.")
                    full_name = full_name.replace(".base_layer.", ".")
                    if any(f".lora_{side}.{own_adapter}." in full_name for side in "AB"):
                        continue
                    if tensor.device.type == "meta":
                        raise ContrastError(
                            f"The weight {full_name} has not been loaded, so it cannot be told which model this is: load "
                            "the model again."
                        )
                    found[full_name] = pool.submit(_tensor_digest, tensor)
                    if is_offloaded(module):
                        # What was loaded is only there until the context ends.
                        found[full_name].result()
        return digest({name: future.result() for name, future in found.items()})


def _tensor_digest(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)
    for start in range(0, flat.numel(), CHUNK):
        found.update(hashlib.sha256(flat[start : start + CHUNK].cpu().numpy().data).digest())
    return found.hexdigest()


def _tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Yields everything that a module itself computes with, its children's tensors aside."""

    own = {
        **dict(module.named_parameters(recurse=False)),
        # Under all its names: dynamic frequencies are one tensor with those that they begin with, or two.
        **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
    }
    if type(module)._save_to_state_dict is not Module._save_to_state_dict:
        if type(own.get("weight")).__name__ == "Params4bit":
            # Saving would put its bits into another order.
            own.update(
                {f"weight.{index}": part for index, part in enumerate(codes(own.pop("weight")))}
            )
        else:
            # Quantized modules keep their scales elsewhere.
            module._save_to_state_dict(own, "", True)
    if any(kind in str(getattr(module, "rope_type", "")) for kind in ("dynamic", "longrope")):
        # Its frequencies are those of the longest prompt of the last pass, and beside them those that it begins with.
        own = {
            name: own.get(name.replace("inv_freq", "original_inv_freq"), tensor)
            for name, tensor in own.items()
        }
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            yield from _plain_tensors(name, tensor)


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that a tensor is made of, which is itself unless a library has put several into one."""

    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    inner, context = tensor.__tensor_flatten__()
    yield f"{name}.context", torch.frombuffer(bytearray(repr(context).encode()), dtype=torch.uint8)
    for part in inner:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _configuration(network: Any, own_adapter: str | None) -> dict[str, Any]:
    """Returns what decides how a network computes, besides its weights, as JSON values."""

    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    adapters = {
        name: _lasting(configuration.to_dict())
        for name, configuration in (getattr(network, "peft_config", None) or {}).items()
        if name != own_adapter
    }
    for content in adapters.values():
        content.pop("base_model_name_or_path", None)
    active = {
        name
        for module in network.modules()
        if not getattr(module, "disable_adapters", True)
        for name in module.active_adapters
    }
    return {
        "class": type(base).__name__,
        "configuration": _lasting(base.config.to_dict()),
        "attention": getattr(base.config, "_attn_implementation", None),
        "adapters": adapters,
        "active": sorted(active - {own_adapter}),
        "code": _own_code(base),
    }


def _lasting(content: Any) -> Any:
    """Returns JSON values without what says only where they came from."""

    if isinstance(content, Mapping):
        return {str(key): _lasting(value) for key, value in content.items() if key not in PASSING}
    if isinstance(content, list | tuple):
        return [_lasting(value) for value in content]
    # A set has no order.
    return sorted(map(str, content)) if isinstance(content, set | frozenset) else content


def _own_code(network: Module) -> dict[str, str]:
    files = {
        inspect.getsourcefile(type(module))
        for module in network.modules()
        if type(module).__module__.startswith("transformers_modules.")
    }
    return {Path(path).name: file_digest(Path(path)) for path in files if path is not None}


def program_digest(modules: Sequence[ModuleType], function: Any) -> str:
    """Returns a digest of what a function does: of the text of modules, its own text, and what it was made with."""

    return digest([[inspect.getsource(module) for module in modules], _state(function)])


def _state(value: Any) -> Any:
    """Returns JSON values that differ where functions or objects do different things, as far as can be seen."""

    if isinstance(value, Module):
        return weights_digest(value)
    if isinstance(value, Mapping):
        return {str(key): _state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_state(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, partial):
        return [_state(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return [_state(value.__func__), _state(vars(value.__self__))]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        try:
            text = inspect.getsource(value)
        except OSError:
            # Typed in, or made by a program.
            text = value.__code__.co_code.hex()
        return [value.__module__, value.__qualname__, text, _state([cells, value.__defaults__])]
    if type(value).__repr__ is object.__repr__:
        # It would only say where the object lies in memory.
        return [type(value).__qualname__, _state(vars(value))]
    return repr(value)


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    user = [[{"role": "user", "content": text}] for text in PROBES]
    chats = [*user, *([{"role": "system", "content": "Be brief."}, *chat] for chat in user)]
    # A template may write the date, which is no property of the model.
    template = "{% macro strftime_now(format) %}1 January 2000{% endmacro %}"
    template += tokenizer.get_chat_template()
    texts = chat_texts(tokenizer, chats, chat_template=template)
    return {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "tokens": token_ids(tokenizer, texts),
    }


def reading_digest(network: Module, tokenizer: Any) -> list[str]:
    """Returns digests of a network's weights and configuration, and of a tokenizer's vocabulary and tokens, without a chat format."""

    tokens = tokenizer(list(PROBES))["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return [
        weights_digest(network),
        digest(_configuration(network, None)),
        digest([vocabulary, tokens]),
    ]


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Returns the versions of this package and of those libraries that are installed."""

    found = {"heretic-contrast": __version__}
    for name in libraries:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
