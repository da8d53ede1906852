# SPDX-License-Identifier: AGPL-3.0-or-later
# ruff: noqa: E402

"""
Checks and measures the package on one GPU, in a few minutes and without network.

    python benchmarks/gpu.py --output gpu [--minutes 8] [--only SECTION...]
    python benchmarks/gpu.py --output gpu --device cpu --small
    python benchmarks/gpu.py --table gpu/gpu.json

Writes gpu.json into the output folder after every row and prints a table at the end. A section that fails leaves its error
there, and the next one runs. Models are the built-in refuser, and random ones in the shapes of Qwen 3.5 2B, Llama 3.1 8B and
Qwen 3 30B-A3B, made on the device in bfloat16. Times are medians of warmed up runs between two events of the device, which
wait for everything in between. No setting of the card is changed.
"""

import argparse
import copy
import gc
import importlib.util
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# So that a checkout need not be installed.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import accelerate
import peft  # noqa: F401  # Before Heretic, see below.
import torch
import transformers
from measuring import LiveBytes, random_directions
from torch import Tensor
from torch.nn import Module

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
if not HAS_BITSANDBYTES:
    # Heretic imports it always, and uses it for 4-bit models only. Nobody else may take it for the library.
    sys.modules["bitsandbytes"] = ModuleType("bitsandbytes")
    sys.modules["bitsandbytes"].__spec__ = ModuleSpec("bitsandbytes", None)
import heretic.model

if not HAS_BITSANDBYTES:
    del sys.modules["bitsandbytes"]

from heretic.config import RowNormalization as HereticNormalization
from heretic.evaluator import Evaluator
from heretic.utils import Prompt as HereticPrompt
from trial import KERNEL, text_file

import heretic_contrast.language_model
from heretic_contrast.ablation.changes import subtract
from heretic_contrast.ablation.hooks import Intervention, ablated_samples
from heretic_contrast.ablation.operator import Operator, compose
from heretic_contrast.builtin import DATA, refuser_pool
from heretic_contrast.directions.extraction import extract
from heretic_contrast.directions.pools import Pools
from heretic_contrast.engine.check import all_logits, checked_engine
from heretic_contrast.engine.compat import CACHE
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.interface import Continuations, pad_right
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.evaluation.cells import CellKey
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.plan_settings import WEIGHTS
from heretic_contrast.evaluation.sweep import SweepEvaluator
from heretic_contrast.files import write_text_atomically
from heretic_contrast.hosts.host_model import HostModel
from heretic_contrast.hosts.loading import LoadedContext
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.substitution import replaced
from heretic_contrast.hosts.surface import from_heretic, wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.prompts import Prompt, load_pool
from heretic_contrast.search.parameters import Kernel, Parameters
from heretic_contrast.settings import ContrastSettings, RowNormalization
from heretic_contrast.tiers.responses import Tier


def sizes_of(text: str) -> dict[str, Any]:
    """Returns the fields of a configuration, written as name=value."""

    return {key: literal_eval(value) for key, value in (part.split("=") for part in text.split())}


SHAPES = {
    "2b": (
        "qwen3_5_text",
        """
        vocab_size=248_320 hidden_size=2_048 intermediate_size=6_144 num_hidden_layers=24 num_attention_heads=8
        num_key_value_heads=2 head_dim=256 linear_num_key_heads=16 linear_num_value_heads=16
        linear_key_head_dim=128 linear_value_head_dim=128 tie_word_embeddings=True
        """,
        "linear_num_key_heads=2 linear_num_value_heads=2 linear_key_head_dim=16 linear_value_head_dim=16",
    ),
    "8b": (
        "llama",
        """
        vocab_size=128_256 hidden_size=4_096 intermediate_size=14_336 num_hidden_layers=32 num_attention_heads=32
        num_key_value_heads=8 max_position_embeddings=8_192
        """,
        "",
    ),
    "30b": (
        "qwen3_moe",
        """
        vocab_size=151_936 hidden_size=2_048 intermediate_size=6_144 num_hidden_layers=48 num_attention_heads=32
        num_key_value_heads=4 head_dim=128 moe_intermediate_size=768 num_experts=128 num_experts_per_tok=8
        norm_topk_prob=True
        """,
        "moe_intermediate_size=32 num_experts=8 num_experts_per_tok=2",
    ),
}
"""
Kinds and sizes of models, and what is smaller in small ones: a hybrid of linear and full attention, a dense one, a mixture of
experts.
"""

SMALL = """
    vocab_size=2_048 hidden_size=64 intermediate_size=128 num_hidden_layers=4 num_attention_heads=4
    num_key_value_heads=2 head_dim=16
"""
"""What is small in all small ones."""

REFUSER = "refuser"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BOUNDS = {"float32": 1e-3, "bfloat16": 0.04, "float16": 0.01}
"""Relative differences of logits that rounding explains. Convolutions may compute in TF32."""

DEPARTING = tuple(1e4 * weight for weight in WEIGHTS)

KINDS = {"the paper's weights": WEIGHTS, "weights 10,000 times as large": DEPARTING}
"""The first change no response of a random model whose tokens predict themselves, the others nearly all."""

MAIN = frozenset(
    f"{kind}: {what}"
    for kind in KINDS
    for what in ("a cell, fast engine", "plain / fast", "sweep of all layers, computed from this")
) | frozenset(
    """
    product of matrices, bfloat16
    copy, read and written
    a cell, plain engine
    row normalization none: ours / Heretic
    row normalization pre: ours / Heretic
    row normalization full: ours / Heretic
    ours: prompts
    ours: tokens
    Heretic's / ours
    a step of 128 rows
    step: kernels
    step: time of kernels
    step: time of concatenations
    a step without hooks
    a step inside generate, without hooks
    parameters
    a trial with experts / without
    cells that were measured
    preparation and measured cells
    digest of all weights
    """.strip()
    .replace("    ", "")
    .splitlines()
)
"""Rows that a short table has."""

GIB = 2**30


class OutOfTime(BaseException):
    """A section took longer than it may, whoever would go on after an exception."""


