# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Asks what the settings of a self-organizing map decide, which the paper leaves open.

    python examples/map_settings.py --results docs/maps.json --model builtin:refuser
    python examples/map_settings.py --results docs/maps.json

The harmful prompts, the harmless ones and the nine classes are those that come with the package, and the baseline is
`unmatched`. For each class and each layer from 40 to 90 percent of the model:

- the cosine of the class's direction (the densest neuron) with the class's difference in means,
- the cosine of two directions that differ in the seed alone, over all pairs of five seeds,
- the share of the class's prompts that the densest neuron wins.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from heretic_contrast.builtin import model_name, resolve_model, with_refuser_pools
from heretic_contrast.directions.baselines import Residuals
from heretic_contrast.directions.extraction import class_directions
from heretic_contrast.directions.pools import load_pools
from heretic_contrast.settings import ContrastSettings

SEEDS = range(5)
LINEAGE = {"som_rows": 4, "som_columns": 4, "som_topology": "hexagonal", "som_learning_rate": 0.01}
SETTINGS: dict[str, dict[str, Any]] = {
    "MiniSom's defaults (3 × 3, rectangular, σ 1, learning rate 0.5)": {},
    "learning rate 0.1": {"som_learning_rate": 0.1},
    "learning rate 0.01": {"som_learning_rate": 0.01},
    "σ 0.5": {"som_sigma": 0.5},
    "σ 0.33": {"som_sigma": 0.33},
    "hexagonal": {"som_topology": "hexagonal"},
    "1,000 iterations": {"som_iterations": 1000},
    "100,000 iterations": {"som_iterations": 100_000},
    "2 × 2": {"som_rows": 2, "som_columns": 2},
    "4 × 4": {"som_rows": 4, "som_columns": 4},
    "Piras et al. (4 × 4, hexagonal, σ 0.33, learning rate 0.01)": {**LINEAGE, "som_sigma": 0.33},
    "pull request 196 (the same, σ 0.5)": {**LINEAGE, "som_sigma": 0.5},
}
MEASURES = {
    "to_mean": "Cosine with the difference in means",
    "between_seeds": "Cosine between seeds",
    "share": "Share of the class's prompts that the densest neuron wins",
}


def measure(residuals: Residuals) -> dict[str, dict[str, list[float]]]:
    """Returns the quartiles of each measure by settings, over classes and layers."""

    n_layers = residuals.harmful.shape[1] - 1
    layers = slice(round(0.4 * n_layers) + 1, round(0.9 * n_layers) + 1)
    classes = sorted(set(residuals.harmful_classes))
    counts = torch.tensor([residuals.harmful_classes.count(name) for name in classes])

    def train(**settings: Any) -> tuple[Tensor, Tensor]:
        """Returns directions, Tensor of shape (n_layers, n_classes, hidden_size), and hits."""

        found, hits = class_directions(
            residuals,
            classes,
            ContrastSettings(
                **{
                    "method": "som",
                    "classes": "category",
                    "orthogonalize_direction": False,
                    **settings,
                }
            ),
        )
        return found[layers], hits[layers]

    means, _ = train(method="mean")
    found = {}
    for name, settings in SETTINGS.items():
        maps = [train(**settings, seed=seed) for seed in SEEDS]
        directions = [directions for directions, _ in maps]
        pairs = combinations(directions, 2)
        values = {
            "to_mean": [cosine_similarity(item, means, dim=-1) for item in directions],
            "between_seeds": [cosine_similarity(a, b, dim=-1) for a, b in pairs],
            "share": [hits.amax(dim=-1) / counts for _, hits in maps],
        }
        found[name] = {
            key: torch.stack(value)
            .double()
            .quantile(torch.tensor([0.25, 0.5, 0.75]).double())
            .tolist()
            for key, value in values.items()
        }
        print(name, {key: round(value[1], 3) for key, value in found[name].items()}, flush=True)
    return found


def report(results: dict[str, Any]) -> str:
    """Returns a table of medians and quartiles for each measure, a model in each column."""

    lines = []
    for key, title in MEASURES.items():
        lines += [f"\n## {title}\n", "| Settings | " + " | ".join(results) + " |"]
        lines.append("| :--- |" + " ---: |" * len(results))
        for name in SETTINGS:
            cells = []
            for result in results.values():
                low, middle, high = result[name][key]
                cells.append(f"**{middle:.2f}** ({low:.2f} to {high:.2f})")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures one model, or prints the tables of those that were measured."""

    parser = argparse.ArgumentParser(description="What the settings of a map decide.")
    parser.add_argument("--results", type=Path, required=True, help="JSON file of all models")
    parser.add_argument("--model", help="to measure and add: builtin:refuser, a folder, or a name")
    arguments = parser.parse_args()

    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    if arguments.model is not None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from heretic_contrast.hosts.surface import wrap

        path, name = resolve_model(arguments.model), model_name(arguments.model)
        network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model = wrap(network, AutoTokenizer.from_pretrained(path), name=name)
        pools = load_pools(with_refuser_pools(ContrastSettings(classes="category")))
        harmful, bulk = (model.residuals(pool) for pool in (pools.harmful, pools.bulk))
        classes = tuple(str(prompt.category) for prompt in pools.harmful)
        results[name] = measure(Residuals(harmful, classes, bulk, bulk[:0], ()))
        arguments.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
