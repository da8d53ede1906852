# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Models some of whose weights wait in memory or on disk until they are needed: what knows accelerate's hooks.

The parameters of an offloaded module are on PyTorch's "meta" device, without data, except while the module runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

CPU = torch.device("cpu")


def _hooks(module: Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [] if hook is None else [hook]))


def is_hooked(module: Module) -> bool:
    """Returns whether accelerate has put a `forward` of its own before the module's."""

    return bool(_hooks(module))


def is_offloaded(module: Module) -> bool:
    """Returns whether the module's own parameters are elsewhere while it does not run."""

    return any(getattr(hook, "offload", False) for hook in _hooks(module))


@contextmanager
def loaded(module: Module, device: torch.device | None = CPU) -> Iterator[None]:
    """
    Gives an offloaded module its parameters, not those of its children, for as long as the context lasts.

    `device`: where to, or None for where the module computes. Other modules are left as they are.
    """

    hook = next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)
    if hook is None:
        yield
        return
    computes_on = hook.execution_device
    if device is not None:
        hook.execution_device = device
    try:
        hook.pre_forward(module)
        yield
    finally:
        hook.post_forward(module, None)
        hook.execution_device = computes_on


@contextmanager
def changing(module: Module) -> Iterator[None]:
    """
    Gives an offloaded module its parameters on the CPU for as long as the context lasts, and keeps what has become of them.

    They are kept in memory, as PEFT keeps what it merges.
    """

    with loaded(module):
        yield
        for hook in _hooks(module):
            if getattr(hook, "offload", False):
                hook.weights_map = module.state_dict()


def computing_device(module: Module, default: torch.device) -> torch.device:
    """Returns where a module, or the first of its children that is offloaded, computes; `default` where none is."""

    for part in module.modules():
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if getattr(hook, "offload", False) and device is not None:
                return torch.device(device)
    return default


def input_device(model: Any) -> torch.device:
    """Returns the device that a model's inputs belong on."""

    device: torch.device = model.device
    return computing_device(model, device) if device.type == "meta" else device
