# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Writers (design, section 5): whatever adds its output to the residual stream.

They are found in one pass over a few tokens, by walking back from what a layer returns, through sums, products and norms, to the
modules that hold matrices. No family of models is known here; names only decide what a component is called.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from ..errors import ContrastError
from ..files import digest
from ..language_model import LanguageModel, hooked
from ..offloading import loaded
from .operator import Operator

EMBEDDINGS = "embeddings"
"""The component that belongs to no layer: what the residual stream starts from."""

LINEAR_ATTENTION = ("linear_attn", "delta", "lightning")
"""Words in the names of modules of linear attention, or of their classes."""

Names = Sequence[Mapping[str, Sequence[Module]]]
"""The modules of each layer that have a component's name already."""


@dataclass(frozen=True)
class Writer:
    """
    A module whose output is added to the residual stream, perhaps times something, and behind norms.

    `component`: what it is called, as "attn.o_proj", "mlp.experts". `path`: the module's name inside its layer, or, of an
    embedding, inside the model. `norms`: the paths of the norms behind it, the last one first. `gain`: what these multiply it
    by, float64 Tensor of shape (hidden_size,), or None. `centered`: whether these take the mean away. `with_bias`: whether its bias
    is ablated as well; Heretic leaves it.
    """

    component: str
    path: str
    module: Module
    norms: tuple[str, ...] = ()
    gain: Tensor | None = None
    centered: bool = False
    with_bias: bool = True

    def operator(self, operator: Operator) -> Operator:
        """Returns what removes from the module's output what `operator` would remove from its contribution."""

        return operator if self.gain is None else operator.behind(self.gain, self.centered)

    def is_among(self, components: Sequence[str] | None) -> bool:
        """Returns whether it is one of some components, or of all. A module's path stands for it alone."""

        return components is None or self.component in components or self.path in components

    @property
    def layer(self) -> Module:
        """The matrix's own module, with LoRA looked through."""

        found: Module = getattr(self.module, "base_layer", self.module)
        return found

    @property
    def is_fused(self) -> bool:
        """Whether it holds the matrices of several experts in one tensor, so that it is no module that LoRA knows."""

        return is_fused(self.layer)

    @property
    def bias(self) -> Tensor | None:
        """The bias of an output projection, on the device that it computes on, if it has one and that is ablated."""

        if self.is_fused or not self.with_bias or getattr(self.layer, "bias", None) is None:
            return None
        with loaded(self.layer, None):
            return cast(Tensor, self.layer.bias).detach()


def is_fused(module: Module) -> bool:
    """Returns whether a module holds experts in one tensor, in whatever data type."""

    # MXFP4 keeps no parameter, but a tensor of the library that computes with it.
    other = getattr(module, "down_proj", None)
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False), other]
    return any(len(getattr(tensor, "shape", ())) > 2 for tensor in own)


def writers_digest(model: LanguageModel) -> str:
    return digest(
        [
            [(writer.component, writer.path, *writer.norms, writer.with_bias) for writer in writers]
            for writers in model.writers
        ]
    )


def shared_components(model: LanguageModel) -> dict[str, str]:
    """Returns the component that each component of a model is counted among where it has none of its own (see `apart`)."""

    return {
        writer.component: shared.component
        for layer, found in zip(model.writers, _FOUND.get(model.layers[0], ()), strict=False)
        for writer in layer
        for shared in found
        if writer.path == shared.path
    }


def named_writers(names: Names, layers: Sequence[Module]) -> tuple[tuple[Writer, ...], ...]:
    """Returns just the modules that have names, ablated without their biases and without regard to norms: as Heretic."""

    found = []
    for layer, components in zip(layers, names, strict=True):
        paths = {id(module): path for path, module in layer.named_modules()}
        found.append(
            tuple(
                Writer(component, paths.get(id(module), ""), module, with_bias=False)
                for component, modules in components.items()
                for module in modules
            )
        )
    return tuple(found)


_FOUND: WeakKeyDictionary[Module, tuple[tuple[Writer, ...], ...]] = WeakKeyDictionary()
"""
What was found in each model that is loaded, without `module`: the writers of its layers, by the first of these, which adapters
leave in its place, and its embeddings, by the network.
"""


def are_found(model: LanguageModel) -> bool:
    return model.layers[0] in _FOUND


def find_writers(model: LanguageModel, names: Names) -> tuple[tuple[Writer, ...], ...]:
    """
    Returns the writers of each layer, in the order that they run in.

    A model's writers are found once. `names`: the modules of each layer that have a component's name already.

    Raises `ContrastError` when nothing writes that can be ablated.
    """

    first = model.layers[0]
    if first not in _FOUND:
        _run_experts_as_modules(model)
        traces = _trace(model)
        found = tuple(
            tuple(_complete(layer, trace, components))
            for layer, trace, components in zip(model.layers, traces, names, strict=True)
        )
        if not any(found):
            raise ContrastError(
                f"Nothing was found in {model.name} that writes into the residual stream, and could be ablated: its "
                "architecture is not supported."
            )
        _FOUND[first] = tuple(map(_without_modules, found))
    return tuple(map(_resolved, model.layers, _FOUND[first]))


