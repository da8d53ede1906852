# SPDX-License-Identifier: AGPL-3.0-or-later

"""Loading a model through Heretic, and letting Heretic put prompts to it as `chat` does."""

import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import heretic.model
import heretic.utils
import torch
import transformers
from heretic.model import Model
from rich.markup import escape
from torch.nn import Module

from ..builtin import model_name
from ..chat import chat_texts, note_on_system_role, padded, require_chat, token_ids
from ..directions.sources import DirectionSources
from ..errors import ContrastError, one_line
from ..language_model import LanguageModel, contiguous_head, is_out_of_memory
from ..prompts import Prompt, load_pool
from .settings import HostSettings, prompt_sources
from .surface import find_layers, from_heretic, log


class Inputs(dict[str, torch.Tensor]):
    """What a tokenizer returns. Heretic sends it to the device of the first weight, which may be offloaded."""

    def to(self, device: Any) -> "Inputs":
        """Returns the inputs on a device; accelerate moves what enters an offloaded model by itself."""

        if torch.device(device).type == "meta":
            return self
        return Inputs({name: tensor.to(device) for name, tensor in self.items()})


class ChatTokenizer:
    """A tokenizer as Heretic calls it for chats, which writes and reads them as `chat` does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> Any:
        if isinstance(conversation[0], dict):
            return chat_texts(self._tokenizer, [conversation], **options)[0]
        return chat_texts(self._tokenizer, conversation, **options)

    def __call__(self, text: str | list[str], **options: Any) -> Inputs:
        texts = [text] if isinstance(text, str) else text
        tokens, mask = padded(token_ids(self._tokenizer, texts), self._tokenizer.pad_token_id)
        return Inputs(input_ids=tokens, attention_mask=mask)


class ChatModel(Model):
    """Heretic's model, which asks as `chat` does. Raises `ContrastError` when it cannot be loaded, or answers nothing."""

    def __init__(self, settings: Any) -> None:
        self._asks = False
        failures: list[Exception] = []

        def remember(error: Exception) -> str:
            # Heretic tries one data type after the other, and only prints what goes wrong.
            failures.append(error)
            return str(heretic.utils.format_exception(error))

        try:
            with patch.object(heretic.model, "format_exception", remember, create=True):
                super().__init__(settings)
        except ContrastError:
            raise
        except Exception as error:
            # Whatever transformers raises, the user needs to know that it was the model.
            cause = failures[-1] if failures else error
            if is_out_of_memory(cause):
                remedy = (
                    "use a smaller model, --quantization bnb_4bit, or a device with more memory"
                )
            elif isinstance(cause, OSError) and not failures:
                # transformers says so of files and of repositories that are not there.
                is_there = os.path.isdir(settings.model)
                remedy = "put what it lacks there" if is_there else "check its name or path"
            else:
                remedy = (
                    "look whether its files are whole, what its generation_config.json asks for can be done, and the installed "
                    "versions of transformers and its libraries support it"
                )
            reason = one_line(str(cause))[:300] or type(cause).__name__
            raise ContrastError(
                f"The model {model_name(settings.model)} could not be loaded, or cannot generate ({reason}): {remedy}."
            ) from error

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; while Heretic puts chats to the model, one that knows how."""

        return ChatTokenizer(self._tokenizer) if self._asks else self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        require_chat(tokenizer, model_name(self.settings.model))
        if (note := note_on_system_role(tokenizer)) is not None:
            log(f"[yellow]* {escape(note)}[/]")
        self._tokenizer = tokenizer

    heretic_get_layers = Model.get_layers
    heretic_get_layer_modules = Model.get_layer_modules

    def get_layers(self) -> Any:
        return find_layers(self)

    def get_layer_modules(self, layer_index: int) -> dict[str, list[Module]]:
        components: dict[str, list[Module]] = {}
        for writer in from_heretic(self, self.settings).writers[layer_index]:
            components.setdefault(writer.component, []).append(writer.module)
        return components

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._asking():
            return super().generate(*args, **kwargs)

    def stream_chat_response(self, *args: Any, **kwargs: Any) -> Any:
        with self._asking():
            return super().stream_chat_response(*args, **kwargs)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        # Tokens of one response for each prompt, whatever the model's generation configuration says.
        form = patch.multiple(
            self.model.generation_config, num_return_sequences=1, return_dict_in_generate=False
        )
        with patch.multiple(self, _asks=True), form, contiguous_head(self.model):
            yield


class PlainModel(ChatModel):
    """Heretic's model without LoRA adapters, which hooks do not need."""

    def _apply_lora(self) -> None:
        """Heretic 1.4's constructor calls this; Heretic 2.0 leaves it to modifiers."""


