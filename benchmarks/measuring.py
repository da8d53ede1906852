# SPDX-License-Identifier: AGPL-3.0-or-later

"""What the benchmarks measure with: times, memory, exponents of growth, and random models of any size."""

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def best_time(action: Callable[[], Any], repeats: int) -> float:
    """Wall seconds of the fastest of several runs."""

    return best_times(action, repeats)[0]


def best_times_in_turns(actions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Wall seconds of the fastest of several runs of each action, where a slow minute slows down all of them."""

    turns = [[best_time(action, 1) for action in actions] for _ in range(repeats)]
    return [min(times) for times in zip(*turns, strict=True)]


def fitted_exponent(values: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Slope, and its standard error, of the line through measurements in doubly logarithmic coordinates."""

    from scipy.stats import linregress

    fit = linregress(np.log(values), np.log(seconds))
    return float(fit.slope), float(fit.stderr)


def resident_bytes() -> int:
    """Resident memory of this process now."""

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


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
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # Views, and what is changed in place, bring nothing to life.
            if isinstance(leaf, Tensor) and _storage(leaf) not in known:
                storage = leaf.untyped_storage()
                self._alive[_storage(leaf)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.current)
        return result


def _storage(tensor: Tensor) -> int:
    """Returns what tells the memory of tensors apart, as long as they live."""

    return tensor.untyped_storage()._cdata


def random_language_model(
    layers: int, hidden_size: int, vocabulary: int, batch_size: int, spread: float = 1.0
) -> Any:
    """
    Returns a random Llama with the tokenizer of the built-in refuser, whose responses never end by themselves.

    Heads have 64 dimensions, and the MLP is three times as wide as the residual stream. `spread` multiplies the weights
    of the layers: with 4, single layers matter enough for an ablation to change every response.
    """

    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from heretic_contrast.builtin import DATA
    from heretic_contrast.hosts.surface import wrap

    tokenizer = AutoTokenizer.from_pretrained(DATA / "refuser")
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden_size // 64),
            num_key_value_heads=max(1, hidden_size // 64),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    with torch.no_grad():
        for parameter in network.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
        # Their logits are 0, and some other one is larger: no response ends, and every token has a text.
        network.lm_head.weight[tokenizer.eos_token_id] = 0
        network.lm_head.weight[len(tokenizer) :] = 0
    return wrap(network, tokenizer, name="random", batch_size=batch_size)


def random_directions(layers: int, directions: int, hidden_size: int) -> Any:
    """Returns directions without meaning, one unit vector per layer and direction."""

    from heretic_contrast.directions.directions import Directions

    generator = torch.Generator().manual_seed(0)
    tensor = torch.nn.functional.normalize(
        torch.randn(layers + 1, directions, hidden_size, generator=generator), dim=-1
    )
    names = tuple(f"class {index}" for index in range(directions))
    return Directions(
        tensor=tensor,
        names=names,
        aligned=True,
        class_directions=tensor,
        class_names=names,
        mean_direction=tensor.mean(dim=1),
        hits=torch.zeros(*tensor.shape[:2], 0, dtype=torch.int64),
    )