def _run_experts_as_modules(model: LanguageModel) -> None:
    """Makes experts in MXFP4 run as modules, whose hooks are called: transformers 5.24 calls a method of theirs instead."""

    for module in model.model.modules():
        # Experts that are spread over devices run as modules already.
        spread = getattr(module, "_is_hooked", False) or "forward_routed" in vars(module)
        if hasattr(module, "forward_routed") and not spread:
            routed: Any = module.forward_routed
            module.forward, module.forward_routed = routed, module.__call__


def apart(model: LanguageModel) -> LanguageModel:
    """Returns a model whose writers have components of their own where Heretic counts them among others."""

    def renamed(layer: Module, writer: Writer) -> Writer:
        return replace(writer, component=_component(layer, writer.path, apart=True))

    return replace(
        model,
        writers=tuple(
            tuple(renamed(layer, writer) for writer in writers)
            for layer, writers in zip(model.layers, model.writers, strict=True)
        ),
    )


def find_embeddings(model: LanguageModel) -> tuple[Writer, ...]:
    """
    Returns what enters the first layer: the embeddings of tokens, and of positions where these are learned.

    They are found once, in a pass of their own. Raises `ContrastError` when there are none.
    """

    # With PEFT looked through.
    network: Module = getattr(model.model, "get_base_model", lambda: model.model)()
    first = model.layers[0]
    if network not in _FOUND:
        trace = _Trace(network, model.hidden_size)

        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.leave(module, args, args[0] if args else kwargs["hidden_states"])

        with torch.enable_grad(), hooked([*trace.before, (first, enter)], trace.after):
            model.decoder()(input_ids=some_tokens(model), use_cache=False)
        found = tuple(
            replace(writer, component=EMBEDDINGS) for writer in _complete(network, trace, {})
        )
        if not found:
            raise ContrastError(
                f"No embeddings were found in {model.name} that could be ablated: leave them as they are (embeddings = false)."
            )
        _FOUND[network] = (_without_modules(found),)
    return _resolved(network, *_FOUND[network])


def with_embeddings(model: LanguageModel) -> LanguageModel:
    """Returns a model whose embeddings are ablated with its first layer, as writers of this."""

    first, *others = model.writers
    return replace(model, writers=((*find_embeddings(model), *first), *others))


def _without_modules(writers: tuple[Writer, ...]) -> tuple[Writer, ...]:
    # A weak dictionary whose values hold its keys would never lose them.
    return tuple(replace(writer, module=Module()) for writer in writers)


def _resolved(root: Module, found: tuple[Writer, ...]) -> tuple[Writer, ...]:
    return tuple(replace(writer, module=root.get_submodule(writer.path)) for writer in found)


def _complete(
    layer: Module, trace: "_Trace", components: Mapping[str, Sequence[Module]]
) -> Iterator[Writer]:
    """Yields the writers that a trace has found, with names and gains, and the experts beside one that ran."""

    known = {
        id(module): component for component, modules in components.items() for module in modules
    }
    seen: set[str] = set()
    for found, norms in trace.found.items():
        for path in _siblings(layer, found):
            if path in seen:
                continue
            seen.add(path)
            module = layer.get_submodule(path)
            name = known.get(id(module)) or _component(layer, path)
            modules = [layer.get_submodule(norm) for norm in norms]
            yield Writer(name, path, module, norms, *_gain(modules, trace.hidden_size))


def _siblings(layer: Module, path: str) -> list[str]:
    """Returns the path of every expert where one is of a list of modules, since few tokens reach only a few experts."""

    parts = path.split(".")
    for index in range(len(parts)):
        parent = layer.get_submodule(".".join(parts[:index]))
        if isinstance(parent, ModuleList):
            return [".".join([*parts[:index], key, *parts[index + 1 :]]) for key in parent._modules]
    return [path]


def _component(layer: Module, path: str, apart: bool = False) -> str:
    """Returns what a writer is called that Heretic has no name for. `apart`: whether linear attention is no other attention."""

    parts = path.split(".")
    parents = [layer.get_submodule(".".join(parts[:index])) for index in range(1, len(parts))]
    words = [*parts[:-1], *(type(parent).__name__ for parent in parents)]
    text = " ".join(words).lower()
    module = layer.get_submodule(path)
    if is_fused(getattr(module, "base_layer", module)) or any(
        isinstance(parent, ModuleList) for parent in parents
    ):
        return "mlp.experts"
    if "shared" in text:
        return "mlp.shared_expert"
    if "mamba" in text:
        return f"mamba.{parts[-1]}"
    if apart and any(word in text for word in LINEAR_ATTENTION):
        return f"linear_attn.{parts[-1]}"
    if "attn" in text or "attention" in text:
        return "attn.o_proj"
    if "mlp" in text or "feed_forward" in text or "ffn" in text:
        return "mlp.down_proj"
    return path