class LoadedContext:
    """Heretic 2.0's plugin context around a model that is loaded."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def get_model(self) -> Any:
        return self._model

    def get_responses(self, prompts: list[Any]) -> list[str]:
        return self._model.get_responses_batched(prompts, skip_special_tokens=True)


def open_model(settings: Any, model_class: type[ChatModel] = PlainModel) -> ChatModel:
    """Loads a model with Heretic's choice of data type, device and quantization. Raises `ContrastError` when it cannot be loaded."""

    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if settings.seed is None:
        settings.seed = random.randint(0, 2**32 - 1)
    transformers.set_seed(settings.seed)
    return model_class(settings)


def take_prefix(settings: Any, sources: DirectionSources) -> None:
    """Sets the response prefix that a directions file says, where none is given."""

    found = sources.response_prefix
    if settings.response_prefix is None and found is not None:
        settings.response_prefix = found
        log(f"* Response prefix of the directions file: [bold]{escape(one_line(repr(found)))}[/]")


def with_common_prefix(
    model: LanguageModel, settings: Any, sources: DirectionSources
) -> LanguageModel:
    """
    Returns the model with the response prefix of the settings, or of directions files, or the one that Heretic would find.

    A directions file says what was found, or given, when its residuals were taken of this model. A chain of thought that all
    responses open with, or in Heretic 2.0 the chat template, is closed, so that the residual is taken where the actual response
    starts. Prompts to look for a prefix with, which Heretic 2.0 has a setting for, are used where they are given.
    """

    take_prefix(settings, sources)
    if settings.response_prefix is None:
        prompts = [*sources.bulk[:100], *sources.harmful[:100]]
        if "response_prefix_test_prompts" in settings.model_fields_set:
            prompts = load_pool(
                prompt_sources(settings.response_prefix_test_prompts),
                "response prefix",
                "--response_prefix_test_prompts.",
            )
        log("* Checking for common response prefix...")
        settings.response_prefix = _find_prefix(model, settings, prompts)
        if settings.response_prefix:
            log(f"* Prefix found: [bold]{escape(repr(settings.response_prefix))}[/]")
    return replace(model, response_prefix=settings.response_prefix)


def _find_prefix(model: LanguageModel, settings: Any, prompts: Sequence[Prompt]) -> str:
    """Returns the common prefix of the responses to the prompts, with a chain of thought that is closed at once."""

    closed_block = None
    # Heretic 2.0 looks first at the chat template, which may open the chain of thought by itself.
    if hasattr(settings, "response_prefix_test_prompts"):
        opened = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": "This is a test."}],
            add_generation_prompt=True,
            tokenize=False,
        )
        closed_block = _closed_thought(opened.rstrip(), settings, str.endswith)
    if closed_block is None:
        prefix = _common_prefix(model, prompts, settings.max_response_length)
        closed_block = _closed_thought(prefix, settings, str.startswith)
        if closed_block is None:
            return prefix
    closed = replace(model, response_prefix=closed_block)
    return closed_block + _common_prefix(closed, prompts, settings.max_response_length)


def _closed_thought(text: str, settings: Any, stands_in: Callable[[str, str], bool]) -> str | None:
    """Returns the closed chain of thought whose tag `stands_in` finds in a text: one of Heretic's, or as <think> or [THINK]."""

    skips = getattr(settings, "chain_of_thought_skips", None)
    if skips is None:
        tags = re.findall(r"^[<\[]\w+[>\]]|[<\[]\w+[>\]]$", text)
        skips = [(tag, f"{tag}{tag[0]}/{tag[1:]}") for tag in tags]
    return next((block for tag, block in skips if stands_in(text, tag)), None)


def _common_prefix(model: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int) -> str:
    """Returns what all responses start with, special tokens included, without trailing spaces."""

    responses = model.generate(prompts, max_new_tokens, special_tokens=True)
    # Character by character is what is meant.
    return os.path.commonprefix(responses).rstrip(" ")  # noqa: RUF071


def load_language_model(settings: HostSettings) -> LanguageModel:
    contrast = settings.contrast
    model = from_heretic(open_model(settings), settings, contrast.batch_size).identified()
    return replace(model, winsorization_quantile=contrast.winsorization_quantile)
