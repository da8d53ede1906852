# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Small models of the families of architectures that users of Heretic try, made from transformers' own configurations.

All have four layers and random weights. Models with vision carry the processor of their images, as published ones
do, since Heretic loads it; they are only given text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_models import LINEAR_ATTENTION, SIZES, build, make_tokenizer


@dataclass(frozen=True)
class Family:
    """
    A family of architectures: its model class, the configuration of a small model, and what is special.

    `processor` makes the processor of a model with vision from its tokenizer, which has the `special_tokens`.
    `options` are Heretic's, as on its command line.
    """

    model: str
    configuration: Callable[[], Any]
    remark: str = ""
    dtype: torch.dtype = torch.float32
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    processor: Callable[[Any], Any] | None = None
    options: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether Heretic loads the weights with 4 bits."""

        return "--quantization=bnb_4bit" in self.options

    def make_tokenizer(self) -> Any:
        """Returns the tokenizer, with the family's special tokens."""

        return make_tokenizer(self.special_tokens)

    def make_model(self) -> Any:
        """Returns the model in memory, with random gains and biases, since equal ones hide what a norm does."""

        model = build(self.model, self.configuration())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or name.endswith("bias"):
                    parameter += 0.6 * torch.randn(parameter.shape, generator=generator)
        return model.to(self.dtype)

    def save(self, folder: Path) -> None:
        """Saves the model with its tokenizer, and its processor when it has one, as published ones are."""

        tokenizer = self.make_tokenizer()
        self.make_model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if self.processor is not None:
            self.processor(tokenizer).save_pretrained(folder)


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT: dict[str, Any] = {"shared_expert_intermediate_size": 16}
DENSE_FIRST: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
"""Routed experts in all layers but the first."""

LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
CONVOLUTIONS: dict[str, Any] = {
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
HEADS: dict[str, Any] = {"head_dim": 8}
WINDOW: dict[str, Any] = {"head_dim": 8, "sliding_window": 16}
GEMMA: dict[str, Any] = {**WINDOW, "query_pre_attn_scalar": 8}
GEMMA_4: dict[str, Any] = {
    **WINDOW,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
ROPE_3D: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}


def text(configuration: str, **options: Any) -> Callable[[], Any]:
    """Returns a function that makes the configuration of a language model."""

    return lambda: getattr(transformers, configuration)(**{**SIZES, **options})


EYE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
"""A vision encoder of one layer, for images of 8 by 8 pixels."""

QWEN_EYE: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
FIRST_SPECIAL = 288
"""The identifier of the first special token that a family adds."""


def qwen_with_vision(
    configuration: str, language: Mapping[str, Any], vision: Mapping[str, Any]
) -> Callable[[], Any]:
    """Returns a function that makes the configuration of a Qwen with an eye of one layer."""

    return lambda: getattr(transformers, configuration)(
        text_config={**SIZES, **language},
        vision_config={**QWEN_EYE, **vision},
        **{f"{name}_id": FIRST_SPECIAL + index for index, name in enumerate(QWEN_TOKENS)},
    )


def with_vision(
    configuration: str, language: Callable[[], Any], vision: Any, **options: Any
) -> Callable[[], Any]:
    """Returns a function that makes the configuration of a language model with a vision encoder."""

    return lambda: getattr(transformers, configuration)(
        text_config=language(), vision_config=vision, **options
    )


def qwen_processor(tokenizer: Any) -> Any:
    """
    Qwen's processor of images, without that of videos, which needs torchvision.

    The published `Qwen3VLProcessor` has both; Heretic only loads and saves it.
    """

    return transformers.ColQwen2Processor(
        transformers.Qwen2VLImageProcessorPil(patch_size=4), tokenizer
    )


def clip_processor(tokenizer: Any) -> Any:
    """LLaVA's processor."""

    size = {"height": 8, "width": 8}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default"
    )


def pixtral_processor(tokenizer: Any) -> Any:
    """Pixtral's processor of images, in LLaVA's processor, since the published `PixtralProcessor` needs torchvision."""

    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 8}, patch_size=4)
    return transformers.LlavaProcessor(images, tokenizer, patch_size=4)


def gemma_processor(tokenizer: Any) -> Any:
    """Gemma's processor."""

    images = transformers.Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


QWEN_VISION: dict[str, Any] = {"special_tokens": QWEN_TOKENS, "processor": qwen_processor}
IMAGE_TOKEN = {"image_token": "<image>"}

IMAGES_ALONE = "Loaded with a processor of images alone."

