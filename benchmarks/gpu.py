# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Checks and measures the package on one GPU, in a few minutes and without network.

    python benchmarks/gpu.py --output gpu [--minutes 8] [--only SECTION...]
    python benchmarks/gpu.py --output gpu --device cpu --small
    python benchmarks/gpu.py --table gpu/gpu.json

Writes gpu.json into the output folder after every row, and prints a table at the end. A section that fails leaves its error
there, and the next one runs. Models are the built-in refuser, and random ones in the shapes of Qwen 3.5 2B, Llama 3.1 8B and
Qwen 3 30B-A3B, made on the device in bfloat16. Times are medians of warmed up runs between two events of the device, which
wait for everything in between. No setting of the card is changed. cuDNN's attention, which builds a plan for every new length,
is switched off for everything but the section that measures it.
"""

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# So that a checkout need not be installed.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import accelerate
import heretic.model
import torch
import transformers
from heretic.utils import Prompt as HereticPrompt
from measuring import Clock, Forwards, Steps, network_of_shape, profiled, random_directions, waits
from recording import Record, table
from torch import Tensor
from trial import Trials, silently

from heretic_contrast.ablation.changes import subtract
from heretic_contrast.ablation.hooks import Intervention
from heretic_contrast.ablation.operator import compose
from heretic_contrast.builtin import DATA, refuser_pool
from heretic_contrast.directions.extraction import extract
from heretic_contrast.directions.pools import Pools
from heretic_contrast.engine.check import all_logits, checked_engine
from heretic_contrast.engine.fast.engine import FastEngine
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.evaluation.cells import CellKey
from heretic_contrast.evaluation.plan import SweepOptions, plan_sweep
from heretic_contrast.evaluation.plan_settings import WEIGHTS
from heretic_contrast.evaluation.sweep import SweepEvaluator, swept_layers
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.surface import from_heretic, wrap
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt, load_pool
from heretic_contrast.settings import ContrastSettings, RowNormalization
from heretic_contrast.tiers.responses import Tier

REFUSER = "refuser"
TOKENIZER = transformers.AutoTokenizer.from_pretrained(DATA / REFUSER)

BOUNDS = {"float16": 0.01, "float32": 1e-3, "bfloat16": 0.04}
"""Relative differences of logits that rounding explains, by data type. Convolutions may compute in TF32."""

DEPARTING = tuple(1e4 * weight for weight in WEIGHTS)

KINDS = {"the paper's weights": WEIGHTS, "weights 10,000 times as large": DEPARTING}
"""The first change no response of a random model whose tokens predict themselves, the others nearly all."""

GIB = 2**30


class Bench(Record):
    """The device, the models on it, and all that was recorded."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        super().__init__(arguments.output / "gpu.json", arguments.minutes)
        self.small: bool = arguments.small
        self.folder = folder
        self.device = torch.device(arguments.device)
        self.clock = Clock(self.device)
        self.is_cuda = self.clock.is_cuda
        self.seconds = self.clock.seconds
        if self.is_cuda:
            self.device = torch.device("cuda", self.device.index or 0)
        self._held: dict[str, LanguageModel] = {}

    def median(self, action: Callable[[], Any], repeats: int = 3) -> float:
        """Returns the median seconds of several runs, after one that does not count."""

        return self.clock.median(action, 1 if self.small else repeats)

    def drop(self) -> None:
        """Forgets all models, and gives back the memory of the device."""

        self._held.clear()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def model(self, name: str) -> LanguageModel:
        """Returns a model as it is measured: the refuser, or a random one in bfloat16. One of them is kept."""

        if name not in self._held:
            self.drop()
            # Half precision is slow on a CPU.
            dtype = torch.bfloat16 if self.is_cuda or name != REFUSER else torch.float32
            self._held[name] = self.wrapped(self.network(name, dtype, self.small), name)
        return self._held[name]

    def wrapped(self, network: Any, name: str) -> LanguageModel:
        """Returns the wrapper, which is not asked for a digest of its weights."""

        model: LanguageModel = wrap(network, TOKENIZER, name=name, batch_size=128)
        return replace(model, known_identity={"weights": f"{name} {network.dtype}"})

    def network(self, name: str, dtype: torch.dtype, small: bool, certain: bool = True) -> Any:
        """Returns the refuser, or a random network of a shape, on the device."""

        if name == REFUSER:
            kind = transformers.AutoModelForCausalLM
            return kind.from_pretrained(DATA / REFUSER, dtype=dtype).to(self.device)
        return network_of_shape(name, TOKENIZER, self.device, dtype, small, certain)

    def small_networks(self, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
        """Yields the refuser and small random networks, whose tokens are nearly equally likely."""

        yield REFUSER, self.network(REFUSER, dtype, True)
        for name in ("2b", "30b"):
            yield f"small {name}", self.network(name, dtype, True, certain=False)

    @cached_property
    def matrix_rate(self) -> float:
        """Operations per second of a product of large matrices in bfloat16."""

        size = 8_192 if self.is_cuda else 512
        first, second = torch.randn(2, size, size, device=self.device).bfloat16()
        seconds = self.median(lambda: [torch.mm(first, second) for _ in range(10)], 10)
        return 10 * 2 * size**3 / seconds

    def forwards(
        self, what: str, model: LanguageModel, action: Callable[[], Any], aim: float = 0.6
    ) -> None:
        """Records what an action does inside forward passes, and the memory that it takes. It has been run before."""

        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with Forwards(self.clock, model) as found:
            seconds = self.seconds(action)
        at_least = aim if self.is_cuda and model.name != REFUSER else None
        self.row(what, seconds, "s")
        share = found.seconds / seconds
        self.row(f"{what}: share of time in forward passes", share, at_least=at_least, main=True)
        self.row(f"{what}: tokens through all layers", found.tokens / seconds, "tokens/s")
        rate = found.operations / seconds / self.matrix_rate
        self.row(f"{what}: share of the matrix rate", rate, main=True)
        if self.is_cuda:
            peak = (torch.cuda.max_memory_allocated() - before) / GIB
            bound = torch.cuda.get_device_properties(self.device).total_memory / 5 / GIB
            self.row(f"{what}: memory beside the model", peak, "GiB", at_most=bound)


def pool(name: str, split: str = "test", count: int | None = None) -> tuple[Prompt, ...]:
    """Returns prompts of the built-in refuser, of all categories."""

    prompts = load_pool(refuser_pool(name, split), name)
    return tuple(prompts[:: max(1, len(prompts) // (count or len(prompts)))][:count])


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns a relative difference; of logits, apart from what adds to all of a position."""

    found, expected = (item - item.mean(dim=-1, keepdim=True) for item in (found, expected))
    return float((found - expected).norm() / expected.norm())


def continuations(model: LanguageModel) -> Continuations:
    """Returns prompts with the model's responses."""

    prompts = tuple(model.token_ids(pool("harmful", count=8)))
    return Continuations(prompts, tuple(PlainEngine(model).generate(prompts, [8] * 8)))


def logits(
    model: LanguageModel, known: Continuations, intervention: Intervention | None = None
) -> Tensor:
    """Returns the logits of the plain engine."""

    return all_logits(PlainEngine(model), known, intervention and [intervention])[0]


def some_intervention(model: LanguageModel, weight: float = 2.0) -> Intervention:
    """Returns what changes the upper half of a model."""

    vectors = random_directions(model.n_layers, 3, model.hidden_size).tensor
    layers = range(model.n_layers // 2, model.n_layers)
    return Intervention(
        {layer: compose(vectors[layer + 1], torch.full((3,), weight)) for layer in layers}
    )


def reloaded(bench: Bench, network: Any) -> LanguageModel:
    """Returns a model that has been saved and loaded again."""

    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        network.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=network.dtype)
    return bench.wrapped(loaded.to(bench.device), "reloaded")


def evaluator_of(
    model: LanguageModel,
    weights: Sequence[float],
    n_configurations: int = 1,
    sizes: tuple[int, int, int, int] = (4, 4, 8, 16),
    directions: Any = None,
) -> SweepEvaluator:
    """
    Returns an evaluator with the fast engine, which takes every response for a refusal.

    `sizes`: harmful prompts, canaries, references, tokens of a response.
    """

    directions = directions or random_directions(model.n_layers, 9, model.hidden_size)
    harmless = pool("harmless")
    plan = plan_sweep(
        {f"configuration {index}": directions for index in range(n_configurations)},
        pool("harmful", count=sizes[0]),
        harmless[: sizes[1]],
        harmless[sizes[1] : sizes[1] + sizes[2]],
        SweepOptions(
            weights=tuple(weights), max_new_tokens=sizes[3], kl_tokens=sizes[3], synergy_size=0
        ),
    )
    return SweepEvaluator(model, plan, lambda prompt, response: Tier.REFUSE, FastEngine(model))


def keys_at(
    evaluator: SweepEvaluator, layer: int, weights: Sequence[float] | None = None
) -> list[CellKey]:
    """Returns the cells of a layer, which a sweep measures together."""

    return [
        key
        for key in evaluator.grid()
        if key.layers == (layer,) and (weights is None or key.weight in weights)
    ]


def evaluate_plainly(evaluator: SweepEvaluator, keys: Sequence[CellKey]) -> list[Any]:
    """Measures cells by the plain engine, against the same unmodified model."""

    plain = copy.copy(evaluator)
    plain._engine = PlainEngine(evaluator.model)
    return plain.evaluate(keys)


def departed(evaluator: SweepEvaluator, cells: Sequence[Any]) -> float:
    """Returns the share of responses to harmful prompts that are not the unmodified model's."""

    base = evaluator.base_responses
    changed = [a != b for cell in cells for a, b in zip(cell.responses, base, strict=True)]
    return sum(changed) / len(changed)


def compare_cells(
    bench: Bench, label: str, found: Sequence[Any], expected: Sequence[Any], exact: bool = False
) -> None:
    """Records how far both engines agree. `exact`: whether responses must be equal."""

    pairs = list(zip(found, expected, strict=True))
    same = [
        a == b
        for one, other in pairs
        for a, b in zip(
            one.responses + one.canary_responses,
            other.responses + other.canary_responses,
            strict=True,
        )
    ]
    values = [[item.measurement.kl_divergence for item in pair] for pair in pairs]
    bench.row(f"{label}: equal responses", sum(same) / len(same), at_least=1.0 if exact else None)
    bench.row(f"{label}: KL, largest difference", max(abs(a - b) for a, b in values), "nats")
    relative = max(abs(a - b) / max(abs(b), 1e-9) for a, b in values)
    bench.row(f"{label}: KL, relative", relative, at_most=0.02 if exact else None)


def card(bench: Bench) -> None:
    """What computes, as it is found."""

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.is_cuda else "CPU",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "small": bench.small,
    }
    libraries = """
        heretic-contrast heretic-llm torch transformers accelerate peft bitsandbytes flash-linear-attention causal-conv1d
    """
    for name in libraries.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not there"
    fields = """
        name driver_version memory.total clocks.sm clocks.mem clocks.max.sm clocks.max.mem power.limit temperature.gpu
        ecc.mode.current
    """.split()
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if bench.is_cuda:
        try:
            lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
            found |= dict(zip(fields, lines.splitlines()[0].split(", "), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            found["name"] = f"nvidia-smi is not there ({error})"
    bench.content["card"] = found
    bench.say(json.dumps(found))
    bench.row("product of matrices, bfloat16", bench.matrix_rate / 1e12, "TFLOP/s", main=True)
    source = torch.zeros(
        2 * GIB if bench.is_cuda else 2**24, dtype=torch.uint8, device=bench.device
    )
    target = torch.empty_like(source)
    seconds = bench.median(lambda: target.copy_(source), 10)
    bench.row("copy, read and written", 2 * source.numel() / seconds / 1e9, "GB/s", main=True)


def hooks(bench: Bench) -> None:
    """Hooks against changed weights, and against those when they have been saved and loaded again."""

    for dtype, bound in BOUNDS.items():
        for name, network in bench.small_networks(getattr(torch, dtype)):
            model = bench.wrapped(network, name)
            known, intervention = continuations(model), some_intervention(model)
            unmodified, hooked = logits(model, known), logits(model, known, intervention)
            for layer, operator in intervention.operators.items():
                for writer in model.writers[layer]:
                    subtract(writer, operator)
            changed = logits(model, known)
            exported = difference(logits(reloaded(bench, network), known), changed)
            label = f"{name}, {dtype}"
            bench.row(f"{label}: hooks to changed weights", difference(hooked, changed), "", bound)
            bench.row(f"{label}: changed weights to export", exported, "", 1e-6)
            if name == REFUSER:
                # A check that nothing changes would be met by hooks that do nothing.
                effect = difference(hooked, unmodified)
                bench.row(f"{label}: what the hooks change", effect, at_least=2 * bound)


def adapters(bench: Bench) -> None:
    """A trial's adapters against hooks, and against the merged model when it has been saved and loaded again."""

    for dtype, bound in list(BOUNDS.items())[: 1 if bench.small else None]:
        kind = torch.float32 if bench.small else getattr(torch, dtype)
        trials = trials_of(bench, bench.network(REFUSER, kind, True))
        parameters, directions = trials.parameters(), trials.modifier.directions
        plain = bench.wrapped(bench.network(REFUSER, kind, True), REFUSER)
        known = continuations(plain)
        trials.modifier.modify_model(trials.context, parameters)
        adapted = logits(bench.wrapped(trials.model.model, REFUSER), known)
        with silently():
            exported = logits(reloaded(bench, trials.model.get_merged_model()), known)
        kernel = next(iter(parameters.kernels.values()))
        scales = torch.tensor([parameters.scales[name] for name in directions.names])
        operators = {
            layer: compose(directions.tensor[layer + 1], scales * kernel.weight(layer))
            for layer in range(plain.n_layers)
        }
        hooked = logits(plain, known, Intervention(operators))
        bench.row(f"{dtype}: adapters to hooks", difference(adapted, hooked), "", bound)
        bench.row(f"{dtype}: export to hooks", difference(exported, hooked), "", bound)


def engines(bench: Bench) -> None:
    """The fast engine against the plain one."""

    for dtype in BOUNDS:
        for name, network in bench.small_networks(getattr(torch, dtype)):
            model = bench.wrapped(network, name)
            evaluator = evaluator_of(model, (1.0, 100.0))
            keys = keys_at(evaluator, model.n_layers // 4)
            if not bench.small:
                keys += keys_at(evaluator, 3 * model.n_layers // 4)
            found = evaluator.evaluate(keys)
            label = f"{name}, {dtype}"
            bench.row(f"{label}: responses that depart", departed(evaluator, found))
            expected = evaluate_plainly(evaluator, keys)
            compare_cells(bench, label, found, expected, exact=dtype == "float32")


def zero(bench: Bench) -> None:
    """An intervention of zero gives the unmodified responses, also where many tokens are nearly equally likely."""

    for name, network in bench.small_networks(torch.bfloat16):
        evaluator = evaluator_of(bench.wrapped(network, name), (0.0,), sizes=(30, 10, 10, 30))
        cells = evaluator.evaluate(keys_at(evaluator, 0) + keys_at(evaluator, 2))
        bench.row(f"{name}: responses that depart", departed(evaluator, cells), "", 0)


def devices(bench: Bench) -> None:
    """Residuals, directions and maps of the refuser on the device against those on the CPU."""

    pools = some_pools(bench)
    networks = [bench.network(REFUSER, torch.float32, True) for _ in range(2)]
    networks[1].cpu()
    # Each has its own place in the cache of residuals.
    models = [bench.wrapped(network, str(index)) for index, network in enumerate(networks)]
    bench.row(
        "residuals", difference(*(item.residuals(pools.harmful) for item in models)), "", 2e-3
    )
    maps = {"method": "som", "som_rows": 2, "som_columns": 2}
    for chosen, bound in (({"method": "mean"}, 0.9999), (maps, 0.999)):
        method = chosen["method"]
        settings = ContrastSettings(classes="category", **chosen)
        found, expected = (extract(item, pools, settings, lambda line: None) for item in models)
        # Where all prompts end in the same token, the embedding has no direction.
        some = expected.tensor.norm(dim=-1) > 0
        cosines = torch.cosine_similarity(found.tensor, expected.tensor, dim=-1)[some]
        bench.row(f"directions, {method}: smallest cosine", float(cosines.min()), at_least=bound)
    bench.row("maps: equal hits", float((found.hits == expected.hits).double().mean()))


def some_pools(bench: Bench) -> Pools:
    """Returns prompts to extract directions from."""

    count = 54 if bench.small else 216
    return Pools(pool("harmful", "train", count), pool("harmless", "train", count), ())


def steps_of(model: LanguageModel, interventions: Sequence[Intervention], n_rows: int = 4) -> Steps:
    """Returns steps after prompts of 64 tokens."""

    prompts = (model.token_ids(pool("harmful")) * 2)[:n_rows]
    return Steps(model, [(tokens * 64)[:64] for tokens in prompts], interventions)


def waiting(bench: Bench) -> None:
    """How often a pass, a step and groups of cells wait for the device."""

    network = bench.network("2b", torch.bfloat16, True, certain=False)
    model = bench.wrapped(network, "small 2b")
    hooked = steps_of(model, [some_intervention(model, 0.1 * row) for row in range(4)])
    unhooked = steps_of(model, [])
    for name in ("read", "take"):
        counts = []
        for steps in (unhooked, hooked):
            with steps.hooked():
                getattr(steps, name)()
                counts.append(len(waits(getattr(steps, name), bench.is_cuda)))
        bench.row(f"{name}: waits without hooks", counts[0])
        bench.row(f"{name}: waits that hooks add", counts[1] - counts[0], "", 0)
    evaluator = evaluator_of(model, WEIGHTS)
    evaluator.evaluate(keys_at(evaluator, 1))
    for name, action in parts_of(evaluator, 1, WEIGHTS).items():
        places = waits(action, bench.is_cuda)
        bench.row(f"{name}: waits", len(places))
        bench.section.setdefault("places", {})[name] = Counter(places).most_common(30)


def offload(bench: Bench) -> None:
    """A model, half of which waits in the CPU's memory."""

    whole, network = (bench.network("2b", torch.float32, True, certain=False) for _ in range(2))
    if bench.is_cuda:
        names = ("embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(4)))
        places: dict[str, Any] = {f"model.{name}": bench.device for name in names}
        places |= {"lm_head": bench.device, "model.layers.2": "cpu", "model.layers.3": "cpu"}
        network = accelerate.dispatch_model(network.cpu(), places, main_device=bench.device)
    else:
        network = accelerate.cpu_offload(network, execution_device=bench.device)
    models = [
        # Weights are digested here, for which they have to be found.
        replace(bench.wrapped(item, "offloaded"), known_identity=None)
        for item in (network, whole)
    ]
    same = models[0].identity()["weights"] == models[1].identity()["weights"]
    bench.row("the same identity", float(same), at_least=1.0)
    prompts, known = pool("harmful", "train", 20), continuations(models[0])
    residuals = [model.residuals(prompts) for model in models]
    bench.row("residuals to those of the whole model", difference(*residuals), "", 1e-3)
    for what, intervention in (("unmodified", None), ("hooked", some_intervention(models[1]))):
        found, expected = (logits(model, known, intervention) for model in models)
        bench.row(f"{what}: logits to the whole model's", difference(found, expected), "", 1e-3)
    settings = ContrastSettings(method="mean", classes="single")
    extract(models[0], some_pools(bench), settings, lambda line: None)


def four_bits(bench: Bench) -> None:
    """Engines and a trial of a model in 4 bits."""

    def quantized() -> Any:
        options = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            # With so few rows, they have no kernel on a CPU.
            llm_int8_skip_modules=["in_proj_a", "in_proj_b", "lm_head"],
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            DATA / REFUSER, quantization_config=options, device_map={"": bench.device}
        )

    evaluator = evaluator_of(bench.wrapped(quantized(), REFUSER), (1.0, 100.0))
    keys = keys_at(evaluator, 4)
    compare_cells(bench, "cells", evaluator.evaluate(keys), evaluate_plainly(evaluator, keys))
    trials = trials_of(bench, quantized(), arguments=["--quantization=bnb_4bit"])
    trials.modifier.modify_model(trials.context, trials.parameters())
    bench.row("a trial's divergence", float(trials.score()[1]), "nats")


def choice(bench: Bench) -> None:
    """Which engine a model gets, and what is read before a sweep starts."""

    for name in (REFUSER, "2b"):
        model = bench.model(name)
        tokens = model.token_ids(pool("harmful", count=20))
        check = bench.seconds(partial(checked_engine, model, tokens))
        is_fast = float(isinstance(checked_engine(model, tokens), FastEngine))
        bench.row(f"{name}: the fast engine is chosen", is_fast, at_least=1.0)
        bench.row(f"{name}: its check", check, "s")
        digest = bench.seconds(replace(model, known_identity=None).identity)
        bench.row(f"{name}: digest of all weights", digest, "s", main=True)


def cells(bench: Bench, name: str) -> None:
    """A sweep's cell by the plain and by the fast engine, and what a whole sweep takes."""

    model, directions = bench.model(name), None
    if name == REFUSER:
        settings = ContrastSettings(method="mean", classes="category")
        directions = extract(model, some_pools(bench), settings, lambda line: None)
    seconds, evaluator = prepared(bench, model, (*WEIGHTS, *DEPARTING), directions)
    bench.row("preparation, fast engine", seconds, "s", main=True)
    middle = model.n_layers // 2
    # The plain engine's cost depends neither on the layer nor on the weight.
    keys = keys_at(evaluator, middle, WEIGHTS[-1:])[:1]
    expected: list[Any] = []
    plain = bench.seconds(lambda: expected.extend(evaluate_plainly(evaluator, keys)))
    if plain < 4 and not bench.small:
        plain = bench.seconds(lambda: evaluate_plainly(evaluator, keys))
    bench.row("a cell, plain engine", plain, "s", main=True)
    compare_cells(bench, "both engines", evaluator.evaluate(keys), expected)
    for kind, weights in KINDS.items():
        # What is generated takes the time of large weights, wherever the layer.
        layers = {model.n_layers // 6, middle, 5 * model.n_layers // 6}
        per_cell: list[float] = []
        found: list[Any] = []
        for layer in sorted(layers if weights is WEIGHTS else [middle]):
            keys = keys_at(evaluator, layer, weights)
            if not found and weights is WEIGHTS:
                evaluator.evaluate(keys)
            times = [bench.seconds(partial(evaluate_into, found, evaluator, keys))]
            while sum(times) < 2 and len(times) < 3 and not bench.small:
                times.append(bench.seconds(partial(evaluator.evaluate, keys)))
            per_cell.append(statistics.median(times) / len(keys))
        mean = statistics.fmean(per_cell)
        aim = 5.0 if name == "2b" and bench.is_cuda else None
        whole = (seconds + model.n_layers * 4 * len(WEIGHTS) * mean) / 60
        bench.row(f"{kind}: responses that depart", departed(evaluator, found), main=True)
        bench.row(f"{kind}: a cell, fast engine", mean, "s", main=True)
        bench.row(f"{kind}: plain / fast", plain / mean, at_least=aim, main=True)
        bench.row(f"{kind}: sweep of all layers, computed", whole, "min", main=True)
        for what, action in parts_of(evaluator, middle, weights).items():
            bench.forwards(f"{kind}: {what}", model, action)


def evaluate_into(found: list[Any], evaluator: SweepEvaluator, keys: Sequence[CellKey]) -> None:
    """Adds measured cells to a list."""

    found += evaluator.evaluate(keys)


def prepared(
    bench: Bench, model: LanguageModel, weights: Sequence[float], directions: Any = None
) -> tuple[float, SweepEvaluator]:
    """Returns an evaluator of the size of a real sweep, and how long it took to make it."""

    sizes = (4, 4, 8, 16) if bench.small else (10, 10, 100, 50)
    made: list[SweepEvaluator] = []
    n_configurations = 1 if bench.small else 4
    seconds = bench.seconds(
        lambda: made.append(evaluator_of(model, weights, n_configurations, sizes, directions))
    )
    return seconds, made[0]


def parts_of(
    evaluator: SweepEvaluator, layer: int, weights: Sequence[float]
) -> dict[str, Callable[[], Any]]:
    """Returns what a group of cells consists of."""

    engine, known, references = evaluator._engine, evaluator._known, evaluator.references
    limit = evaluator.options.max_new_tokens
    interventions = [
        Intervention(
            {layer: evaluator.configurations[key.configuration].operator(layer, key.weight)}
        )
        for key in keys_at(evaluator, layer, weights)
    ]
    return {
        f"responses of {len(interventions)} cells": lambda: engine.respond(
            known, limit, interventions
        ),
        f"divergence of {len(interventions)} cells": lambda: references.measure(
            engine, interventions
        ),
    }


def whole_sweep(bench: Bench) -> None:
    """The sweep of all layers with three configurations and the control: every third layer, and two of five weights large."""

    model, until = bench.model("2b"), time.monotonic() + 50
    seconds, evaluator = prepared(bench, model, (*WEIGHTS[:3], *DEPARTING[-2:]))
    times = []
    for layer in swept_layers(evaluator.model, evaluator.options)[1::3]:
        times.append(bench.seconds(partial(evaluator.evaluate, keys_at(evaluator, layer))))
        bench.say(f"layer {layer}: {times[-1]:.1f} s")
        if time.monotonic() > until:
            break
    bench.row("cells of the sweep", len(evaluator.grid()), main=True)
    bench.row("layers that were measured", len(times), main=True)
    bench.row("cells of a layer together, median", statistics.median(times), "s", main=True)
    whole = seconds + statistics.fmean(times) * model.n_layers
    bench.row("whole sweep, from these layers", whole / 60, "min", at_most=10.0, main=True)


def trials_of(
    bench: Bench, network: Any, plain: bool = False, arguments: Sequence[str] = ()
) -> Trials:
    """Returns Heretic's model around a network, with or without the plugin."""

    n_prompts, n_tokens, n_training = (4, 4, 27) if bench.small else (100, 100, 400)
    options = [f"--max-response-length={n_tokens}", "--batch-size=128", *arguments]
    return Trials(str(DATA / REFUSER), plain, network, n_prompts, n_training, options)


def trial(bench: Bench) -> None:
    """A trial of the search against plain Heretic's, in every row normalization."""

    bench.drop()
    ours, theirs = (
        trials_of(bench, bench.network("2b", torch.bfloat16, bench.small), plain=plain)
        for plain in (False, True)
    )
    actions = {
        "Heretic": (
            theirs,
            partial(theirs.modify_plainly, ours.modifier.directions.mean_direction),
        ),
        "ours": (ours, partial(ours.modify, ours.parameters())),
    }
    bench.row("directions per layer", ours.modifier.directions.n_directions)
    evaluating: dict[str, float] = {}
    for normalization in get_args(RowNormalization):
        label = f"row normalization {normalization}"
        modifying: dict[str, float] = {}
        for who, (trials, modify) in actions.items():
            trials.normalize(normalization)
            modifying[who] = bench.median(modify)
            if who not in evaluating:
                # What was written makes no difference to its time. The baseline was evaluated before.
                evaluating[who] = bench.seconds(trials.score)
                bench.row(f"{who}, evaluate", evaluating[who], "s", main=True)
            bench.row(f"{label}: {who}, reset and modify", modifying[who], "s", main=True)
        totals = {who: modifying[who] + evaluating[who] for who in actions}
        aim = 0.6 if bench.is_cuda else None
        ratio = totals["ours"] / totals["Heretic"]
        bench.row(f"{label}: ours / Heretic", ratio, at_most=aim, main=True)
    # As Heretic runs by itself: plans are built for every length once, and are there in the next trial.
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        for which in ("first", "second"):
            seconds = bench.seconds(theirs.score)
            bench.row(f"Heretic, evaluate with cuDNN's attention, {which}", seconds, "s", main=True)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def mixture(bench: Bench) -> None:
    """A trial on a mixture of experts, with the experts and without."""

    bench.drop()
    made: list[Any] = []
    seconds = bench.seconds(lambda: made.append(bench.network("30b", torch.bfloat16, bench.small)))
    bench.row("making the model on the device", seconds, "s")
    bench.row("parameters", sum(item.numel() for item in made[0].parameters()) / 1e9, "B")
    seconds = bench.seconds(lambda: made.append(trials_of(bench, made[0])))
    bench.row("extraction and baseline", seconds, "s", main=True)
    trials = made[1]
    model = from_heretic(trials.model, trials.settings)
    fused = sorted({w.component for writers in model.writers for w in writers if w.is_fused})
    bench.row("components of experts", ", ".join(fused))
    totals = []
    for label, left_out in (("with experts", []), ("without experts", fused)):
        modifying = bench.median(partial(trials.modify, trials.parameters(left_out)))
        evaluating = bench.seconds(trials.score)
        totals.append(modifying + evaluating)
        bench.row(f"{label}: reset and modify", modifying, "s", main=True)
        bench.row(f"{label}: evaluate", evaluating, "s", main=True)
    bench.row("a trial with experts / without", totals[0] / totals[1], main=True)
    bench.forwards("evaluate", model, trials.score)


def residuals(bench: Bench, name: str) -> None:
    """The collection of residuals, against Heretic's own."""

    with silently():
        settings = load_settings(
            HostSettings,
            sys.argv[0],
            ["--model", str(DATA / REFUSER), "--batch-size=128", "--response-prefix="],
        )
    theirs = heretic.model.Model.__new__(heretic.model.Model)
    theirs.model, theirs.settings = bench.model(name).model, settings
    theirs.tokenizer = copy.deepcopy(TOKENIZER)
    theirs.tokenizer.padding_side = "left"
    ours = replace(from_heretic(theirs, settings), name=name)
    texts = [prompt.text for prompt in pool("harmful", "train")] * 2
    # Real pools hold prompts of one to several sentences: every fourth is made longer.
    count = 16 if bench.small else 256
    texts = [" ".join(texts[i : i + (1, 1, 1, 5)[i % 4]]) for i in range(count)]
    prompts = [Prompt(text) for text in texts]
    asked = [HereticPrompt(system=settings.system_prompt, user=text) for text in texts]
    collect = partial(ours.residuals, prompts)
    collect_theirs = partial(theirs.get_residuals_batched, asked)
    bench.row("difference", difference(collect(), collect_theirs().cpu()), at_most=0.05)
    mine, heretics = bench.median(collect), bench.median(collect_theirs, 1)
    # Heretic collects garbage after every batch, which takes as long as everything that was imported says.
    gc.freeze()
    without = bench.median(collect_theirs, 1)
    gc.unfreeze()
    n_tokens = sum(map(len, ours.token_ids(prompts)))
    bench.row("Heretic's", heretics, "s", main=True)
    bench.row("ours", mine, "s", main=True)
    bench.row("Heretic's / ours", heretics / mine, main=True)
    bench.row("Heretic's / ours, without its collections of garbage", without / mine, main=True)
    bench.row("ours: prompts", count / mine, "prompts/s", main=True)
    bench.row("ours: tokens", n_tokens / mine, "tokens/s", main=True)
    bench.forwards("one run of ours", ours, collect)


def profile(bench: Bench, name: str) -> None:
    """Where the time of a step of generation and of a pass goes."""

    model, n_rows = bench.model(name), 4 if bench.small else 128
    vectors, middle = (
        random_directions(model.n_layers, 9, model.hidden_size).tensor,
        model.n_layers // 2,
    )
    interventions = [
        Intervention({middle: compose(vectors[middle + 1], torch.full((9,), 0.3 + row / n_rows))})
        for row in range(n_rows)
    ]
    steps = steps_of(model, interventions, n_rows)
    with steps.hooked():
        steps.read()
        seconds = bench.median(steps.take, 8)
        bench.row(f"a step of {n_rows} rows", 1000 * seconds, "ms", main=True)
        record_profile(bench, "step", steps.take, 3)
        seconds = bench.median(steps.read)
        bench.row(f"a pass over {n_rows} × 64 tokens", 1000 * seconds, "ms", main=True)
        record_profile(bench, "pass", steps.read, 1)
    for rows in (n_rows, 1):
        steps = steps_of(model, [], rows)
        steps.read()
        seconds = bench.median(steps.take, 8)
        bench.row(f"a step of {rows} rows without hooks", 1000 * seconds, "ms", main=True)
    tokens = model.pad(model.token_ids(pool("harmful")[:n_rows]))
    generate = partial(
        model.model.generate, **tokens, do_sample=False, pad_token_id=model.pad_token_id()
    )
    short, long = (bench.median(partial(generate, max_new_tokens=n), 2) for n in (4, 12))
    seconds = (long - short) / 8
    bench.row("a step inside generate without hooks", 1000 * seconds, "ms", main=True)


def record_profile(bench: Bench, what: str, action: Callable[[], Any], repeats: int) -> None:
    """Records how many kernels, copies and waits an action consists of, and their time."""

    found = profiled(action, repeats, bench.is_cuda)
    for label, chosen in (
        ("kernels", lambda key: key == "kernel"),
        ("copies", lambda key: key == "copy"),
        # Of keys and values that grow by a token.
        ("concatenations", lambda key: "CatArray" in key or "aten::cat" in key),
        ("waits", lambda key: "Synchronize" in key),
    ):
        counts = [values for key, values in found.items() if chosen(key)]
        bench.row(f"{what}: {label}", sum(count for count, _ in counts), main=True)
        bench.row(f"{what}: time of {label}", sum(spent for _, spent in counts), "ms", main=True)
    longest = sorted(found.items(), key=lambda item: -item[1][1])[:40]
    bench.section.setdefault("profiles", {})[what] = [(key[:160], *item) for key, item in longest]


def attention(bench: Bench) -> None:
    """Steps of generation with cuDNN's attention, which builds a plan for every new length, and without."""

    for name in (REFUSER, "2b"):
        model = bench.model(name)
        for is_on in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(is_on)
            try:
                steps = steps_of(model, [], 8)
                label = f"{name}, cuDNN's attention {'on' if is_on else 'off'}"
                seconds = bench.seconds(steps.read)
                bench.row(f"{label}: first pass", 1000 * seconds, "ms")
                times = [bench.seconds(steps.take) for _ in range(2 if bench.small else 8)]
                median = 1000 * statistics.median(times)
                bench.row(f"{label}: step of a new length", median, "ms", main=True)
            finally:
                torch.backends.cuda.enable_cudnn_sdp(False)


SECTIONS: dict[str, tuple[Callable[[Bench], None], float, float]] = {
    "card": (card, 1, 30),
    "cells, 2b": (partial(cells, name="2b"), 20, 90),
    "trial, 2b": (trial, 25, 70),
    "residuals, 2b": (partial(residuals, name="2b"), 5, 30),
    "profile, 2b": (partial(profile, name="2b"), 8, 40),
    "attention": (attention, 5, 25),
    "whole sweep, 2b": (whole_sweep, 15, 65),
    "cells, 8b": (partial(cells, name="8b"), 15, 55),
    "mixture": (mixture, 40, 150),
    "residuals, 8b": (partial(residuals, name="8b"), 8, 30),
    "cells, refuser": (partial(cells, name=REFUSER), 5, 40),
    "devices": (devices, 5, 40),
    "adapters": (adapters, 5, 40),
    "offload": (offload, 3, 30),
    "4 bits": (four_bits, 3, 30),
    "choice": (choice, 3, 30),
    "profile, 8b": (partial(profile, name="8b"), 5, 40),
    "hooks": (hooks, 5, 60),
    "engines": (engines, 5, 60),
    "zero": (zero, 5, 40),
    "waiting": (waiting, 3, 30),
}
"""What is measured, the seconds that it needs on a GPU, and those that it may take. The most important first."""


def main() -> None:
    """Runs the sections, and prints everything as a table."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder for gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small models and few prompts")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--table", type=Path, help="print a short table of a file, measure nothing")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text("utf-8")), short=True))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.small:
        # Heretic collects garbage after every batch, which would take most of the time here.
        gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        # Residuals of random models are nothing to keep.
        os.environ["XDG_CACHE_HOME"] = folder
        bench = Bench(arguments, Path(folder))
        for name in arguments.only or SECTIONS:
            measure, least, most = SECTIONS[name]
            bench.run(name, partial(measure, bench), least, most)
    print(table(bench.content), flush=True)


if __name__ == "__main__":
    main()
