# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A loaded language model, as everything below the two hosts sees it.

Nothing here knows a version of Heretic: the hosts hand over a transformers model, its tokenizer, and the
output projections that Heretic found in each layer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import GenerationConfig

from .chat import chat_texts, padded, token_ids
from .errors import ContrastError, warn
from .identity import Identity, model_identity
from .offloading import input_device
from .prompts import Prompt
from .vectors import logits_difference, logits_tolerance, to_device

if TYPE_CHECKING:
    from .ablation.writers import Writer

Progress = Callable[[int, int], None]
"""Called with the number of finished steps and the number of all steps."""


Tokens = tuple[int, ...]

Result = TypeVar("Result")


class Reached(Exception):
    """Ends a pass where everything that was asked for is known; raised by hooks."""


def until_end(tokens: Tokens, limit: int, ends: frozenset[int]) -> Tokens:
    """Returns at most `limit` tokens, up to and with the first that ends the response."""

    tokens = tokens[:limit]
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory is exhausted, on a GPU or a CPU."""

    # Libraries of CUDA, the CPU's allocator (on Windows in words of its own) and Apple's GPU have no class for it.
    signs = ["out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"]
    signs += ["not enough memory", "Invalid buffer size"]
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


DEVICE_FAILS = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
"""What PyTorch raises from 2.8 on when a device does not work any more."""


def is_of_the_machine(error: BaseException) -> bool:
    """Returns whether an error would come anywhere, whatever is run: memory is exhausted, or a device fails."""

    return is_out_of_memory(error) or isinstance(error, DEVICE_FAILS)


@dataclass
class Batches:
    """`size`: how many rows are run together; half as many from then on whenever memory is exhausted, which one line says."""

    size: int

    def run(self, n_items: int, run: Callable[[slice], Result]) -> Iterator[Result]:
        """Yields what `run` gives for one batch of items after the other. Raises what it raises for a single one."""

        start = 0
        while start < n_items:
            n = min(self.size, n_items - start)
            found = []
            try:
                found.append(run(slice(start, start + n)))
            except Exception as error:
                if n == 1 or not is_out_of_memory(error):
                    raise
            if found:
                start += n
                # Held by no name here while the next batch is run.
                yield found.pop()
                continue
            # Only now has the error let go of what it held.
            self.size = n // 2
            # Of whatever device there is; importing it takes time.
            from accelerate.utils import release_memory

            release_memory()
            warn(f"Memory is exhausted by {n} sequences at once: going on with {self.size}.")

    def run_groups(
        self, groups: Iterable[list[int]], run: Callable[[list[int]], Result]
    ) -> Iterator[Result]:
        """Yields what `run` gives for one batch of indices after the other, none of which stand in two groups."""

        for group in groups:
            yield from self.run(len(group), lambda part, group=group: run(group[part]))  # type: ignore[misc]


LONG = 512
"""Tokens from which on a prompt may be too long to stand beside others."""


def groups_by_length(sequences: Sequence[Tokens]) -> list[list[int]]:
    """
    Returns the indices of sequences, shortest first, in groups that batches do not mix.

    A long one that has more than four times the tokens of the shortest of a group begins another: beside it, all would be padded to its length.
    """

    groups: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda index: (len(sequences[index]), index)):
        length = len(sequences[index])
        if not groups or length > max(LONG, 4 * len(sequences[groups[-1][0]])):
            groups.append([])
        groups[-1].append(index)
    return groups


def winsorize(residuals: Tensor, quantile: float) -> Tensor:
    """
    Clamps the components of each residual to a quantile of their absolute values, as Heretic's option does.

    Tensor of shape (..., hidden_size). A quantile of 1 changes nothing.
    """

    if not 0 <= quantile < 1:
        return residuals
    thresholds = torch.quantile(residuals.abs(), quantile, dim=-1, keepdim=True)
    return torch.clamp(residuals, -thresholds, thresholds)


@contextmanager
def hooked(
    before: Iterable[tuple[Module, Callable[..., Any]]] = (),
    after: Iterable[tuple[Module, Callable[..., Any]]] = (),
) -> Iterator[None]:
    """Calls functions before (with keywords) and after modules run, as PyTorch's hooks, for as long as the context lasts."""

    with ExitStack() as stack:
        for module, function in before:
            stack.callback(module.register_forward_pre_hook(function, with_kwargs=True).remove)
        for module, function in after:
            stack.callback(module.register_forward_hook(function).remove)
        yield


