# SPDX-License-Identifier: AGPL-3.0-or-later

"""Weights that are not plain numbers."""

import pytest
import torch

from heretic_contrast.weights import base_weight

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_of_4_bits_whose_bits_were_reordered(nested: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        256, 64, bias=False, compress_statistics=nested, quant_type="nf4"
    )
    layer = layer.to(dtype).to("cpu")
    before = base_weight(layer)
    assert before.shape == (64, 256) and before.dtype == torch.float32
    # What the first forward pass does on some processors.
    layer.weight.data, state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    packed, scales = layer.weight.data.clone(), state.absmax.clone()
    after = base_weight(layer)
    # The scales are rounded to 16 bits.
    assert float((after - before).abs().max()) <= 0.005 * float(before.abs().max())
    assert torch.equal(layer.weight.data, packed) and torch.equal(state.absmax, scales)
    assert state.packing_format_for_cpu
