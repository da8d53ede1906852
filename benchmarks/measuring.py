# SPDX-License-Identifier: AGPL-3.0-or-later

"""What the benchmarks measure with: times, memory, exponents of growth, kernels, and random models of any size."""

import resource
import statistics
import time
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Module
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPES = {
    "2b": """
        model_type="qwen3_5_text" vocab_size=248_320 hidden_size=2_048 intermediate_size=6_144 num_hidden_layers=24
        num_attention_heads=8 num_key_value_heads=2 head_dim=256 linear_num_key_heads=16 linear_num_value_heads=16
        linear_key_head_dim=128 linear_value_head_dim=128 tie_word_embeddings=True
        """,
    "8b": """
        model_type="llama" vocab_size=128_256 hidden_size=4_096 intermediate_size=14_336 num_hidden_layers=32
        num_attention_heads=32 num_key_value_heads=8 max_position_embeddings=8_192
        """,
    "30b": """
        model_type="qwen3_moe" vocab_size=151_936 hidden_size=2_048 intermediate_size=6_144 num_hidden_layers=48
        num_attention_heads=32 num_key_value_heads=4 head_dim=128 moe_intermediate_size=768 num_experts=128
        num_experts_per_tok=8 norm_topk_prob=True
        """,
}
"""A hybrid of linear and full attention, a dense model, a mixture of experts: their configurations."""

SMALL = """
    vocab_size=2_048 hidden_size=64 intermediate_size=128 num_hidden_layers=4 num_attention_heads=4
    num_key_value_heads=2 head_dim=16 linear_num_key_heads=2 linear_num_value_heads=2 linear_key_head_dim=16
    linear_value_head_dim=16 moe_intermediate_size=32 num_experts=8 num_experts_per_tok=2
"""
"""What is smaller in small ones, so far as they have it."""


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


