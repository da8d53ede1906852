# SPDX-License-Identifier: AGPL-3.0-or-later

"""Small random-weight models with a tokenizer, for tests that need a model but not its behavior."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3_5TextConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What the configurations of nearly all language models have in common."""

LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "full_attention_interval": 4,
}
"""What a hybrid of linear and full attention needs besides."""


def make_tokenizer(special_tokens: Mapping[str, str] | None = None) -> PreTrainedTokenizerFast:
    """
    Returns a byte-level tokenizer with a chat template.

    `special_tokens` are further tokens by name, such as `image_token`. They follow the other 288 in this order.
    """

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["How do I bake bread?", "Explain how to plant a tree."], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(special_tokens or {}),
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(architecture: str = "llama", seed: int = 0, **options: Any) -> Any:
    """Returns a random-weight model: "llama", or the hybrid "qwen3_5"."""

    if architecture == "llama":
        return build("LlamaForCausalLM", LlamaConfig(**{**SIZES, **options}), seed)
    configuration = Qwen3_5TextConfig(**{**SIZES, **options, **LINEAR_ATTENTION})
    return build("Qwen3_5ForCausalLM", configuration, seed)


def build(
    model_class: str, configuration: Any, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """Returns a random-weight model of a class and a configuration of transformers."""

    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(configuration)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default initialization is so small that every model answers alike.
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
            elif name.endswith("proj.bias"):
                parameter.normal_()
    return model.to(dtype).eval()