class Record:
    """The rows of all sections, and the file that has them at any time."""

    def __init__(self, path: Path, started: float) -> None:
        self._path = path
        self._started = started
        self.content: dict[str, Any] = {"sections": {}}
        self.section: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """Begins a section."""

        self.section = self.content["sections"][name] = {"rows": []}
        self.say(f"--- {name}")

    def row(
        self,
        name: str,
        value: Any,
        unit: str = "",
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Records what was measured, and its bound or aim."""

        row = {"name": name, "value": value, "unit": unit}
        for key, bound in (("at_most", at_most), ("at_least", at_least)):
            if bound is not None:
                row[key] = bound
                row["met"] = value <= bound if key == "at_most" else value >= bound
        self.section["rows"].append(row)
        self.say("  ".join(cells_of(row)))
        self.write()

    def write(self) -> None:
        """Writes everything that is known."""

        write_text_atomically(self._path, json.dumps(self.content, indent=2) + "\n")

    def say(self, line: str) -> None:
        """Prints a line with the seconds since the start."""

        print(
            f"[{time.monotonic() - self._started:6.1f} s] {line}", file=sys.__stdout__, flush=True
        )


def shown(value: Any) -> str:
    """Returns a value with three digits that count."""

    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def cells_of(row: dict[str, Any]) -> list[str]:
    """Returns a row as texts: what, value, aim, whether it is met."""

    aim = next(
        (
            f"{word} {shown(row[key])}"
            for key, word in (("at_most", "≤"), ("at_least", "≥"))
            if key in row
        ),
        "",
    )
    met = "" if "met" not in row else "yes" if row["met"] else "**no**"
    return [row["name"], f"{shown(row['value'])} {row['unit']}".strip(), aim, met]


def table(content: dict[str, Any], short: bool = False) -> str:
    """Returns what was recorded as a Markdown table. `short`: main figures, and how many bounds were met."""

    lines = ["| Section | What | Value | Aim | Met |", "| :------ | :--- | ----: | --: | :-- |"]
    for name, section in content["sections"].items():
        rows = [
            cells_of(row)
            for row in section["rows"]
            if not short or row["name"] in MAIN or row.get("met") is False
        ]
        bounded = [row["met"] for row in section["rows"] if "met" in row]
        if short and bounded:
            rows.insert(
                0, ["bounds and aims that are met", f"{sum(bounded)} of {len(bounded)}", "", ""]
            )
        for key in ("skipped", "error"):
            if key in section:
                text = section[key][-1] if key == "error" else section[key]
                rows.append([f"{key}: {text.strip().replace('|', '/')}", "", "", ""])
        for index, row in enumerate(rows):
            lines.append(f"| {' | '.join(['' if index else name, *row])} |")
    return "\n".join(lines)


class Bench:
    """The device, the models on it, and what is measured with."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.small: bool = arguments.small
        self.device = torch.device(arguments.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)
        self.folder = folder
        self.is_cuda = self.device.type == "cuda"
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self._held: dict[str, LanguageModel] = {}

    def synchronize(self) -> None:
        """Waits for the device."""

        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any]) -> float:
        """Returns how long an action takes, until the device has done everything."""

        if not self.is_cuda:
            started = time.perf_counter()
            action()
            return time.perf_counter() - started
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        action()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000

    def median(self, action: Callable[[], Any], repeats: int = 3, warm_up: bool = True) -> float:
        """Returns the median seconds of several runs, after one that does not count."""

        if warm_up:
            action()
        if self.small:
            repeats = 1
        return statistics.median(self.seconds(action) for _ in range(repeats))

    def free(self) -> None:
        """Gives back the memory of the device that no object needs any more."""

        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def drop(self) -> None:
        """Forgets all models."""

        self._held.clear()
        self.free()

    def model(self, name: str, batch_size: int = 128) -> LanguageModel:
        """Returns a model as it is measured: the refuser, or a random one in bfloat16. One of them is kept."""

        if name not in self._held:
            self.drop()
            network = (
                # Half precision is slow on a CPU.
                self.refuser(torch.bfloat16 if self.is_cuda else torch.float32)
                if name == REFUSER
                else self.network(name, torch.bfloat16, self.small, certain=True)
            )
            self._held[name] = self.wrapped(network, name, batch_size)
        return self._held[name]

    def wrapped(self, network: Any, name: str, batch_size: int = 128) -> LanguageModel:
        """Returns the wrapper, which is not asked for a digest of its weights."""

        tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / REFUSER)
        model: LanguageModel = wrap(network, tokenizer, name=name, batch_size=batch_size)
        return replace(model, known_identity={"weights": f"{name} {network.dtype}"})

    def refuser(self, dtype: torch.dtype, device: torch.device | None = None) -> Any:
        """Returns the built-in refuser."""

        return transformers.AutoModelForCausalLM.from_pretrained(DATA / REFUSER, dtype=dtype).to(
            device or self.device
        )

    def network(self, name: str, dtype: torch.dtype, small: bool, certain: bool) -> Any:
        """
        Returns a random network, made on the device, whose responses never end.

        `certain`: tokens predict themselves by far, so that rounding and weak interventions change no response. Otherwise many
        tokens are nearly as likely as the most likely one.
        """

        kind, large, parts = SHAPES[name]
        sizes = sizes_of(large) | (sizes_of(SMALL + parts) if small else {})
        tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / REFUSER)
        config = transformers.AutoConfig.for_model(
            kind, **sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            network = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        embedding = network.get_input_embeddings().weight.data
        head = network.get_output_embeddings().weight.data
        if certain:
            # Larger than what all layers add.
            embedding.normal_(std=5.0)
            head.copy_(embedding)
        # Their logits are 0, and some other one is larger: no response ends, and every token has a text.
        head[tokenizer.eos_token_id] = 0
        head[len(tokenizer) :] = 0
        return network.eval().requires_grad_(False)

    @cached_property
    def matrix_rate(self) -> float:
        """Operations per second of a product of large matrices in bfloat16."""

        size = 8_192 if self.is_cuda else 512
        first, second = torch.randn(2, size, size, device=self.device).bfloat16()
        seconds = self.median(lambda: [torch.mm(first, second) for _ in range(10)], 10) / 10
        return 2 * size**3 / seconds

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that are read and written by a copy."""

        source = torch.zeros(
            2 * GIB if self.is_cuda else 2**24, dtype=torch.uint8, device=self.device
        )
        target = torch.empty_like(source)
        return 2 * source.numel() / self.median(lambda: target.copy_(source), 10)


def pool(name: str, split: str) -> list[Prompt]:
    """Returns the prompts of a pool of the built-in refuser."""

    return load_pool(refuser_pool(name, split), name)


class Forwards:
    """
    What runs inside a model's forward passes while the context lasts.

    `seconds`: inside them. `tokens`: that went through all layers, or more tokens through fewer. `operations`: two for each
    weight that a token meets, those of attention left out.
    """

    def __init__(self, bench: Bench, model: LanguageModel) -> None:
        self._bench = bench
        self._model = model
        self._depth = 0
        self._marks: list[Any] = []
        self._handles: list[Any] = []
        self._layers = [0] * model.n_layers
        self._head = 0

    def __enter__(self) -> "Forwards":
        network = self._model.model
        for module in {id(item): item for item in (network, self._model.decoder())}.values():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        # Modules inside the layers, since the fast engine steps over layers without taking them away.
        for index, writers in enumerate(self._model.writers):
            self._handles.append(writers[0].module.register_forward_hook(self._count(index)))
        self._handles.append(
            network.get_output_embeddings().register_forward_hook(self._count(None))
        )
        return self

    def __exit__(self, *args: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._bench.synchronize()

    def _mark(self) -> None:
        if not self._bench.is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def _enter(self, module: Module, args: Any) -> None:
        if self._depth == 0:
            self._mark()
        self._depth += 1

    def _leave(self, module: Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._mark()

    def _count(self, layer: int | None) -> Callable[..., None]:
        def hook(module: Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            n_positions = output.numel() // output.shape[-1]
            if layer is None:
                self._head += n_positions
            else:
                self._layers[layer] += n_positions

        return hook

    @property
    def seconds(self) -> float:
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._bench.is_cuda:
            return sum(first.elapsed_time(last) for first, last in pairs) / 1000
        return sum(last - first for first, last in pairs)

    @property
    def tokens(self) -> float:
        return sum(self._layers) / len(self._layers)

    @property
    def operations(self) -> float:
        config = self._model.model.config
        n_experts = getattr(config, "num_experts", None)
        share = config.num_experts_per_tok / n_experts if n_experts else 1.0
        weights = [
            sum(item.numel() * (share if item.ndim == 3 else 1) for item in layer.parameters())
            for layer in self._model.layers
        ]
        head = self._model.model.get_output_embeddings().weight.numel()
        counted = zip(weights, self._layers, strict=True)
        return 2 * (sum(weight * count for weight, count in counted) + head * self._head)


def record_forwards(
    bench: Bench, record: Record, what: str, model: LanguageModel, action: Callable[[], Any]
) -> None:
    """Records what an action does inside forward passes. It has been run before."""

    with Forwards(bench, model) as forwards:
        seconds = bench.seconds(action)
    record.row(what, seconds, "s")
    aim = 0.6 if bench.is_cuda and model.name != REFUSER else None
    record.row(f"{what}: share of time in forward passes", forwards.seconds / seconds, at_least=aim)
    record.row(f"{what}: tokens through all layers", forwards.tokens / seconds, "tokens/s")
    record.row(
        f"{what}: share of the matrix rate", forwards.operations / seconds / bench.matrix_rate
    )


# The card.


def card(bench: Bench, record: Record) -> None:
    """What computes, as it is found."""

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.is_cuda else platform.processor() or "CPU",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "small": bench.small,
        "threads": torch.get_num_threads(),
    }
    for name in (
        "heretic-contrast heretic-llm torch transformers accelerate peft bitsandbytes kernels "
        "flash-linear-attention causal-conv1d"
    ).split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not there"
    queries = "name driver_version memory.total clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.limit temperature.gpu ecc.mode.current persistence_mode"
    if bench.is_cuda:
        try:
            found["nvidia-smi"] = dict(
                zip(
                    queries.split(),
                    subprocess.run(
                        [
                            "nvidia-smi",
                            f"--query-gpu={','.join(queries.split())}",
                            "--format=csv,noheader",
                        ],
                        capture_output=True,
                        text=True,
                        timeout=20,
                        check=True,
                    )
                    .stdout.splitlines()[0]
                    .split(", "),
                    strict=True,
                )
            )
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            found["nvidia-smi"] = f"not there ({error})"
    record.content["card"] = found
    record.say(json.dumps(found))
    record.row("product of matrices, bfloat16", bench.matrix_rate / 1e12, "TFLOP/s")
    record.row("copy, read and written", bench.bandwidth / 1e9, "GB/s")


# Right.


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the relative difference of logits, apart from what adds to all of a position."""

    found, expected = (item - item.mean(dim=1, keepdim=True) for item in (found, expected))
    return float((found - expected).norm() / expected.norm())


def continuations(model: LanguageModel, n_prompts: int, n_tokens: int) -> Continuations:
    """Returns prompts with the model's responses."""

    prompts = tuple(model.token_ids(pool("harmful", "test")[:n_prompts]))
    return Continuations(
        prompts, tuple(PlainEngine(model).generate(prompts, [n_tokens] * n_prompts))
    )


def some_intervention(model: LanguageModel) -> Intervention:
    """Returns what changes the upper half of a model enough to be seen."""

    vectors = random_directions(model.n_layers, 3, model.hidden_size).tensor
    operators = {
        layer: compose(vectors[layer + 1], torch.full((3,), 2.0))
        for layer in range(model.n_layers // 2, model.n_layers)
    }
    return Intervention(operators)


def small_networks(bench: Bench, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Yields the refuser, and small random networks."""

    yield REFUSER, bench.refuser(dtype)
    for name in ("2b", "30b"):
        yield f"small {name}", bench.network(name, dtype, small=True, certain=False)


def hooks(bench: Bench, record: Record) -> None:
    """Hooks against changed weights, and against those when they have been saved and loaded again."""

    for dtype_name, dtype in DTYPES.items():
        bound = BOUNDS[dtype_name]
        for name, network in small_networks(bench, dtype):
            model = bench.wrapped(network, name)
            known, intervention = continuations(model, 8, 8), some_intervention(model)
            (hooked,) = all_logits(PlainEngine(model), known, [intervention])
            (unmodified,) = all_logits(PlainEngine(model), known, None)
            for layer, operator in intervention.operators.items():
                for writer in model.writers[layer]:
                    subtract(writer, operator)
            (changed,) = all_logits(PlainEngine(model), known, None)
            with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
                network.save_pretrained(folder)
                loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            reloaded = bench.wrapped(loaded.to(bench.device), name)
            (exported,) = all_logits(PlainEngine(reloaded), known, None)
            label = f"{name}, {dtype_name}"
            record.row(f"{label}: hooks to changed weights", difference(hooked, changed), "", bound)
            record.row(
                f"{label}: changed weights to export", difference(exported, changed), "", 1e-6
            )
            if name == REFUSER:
                # A check that nothing changes would be met by hooks that do nothing.
                effect = difference(hooked, unmodified)
                record.row(f"{label}: what the intervention changes", effect, at_least=2 * bound)


def adapters(bench: Bench, record: Record) -> None:
    """A trial's adapters against hooks, and against the merged model when it has been saved and loaded again."""

    for dtype_name, dtype in list(DTYPES.items())[: 1 if bench.small else None]:
        trial = Trials(bench, bench.refuser(dtype))
        modifier, parameters = trial.modifier, trial.parameters()
        known = continuations(bench.wrapped(bench.refuser(dtype), REFUSER), 8, 8)
        modifier.modify_model(trial.context, parameters)
        network = trial.hosted.model
        (adapted,) = all_logits(PlainEngine(bench.wrapped(network, REFUSER)), known, None)
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            with redirect_stdout(io.StringIO()):
                trial.hosted.get_merged_model().save_pretrained(folder)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        merged = bench.wrapped(loaded.to(bench.device), REFUSER)
        (exported,) = all_logits(PlainEngine(merged), known, None)
        plain = bench.wrapped(bench.refuser(dtype), REFUSER)
        directions = modifier.directions
        kernel = next(iter(parameters.kernels.values()))
        scales = torch.tensor([parameters.scales[name] for name in directions.names])
        operators = {
            layer: compose(directions.tensor[layer + 1], scales * kernel.weight(layer))
            for layer in range(plain.n_layers)
        }
        (hooked,) = all_logits(PlainEngine(plain), known, [Intervention(operators)])
        bound = BOUNDS[dtype_name]
        record.row(f"{dtype_name}: adapters to hooks", difference(adapted, hooked), "", bound)
        record.row(f"{dtype_name}: export to hooks", difference(exported, hooked), "", bound)


def evaluator_of(
    model: LanguageModel,
    weights: Sequence[float],
    n_configurations: int,
    sizes: tuple[int, int, int, int],
    directions: Any = None,
) -> SweepEvaluator:
    """
    Returns an evaluator with the fast engine, which takes every response for a refusal.

    `sizes`: harmful prompts, canaries, references, tokens of a response.
    """

    n_harmful, n_canaries, n_references, n_tokens = sizes
    found = directions or random_directions(model.n_layers, 9, model.hidden_size)
    harmless = pool("harmless", "test")
    plan = plan_sweep(
        {f"configuration {index}": found for index in range(n_configurations)},
        pool("harmful", "test")[:n_harmful],
        harmless[:n_canaries],
        harmless[n_canaries : n_canaries + n_references],
        SweepOptions(
            weights=tuple(weights), max_new_tokens=n_tokens, kl_tokens=n_tokens, synergy_size=0
        ),
    )
    return SweepEvaluator(model, plan, lambda prompt, response: Tier.REFUSE, FastEngine(model))


def with_plain_engine(evaluator: SweepEvaluator) -> SweepEvaluator:
    """Returns an evaluator that measures against the same unmodified model by the plain engine."""

    plain = copy.copy(evaluator)
    plain._engine = PlainEngine(evaluator.model)
    return plain


def keys_at(evaluator: SweepEvaluator, layer: int) -> list[CellKey]:
    """Returns the cells of a layer, which a sweep measures together."""

    return [key for key in evaluator.grid() if key.layers == (layer,)]


def compared(fast: Sequence[Any], plain: Sequence[Any]) -> tuple[float, float, float]:
    """Returns the share of responses that are equal, and the largest absolute and relative difference of the divergence."""

    pairs = [
        (a, b)
        for one, other in zip(fast, plain, strict=True)
        for a, b in zip(
            (*one.responses, *one.canary_responses),
            (*other.responses, *other.canary_responses),
            strict=True,
        )
    ]
    found = [
        (one.measurement.kl_divergence, other.measurement.kl_divergence)
        for one, other in zip(fast, plain, strict=True)
    ]
    return (
        sum(a == b for a, b in pairs) / len(pairs),
        max(abs(a - b) for a, b in found),
        max(abs(a - b) / max(abs(b), 1e-9) for a, b in found),
    )


def departed(evaluator: SweepEvaluator, cells: Sequence[Any]) -> float:
    """Returns the share of responses to harmful prompts that are not the unmodified model's."""

    pairs = [
        pair
        for cell in cells
        for pair in zip(cell.responses, evaluator.base_responses, strict=True)
    ]
    return sum(a != b for a, b in pairs) / len(pairs)


def engines(bench: Bench, record: Record) -> None:
    """The fast engine against the plain one."""

    for dtype_name, dtype in DTYPES.items():
        for name, network in small_networks(bench, dtype):
            model = bench.wrapped(network, name, batch_size=32)
            sizes = (2, 2, 4, 8) if bench.small else (4, 4, 8, 16)
            evaluator = evaluator_of(model, (1.0, 100.0), 1, sizes)
            plain = with_plain_engine(evaluator)
            keys = [
                key
                for layer in (model.n_layers // 4, 3 * model.n_layers // 4)[bench.small :]
                for key in keys_at(evaluator, layer)
            ]
            found = evaluator.evaluate(keys)
            same, absolute, relative = compared(found, plain.evaluate(keys))
            label = f"{name}, {dtype_name}"
            record.row(f"{label}: responses that interventions change", departed(evaluator, found))
            exact = dtype is torch.float32
            record.row(f"{label}: equal responses", same, at_least=1.0 if exact else None)
            record.row(f"{label}: KL, largest difference", absolute, "nats")
            bound = 0.02 if exact else None
            record.row(f"{label}: KL, largest relative difference", relative, at_most=bound)


def engine_choice(bench: Bench, record: Record) -> None:
    """Which engine a model gets."""

    for name in (REFUSER, "2b"):
        model = bench.model(name)
        tokens = model.token_ids(pool("harmful", "test")[:20])
        chosen: list[Any] = []
        seconds = bench.seconds(
            lambda model=model, tokens=tokens, chosen=chosen: chosen.append(
                checked_engine(model, tokens)
            )
        )
        is_fast = float(isinstance(chosen[0], FastEngine))
        record.row(f"{name}: the fast engine is chosen", is_fast, "", at_least=1.0)
        record.row(f"{name}: its check", seconds, "s")


def some_pools(bench: Bench) -> Pools:
    """Returns prompts to extract directions from."""

    count = 54 if bench.small else 216
    pools = (pool(name, "train") for name in ("harmful", "harmless"))
    harmful, harmless = (tuple(prompts[:: len(prompts) // count]) for prompts in pools)
    return Pools(harmful, harmless, ())


def devices(bench: Bench, record: Record) -> None:
    """Residuals, directions and maps of the refuser on the device against those on the CPU."""

    pools = some_pools(bench)
    models = [
        bench.wrapped(bench.refuser(torch.float32, torch.device(device)), REFUSER)
        for device in (bench.device, "cpu")
    ]
    # Each has its own place in the cache of residuals.
    models = [
        replace(model, known_identity={"weights": f"refuser {index}"})
        for index, model in enumerate(models)
    ]
    found, expected = (model.residuals(pools.harmful) for model in models)
    record.row("residuals", float((found - expected).norm() / expected.norm()), "", at_most=2e-3)
    for method, bound in (("mean", 0.9999), ("som", 0.999)):
        settings = ContrastSettings(method=method, som_rows=2, som_columns=2)
        one, other = (extract(model, pools, settings, lambda line: None) for model in models)
        cosines = torch.cosine_similarity(one.tensor.double(), other.tensor.double(), dim=-1)
        # Where all prompts end in the same token the embedding has no direction.
        some = other.tensor.norm(dim=-1) > 0
        record.row(
            f"directions, {method}: smallest cosine", float(cosines[some].min()), "", at_least=bound
        )
        if method == "som":
            same = float((one.hits == other.hits).double().mean())
            record.row("maps: equal counts of hits", same)


def zero(bench: Bench, record: Record) -> None:
    """An intervention of zero gives the unmodified responses, also where many tokens are nearly equally likely."""

    for name, network in small_networks(bench, torch.bfloat16):
        model = bench.wrapped(network, name)
        evaluator = evaluator_of(model, (0.0,), 1, (30, 10, 10, 30))
        n_changed = 0
        for layer in (0, model.n_layers // 2):
            (cell,) = evaluator.evaluate([CellKey("configuration 0", "weight", (layer,), 0.0)])
            pairs = zip(cell.responses, evaluator.base_responses, strict=True)
            n_changed += sum(a != b for a, b in pairs)
        record.row(f"{name}: changed responses of 60", n_changed, "", at_most=0)


@contextmanager
def waits(bench: Bench) -> Iterator[list[str]]:
    """Collects where the CPU waits for the device."""

    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if bench.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if bench.is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    for item in caught:
        if "synchronizing CUDA operation" in str(item.message):
            parts = Path(item.filename).parts
            places.append(f"{'/'.join(parts[-3:])}:{item.lineno}")


def waiting(bench: Bench, record: Record) -> None:
    """How often a pass, a step and a group of cells wait for the device."""

    model = bench.wrapped(
        bench.network("2b", torch.bfloat16, small=True, certain=False), "small 2b"
    )
    step = Step(model, [some_intervention(model)] * 3 + [Intervention({0: zero_operator(model)})])
    unhooked = Step(model, [])
    for name, run in (("pass", lambda item: item.read()), ("step", lambda item: item.take())):
        counts = []
        for item in (step, unhooked):
            with item.hooked():
                run(item)
                with waits(bench) as places:
                    run(item)
            counts.append(len(places))
        record.row(f"one {name}: waits without hooks", counts[1])
        record.row(f"one {name}: waits that hooks add", counts[0] - counts[1], "", at_most=0)
    evaluator = evaluator_of(model, WEIGHTS, 1, (4, 4, 8, 16))
    keys = keys_at(evaluator, 1)
    evaluator.evaluate(keys)
    engine, known, references = evaluator._engine, evaluator._known, evaluator.references
    interventions = [
        Intervention({1: evaluator.configurations[key.configuration].operator(1, key.weight)})
        for key in keys
    ]
    for name, action in (
        ("responses of 5 cells", lambda: engine.respond(known, 16, interventions)),
        ("divergence of 5 cells", lambda: references.measure(engine, interventions)),
    ):
        with waits(bench) as places:
            action()
        record.row(f"{name}: waits", len(places))
        record.section.setdefault("places", {})[name] = Counter(places).most_common(12)


def zero_operator(model: LanguageModel) -> Operator:
    """Returns an operator that does nothing."""

    return Operator(torch.zeros(1, model.hidden_size), torch.zeros(1, 1))


def offload(bench: Bench, record: Record) -> None:
    """Directions of a model, half of which waits in the CPU's memory."""

    pools = Pools(tuple(pool("harmful", "train")[:60]), tuple(pool("harmless", "train")[:30]), ())
    settings = ContrastSettings(method="mean", small_classes="drop", classes="single")
    found = []
    for is_offloaded in (False, True):
        network = bench.network("2b", torch.float32, small=True, certain=False)
        if is_offloaded:
            where = bench.device
            half = len(network.model.layers) // 2
            if bench.is_cuda:
                network = network.cpu()
                names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
                layers = range(len(network.model.layers))
                network = accelerate.dispatch_model(
                    network,
                    {
                        **dict.fromkeys(names, where),
                        **{f"model.layers.{i}": where if i < half else "cpu" for i in layers},
                    },
                    main_device=where,
                )
            else:
                network = accelerate.cpu_offload(network, execution_device=bench.device)
        # Its weights are digested here, which has to find them.
        model = replace(bench.wrapped(network, "small 2b"), known_identity=None)
        found.append(extract(model, pools, settings, lambda line: None))
    # The same digest would give what is in the cache of residuals: the maximum would be 0 without any pass.
    same = found[0].provenance["identity"] == found[1].provenance["identity"]
    record.row("the same identity", float(same), "", at_least=1.0)
    known = continuations(model, 8, 8)
    whole = bench.wrapped(bench.network("2b", torch.float32, small=True, certain=False), "whole")
    intervention = some_intervention(model)
    for what, chosen in (("unmodified", None), ("hooked", [intervention])):
        (one,), (other,) = (all_logits(PlainEngine(item), known, chosen) for item in (model, whole))
        record.row(
            f"{what}: logits to those of the whole model", difference(one, other), "", at_most=1e-3
        )
    residuals = [item.residuals(pools.harmful) for item in (model, whole)]
    value = float((residuals[0] - residuals[1]).norm() / residuals[1].norm())
    record.row("residuals to those of the whole model", value, "", at_most=1e-3)


def four_bits(bench: Bench, record: Record) -> None:
    """Engines and a trial of a model in 4 bits."""

    if not HAS_BITSANDBYTES:
        record.row("bitsandbytes", "not there")
        return

    def quantized() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            DATA / REFUSER,
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                # With so few rows, they have no kernel on a CPU.
                llm_int8_skip_modules=["in_proj_a", "in_proj_b", "lm_head"],
            ),
            device_map={"": bench.device},
        )

    model = bench.wrapped(quantized(), REFUSER)
    evaluator = evaluator_of(model, (1.0, 100.0), 1, (4, 4, 8, 16))
    keys = keys_at(evaluator, 4)
    same, absolute, _ = compared(
        evaluator.evaluate(keys), with_plain_engine(evaluator).evaluate(keys)
    )
    record.row("equal responses of both engines", same)
    record.row("KL, largest difference of both engines", absolute, "nats")
    trial = Trials(bench, quantized(), ["--quantization=bnb_4bit"])
    trial.modifier.modify_model(trial.context, trial.parameters())
    record.row("a trial's divergence", float(trial.score()[1]), "nats")


# Fast.


def cells(bench: Bench, record: Record, name: str) -> None:
    """A sweep's cell by the plain and by the fast engine, and what a whole sweep takes."""

    model = bench.model(name)
    sizes = (4, 4, 8, 16) if bench.small else (10, 10, 100, 50)
    directions = None
    if name == REFUSER:
        settings = ContrastSettings(method="mean")
        directions = extract(model, some_pools(bench), settings, lambda line: None)
    made: list[SweepEvaluator] = []
    preparation = bench.seconds(
        lambda: made.append(
            evaluator_of(model, (*WEIGHTS, *DEPARTING), 1 if bench.small else 4, sizes, directions)
        )
    )
    (evaluator,) = made
    record.row("preparation, fast engine", preparation, "s")
    middle = model.n_layers // 2
    layers = sorted({model.n_layers // 6, middle, model.n_layers * 5 // 6})
    plain = with_plain_engine(evaluator)
    # Its cost depends neither on the layer nor on the weight.
    keys = [key for key in keys_at(evaluator, middle) if key.weight == WEIGHTS[-1]][:1]
    expected: list[Any] = []
    plain_seconds = bench.seconds(lambda: expected.extend(plain.evaluate(keys)))
    if plain_seconds < 4 and not bench.small:
        plain_seconds = bench.seconds(lambda: plain.evaluate(keys))
    record.row("a cell, plain engine", plain_seconds, "s")
    same, absolute, relative = compared(evaluator.evaluate(keys), expected)
    record.row("a cell: equal responses of both engines", same)
    record.row("a cell: KL, difference of both engines", absolute, "nats")
    record.row("a cell: KL, relative difference of both engines", relative)
    aim = 5.0 if name == "2b" and bench.is_cuda else None
    for kind, weights in KINDS.items():
        # What is generated takes the time of large weights, wherever the layer.
        chosen = layers if weights is WEIGHTS else [middle]
        per_cell, found = [], []
        for layer in chosen:
            keys = [key for key in keys_at(evaluator, layer) if key.weight in weights]
            times: list[float] = []
            found += evaluator.evaluate(keys)
            while not times or (sum(times) < 2 and len(times) < 3 and not bench.small):
                times.append(bench.seconds(partial(evaluator.evaluate, keys)))
            per_cell.append(statistics.median(times) / len(keys))
        mean = statistics.fmean(per_cell)
        record.row(f"{kind}: responses that depart", departed(evaluator, found))
        record.row(f"{kind}: a cell, fast engine", mean, "s")
        record.row(f"{kind}: plain / fast", plain_seconds / mean, at_least=aim)
        whole = preparation + model.n_layers * 4 * len(WEIGHTS) * mean
        record.row(f"{kind}: sweep of all layers, computed from this", whole / 60, "min")
        analyze(bench, record, kind, evaluator, middle, weights)


def analyze(
    bench: Bench,
    record: Record,
    kind: str,
    evaluator: SweepEvaluator,
    layer: int,
    weights: Sequence[float],
) -> None:
    """Records where the time of a group of cells goes, and the memory that it takes."""

    engine, known, references = evaluator._engine, evaluator._known, evaluator.references
    interventions = [
        Intervention(
            {layer: evaluator.configurations[key.configuration].operator(layer, key.weight)}
        )
        for key in keys_at(evaluator, layer)
        if key.weight in weights
    ]
    limit = evaluator.options.max_new_tokens
    for what, action in (
        ("responses", lambda: engine.respond(known, limit, interventions)),
        ("divergence", lambda: references.measure(engine, interventions)),
    ):
        label = f"{kind}: {what} of {len(interventions)} cells"
        record_forwards(bench, record, label, evaluator.model, action)
        bound = None
        if bench.is_cuda:
            bound = torch.cuda.get_device_properties(bench.device).total_memory / 5 / GIB
        peak = peak_bytes(bench, action) / GIB
        record.row(f"{label}: memory beside the model", peak, "GiB", at_most=bound)


def peak_bytes(bench: Bench, action: Callable[[], Any]) -> int:
    """Returns how much more memory of the device is taken at most while an action runs."""

    if not bench.is_cuda:
        with LiveBytes() as memory:
            action()
        return memory.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def whole_sweep(bench: Bench, record: Record) -> None:
    """The sweep of all layers with three configurations and the control, two of five weights changing all responses."""

    name = "2b"
    model = bench.model(name)
    sizes = (4, 4, 8, 16) if bench.small else (10, 10, 100, 50)
    weights = (*WEIGHTS[:3], *DEPARTING[-2:])
    made: list[SweepEvaluator] = []
    seconds = bench.seconds(lambda: made.append(evaluator_of(model, weights, 4, sizes)))
    (evaluator,) = made
    n_cells = n_done = 0
    for layer in evaluator.layers():
        keys = keys_at(evaluator, layer)
        n_cells += len(keys)
        if time.monotonic() < bench.deadline - 5 and not (bench.small and layer > 1):
            seconds += bench.seconds(lambda keys=keys: evaluator.evaluate(keys))
            n_done += len(keys)
            record.say(f"layer {layer}: {seconds:.1f} s")
    record.row("cells that were measured", n_done)
    record.row("cells of the sweep", n_cells)
    minutes = seconds / 60
    record.row(
        "preparation and measured cells", minutes, "min", at_most=10 if n_done == n_cells else None
    )


def train_file(directory: Path, name: str, count: int) -> Path:
    """Writes some prompts of a pool of the built-in refuser, of all categories."""

    source = DATA / "refuser_prompts" / name / "train.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    path = directory / f"{name}.jsonl"
    path.write_text("\n".join(lines[:: max(1, len(lines) // count)]), encoding="utf-8")
    return path


class Trials:
    """
    Heretic's model around a network that is there, with the plugin, as its host for Heretic 1.4 makes it.

    `plain`: whether it is plain Heretic's instead.
    """

    def __init__(
        self, bench: Bench, network: Any, arguments: Sequence[str] = (), plain: bool = False
    ) -> None:
        self._bench = bench
        # What Heretic compares with the settings, to know that nothing is to be loaded again.
        network.config._name_or_path = str(DATA / REFUSER)
        n_prompts = 4 if bench.small else 100
        with silently(), tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            harmful, harmless = (
                train_file(directory, name, 27 if bench.small else 400)
                for name in ("harmful", "harmless")
            )
            self.settings = load_settings(
                HostSettings,
                sys.argv[0],
                [
                    "--model",
                    str(DATA / REFUSER),
                    "--seed=0",
                    "--batch-size=128",
                    "--response-prefix=",
                    f"--max-response-length={4 if bench.small else 100}",
                    "--row-normalization=none",
                    "--contrast.method=mean",
                    f"--contrast.bad-prompts.dataset={harmful}",
                    f"--contrast.good-prompts.dataset={harmless}",
                    f"--bad-evaluation-prompts.dataset={text_file(directory, 'harmful', n_prompts)}",
                    f"--good-evaluation-prompts.dataset={text_file(directory, 'harmless', n_prompts)}",
                    *arguments,
                ],
            )
            loader = SimpleNamespace(from_pretrained=lambda *args, **options: network)
            with replaced(heretic.model, get_model_class=lambda name: loader):
                kind = heretic.model.Model if plain else HostModel
                self.hosted: Any = kind(self.settings)
            if not plain:
                self.context = LoadedContext(self.hosted)
                self.modifier = ContrastAbliteration(
                    heretic_settings=self.settings, settings=self.settings.contrast
                )
                with replaced(
                    heretic_contrast.language_model,
                    # Each model has its own place in the cache of residuals.
                    model_identity=lambda model: {"weights": time.monotonic_ns()},
                ):
                    self.modifier.init(self.context)
            self.evaluator = Evaluator(self.settings, self.hosted)

    def parameters(self, left_out: Sequence[str] = ()) -> Parameters:
        """Returns the parameters of a trial. `left_out`: components that are not ablated."""

        names = from_heretic(self.hosted, self.settings).component_names
        directions = self.modifier.directions
        kernel = {**KERNEL, **self.positions()}
        return Parameters(
            direction_index=None,
            kernels={
                name: Kernel(
                    **{**kernel, **(dict.fromkeys(KERNEL, 0.0) if name in left_out else {})}
                )
                for name in names
            },
            scales=dict.fromkeys(directions.names, 1.0 / directions.n_directions),
        )

    def positions(self) -> dict[str, float]:
        """Returns where a kernel has its maximum, and how far it reaches."""

        last = len(self.hosted.get_layers()) - 1
        return {"max_weight_position": 0.8 * last, "min_weight_distance": float(last)}

    def score(self) -> Any:
        """Evaluates the model as it is."""

        with silently():
            return self.evaluator.get_score()

    def evaluate(self) -> float:
        """Returns the median seconds of an evaluation."""

        return self._bench.median(self.score, 1)

    def normalize(self, normalization: RowNormalization) -> None:
        """Puts adapters on the network anew, of the rank that a row normalization needs."""

        with silently():
            self.hosted.model = self.hosted.model.unload()
            self.settings.row_normalization = HereticNormalization(normalization.value)
            if type(self.hosted) is HostModel:
                self.modifier.settings = self.modifier.settings.model_copy(
                    update={"row_normalization": normalization}
                )
                self.modifier._apply_lora(self.context)
            else:
                self.hosted._apply_lora()


@contextmanager
def silently() -> Iterator[None]:
    """Keeps what Heretic prints to itself."""

    with redirect_stdout(io.StringIO()):
        yield


def trial(bench: Bench, record: Record) -> None:
    """A trial of the search against plain Heretic's, in every row normalization."""

    bench.drop()
    ours, theirs = (
        Trials(bench, bench.network("2b", torch.bfloat16, bench.small, certain=True), plain=plain)
        for plain in (False, True)
    )
    mean_direction = ours.modifier.directions.mean_direction
    components = theirs.hosted.get_abliterable_components()
    parameters = ours.parameters()
    heretic_parameters = {
        component: heretic.model.AbliterationParameters(**KERNEL, **theirs.positions())
        for component in components
    }

    def modify_ours() -> None:
        ours.modifier.reset_model(ours.context)
        ours.modifier.modify_model(ours.context, parameters)

    def modify_theirs() -> None:
        theirs.hosted.reset_model()
        theirs.hosted.abliterate(mean_direction, None, heretic_parameters)

    record.row("directions per layer", ours.modifier.directions.n_directions)
    modifying: dict[str, float] = {}
    evaluating: dict[str, float] = {}
    for normalization in RowNormalization:
        for who, item, modify in (("Heretic", theirs, modify_theirs), ("ours", ours, modify_ours)):
            item.normalize(normalization)
            modifying[who] = bench.median(modify, 3)
            if normalization is not RowNormalization.PRE:
                # What was written makes no difference to its time, but for the rank.
                evaluating[who] = item.evaluate()
        label = f"row normalization {normalization.value}"
        totals = {}
        for who in modifying:
            totals[who] = modifying[who] + evaluating[who]
            record.row(f"{label}: {who}, reset and modify", modifying[who], "s")
            record.row(f"{label}: {who}, evaluate", evaluating[who], "s")
        aim = 0.6 if bench.is_cuda else None
        record.row(f"{label}: ours / Heretic", totals["ours"] / totals["Heretic"], at_most=aim)
        ratio = modifying["ours"] / modifying["Heretic"]
        record.row(f"{label}: ours / Heretic, without evaluation", ratio)


def mixture(bench: Bench, record: Record) -> None:
    """A trial on a mixture of experts, with the experts and without."""

    bench.drop()
    made: list[Any] = []
    seconds = bench.seconds(
        lambda: made.append(bench.network("30b", torch.bfloat16, bench.small, certain=True))
    )
    (network,) = made
    record.row("making the model on the device", seconds, "s")
    record.row("parameters", sum(item.numel() for item in network.parameters()) / 1e9, "B")
    preparation = bench.seconds(lambda: made.append(Trials(bench, network)))
    item = made[-1]
    record.row("extraction and baseline", preparation, "s")
    model = from_heretic(item.hosted, item.settings)
    fused = sorted({w.component for writers in model.writers for w in writers if w.is_fused})
    record.row("components of experts", ", ".join(fused) or "none")
    totals = {}
    for label, left_out in (("with experts", []), ("without experts", fused)):
        parameters = item.parameters(left_out)

        def modify(parameters: Parameters = parameters) -> None:
            item.modifier.reset_model(item.context)
            item.modifier.modify_model(item.context, parameters)

        modifying, evaluating = bench.median(modify, 3), item.evaluate()
        totals[label] = modifying + evaluating
        record.row(f"{label}: reset and modify", modifying, "s")
        record.row(f"{label}: evaluate", evaluating, "s")
    record.row("a trial with experts / without", totals["with experts"] / totals["without experts"])
    record_forwards(bench, record, "evaluate", from_heretic(item.hosted, item.settings), item.score)


def residuals(bench: Bench, record: Record, name: str) -> None:
    """The collection of residuals, against Heretic's own."""

    network = bench.model(name).model
    with silently():
        settings = load_settings(
            HostSettings,
            sys.argv[0],
            ["--model", str(DATA / REFUSER), "--batch-size=128", "--response-prefix="],
        )
    theirs = heretic.model.Model.__new__(heretic.model.Model)
    theirs.model, theirs.settings = network, settings
    theirs.tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / REFUSER)
    theirs.tokenizer.padding_side = "left"
    ours = from_heretic(theirs, settings)
    texts = [prompt.text for prompt in pool("harmful", "train")]
    # Real pools hold prompts of one to several sentences: every fourth is made longer.
    count = 16 if bench.small else 512
    texts = [
        " ".join((texts + texts)[i % len(texts) : i % len(texts) + (1, 1, 1, 5)[i % 4]])
        for i in range(count)
    ]
    prompts = [Prompt(text) for text in texts]
    asked = [HereticPrompt(system=settings.system_prompt, user=text) for text in texts]
    n_tokens = sum(map(len, ours.token_ids(prompts)))
    found, expected = ours.residuals(prompts), theirs.get_residuals_batched(asked).cpu()
    record.row("difference", float((found - expected).norm() / expected.norm()), "", at_most=0.05)
    mine = bench.median(lambda: ours.residuals(prompts))
    heretics = bench.median(lambda: theirs.get_residuals_batched(asked))
    record.row("ours", mine, "s")
    record.row("Heretic's", heretics, "s")
    record.row("Heretic's / ours", heretics / mine)
    # Heretic collects garbage after every batch, which takes as long as everything that was imported says.
    gc.freeze()
    without = bench.median(lambda: theirs.get_residuals_batched(asked))
    gc.unfreeze()
    record.row("Heretic's / ours, without its collections of garbage", without / mine)
    record.row("ours: prompts", count / mine, "prompts/s")
    record.row("ours: tokens", n_tokens / mine, "tokens/s")
    record_forwards(bench, record, "ours", ours, lambda: ours.residuals(prompts))
    for who, action in (
        ("ours", lambda: ours.residuals(prompts)),
        ("Heretic's", lambda: theirs.get_residuals_batched(asked)),
    ):
        record.row(f"{who}: peak memory", peak_bytes(bench, action) / GIB, "GiB")


def identity(bench: Bench, record: Record) -> None:
    """The digest of all weights, which every command reads once."""

    model = replace(bench.model("2b"), known_identity=None)
    record.row("digest of all weights", bench.median(model.identity, 1, warm_up=False), "s")


class Step:
    """Steps of a model that answers prompts under interventions, one token at a time, as generation does."""

    def __init__(
        self,
        model: LanguageModel,
        interventions: Sequence[Intervention],
        n_rows: int = 4,
        length: int = 64,
    ) -> None:
        self._model = model
        self._interventions = interventions
        sequences = (model.token_ids(pool("harmful", "test")) * 2)[:n_rows]
        sequences = [(sequence * length)[:length] for sequence in sequences]
        self._tokens, self._mask = (
            item.to(model.device) for item in pad_right(sequences, model.pad_token_id())
        )
        self._next = self._tokens[:, -1:]
        self._cache: Any = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Ablates the rows, one intervention each."""

        if not self._interventions:
            yield
            return
        with ablated_samples(self._model, self._interventions):
            yield

    @torch.no_grad()
    def read(self) -> None:
        """Reads the prompts."""

        output = self._model.model(
            input_ids=self._tokens, attention_mask=self._mask, use_cache=True, logits_to_keep=1
        )
        self._cache = getattr(output, CACHE)
        self._grown = self._mask

    @torch.no_grad()
    def take(self) -> None:
        """Takes one step."""

        self._grown = torch.nn.functional.pad(self._grown, (0, 1), value=1)
        output = self._model.model(
            input_ids=self._next,
            attention_mask=self._grown,
            **{CACHE: self._cache},
            use_cache=True,
            logits_to_keep=1,
        )
        self._next = output.logits.argmax(dim=-1)


def profile(bench: Bench, record: Record, name: str) -> None:
    """Where the time of a step of generation and of a pass goes: kernels, their number, waits, copies of caches."""

    model = bench.model(name)
    n_rows = 4 if bench.small else 128
    vectors = random_directions(model.n_layers, 9, model.hidden_size).tensor
    middle = model.n_layers // 2
    interventions = [
        Intervention({middle: compose(vectors[middle + 1], torch.full((9,), 0.3 + row / n_rows))})
        for row in range(n_rows)
    ]
    step = Step(model, interventions, n_rows)
    with step.hooked():
        step.read()
        for _ in range(3):
            step.take()
        seconds = bench.median(step.take, 8)
        record.row(f"a step of {n_rows} rows", 1000 * seconds, "ms")
        profiled(bench, record, "step", step.take, 3)
        record.row(f"a pass over {n_rows} × 64 tokens", 1000 * bench.median(step.read, 3), "ms")
        profiled(bench, record, "pass", step.read, 1)
    unhooked = Step(model, [], n_rows)
    unhooked.read()
    record.row("a step without hooks", 1000 * bench.median(unhooked.take, 8), "ms")
    single = Step(model, [], 1)
    single.read()
    record.row("a step of one row without hooks", 1000 * bench.median(single.take, 8), "ms")
    tokens = model.pad(model.token_ids(pool("harmful", "test")[:n_rows]))
    lengths = (4, 8) if bench.small else (8, 24)
    times = [
        bench.median(
            lambda n=n: model.model.generate(
                **tokens, max_new_tokens=n, do_sample=False, pad_token_id=model.pad_token_id()
            ),
            2,
        )
        for n in lengths
    ]
    in_generate = (times[1] - times[0]) / (lengths[1] - lengths[0])
    record.row("a step inside generate, without hooks", 1000 * in_generate, "ms")


def profiled(
    bench: Bench, record: Record, what: str, action: Callable[[], Any], repeats: int
) -> None:
    """Records what PyTorch's profiler sees of an action."""

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    bench.synchronize()
    with profiler(activities=activities) as found:
        for _ in range(repeats):
            action()
        bench.synchronize()
    counts: Counter[str] = Counter()
    durations: Counter[str] = Counter()
    for event in found.events():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device:
            kind = "copy" if event.name.startswith(("Memcpy", "Memset")) else "kernel"
            names = [kind, f"{kind}: {event.name}"]
        elif event.name.startswith("cu") or (
            not bench.is_cuda
            and event.name
            in (
                "aten::cat",
                "aten::mm",
                "aten::addmm",
                "aten::copy_",
            )
        ):
            names = [event.name]
        else:
            continue
        for key in names:
            counts[key] += 1
            durations[key] += event.time_range.elapsed_us()
    record.row(f"{what}: kernels", counts["kernel"] / repeats)
    record.row(f"{what}: time of kernels", durations["kernel"] / repeats / 1000, "ms")
    record.row(f"{what}: copies", counts["copy"] / repeats)
    record.row(f"{what}: time of copies", durations["copy"] / repeats / 1000, "ms")
    concatenated = [key for key in counts if "CatArray" in key or key == "aten::cat"]
    record.row(
        f"{what}: concatenations, as of caches", sum(counts[key] for key in concatenated) / repeats
    )
    spent = sum(durations[key] for key in concatenated) / repeats / 1000
    record.row(f"{what}: time of concatenations", spent, "ms")
    waited = [key for key in counts if "Synchronize" in key]
    record.row(f"{what}: waits", sum(counts[key] for key in waited) / repeats)
    record.section.setdefault("profiles", {})[what] = [
        {"name": key[:160], "count": counts[key] / repeats, "ms": value / repeats / 1000}
        for key, value in durations.most_common(40)
    ]


@dataclass(frozen=True)
class Section:
    """`run`: what is measured. `least` and `most`: seconds that it needs on a GPU, and that it may take."""

    run: Callable[[Bench, Record], None]
    least: float
    most: float


def for_model(measure: Callable[[Bench, Record, str], None], name: str) -> Callable[..., None]:
    return lambda bench, record: measure(bench, record, name)


SECTIONS = {
    "card": Section(card, 1, 30),
    "hooks": Section(hooks, 5, 60),
    "engines": Section(engines, 5, 60),
    "zero": Section(zero, 5, 40),
    "waiting": Section(waiting, 3, 30),
    "cells, 2b": Section(for_model(cells, "2b"), 20, 120),
    "trial, 2b": Section(trial, 20, 120),
    "residuals, 2b": Section(for_model(residuals, "2b"), 5, 60),
    "profile, 2b": Section(for_model(profile, "2b"), 8, 60),
    "cells, 8b": Section(for_model(cells, "8b"), 25, 120),
    "residuals, 8b": Section(for_model(residuals, "8b"), 8, 60),
    "profile, 8b": Section(for_model(profile, "8b"), 5, 40),
    "mixture": Section(mixture, 30, 120),
    "devices": Section(devices, 5, 60),
    "adapters": Section(adapters, 5, 60),
    "offload": Section(offload, 3, 30),
    "4 bits": Section(four_bits, 3, 40),
    "choice of the engine": Section(engine_choice, 3, 40),
    "identity": Section(identity, 2, 30),
    "whole sweep, 2b": Section(whole_sweep, 20, 600),
    "cells, refuser": Section(for_model(cells, REFUSER), 5, 60),
}
"""The most important first."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` when the context takes longer."""

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(f"This took more than {seconds:.0f} s.")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_section(bench: Bench, record: Record, name: str) -> None:
    """Runs a section, and records how it failed where it does."""

    section = SECTIONS[name]
    record.start(name)
    left = bench.deadline - time.monotonic()
    started = time.monotonic()
    if left < section.least:
        text = f"{max(left, 0):.0f} s were left, and it needs about {section.least:.0f} s."
        record.section["skipped"] = text
        record.say(text)
    else:
        try:
            with at_most(max(1.0, min(left, section.most))):
                section.run(bench, record)
        except (Exception, OutOfTime) as error:
            lines = "".join(traceback.format_exception(error)).splitlines()[-12:]
            record.section["error"] = lines
            record.say("\n".join(lines))
            # Its frames hold tensors.
            error.__traceback__ = None
            if isinstance(error, torch.OutOfMemoryError):
                bench.drop()
    record.section["seconds"] = time.monotonic() - started
    record.write()
    bench.free()


def main() -> None:
    """Runs the sections, and prints everything as a table."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, help="folder for gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and few prompts")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--table", type=Path, help="print a short table of a file")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8")), short=True))
        return
    if arguments.output is None:
        parser.error("give --output or --table")
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record = Record(arguments.output / "gpu.json", time.monotonic())
    with tempfile.TemporaryDirectory() as folder:
        # Residuals of random models are nothing to keep.
        os.environ["XDG_CACHE_HOME"] = folder
        bench = Bench(arguments, Path(folder))
        if arguments.small:
            # Heretic collects garbage after every batch, which would take most of the time here.
            gc.freeze()
        for name in arguments.only or SECTIONS:
            run_section(bench, record, name)
    print(table(record.content), flush=True)


if __name__ == "__main__":
    main()
