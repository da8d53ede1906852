# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Measures the cost of a trial of the plugin against plain Heretic's, in one run with the same prompts.

    python benchmarks/trial.py [--model MODEL] [--trials 6] [--prompts 100] [--weight 1] [--experts]

A trial is what Heretic 1.4 does in one: reset, modify, evaluate. Both kinds take turns, and the ratio is that of the
medians. Target: at most 1.1. `--experts`: instead, a trial of the plugin on a mixture against the same one that leaves its routed
experts alone. Target: at most 1.3.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import heretic.model
import torch
from heretic.config import RowNormalization as HereticNormalization
from heretic.evaluator import Evaluator
from torch import Tensor

import heretic_contrast.language_model
from heretic_contrast.builtin import DATA, REFUSER
from heretic_contrast.hosts.evaluator import Evaluator as HostEvaluator
from heretic_contrast.hosts.host_model import HostModel
from heretic_contrast.hosts.loading import LoadedContext
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.surface import from_heretic
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.search.parameters import Kernel, Parameters
from heretic_contrast.settings import RowNormalization

EXPERTS = "mlp.experts"


def pool_file(directory: Path, pool: str, split: str, count: int) -> Path:
    """Writes prompts of a pool of the built-in refuser, of all its categories, as the plain text that Heretic reads."""

    source = DATA / "refuser_prompts" / pool / f"{split}.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    chosen = lines[:: max(1, len(lines) // count)][:count]
    # Categories of what directions are extracted from stand in JSON Lines alone.
    path = directory / f"{pool}.{'jsonl' if split == 'train' else 'txt'}"
    if split == "test":
        chosen = [json.loads(line)["text"] for line in chosen]
    path.write_text("\n".join(chosen), encoding="utf-8")
    return path


class Trials:
    """
    A model that Heretic has loaded, with the plugin as its host for Heretic 1.4 makes it.

    `plain`: without the plugin. `network`: one that is there, instead of that of the model's folder; its weights are not
    digested. `n_prompts`: of each kind to evaluate; `n_training`: to extract directions from. `weight`: of the ablation.
    """

    def __init__(
        self,
        model: str,
        plain: bool = False,
        network: Any = None,
        n_prompts: int = 100,
        n_training: int = 500,
        arguments: Sequence[str] = (),
        weight: float = 1.0,
    ) -> None:
        loader = SimpleNamespace(from_pretrained=lambda *args, **options: network)
        loading = digesting = nullcontext()
        if network is not None:
            loading = patch.multiple(heretic.model, get_model_class=lambda name: loader)
            digesting = patch.multiple(
                heretic_contrast.language_model,
                # Each has its own place in the cache of residuals.
                model_identity=lambda model: {"weights": time.monotonic_ns()},
            )
        with tempfile.TemporaryDirectory() as folder, silently():
            files = {
                name: pool_file(Path(folder), pool, split, count)
                for name, pool, split, count in (
                    ("bad-evaluation-prompts", "harmful", "test", n_prompts),
                    ("good-evaluation-prompts", "harmless", "test", n_prompts),
                    ("contrast.bad-prompts", "harmful", "train", n_training),
                    ("contrast.good-prompts", "harmless", "train", n_training),
                )
            }
            self.settings = load_settings(
                HostSettings,
                sys.argv[0],
                [
                    *("--model", model, "--seed=0", "--batch-size=64", "--response-prefix="),
                    *("--row-normalization=none", "--contrast.classes=category"),
                    *(f"--{name}.dataset={path}" for name, path in files.items()),
                    *arguments,
                ],
            )
            with loading:
                self.model: Any = (heretic.model.Model if plain else HostModel)(self.settings)
            if network is not None:
                # What Heretic compares with the settings, to know that nothing is to be loaded again.
                network.config._name_or_path = self.settings.model
            if not plain:
                self.context = LoadedContext(self.model)
                self.modifier = ContrastAbliteration(
                    heretic_settings=self.settings, settings=self.settings.contrast
                )
                with digesting:
                    self.modifier.init(self.context)
            self.evaluator = (Evaluator if plain else HostEvaluator)(self.settings, self.model)
            if not plain:
                # As before the first trial of a study.
                self.evaluator.prepare()
        last = len(self.model.get_layers()) - 1
        self.kernel = {
            "max_weight": weight,
            "min_weight": 0.5 * weight,
            "max_weight_position": 0.8 * last,
            "min_weight_distance": last,
        }

    def parameters(self, left_out: Sequence[str] = ()) -> Parameters:
        """Returns the parameters of a trial. `left_out`: components that are not ablated."""

        directions = self.modifier.directions
        nothing = self.kernel | {"max_weight": 0.0, "min_weight": 0.0}
        return Parameters(
            direction_index=None,
            kernels={
                name: Kernel(**(nothing if name in left_out else self.kernel))
                for name in from_heretic(self.model, self.settings).component_names
            },
            scales=dict.fromkeys(directions.names, 1.0 / directions.n_directions),
        )

    def modify(self, parameters: Parameters) -> None:
        """Resets and modifies the model."""

        self.modifier.reset_model(self.context)
        self.modifier.modify_model(self.context, parameters)

    def modify_plainly(self, mean_direction: Tensor) -> None:
        """Resets the model, and modifies it as plain Heretic does."""

        self.model.reset_model()
        kernel = heretic.model.AbliterationParameters(**self.kernel)
        components = self.model.get_abliterable_components()
        self.model.abliterate(mean_direction, None, dict.fromkeys(components, kernel))

    def score(self) -> Any:
        """Evaluates the model as it is."""

        with silently():
            return self.evaluator.get_score()

    def normalize(self, normalization: RowNormalization) -> None:
        """Puts adapters on the model anew, of the rank that a row normalization needs."""

        with silently():
            self.model.model = self.model.model.unload()
            self.settings.row_normalization = HereticNormalization(normalization)
            if not isinstance(self.model, HostModel):
                self.model._apply_lora()
                return
            changed = {"row_normalization": normalization}
            self.modifier.settings = self.modifier.settings.model_copy(update=changed)
            self.modifier._apply_lora(self.context)


