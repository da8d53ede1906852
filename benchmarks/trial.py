# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Measures the cost of a trial of the plugin against plain Heretic's, in one run with the same prompts.

    python benchmarks/trial.py [--model MODEL] [--trials 6] [--prompts 100]

A trial is what Heretic 1.4 does in one: reset, modify, evaluate. Both kinds take turns, and the ratio is that of the
medians. Target: at most 1.1.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heretic.evaluator import Evaluator
from heretic.model import AbliterationParameters, Model

from heretic_contrast.builtin import DATA, REFUSER
from heretic_contrast.hosts.host_model import HostModel
from heretic_contrast.hosts.loading import LoadedContext
from heretic_contrast.hosts.settings import HostSettings
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.search.parameters import Kernel, Parameters

KERNEL = {"max_weight": 1.0, "min_weight": 0.5}


def text_file(directory: Path, pool: str, count: int) -> str:
    """Writes a pool of the built-in refuser as the plain text that Heretic reads."""

    lines = (
        (DATA / "refuser_prompts" / pool / "test.jsonl").read_text(encoding="utf-8").splitlines()
    )
    path = directory / f"{pool}.txt"
    path.write_text("\n".join(json.loads(line)["text"] for line in lines[:count]), "utf-8")
    return str(path)


def seconds(trial: Callable[[], Any]) -> float:
    """Returns the time that a trial takes."""

    start = time.perf_counter()
    trial()
    return time.perf_counter() - start


def main() -> None:
    """Runs both kinds of trials in turn, and prints their medians and the ratio."""

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=REFUSER)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        sys.argv = [
            "heretic-contrast",
            f"--model={arguments.model}",
            "--seed=0",
            "--batch-size=64",
            "--response-prefix=",
            "--row-normalization=none",
            "--contrast.method=mean",
            f"--bad-evaluation-prompts.dataset={text_file(directory, 'harmful', arguments.prompts)}",
            f"--good-evaluation-prompts.dataset={text_file(directory, 'harmless', arguments.prompts)}",
        ]
        settings = HostSettings()  # type: ignore[call-arg]
        hosted = HostModel(settings)
        context = LoadedContext(hosted)
        modifier = ContrastAbliteration(heretic_settings=settings, settings=settings.contrast)
        modifier.init(context)
        plain = Model(settings)
        evaluators = [Evaluator(settings, plain), Evaluator(settings, hosted)]

    last_layer = len(plain.get_layers()) - 1
    kernel = {**KERNEL, "max_weight_position": 0.8 * last_layer, "min_weight_distance": last_layer}
    components = plain.get_abliterable_components()
    directions = modifier.directions
    scale = 1.0 / directions.n_directions
    parameters = Parameters(
        direction_index=None,
        kernels={name: Kernel(**kernel) for name in components},
        scales=dict.fromkeys(directions.names, scale),
    )

    def plain_trial() -> None:
        plain.reset_model()
        plain.abliterate(
            directions.mean_direction,
            None,
            {name: AbliterationParameters(**kernel) for name in components},
        )
        evaluators[0].get_score()

    def hosted_trial() -> None:
        modifier.reset_model(context)
        modifier.modify_model(context, parameters)
        evaluators[1].get_score()

    times: dict[str, list[float]] = {"heretic": [], "heretic-contrast": []}
    for number in range(arguments.trials + 1):
        for name, trial in (("heretic", plain_trial), ("heretic-contrast", hosted_trial)):
            taken = seconds(trial)
            # The first round warms up.
            if number > 0:
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"directions per layer: {directions.n_directions}")
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s per trial")
    print(f"ratio: {medians['heretic-contrast'] / medians['heretic']:.3f}")


if __name__ == "__main__":
    main()
