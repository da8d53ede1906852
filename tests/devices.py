# SPDX-License-Identifier: AGPL-3.0-or-later

"""
An imitation of GPUs on a CPU: tensors carry a device that they pretend to be on, and what CUDA refuses is refused.

On "mps", Apple's, numbers in float64 are refused as well, and copies from the CPU that are not waited for, which may be wrong.

It looks at what programs call, not at the operations that these consist of.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any
from unittest.mock import MagicMock

import accelerate
import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")

PRETENDED = ("cuda", "mps")
"""Types of devices that tensors can pretend to be on."""

READING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"}
READING |= {"masked_select", "unique", "unique_consecutive", "allclose", "argwhere", "is_nonzero"}
"""Functions whose result the CPU must know before it goes on."""

MIXING = {"__getitem__", "__setitem__", "copy_", "index_put_", "index_put", "__set__", "type_as"}
MIXING |= {"expand_as", "view_as", "reshape_as", "__get__", "_has_compatible_shallow_copy_type"}
"""Functions that take tensors of several devices."""


def device_of(tensor: Tensor) -> torch.device:
    """Returns the device that a tensor is on, or pretends to be on."""

    return getattr(tensor, "pretended_device", None) or Tensor.device.__get__(tensor)


@cache
def names_of(function: Any) -> tuple[str, str]:
    """Returns the name of a function of PyTorch, with its place and alone."""

    path = resolve_name(function) or getattr(function, "__qualname__", str(function))
    return path, path.split(".")[-1]


def tensors_in(arguments: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for item in arguments:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple | dict):
            found += [leaf for leaf in tree_leaves(item) if isinstance(leaf, Tensor)]
    return found


class PretendedDevices(TorchFunctionMode):
    """
    Makes tensors of this CPU pretend to be on the devices that they are sent to.

    `waits`: how often the CPU waited for a device, by which function outside of PyTorch waited, and what it called: a copy in
    either direction, unless it goes to the device and need not be waited for, or a number that was read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str, str]] = Counter()

    def __enter__(self) -> "PretendedDevices":
        # Parameters are made behind the functions that can be looked at.
        original = Tensor._make_subclass

        def make_subclass(kind: Any, data: Tensor, *arguments: Any) -> Tensor:
            return self._on(original(kind, data, *arguments), device_of(data))

        Tensor._make_subclass = staticmethod(make_subclass)  # type: ignore[assignment]
        # Each device has random numbers of its own; the CPU's have to do.
        self._generator = torch.Generator
        torch.Generator = lambda device="cpu": self._generator()  # type: ignore[assignment, misc]
        # What is copied is there at once.
        self._event = torch.Event
        torch.Event = MagicMock  # type: ignore[assignment, misc]
        self._capability = torch.cuda.get_device_capability
        torch.cuda.get_device_capability = lambda device=None: (8, 0)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.cuda.get_device_capability = self._capability
        torch.Generator = self._generator  # type: ignore[misc]
        torch.Event = self._event  # type: ignore[misc]
        # That of its base class is found again.
        del Tensor._make_subclass

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        path, name = names_of(function)
        if path == "torch.Tensor.device.__get__":
            return device_of(args[0])
        if path == "torch.Tensor.is_cuda.__get__":
            return device_of(args[0]).type == "cuda"
        tensors = tensors_in((*args, *kwargs.values()))
        target = self._target(name, args, kwargs)
        if name in ("to", "cuda", "cpu") and isinstance(args[0], Tensor):
            return self._move(name, target, args, kwargs)
        if target is not None and target.type in PRETENDED:
            kwargs["device"] = CPU
        device = target or self._common_device(name, args, tensors)
        if any(device_of(item).type in PRETENDED for item in tensors):
            masks = name in ("__getitem__", "__setitem__") and any(
                isinstance(item, Tensor) and item.dtype == torch.bool
                for item in tree_leaves(args[1])
            )
            if name in READING or masks:
                self._wait(name)
            if name == "numpy":
                raise TypeError(f"can't convert {device} device type tensor to numpy")
            if (
                name in MIXING
                and len({device_of(item) for item in tensors}) > 1
                and "view" not in name
            ):
                self._wait(name)
        elif device.type in PRETENDED and name in ("tensor", "as_tensor") and args[0] != []:
            self._wait(name)
        if name == "histc":
            # For whole numbers there is none on a CPU.
            args = (args[0].float(), *args[1:])
        found = function(*args, **kwargs)
        if name == "__set__":
            # Parameters get the device of their data.
            if isinstance(args[1], Tensor) and path.endswith(".data.__set__"):
                args[0].pretended_device = device_of(args[1])
            return found
        if isinstance(found, Tensor):
            return self._on(found, device)
        return tree_map_only(Tensor, lambda item: self._on(item, device), found)

    def _wait(self, name: str) -> None:
        frame: Any = sys._getframe(2)
        while (
            frame.f_globals["__name__"].split(".")[0] == "torch"
            or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        self.waits[frame.f_globals["__name__"], frame.f_code.co_name, name] += 1

    @staticmethod
    def _on(tensor: Tensor, device: torch.device) -> Tensor:
        if device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        if device.type in ("cpu", *PRETENDED):
            tensor.pretended_device = None if device.type == "cpu" else device
        return tensor

    @staticmethod
    def _target(name: str, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """Returns the device that is asked for."""

        found = kwargs.get("device")
        if name == "to" and isinstance(args[0], Tensor):
            other = [item for item in (*args[1:], *kwargs.values()) if isinstance(item, Tensor)]
            places = [
                item
                for item in (*args[1:], found)
                if isinstance(item, str | int | torch.device) and not isinstance(item, bool)
            ]
            found = device_of(other[0]) if other else places[0] if places else None
        elif name == "cuda":
            found = found or (args[1] if len(args) > 1 else 0)
        elif name == "cpu":
            found = CPU
        if found is None:
            return None
        found = torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
        return (
            torch.device(found.type, 0)
            if found.type in PRETENDED and found.index is None
            else found
        )

    def _move(self, name: str, target: torch.device | None, args: Any, kwargs: Any) -> Any:
        """Does what `Tensor.to` does, and copies where the device is another one."""

        source = device_of(args[0])
        target = target or source
        dtypes = [item for item in (*args[1:], *kwargs.values()) if isinstance(item, torch.dtype)]
        dtypes += [item.dtype for item in args[1:] if isinstance(item, Tensor)]
        if name != "to":
            dtypes = []
        if target.type == "meta":
            return args[0].to("meta", *dtypes)
        result = args[0].to(*dtypes) if dtypes else args[0]
        if source != target:
            if source.type == "cpu" and target.type == "mps" and kwargs.get("non_blocking"):
                raise RuntimeError("what is copied may have been let go of before it is read")
            asks = target.type == "cpu" or not kwargs.get("non_blocking")
            if "cpu" in (source.type, target.type) and asks:
                self._wait("copy")
            if result is args[0]:
                result = result.clone()
        elif kwargs.get("copy") and result is args[0]:
            result = result.clone()
        return self._on(result, target)

    @staticmethod
    def _common_device(name: str, args: Any, tensors: list[Tensor]) -> torch.device:
        """Returns where the result lies. Raises `RuntimeError` as CUDA does."""

        if name in MIXING:
            first = device_of(args[0])
            if name in ("__getitem__", "__setitem__"):
                indices = [item for item in tree_leaves(args[1]) if isinstance(item, Tensor)]
                if any(device_of(item) not in (first, CPU) for item in indices):
                    raise RuntimeError(f"indices should be either on cpu or on {first}")
                value = args[2] if name == "__setitem__" else None
                if (
                    indices
                    and isinstance(value, Tensor)
                    and value.ndim
                    and device_of(value) != first
                ):
                    raise RuntimeError(f"expected the value on {first}")
            return first
        devices = {device_of(item) for item in tensors if item.ndim or device_of(item) != CPU}
        if len(devices) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {devices} in {name}"
            )
        return next(iter(devices), CPU)


def spread(
    network: Module,
    lower: Iterable[Module],
    upper: Iterable[Module],
    other: Any = torch.device("cuda", 1),  # noqa: B008
    first: Any = torch.device("cuda", 0),  # noqa: B008
) -> None:
    """
    Puts the lower layers and what comes before them on one device, and the upper ones with what comes after on another.

    As `device_map="auto"` does, by accelerate's own hooks. `first`, `other`: the devices; "cpu" offloads to it.
    """

    places = dict.fromkeys(lower, first) | dict.fromkeys(upper, other)
    device_map: dict[str, Any] = {}
    tied: dict[int, Any] = {}
    device: Any = first

    def place(prefix: str, parent: Module) -> None:
        nonlocal device
        for name, module in parent.named_children():
            if module not in places and any(part in places for part in module.modules()):
                place(f"{prefix}{name}.", module)
            else:
                device = places.get(module, device)
                # A head that shares its weight stays where that is.
                shared = [tied[item] for item in map(id, module.parameters()) if item in tied]
                device_map[prefix + name] = shared[0] if shared else device
                tied.update(dict.fromkeys(map(id, module.parameters()), device))

    place("", network)
    skipped = getattr(network, "_skip_keys_device_placement", None)
    accelerate.dispatch_model(network, device_map, main_device=first, skip_keys=skipped)