FAMILIES = {
    "Llama": Family("LlamaForCausalLM", text("LlamaConfig")),
    "Llama, bfloat16": Family(
        "LlamaForCausalLM", text("LlamaConfig"), "16-bit weights.", torch.bfloat16
    ),
    "Llama, float16": Family(
        "LlamaForCausalLM", text("LlamaConfig"), "16-bit weights.", torch.float16
    ),
    "Llama, 4-bit": Family(
        "LlamaForCausalLM",
        text("LlamaConfig", hidden_size=64, intermediate_size=128),
        "Quantized by bitsandbytes, exported in bfloat16.",
        torch.bfloat16,
        options=("--quantization=bnb_4bit",),
    ),
    "Llama 4, text": Family(
        "Llama4ForCausalLM",
        text(
            "Llama4TextConfig",
            intermediate_size_mlp=48,
            interleave_moe_layer_step=2,
            **HEADS,
            **LOCAL_EXPERTS,
        ),
    ),
    "Mistral": Family(
        "MistralForCausalLM", text("MistralConfig", sliding_window=16), "Sliding window."
    ),
    "Ministral 3": Family("Ministral3ForCausalLM", text("Ministral3Config", **HEADS)),
    "Mistral 3 with vision": Family(
        "Mistral3ForConditionalGeneration",
        with_vision(
            "Mistral3Config",
            text("MistralConfig", **HEADS),
            {"model_type": "pixtral", **EYE, **HEADS},
            image_token_index=FIRST_SPECIAL,
        ),
        IMAGES_ALONE,
        special_tokens={"image_token": "[IMG]"},
        processor=pixtral_processor,
    ),
    "Mixtral": Family("MixtralForCausalLM", text("MixtralConfig", **LOCAL_EXPERTS)),
    "Qwen2": Family("Qwen2ForCausalLM", text("Qwen2Config"), "Biases before attention."),
    "Qwen2 MoE": Family(
        "Qwen2MoeForCausalLM",
        text("Qwen2MoeConfig", **EXPERTS, **SHARED_EXPERT),
    ),
    "Qwen2.5 with vision": Family(
        "Qwen2_5_VLForConditionalGeneration",
        qwen_with_vision("Qwen2_5_VLConfig", ROPE_3D, {"fullatt_block_indexes": [0]}),
        IMAGES_ALONE,
        **QWEN_VISION,
    ),
    "Qwen3": Family("Qwen3ForCausalLM", text("Qwen3Config", **HEADS)),
    "Qwen3 MoE": Family("Qwen3MoeForCausalLM", text("Qwen3MoeConfig", **HEADS, **EXPERTS)),
    "Qwen3 MoE, one dense layer": Family(
        "Qwen3MoeForCausalLM",
        text("Qwen3MoeConfig", mlp_only_layers=[0], **HEADS, **EXPERTS),
    ),
    "Qwen3 with vision": Family(
        "Qwen3VLForConditionalGeneration",
        qwen_with_vision(
            "Qwen3VLConfig",
            {**ROPE_3D, **HEADS},
            {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        ),
        IMAGES_ALONE,
        **QWEN_VISION,
    ),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        text("Qwen3NextConfig", **LINEAR_ATTENTION, **EXPERTS, **SHARED_EXPERT),
        "Linear and full attention.",
    ),
    "Qwen3.5": Family(
        "Qwen3_5ForCausalLM",
        text("Qwen3_5TextConfig", **LINEAR_ATTENTION),
        "Linear and full attention.",
    ),
    "Qwen3.5 MoE": Family(
        "Qwen3_5MoeForCausalLM",
        text("Qwen3_5MoeTextConfig", **LINEAR_ATTENTION, **EXPERTS, **SHARED_EXPERT),
        "Linear and full attention.",
    ),
    "Qwen3.5 with vision": Family(
        "Qwen3_5ForConditionalGeneration",
        qwen_with_vision("Qwen3_5Config", LINEAR_ATTENTION, {"num_position_embeddings": 16}),
        f"Linear and full attention. {IMAGES_ALONE}",
        **QWEN_VISION,
    ),
    "Gemma": Family(
        "GemmaForCausalLM", text("GemmaConfig", **HEADS), "Scaled embeddings, tied to the head."
    ),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        text("Gemma2Config", **GEMMA),
        "Capped logits; norms between the projections and the residual stream.",
    ),
    "Gemma 2, 4-bit": Family(
        "Gemma2ForCausalLM",
        text("Gemma2Config", head_dim=32, hidden_size=64, intermediate_size=128),
        "Quantized by bitsandbytes, exported in bfloat16; norms between the projections and the residual stream.",
        torch.bfloat16,
        options=("--quantization=bnb_4bit",),
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        text("Gemma3TextConfig", **GEMMA),
        "Norms between the projections and the residual stream.",
    ),
    "Gemma 3 with vision": Family(
        "Gemma3ForConditionalGeneration",
        with_vision(
            "Gemma3Config",
            text("Gemma3TextConfig", **GEMMA),
            EYE,
            mm_tokens_per_image=4,
            image_token_index=FIRST_SPECIAL,
            boi_token_index=FIRST_SPECIAL + 1,
            eoi_token_index=FIRST_SPECIAL + 2,
        ),
        "As Gemma 3.",
        special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        processor=gemma_processor,
    ),
    "Gemma 4": Family(
        "Gemma4ForCausalLM", text("Gemma4TextConfig", **GEMMA_4), "Embeddings per layer."
    ),
    "Gemma 4, shared keys": Family(
        "Gemma4ForCausalLM",
        text("Gemma4TextConfig", num_kv_shared_layers=2, **GEMMA_4),
        "As E2B and E4B: the upper layers use keys and values of lower ones.",
    ),
    "Gemma 4 MoE": Family(
        "Gemma4ForCausalLM",
        text(
            "Gemma4TextConfig",
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
            **GEMMA_4,
        ),
        "As 26B-A4B: two norms in a row behind experts and feed-forward.",
    ),
    "Phi-3": Family("Phi3ForCausalLM", text("Phi3Config"), "Fused input projections."),
    "Phi-3.5 MoE": Family(
        "PhimoeForCausalLM",
        text("PhimoeConfig", num_local_experts=4, attention_bias=True),
    ),
    "LFM2": Family("Lfm2ForCausalLM", text("Lfm2Config", **CONVOLUTIONS), "Convolution layers."),
    "LFM2 MoE": Family(
        "Lfm2MoeForCausalLM",
        text("Lfm2MoeConfig", num_dense_layers=1, **CONVOLUTIONS, **EXPERTS),
    ),
    "Granite": Family(
        "GraniteForCausalLM",
        text("GraniteConfig", residual_multiplier=0.5, logits_scaling=2.0),
        "Multipliers.",
    ),
    "Granite MoE hybrid": Family(
        "GraniteMoeHybridForCausalLM",
        text(
            "GraniteMoeHybridConfig",
            layer_types=["mamba", "attention", "mamba", "attention"],
            shared_intermediate_size=48,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            position_embedding_type="rope",
            **LOCAL_EXPERTS,
            **MAMBA,
        ),
    ),
    "SmolLM3": Family("SmolLM3ForCausalLM", text("SmolLM3Config"), "Layers without positions."),
    "OLMo 2": Family(
        "Olmo2ForCausalLM",
        text("Olmo2Config"),
        "Norms between the projections and the residual stream.",
    ),
    "OLMo 3": Family(
        "Olmo3ForCausalLM",
        text("Olmo3Config", sliding_window=16),
        "Norms between the projections and the residual stream.",
    ),
    "OLMoE": Family(
        "OlmoeForCausalLM",
        text("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    ),
    "GLM-4": Family(
        "Glm4ForCausalLM",
        text("Glm4Config", **HEADS),
        "Norms between the projections and the residual stream.",
    ),
    "GLM-4 MoE": Family(
        "Glm4MoeForCausalLM",
        text("Glm4MoeConfig", **HEADS, **DENSE_FIRST),
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        text("GptOssConfig", **WINDOW, **LOCAL_EXPERTS),
        "Biases after attention.",
    ),
    "gpt-oss, 4-bit": Family(
        "GptOssForCausalLM",
        text(
            "GptOssConfig",
            sliding_window=16,
            head_dim=32,
            hidden_size=64,
            intermediate_size=128,
            **LOCAL_EXPERTS,
        ),
        "Attention quantized by bitsandbytes, exported in bfloat16; biases after it.",
        torch.bfloat16,
        options=("--quantization=bnb_4bit",),
    ),
    "DeepSeek V2": Family(
        "DeepseekV2ForCausalLM",
        text("DeepseekV2Config", q_lora_rank=None, **LATENT_ATTENTION, **DENSE_FIRST),
        "Latent attention.",
    ),
    "DeepSeek V3": Family(
        "DeepseekV3ForCausalLM",
        text("DeepseekV3Config", q_lora_rank=16, **LATENT_ATTENTION, **DENSE_FIRST),
        "Latent attention.",
    ),
    "Command R7B": Family(
        "Cohere2ForCausalLM",
        text("Cohere2Config", **WINDOW),
        "Attention and feed-forward side by side; scaled logits.",
    ),
    "StarCoder2": Family(
        "Starcoder2ForCausalLM",
        text("Starcoder2Config"),
        "Biases after the projections.",
    ),
    "StableLM": Family("StableLmForCausalLM", text("StableLmConfig"), "Layer norms with biases."),
    "EXAONE 4": Family(
        "Exaone4ForCausalLM",
        text("Exaone4Config", **WINDOW),
        "Norms between the projections and the residual stream.",
    ),
    "Seed-OSS": Family("SeedOssForCausalLM", text("SeedOssConfig", **HEADS)),
    "ERNIE 4.5": Family("Ernie4_5ForCausalLM", text("Ernie4_5Config", **HEADS)),
    "HunYuan": Family("HunYuanDenseV1ForCausalLM", text("HunYuanDenseV1Config", **HEADS)),
    "Nemotron": Family("NemotronForCausalLM", text("NemotronConfig"), "No gate."),
    "Apertus": Family("ApertusForCausalLM", text("ApertusConfig"), "No gate."),
    "Falcon-H1": Family(
        "FalconH1ForCausalLM",
        text("FalconH1Config", mamba_d_ssm=64, **MAMBA),
        "Attention and Mamba side by side.",
    ),
    "Bamba": Family(
        "BambaForCausalLM",
        text("BambaConfig", attn_layer_indices=[0, 1, 2, 3], **MAMBA),
        "With attention in all layers.",
    ),
    "GLM-5": Family(
        "GlmMoeDsaForCausalLM",
        text(
            "GlmMoeDsaConfig",
            q_lora_rank=16,
            index_topk=512,
            index_head_dim=16,
            index_n_heads=2,
            **LATENT_ATTENTION,
            **DENSE_FIRST,
        ),
        "Sparse latent attention, whose choice of tokens layers pass on.",
    ),
    "LLaVA": Family(
        "LlavaForConditionalGeneration",
        with_vision(
            "LlavaConfig",
            text("LlamaConfig"),
            {"model_type": "clip_vision_model", **EYE},
            image_token_id=FIRST_SPECIAL,
        ),
        "Llama with vision.",
        special_tokens=IMAGE_TOKEN,
        processor=clip_processor,
    ),
    "InternVL 3": Family(
        "InternVLForConditionalGeneration",
        with_vision(
            "InternVLConfig",
            text("Qwen2Config"),
            {**EYE, "image_size": [8, 8], "patch_size": [4, 4]},
            image_token_id=FIRST_SPECIAL,
        ),
        "Qwen2 with vision, loaded with LLaVA's processor.",
        special_tokens=IMAGE_TOKEN,
        processor=clip_processor,
    ),
    "Phi-1, Phi-2": Family(
        "PhiForCausalLM", text("PhiConfig"), "Attention and feed-forward side by side; biases."
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=320, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        "Transposed weights; biases.",
    ),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", text("GPTNeoXConfig"), "Biases."),
    "Falcon": Family("FalconForCausalLM", text("FalconConfig")),
    "Mamba": Family("MambaForCausalLM", text("MambaConfig", state_size=4)),
    "Jamba": Family(
        "JambaForCausalLM",
        text(
            "JambaConfig",
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
        ),
        "Mamba layers.",
    ),
    "Nemotron-H": Family(
        "NemotronHForCausalLM",
        text(
            "NemotronHConfig",
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=16,
            **HEADS,
        ),
        "Mamba layers.",
    ),
    "SmolVLM": Family(
        "SmolVLMForConditionalGeneration",
        with_vision(
            "SmolVLMConfig",
            text("LlamaConfig"),
            EYE,
            image_token_id=FIRST_SPECIAL,
            scale_factor=2,
        ),
        "Llama with vision, loaded with LLaVA's processor.",
        special_tokens=IMAGE_TOKEN,
        processor=clip_processor,
    ),
    "Gemma 3n": Family(
        "Gemma3nForCausalLM",
        text(
            "Gemma3nTextConfig",
            vocab_size_per_layer_input=320,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
            **{**WINDOW, "intermediate_size": [48] * 4},
        ),
        "Four states per token (AltUp), of which the residuals are the active one; what is left stands in writers.md.",
    ),
    "Llama 3.2 with vision": Family(
        "MllamaForConditionalGeneration",
        with_vision(
            "MllamaConfig",
            lambda: {**SIZES, "cross_attention_layers": [1]},
            {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            },
            image_token_index=FIRST_SPECIAL,
        ),
        "One layer runs with an image alone: for text it writes nothing.",
        special_tokens=IMAGE_TOKEN,
        processor=clip_processor,
    ),
}