def _gain(norms: Sequence[Module], hidden_size: int) -> tuple[Tensor | None, bool]:
    """
    Returns what norms multiply a vector by, one after the other, however they keep their weights, and whether they take its mean away.

    A vector of ±1 has the root mean square 1 and the mean 0, so that a norm gives its gain times it, plus its bias.
    """

    if not norms:
        return None, False
    centered = False
    gain = torch.ones(hidden_size, dtype=torch.float64)
    signs = torch.ones(hidden_size)
    signs[1::2] = -1
    for norm in norms:
        with torch.no_grad(), loaded(norm, None):
            tensor = next(iter(norm.parameters(recurse=False)), None)
            probe = signs if tensor is None else signs.to(tensor.device, tensor.dtype)
            plus, minus, moved = norm.forward(torch.stack([probe, -probe, probe + 1]))
        gain *= ((plus - minus) / 2).cpu().double() * signs.double()
        # Another mean changes nothing.
        centered |= bool((moved - plus).norm() < 0.1 * (plus - minus).norm())
    return gain, centered


def _leaves(layer: Module) -> Iterator[tuple[str, Module, int]]:
    """Yields the modules with parameters that hold no others, their paths, and the most dimensions of a parameter."""

    for path, module in layer.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        adapted = hasattr(module, "base_layer")
        inside = any(
            hasattr(layer.get_submodule(path[:end]), "base_layer")
            for end in range(len(path))
            if path[end] == "."
        )
        others = any(
            True for child in module.children() for _ in (*child.parameters(), *child.buffers())
        )
        if inside or not (adapted or (own and not others)):
            continue
        yield path, module, 2 if adapted else max(tensor.ndim for tensor in own)


class _Trace:
    """
    Hooks of one layer, or of a network, that cut the graph at every matrix, to walk back from what the layer returns.

    `found`: for each module that was reached, in the order that they ran in, the norms behind it.
    """

    def __init__(self, layer: Module, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.before: list[tuple[Module, Callable[..., Any]]] = []
        self.after: list[tuple[Module, Callable[..., Any]]] = []
        self.found: dict[str, tuple[str, ...]] = {}
        self._ends: dict[Any, str] = {}
        self._norms: dict[Any, str] = {}
        for path, module, dimensions in _leaves(layer):
            # A vector multiplies, or is a norm's; a matrix ends the walk.
            if dimensions >= 2:
                # Nothing of its input is walked, and some quantized ones cannot compute gradients.
                self.before.append((module, _enter))
                self.after.append((module, partial(self._cut, path)))
            else:
                self.after.append((module, partial(self._mark, path)))

    def _cut(self, path: str, module: Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self._cut(path, module, args, item) for item in output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        output = output.detach()
        if output.ndim < 2 or output.shape[-1] != self.hidden_size:
            return output
        output = output + torch.zeros_like(output, requires_grad=True)
        self._ends[output.grad_fn] = path
        return output

    def _mark(self, path: str, module: Module, args: Any, output: Any) -> None:
        # What is given two tensors, as ZAYA's sum of scaled ones, is no norm.
        n_tensors = sum(isinstance(item, Tensor) for item in args)
        if n_tensors < 2 and isinstance(output, Tensor) and output.grad_fn is not None:
            self._norms[output.grad_fn] = path

    def leave(self, module: Module, args: Any, output: Any) -> None:
        """Walks back from what the layer returns."""

        state = output[0] if isinstance(output, tuple) else output
        # The shortest chain of norms by which each node was reached.
        chains: dict[Any, tuple[str, ...]] = {}
        waiting: list[tuple[Any, tuple[str, ...]]] = [(state.grad_fn, ())]
        while waiting:
            node, norms = waiting.pop()
            if node is None or (node in chains and len(chains[node]) <= len(norms)):
                continue
            chains[node] = norms
            if node not in self._ends:
                norms = (*norms, self._norms[node]) if node in self._norms else norms
                waiting.extend((following, norms) for following, _ in node.next_functions)
        for node, path in self._ends.items():
            if node in chains:
                self.found.setdefault(path, chains[node])
        self._ends.clear()
        self._norms.clear()


def some_tokens(model: LanguageModel) -> Tensor:
    """Returns a few tokens. Integer Tensor of shape (2, 6)."""

    return (torch.arange(3, 15, device=model.device) % model.vocabulary_size).view(2, 6)


def _enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}


def _trace(model: LanguageModel) -> list[_Trace]:
    traces = {layer: _Trace(layer, model.hidden_size) for layer in model.layers}
    before = [(layer, _enter) for layer in traces]
    after = [(layer, trace.leave) for layer, trace in traces.items()]
    for trace in traces.values():
        before, after = before + trace.before, trace.after + after
    with torch.enable_grad(), hooked(before, after):
        model.decoder()(input_ids=some_tokens(model), use_cache=False)
    return list(traces.values())
