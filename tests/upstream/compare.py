# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Compares a one-direction configuration of the plugin with Heretic's own Abliteration (2.0).

Run with the checkout on the path: `python compare.py MODEL HARMFUL HARMLESS`. Prints one line of JSON: by row
normalization the largest relative difference of the weight changes, in Frobenius norm, over all modules.
"""

import json
import sys
from typing import Any

import torch

model_path, harmful, harmless = sys.argv[1:]
sys.argv = ["heretic"]

from heretic.config import Settings  # noqa: E402
from heretic.model import Model  # noqa: E402
from heretic.modifiers.abliteration import Abliteration  # noqa: E402
from heretic.plugin import Context  # noqa: E402

from heretic_contrast import ContrastAbliteration  # noqa: E402

KERNELS = {
    "attn.o_proj": (1.1, 4.5, 0.3, 3.5),
    "mlp.down_proj": (0.9, 3.0, 0.2, 4.0),
}
NAMES = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")


def changes(plugin: Any, context: Any, parameters: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the weight changes of all modules."""

    plugin.init(context)
    plugin.reset_model(context)
    plugin.modify_model(context, plugin.parameters_class.from_dict(parameters))
    found = []
    model = context.get_model()
    for layer in range(len(model.get_layers())):
        for modules in model.get_layer_modules(layer).values():
            for module in modules:
                found.append(
                    module.lora_B["default"].weight.double()
                    @ module.lora_A["default"].weight.double()
                )
    return found


def compare(row_normalization: str, direction_index: float | None) -> float:
    settings = Settings(model=model_path, batch_size=64, response_prefix="", seed=3)
    kernels = {
        component: dict(zip(NAMES, values, strict=True)) for component, values in KERNELS.items()
    }
    tables: dict[type, dict[str, Any]] = {
        Abliteration: {"orthogonalize_direction": True, "full_normalization_lora_rank": 3},
        ContrastAbliteration: {
            "preset": "arditi",
            "embeddings": False,
            "orthogonalize_direction": True,
            "full_normalization_lora_rank": 3,
            "seed": 3,
        },
    }
    results = []
    for plugin, table in tables.items():
        raw = {
            **table,
            "row_normalization": row_normalization,
            "bad_prompts": {"dataset": harmful},
            "good_prompts": {"dataset": harmless},
        }
        loaded = plugin(heretic_settings=settings, settings=plugin.validate_settings(raw))
        if plugin is Abliteration:
            parameters: dict[str, Any] = {"weight_distributions": kernels}
        else:
            parameters = {"kernels": kernels, "scales": {"all": 1.0}}
        context = Context(settings=settings, model=Model(settings))
        results.append(changes(loaded, context, {"direction_index": direction_index, **parameters}))
    largest = max(float(change.norm()) for change in results[0])
    return max(
        float((ours - theirs).norm()) / max(float(theirs.norm()), 1e-6 * largest)
        for theirs, ours in zip(*results, strict=True)
    )


torch.set_grad_enabled(False)
print(
    json.dumps(
        {
            f"{row_normalization}, {'per layer' if index is None else 'global'}": compare(
                row_normalization, index
            )
            for row_normalization, index in (
                ("none", None),
                ("none", 4.3),
                ("pre", None),
                ("full", None),
            )
        }
    )
)
