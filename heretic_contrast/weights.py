# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The weights of output projections as numbers, whatever they are kept as.

What a quantized module holds are codes, whose scales stand beside them. Taken for weights, they are wrong by that scale. So
what is known is listed here, and everything else is refused.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers.pytorch_utils import Conv1D

from .errors import ContrastError
from .offloading import is_hooked, loaded

FULL_PRECISION = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Data types whose values are weights."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Data types whose values are weights once they have been scaled."""


def base_weight(module: Module) -> Tensor:
    """
    Returns the unmodified weight of an output projection.

    Tensor of shape (hidden_size, in_features), float32, on the device that the module computes on. LoRA is looked through,
    offloaded weights are loaded, and quantized ones are dequantized.

    Raises `ContrastError` when it is not known how the weight is kept.
    """

    require_known(module)
    layer: Any = getattr(module, "base_layer", module)
    with loaded(layer, None):
        weight = layer.weight
        if is_plain(layer):
            found = weight.T if is_transposed(layer) else weight
        elif is_fp8(layer):
            found = scaled_blocks(weight, layer.weight_scale_inv, layer.block_size)
        elif type(weight).__name__ == "Int8Params":
            # Its first pass moves the scales of the rows.
            scales = layer.state.SCB if weight.SCB is None else weight.SCB
            found = weight.data.float() * (scales.to(weight.device) / 127)[:, None]
        else:
            from bitsandbytes import functional

            found = functional.dequantize_4bit(*in_order(weight))
        return cast(Tensor, found).detach().to(torch.float32)


def require_known(module: Module) -> None:
    """Raises `ContrastError` when it is not known how a module keeps its weight. Looks at no weight."""

    layer = cast(Module, getattr(module, "base_layer", module))
    if not (is_plain(layer) or is_fp8(layer) or is_bitsandbytes(layer)):
        dtype = getattr(getattr(layer, "weight", None), "dtype", None)
        kept = "no weight" if dtype is None else str(dtype).removeprefix("torch.")
        raise ContrastError(
            f"It is not known how {type(layer).__module__.partition('.')[0]}'s {type(layer).__name__} keeps its weights ({kept}), "
            "so they cannot be modified: use the model in full precision, or quantized by bitsandbytes."
        )


def is_projection(layer: Module) -> bool:
    return isinstance(layer, Linear | Conv1D)


def is_transposed(layer: Module) -> bool:
    """Returns whether a module keeps its weight as (in_features, hidden_size)."""

    return isinstance(layer, Conv1D)


def is_plain(layer: Module) -> bool:
    """Returns whether a module multiplies by its weight as it is, and does nothing else but add a bias."""

    names = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    weight: Any = getattr(layer, "weight", None)
    return (
        (type(layer).forward in (Linear.forward, Conv1D.forward) or _is_linear(layer))
        and ("forward" not in vars(layer) or is_hooked(layer))
        and type(weight) in (Parameter, Tensor)
        and weight.dtype in FULL_PRECISION
        and names <= {"weight", "bias"}
    )


def _is_linear(layer: Any) -> bool:
    """Returns whether a kind of `Linear` with a forward of its own, as Falcon's, multiplies by its weight all the same."""

    if not isinstance(layer, Linear):
        return False
    with torch.no_grad(), loaded(layer, None):
        weight = layer.weight
        if weight.device.type == "meta" or weight.dtype not in FULL_PRECISION:
            return False
        inputs = torch.linspace(-3, 5, 3 * weight.shape[1]).sin().view(3, -1).to(weight) * 20
        found, expected = layer(inputs), Linear.forward(layer, inputs)
        difference = float((found - expected).float().norm())
        return found.shape == expected.shape and difference <= 0.01 * float(expected.float().norm())


def is_bitsandbytes(layer: Any) -> bool:
    weight: Any = getattr(layer, "weight", None)
    kind = type(weight).__name__
    return (kind == "Params4bit" and weight.quant_state is not None) or (
        kind == "Int8Params" and not layer.state.has_fp16_weights
    )


def is_fp8(layer: Any) -> bool:
    """Returns whether transformers keeps a module's weight in 8 bits, with a scale per block or a single one."""

    weight: Any = getattr(layer, "weight", None)
    return type(layer).__name__ == "FP8Linear" and type(weight) is Parameter and weight.dtype in FP8


def scaled_blocks(codes: Tensor, scales: Tensor, block_size: tuple[int, int] | None) -> Tensor:
    """
    Returns codes times the scale of their block.

    `codes`: Tensor of shape (rows, columns). `scales`: Tensor with one element per block, the last blocks of which may be cut
    off, or a single one without a block size. Tensor of shape (rows, columns), float32.
    """

    scales = scales.float()
    if block_size is not None:
        for dimension, size in enumerate(block_size):
            scales = scales.repeat_interleave(size, dimension).narrow(
                dimension, 0, codes.shape[dimension]
            )
    return codes.float() * scales


def in_order(weight: Any) -> tuple[Tensor, Any]:
    """
    Returns the codes of a weight that bitsandbytes keeps in 4 bits, and its scales, in the order that they were made in.

    On processors with 16-bit instructions, bitsandbytes reorders the bits of a weight in its first forward pass, and
    its own `dequantize_4bit`, as Heretic calls it, then returns nonsense. The order is restored in a copy.
    """

    quant_state = weight.quant_state
    if not getattr(quant_state, "packing_format_for_cpu", False):
        return weight.data, quant_state
    from bitsandbytes import functional

    restored = copy.copy(quant_state)
    # The scales are restored here, since bitsandbytes would quantize them anew, or leave them transposed.
    restored.original_nested = False
    data, restored = functional._convert_weight_packed_for_cpu_inverse(weight.data, restored)
    restored.absmax = quant_state.absmax.T.reshape(-1).float()
    return data, restored


def codes(weight: Any) -> list[Tensor]:
    """Returns codes, scales (rounded as on processors) and values of a weight of 4 bits, the same before and after its first pass."""

    from bitsandbytes import functional

    data, state = in_order(weight)
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    return [data, scales.to(torch.bfloat16) if scales.device.type == "cpu" else scales, state.code]


def forget_quantized_form(network: Module) -> None:
    """
    Lets a model be saved with the weights that it has, and not in the form that they were read from.

    transformers keeps how it has read quantized weights, and goes the way back when it saves: FP8 that it has turned into plain weights would be
    written as codes again, beside a configuration that does not say so, and from 8 or 4 bits of bitsandbytes there is no way back.
    """

    conversions = getattr(network, "_weight_conversions", None) or ()
    operations = [
        item for conversion in conversions for item in getattr(conversion, "operations", ())
    ]
    if any(type(item).__module__.startswith("transformers.integrations.") for item in operations):
        # Without them it takes those of the model's class, such as of fused experts.
        network._weight_conversions = None  # type: ignore[assignment]
