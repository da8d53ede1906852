# SPDX-License-Identifier: AGPL-3.0-or-later

"""
A stand-in for Heretic 2.0, which no package registry has.

It follows the documented life cycle of plugins, and is not Heretic's code: where this file and Heretic disagree,
Heretic is right, and `tests/upstream` finds out. Where the installed Heretic is 2.0, its own model class is used.
"""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import heretic.config
import heretic.utils
import optuna
import torch
from pydantic_settings import SettingsConfigDict

from heretic_contrast.hosts.surface import HAS_PLUGIN_SURFACE, Modifier, Scorer

if HAS_PLUGIN_SURFACE:
    from heretic.model import Model
else:
    from heretic_contrast.hosts.heretic14 import HostModel

    class Model(HostModel):  # type: ignore[no-redef]
        """Heretic 1.4's model with 2.0's life cycle: no LoRA at first, and none after a reload."""

        def reset_model(self) -> bool:
            fast = not self.needs_reload
            if not fast:
                self.lora_rank = None
            super().reset_model()
            return fast


class Settings(heretic.config.Settings):
    """Heretic's settings, which keep unknown tables in `model_extra` as 2.0's do."""

    model_config = SettingsConfigDict(extra="allow")


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


class Context:
    """What plugins get; responses are cached for the life of one context."""

    def __init__(self, settings: Any, model: Any) -> None:
        self._settings = settings
        self._model = model
        self._responses: dict[tuple[tuple[str, str], ...], list[str]] = {}

    def get_responses(self, prompts: list[Any]) -> list[str]:
        key = tuple((prompt.system, prompt.user) for prompt in prompts)
        if key not in self._responses:
            self._responses[key] = self._model.get_responses_batched(
                prompts, skip_special_tokens=True
            )
        return self._responses[key]

    def get_logits(self, prompts: list[Any]) -> torch.Tensor:
        return self._model.get_logits_batched(prompts)

    def get_residuals(self, prompts: list[Any]) -> torch.Tensor:
        return self._model.get_residuals_batched(prompts)

    def get_model(self) -> Any:
        return self._model

    def load_prompts(self, specification: Any) -> list[Any]:
        return heretic.utils.load_prompts(self._settings, specification)


def load_plugin(path: str, base: type, namespace: str, settings: Any) -> Any:
    """Loads a plugin class by import path, checks the contract, and instantiates it with validated settings."""

    module, name = path.rsplit(".", 1)
    plugin = getattr(importlib.import_module(module), name)
    assert isinstance(plugin, type) and issubclass(plugin, base)
    assert "__init__" not in plugin.__dict__, f"{name} must not define __init__"
    schema = get_type_hints(plugin, include_extras=True)["settings"]
    table = (settings.model_extra.get(namespace) or {}).get(plugin.__name__) or {}
    # As Heretic does: what the schema does not know is dropped without a word.
    known = {key: value for key, value in table.items() if key in schema.model_fields}
    return plugin(heretic_settings=settings, settings=plugin.validate_settings(known))


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