def contiguous_head(network: Any) -> AbstractContextManager[None]:
    """
    Hands the head whole tensors for as long as the context lasts, where `generate` hands it a slice at the end of prompts.

    On a CPU, PyTorch multiplies a slice sample by sample: 500 times slower for 40 prompts in bfloat16, 10 times in float32
    (`benchmarks/head.py`).
    """

    def make_contiguous(module: Module, inputs: Sequence[Tensor], options: Any) -> Any:
        return tuple(tensor.contiguous() for tensor in inputs), options

    return hooked([(network.get_output_embeddings(), make_contiguous)])


@contextmanager
def plain_settings(network: Any) -> Iterator[None]:
    """Makes a model decode plainly for as long as the context lasts, whatever its generation configuration says."""

    # PEFT hands on its own one, if it was given one.
    base = getattr(network, "get_base_model", lambda: network)()
    with ExitStack() as stack:
        for owner in dict.fromkeys((network, base)):
            if "generation_config" in vars(owner):
                plain = GenerationConfig(eos_token_id=owner.generation_config.eos_token_id)
                stack.enter_context(patch.object(owner, "generation_config", plain))
        yield


@dataclass(frozen=True)
class LanguageModel:
    """
    A causal language model with its chat format.

    `layers` are the decoder layers in order. `writers[i]` is what layer i adds to the residual stream with, each with the name
    of a component (as Heretic's "attn.o_proj", "mlp.down_proj"): see `ablation.writers`.
    `name` and `revision` say which model it is; they are recorded, never looked up. `own_adapter` is the name of a LoRA
    adapter that is an intervention and no part of the model. `known_identity`: see `identified`.
    """

    model: Any
    tokenizer: Any
    name: str
    layers: tuple[Module, ...] = ()
    writers: tuple[tuple["Writer", ...], ...] = ()
    revision: str | None = None
    system_prompt: str = "You are a helpful assistant."
    response_prefix: str = ""
    batch_size: int = 32
    winsorization_quantile: float = 1.0
    own_adapter: str | None = None
    known_identity: Identity | None = None

    @property
    def device(self) -> torch.device:
        """The device that inputs belong on."""

        return input_device(self.model)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""

        return int(self.model.get_input_embeddings().weight.shape[-1])

    @property
    def vocabulary_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def component_names(self) -> list[str]:
        """The names of all components, sorted, as Heretic lists them."""

        return sorted({writer.component for writers in self.writers for writer in writers})

    def chat_texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Returns the prompts in the model's chat format, up to and with the common response prefix."""

        chats = [
            [
                {
                    "role": "system",
                    "content": self.system_prompt if prompt.system is None else prompt.system,
                },
                {"role": "user", "content": prompt.text},
            ]
            for prompt in prompts
        ]
        return [text + self.response_prefix for text in chat_texts(self.tokenizer, chats)]

    def token_ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Returns the tokens of each prompt in chat format, without padding. Warns of prompts that are longer than the model's context."""

        found = token_ids(self.tokenizer, self.chat_texts(prompts))
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        n_long = sum(len(tokens) > limit for tokens in found) if limit else 0
        if n_long:
            warn(
                f"{n_long} of {len(found)} prompts have more tokens than the {limit} that {self.name} was made for, so that what it "
                "makes of them means little: shorten them."
            )
        return found

    def tokenize(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """
        Returns `input_ids` and `attention_mask` of prompts, tensors of shape (n_prompts, length), on the model's device.

        Shorter prompts are padded on the left, so that the last position is the last token of every prompt.
        """

        return self.pad(self.token_ids(prompts))

    def pad(self, sequences: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """As `tokenize`, for known tokens; `side`: where they are padded."""

        tokens, mask = padded(sequences, self.pad_token_id(), side)
        tokens, mask = (to_device(item, self.device) for item in (tokens, mask))
        return {"input_ids": tokens, "attention_mask": mask}

    def pad_token_id(self) -> int:
        """The token that fills the left of shorter prompts: the tokenizer's, or the end-of-sequence token."""

        token_id = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if token_id is None else token_id)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, special_tokens: bool = False
    ) -> list[str]:
        """
        Returns the greedy responses to the prompts, with or without special tokens.

        Raises `ContrastError` when the model's generation configuration does not work.
        """

        sequences = self.token_ids(prompts)
        found = self.for_batches(sequences).generate_tokens(
            sequences, [max_new_tokens] * len(prompts)
        )
        texts: list[str] = self.tokenizer.batch_decode(
            [list(tokens) for tokens in found], skip_special_tokens=not special_tokens
        )
        return texts

    @torch.no_grad()
    def generate_tokens(self, sequences: Sequence[Tokens], limits: Sequence[int]) -> list[Tokens]:
        """
        Returns what the model's own `generate` makes of each sequence without sampling: see `greedy`.

        At most `limits` tokens, up to and with the one that ends the response. Raises `ContrastError` when the model's generation
        configuration does not work.
        """

        # Directions come from residuals; responses are another matter.
        from .greedy import explained_settings, generation_groups

        found: list[Tokens] = [()] * len(sequences)
        ends = self.end_tokens()
        kinds = [(len(tokens), limit) for tokens, limit in zip(sequences, limits, strict=True)]
        sizes = Batches(self.batch_size)

        def answer(batch: list[int]) -> None:
            inputs = self.pad([sequences[index] for index in batch])
            with explained_settings(self.model, self.name), contiguous_head(self.model):
                outputs: Tensor = self.model.generate(
                    **inputs,
                    max_new_tokens=max(limits[index] for index in batch),
                    do_sample=False,
                    num_return_sequences=1,
                    return_dict_in_generate=False,
                    pad_token_id=self.pad_token_id(),
                )
            rows = outputs[:, inputs["input_ids"].shape[1] :].tolist()
            for index, row in zip(batch, rows, strict=True):
                found[index] = until_end(tuple(row), limits[index], ends)

        # In the given order, but that what is much longer than others comes last.
        groups = (
            [group[place] for place in sorted(part)]
            for group in generation_groups(self.model, kinds)
            for part in groups_by_length([sequences[index] for index in group])
        )
        for _ in sizes.run_groups(groups, answer):
            pass
        return found

    def end_tokens(self) -> frozenset[int]:
        """Returns the tokens that end a response; none where the model's generation goes on to the limit."""

        found = self.model.generation_config.eos_token_id
        return frozenset([found] if isinstance(found, int) else found or [])

    @torch.no_grad()
    def for_batches(self, sequences: Sequence[Tokens]) -> "LanguageModel":
        """
        Returns the model with a batch size at which each sequence gives what it gives alone: 1 where padding or others beside it matter.

        Some models ignore that padding is masked, or read positions otherwise beside long prompts. The shortest beside the longest
        decides, by the logits of two steps of decoding. A warning says what was found.
        """

        chosen = sorted(set(sequences), key=lambda tokens: (len(tokens), tokens))
        if self.batch_size == 1 or len(chosen) < 2:
            return self
        pair = [chosen[0], chosen[-1]]

        def decode(part: slice) -> Tensor:
            """Returns the logits of some of the pair, of shape (n_sequences, n_steps, vocabulary)."""

            steps: list[Tensor] = []

            def keep(module: Module, args: Any, output: Tensor) -> None:
                steps.append(output[:, -1].float())

            head = hooked(after=[(self.model.get_output_embeddings(), keep)])
            with plain_settings(self.model), contiguous_head(self.model), head:
                self.model.generate(
                    **self.pad(pair[part]),
                    min_new_tokens=2,
                    max_new_tokens=2,
                    do_sample=False,
                    pad_token_id=self.pad_token_id(),
                )
            return torch.stack(steps, dim=1)

        try:
            beside = decode(slice(2))[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # No batch will hold both.
            return self
        alone = decode(slice(1))[0]
        # Where rounding decided for another token, what follows is another matter.
        n = 1 if beside[0].argmax() != alone[0].argmax() else 2
        if logits_difference(beside[:n], alone[:n]) <= logits_tolerance(self.model.dtype):
            return self
        warn(
            f"Padding or longer prompts in a batch change what {self.name} gives for a prompt, so every prompt is run alone, which takes "
            "many times as long."
        )
        return replace(self, batch_size=1)

    @torch.no_grad()
    def residuals(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> Tensor:
        """
        Returns the hidden states at the last position of every prompt.

        Tensor of shape (n_prompts, n_layers + 1, hidden_size), float32, on the CPU. Index 0 is the output of
        the embedding, index i + 1 that of decoder layer i. As in Heretic, the last index is what transformers
        calls the last hidden state, which most models normalise.

        Prompts of similar length share a batch, so that little is computed, and kept, on padding. The language model's head is not run.
        A layer that does not run on text alone, as Llama 3.2's for images, passes on what it is given.
        """

        sequences = self.token_ids(prompts)
        residuals = torch.empty(len(sequences), self.n_layers + 1, self.hidden_size)

        def read(chosen: list[int]) -> int:
            inputs = self.pad([sequences[index] for index in chosen])
            # What `generate` makes of the inputs, as Heretic does, up to the decoder's output.
            with plain_settings(self.model), self._capture_last_positions() as captured:
                self.model.generate(
                    **inputs,
                    max_new_tokens=1,
                    do_sample=False,
                    use_cache=False,
                    pad_token_id=self.pad_token_id(),
                )
            for index in range(self.n_layers):
                captured.setdefault(index + 1, captured[index])
            stacked = torch.stack(
                [captured[index].float().cpu() for index in range(self.n_layers + 1)], dim=1
            )
            residuals[chosen] = winsorize(stacked, self.winsorization_quantile)
            return len(chosen)

        n_read = 0
        sizes = Batches(self.for_batches(sequences).batch_size)
        for n_rows in sizes.run_groups(groups_by_length(sequences), read):
            n_read += n_rows
            if progress is not None:
                progress(n_read, len(sequences))
        return residuals

    def stream(self, passed: Any) -> Tensor:
        """
        Returns the residual stream of what a layer is given or returns: Tensor of shape (batch, length, hidden_size).

        Gemma 3n passes on four states per token (AltUp), of which its layers read and change the active one. Raises
        `ContrastError` where there are several, and none is known to be that.
        """

        states: Tensor = passed[0] if isinstance(passed, tuple) else passed
        if states.ndim == 3:
            return states
        active = getattr(self.model.config.get_text_config(), "altup_active_idx", None)
        if active is None or states.ndim != 4:
            raise ContrastError(
                f"The layers of {self.name} pass on several hidden states per token, so that residuals are not defined: its "
                "architecture is not supported."
            )
        return states[active]

    @contextmanager
    def _capture_last_positions(self) -> Iterator[dict[int, Tensor]]:
        """Collects hidden states of shape (batch, hidden_size) by layer index, and ends the pass when the decoder is done."""

        captured: dict[int, Tensor] = {}
        indices = {layer: index for index, layer in enumerate(self.layers)}

        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if 0 not in captured:
                captured[0] = self.stream(args or kwargs["hidden_states"])[:, -1].clone()

        def leave(module: Module, args: Any, output: Any) -> None:
            captured[indices[module] + 1] = self.stream(output)[:, -1].clone()

        def leave_decoder(module: Module, args: Any, output: Any) -> None:
            captured[self.n_layers] = output[0][:, -1].clone()
            raise Reached

        after = [(self.decoder(), leave_decoder), *((layer, leave) for layer in self.layers)]
        with hooked([(layer, enter) for layer in self.layers], after), suppress(Reached):
            yield captured

    def decoder(self) -> Module:
        """
        Returns the module that runs the layers and normalises their output, without the language model's head.

        Raises `ContrastError` when no module holds the layers.
        """

        for module in self.model.modules():
            for children in module.children():
                if isinstance(children, ModuleList) and tuple(children) == self.layers:
                    return cast(Module, module)
        raise ContrastError(
            f"The layers of {self.name} could not be found inside the model: its architecture is not supported."
        )

    def identity(self) -> Identity:
        """Returns what decides its numbers besides the prompts: see `identity.model_identity`."""

        return self.known_identity or model_identity(self)

    def identified(self) -> "LanguageModel":
        """
        Returns the model with its identity, so that its weights are read once and not whenever they are asked for.

        They must not be changed any more; interventions may come and go.
        """

        return self if self.known_identity else replace(self, known_identity=model_identity(self))