class Clock:
    """Times on a device: between its own events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Returns a moment of the device."""

        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Returns the seconds from one moment to another, both of which the device has passed."""

        return first.elapsed_time(last) / 1000 if self.is_cuda else last - first

    def wait(self) -> None:
        """Waits until the device has done everything."""

        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any]) -> float:
        """Returns how long an action takes, until the device has done everything."""

        self.wait()
        first = self.mark()
        action()
        last = self.mark()
        self.wait()
        return self.between(first, last)

    def median(self, action: Callable[[], Any], repeats: int = 3) -> float:
        """Returns the median seconds of several runs, after one that does not count."""

        action()
        return statistics.median(self.seconds(action) for _ in range(repeats))


class Forwards:
    """
    What runs inside a model's forward passes while the context lasts.

    `seconds`: inside them. `tokens`: that went through all layers, or more tokens through fewer. `operations`: two for each
    weight that a token meets; those of attention are left out.
    """

    def __init__(self, clock: Clock, model: Any) -> None:
        self._clock, self._model = clock, model
        self._depth = 0
        self._marks: list[Any] = []
        self._positions = [0] * (model.n_layers + 1)

    def __enter__(self) -> "Forwards":
        network, decoder = self._model.model, self._model.decoder()
        self._handles = []
        for module in {id(item): item for item in (network, decoder)}.values():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        # Modules inside the layers, since the fast engine steps over layers without taking them away.
        counted = [writers[0].module for writers in self._model.writers]
        for index, module in enumerate([*counted, network.get_output_embeddings()]):
            self._handles.append(module.register_forward_hook(partial(self._count, index)))
        return self

    def __exit__(self, *args: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._clock.wait()

    def _enter(self, module: Module, args: Any) -> None:
        if self._depth == 0:
            self._marks.append(self._clock.mark())
        self._depth += 1

    def _leave(self, module: Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._marks.append(self._clock.mark())

    def _count(self, index: int, module: Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        self._positions[index] += output.numel() // output.shape[-1]

    @property
    def seconds(self) -> float:
        return sum(map(self._clock.between, self._marks[::2], self._marks[1::2]))

    @property
    def tokens(self) -> float:
        return sum(self._positions[:-1]) / self._model.n_layers

    @property
    def operations(self) -> float:
        config = self._model.model.config
        n_experts = getattr(config, "num_experts", None)
        share = config.num_experts_per_tok / n_experts if n_experts else 1.0
        weights = [
            sum(item.numel() * (share if item.ndim == 3 else 1) for item in layer.parameters())
            for layer in (*self._model.layers, self._model.model.get_output_embeddings())
        ]
        return 2 * sum(map(lambda weight, n: weight * n, weights, self._positions))


def waits(action: Callable[[], Any], is_cuda: bool) -> list[str]:
    """Returns where the CPU waits for the device while an action runs."""

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    found = [item for item in caught if "synchronizing CUDA operation" in str(item.message)]
    return [f"{'/'.join(Path(item.filename).parts[-3:])}:{item.lineno}" for item in found]


class Steps:
    """A model that answers prompts under interventions, one row each, one token at a time, as generation does."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], interventions: Sequence[Any]
    ) -> None:
        self._model, self._interventions = model, interventions
        inputs = model.pad(prompts)
        self._tokens, self._mask = inputs["input_ids"], inputs["attention_mask"]
        self._cache: Any = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Ablates the rows."""

        if not self._interventions:
            yield
            return
        from heretic_contrast.ablation.hooks import ablated_samples

        with ablated_samples(self._model, self._interventions):
            yield

    def _run(self, tokens: Tensor, cache: Any = None) -> None:
        from heretic_contrast.engine.compat import CACHE

        output = self._model.model(
            input_ids=tokens,
            attention_mask=self._grown,
            **{CACHE: cache},
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = getattr(output, CACHE)
        self._next = output.logits.argmax(dim=-1)

    def read(self) -> None:
        """Reads the prompts."""

        self._grown = self._mask
        self._run(self._tokens)

    def take(self) -> None:
        """Takes one step."""

        self._grown = torch.nn.functional.pad(self._grown, (0, 1), value=1)
        self._run(self._next, cache=self._cache)


def profiled(
    action: Callable[[], Any], repeats: int, is_cuda: bool
) -> dict[str, tuple[float, float]]:
    """
    Returns what PyTorch's profiler sees of an action: how often, and the milliseconds that it takes, by what it is.

    Kernels and copies together and by name, and calls of CUDA by name; on a CPU concatenations alone.
    """

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profiler(activities=activities) as found:
        for _ in range(repeats):
            action()
        if is_cuda:
            torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    durations: Counter[str] = Counter()
    for event in found.events():
        kind = "call"
        if event.device_type != DeviceType.CPU:
            kind = "copy" if event.name.startswith(("Memcpy", "Memset")) else "kernel"
        elif not event.name.startswith("cu" if is_cuda else "aten::cat"):
            continue
        for key in (kind, f"{kind}: {event.name}"):
            counts[key] += 1
            durations[key] += event.time_range.elapsed_us() / 1000
    return {key: (count / repeats, durations[key] / repeats) for key, count in counts.items()}


def sizes_of(text: str) -> dict[str, Any]:
    """Returns the fields of a configuration, written as name=value."""

    return {key: literal_eval(value) for key, value in (part.split("=") for part in text.split())}


def network_of_shape(
    name: str,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    small: bool = False,
    certain: bool = True,
) -> Any:
    """
    Returns a random network of one of `SHAPES`, made on the device, whose responses never end.

    `certain`: tokens predict themselves by far, so that rounding and weak interventions change no response. Otherwise many
    tokens are nearly as likely as the most likely one.
    """

    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = sizes_of(SHAPES[name])
    if small:
        sizes |= {key: value for key, value in sizes_of(SMALL).items() if key in sizes}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    configuration = AutoConfig.for_model(**sizes, **ends)
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    head = network.get_output_embeddings().weight.data
    if certain:
        # Larger than what all layers add.
        head.normal_(std=5.0)
        network.get_input_embeddings().weight.data.copy_(head)
    silence(head, tokenizer)
    return network.eval().requires_grad_(False)


def silence(head: Tensor, tokenizer: Any) -> None:
    """
    Changes the weight of a head so that no response ends, and every token has a text.

    The logits of other tokens are 0, and some one is larger.
    """

    head[tokenizer.eos_token_id] = 0
    head[len(tokenizer) :] = 0


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
        silence(network.lm_head.weight, tokenizer)
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
