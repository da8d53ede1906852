# SPDX-License-Identifier: AGPL-3.0-or-later

"""What the benchmarks measure with: times, live memory, and exponents of growth."""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def best_times(action: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Wall and processor seconds, each of the fastest of several runs."""

    times = []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        action()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    walls, processors = zip(*times, strict=True)
    return min(walls), min(processors)


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of the tensors that came to life in its context and are still alive.

    `current`: now. `peak`: the most after any operation. The same program gives the same numbers. What one operation
    allocates and frees while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def current(self) -> int:
        """The bytes that are alive now."""

        for key, (reference, _) in list(self._alive.items()):
            if reference.expired():
                del self._alive[key]
        return sum(n_bytes for _, n_bytes in self._alive.values())

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # Views, and what is changed in place, bring nothing to life.
            if isinstance(leaf, Tensor) and id_of(leaf) not in known:
                storage = leaf.untyped_storage()
                self._alive[id_of(leaf)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.current)
        return result


def id_of(tensor: Tensor) -> int:
    """Returns what tells the memory of tensors apart, as long as they live."""

    return tensor.untyped_storage()._cdata