@contextmanager
def silently() -> Iterator[None]:
    """Keeps what Heretic prints to itself."""

    with redirect_stdout(io.StringIO()):
        yield


def main() -> None:
    """Runs both kinds of trials in turn, and prints their medians and the ratio."""

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=REFUSER)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--weight", type=float, default=1.0, help="0 leaves every refusal")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    ours = Trials(arguments.model, n_prompts=arguments.prompts, weight=arguments.weight)
    directions = ours.modifier.directions
    parameters = ours.parameters()

    def hosted_trial() -> None:
        ours.modify(parameters)
        ours.score()

    if arguments.experts:
        if EXPERTS not in parameters.kernels:
            parser.error(f"{arguments.model} has no {EXPERTS}: give --model a mixture")
        attention = ours.parameters([EXPERTS])

        def other_trial() -> None:
            ours.modify(attention)
            ours.score()

    else:
        theirs = Trials(
            ours.settings.model, plain=True, n_prompts=arguments.prompts, weight=arguments.weight
        )

        def other_trial() -> None:
            theirs.modify_plainly(directions.mean_direction)
            theirs.score()

    other = f"without {EXPERTS}" if arguments.experts else "heretic"
    trials = {other: other_trial, "heretic-contrast": hosted_trial}
    times: dict[str, list[float]] = {name: [] for name in trials}
    for number in range(arguments.trials + 1):
        for name, trial in trials.items():
            started = time.perf_counter()
            trial()
            # The first round warms up.
            if number > 0:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"directions per layer: {directions.n_directions}")
    print(f"refusals: {ours.score()[2]} of {arguments.prompts}")
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s per trial")
    print(f"ratio: {medians['heretic-contrast'] / medians[other]:.3f}")


if __name__ == "__main__":
    main()
