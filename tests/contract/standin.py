# SPDX-License-Identifier: AGPL-3.0-or-later

"""
One run of the plugins in Heretic 2.0's documented life cycle, step by step.

Where the installed Heretic is 2.0, its own settings, model and context are used, and so are those of the stand-in for it
(`heretic2`) where that is in front of the path. Under Heretic 1.4 the stand-in is used by its other name, with the bases that
this package gives its plugins there.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import optuna
import torch

from heretic_contrast.hosts.surface import HAS_PLUGIN_SURFACE, Modifier, Scorer

if HAS_PLUGIN_SURFACE:
    from heretic.config import Settings
    from heretic.model import Model
    from heretic.plugin import Context
    from heretic.plugin import Plugin as Plugin
    from heretic.plugin import load_plugin as load_class
else:
    from tests.contract.heretic2.heretic.config import Settings
    from tests.contract.heretic2.heretic.model import Model
    from tests.contract.heretic2.heretic.plugin import Context, raw_settings
    from tests.contract.heretic2.heretic.plugin import Plugin as Plugin
    from tests.contract.heretic2.heretic.plugin import load_plugin as load_class


def make_settings(model: str, tables: Mapping[str, Any], **options: Any) -> Any:
    """Returns settings with the tables of `config.toml`."""

    arguments, sys.argv = sys.argv, ["heretic"]
    try:
        return Settings(
            model=model,
            **{
                "batch_size": 64,
                "response_prefix": "",
                "max_response_length": 12,
                "seed": 3,
                **options,
                **tables,
            },
        )
    finally:
        sys.argv = arguments


def load_plugin(path: str, base: type, namespace: str, settings: Any) -> Any:
    """Loads a plugin class by import path or from a file, and instantiates it with its validated settings."""

    plugin: Any = load_class(path, base)
    if HAS_PLUGIN_SURFACE:
        raw = plugin.get_settings_raw(settings.model_extra, namespace, None)
    else:
        raw = raw_settings(plugin, settings.model_extra, namespace, None)
    return plugin(heretic_settings=settings, settings=plugin.validate_settings(raw))


@dataclass
class StandIn:
    """One run: scorers first, with baselines on the model without LoRA, then the modifier, then trials."""

    settings: Any
    modifier: str = "heretic_contrast.ContrastAbliteration"
    scorers: Sequence[str] = ()
    trials: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def start(self) -> "StandIn":
        """Loads the model, and initializes the plugins."""

        torch.set_grad_enabled(False)
        self.model = Model(self.settings)
        self.loaded_scorers = [
            load_plugin(path, Scorer, "scorer", self.settings) for path in self.scorers
        ]
        context = self.context()
        for scorer in self.loaded_scorers:
            scorer.init(context)
        context = self.context()
        self.baselines = [scorer.get_baseline_score(context) for scorer in self.loaded_scorers]
        assert not self.has_lora(), "a scorer must not apply LoRA adapters"
        self.loaded_modifier = load_plugin(self.modifier, Modifier, "modifier", self.settings)
        self.loaded_modifier.init(self.context())
        assert self.has_lora(), "a modifier applies LoRA adapters in init"
        return self

    def context(self) -> Context:
        return Context(self.settings, self.model)

    def has_lora(self) -> bool:
        return any("lora_" in name for name, _ in self.model.model.named_parameters())

    def parameters_class(self) -> type:
        """The generic argument of the first base, as Heretic reads it where a plugin does not say."""

        said = getattr(self.loaded_modifier, "parameters_class", None)
        return said or get_args(type(self.loaded_modifier).__orig_bases__[0])[0]

    def optimize(self, n_trials: int) -> None:
        """Runs trials; each keeps its parameters as JSON."""

        def objective(trial: optuna.Trial) -> float:
            context = self.context()
            parameters = self.loaded_modifier.suggest_parameters(context, trial)
            self.trials.append(json.dumps(parameters.to_dict()))
            assert all(
                isinstance(name, str) and isinstance(value, str)
                for name, value in parameters.to_presentation_dict().items()
            )
            self.loaded_modifier.reset_model(context)
            self.loaded_modifier.modify_model(context, parameters)
            return sum(score.value for score in self.scores())

        sampler = optuna.samplers.TPESampler(seed=3, n_startup_trials=n_trials)
        optuna.create_study(sampler=sampler).optimize(objective, n_trials=n_trials)

    def scores(self) -> list[Any]:
        context = self.context()
        return [scorer.get_score(context) for scorer in self.loaded_scorers]

    def restore(self, stored: str) -> None:
        """Restores a trial from its JSON."""

        context = self.context()
        self.loaded_modifier.reset_model(context)
        parameters = self.parameters_class().from_dict(json.loads(stored))
        self.loaded_modifier.modify_model(context, parameters)

    def export(self) -> Any:
        """Returns the merged model; afterwards the model has to be loaded again."""

        merged = self.model.get_merged_model()
        assert self.model.needs_reload
        return merged

    def factors(self) -> dict[str, torch.Tensor]:
        """Returns copies of all LoRA factors by name."""

        return {
            name: parameter.detach().clone()
            for name, parameter in self.model.model.named_parameters()
            if "lora_" in name
        }
