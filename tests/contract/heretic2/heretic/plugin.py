# SPDX-License-Identifier: AGPL-3.0-or-later

"""Plugins: how Heretic 2.0 finds and instantiates them, and what they get."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import BaseModel

from .utils import load_prompts


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
        return load_prompts(self._settings, specification)


def load_plugin(name: str, base_class: type) -> Any:
    """Loads a plugin class: "package.module.Class", or "path/to/file.py:Class"."""

    if ":" in name:
        file, _, class_name = name.rpartition(":")
        module_name = f"heretic_plugin_{Path(file).resolve()}"
        if module_name not in sys.modules:
            spec = spec_from_file_location(module_name, Path(file).resolve())
            assert spec is not None and spec.loader is not None
            sys.modules[module_name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module_name])
        module = sys.modules[module_name]
    else:
        module_path, _, class_name = name.rpartition(".")
        module = import_module(module_path)
    plugin = getattr(module, class_name)
    if not issubclass(plugin, base_class):
        raise TypeError(f"Plugin '{name}' must subclass {base_class.__name__}")
    if "__init__" in plugin.__dict__:
        raise TypeError(f"{class_name} must not define __init__().")
    return plugin


def raw_settings(
    plugin: type, tables: dict[str, Any] | None, namespace: str, instance_name: str | None
) -> dict[str, Any]:
    """
    Returns a plugin's tables, the instance's over the class's and into tables inside it.

    What the plugin's schema does not know is dropped without a word.
    """

    merged: dict[str, Any] = {}
    known = get_type_hints(plugin)["settings"].model_fields
    names = [plugin.__name__, *([f"{plugin.__name__}_{instance_name}"] if instance_name else [])]
    for name in names:
        table = ((tables or {}).get(namespace) or {}).get(name) or {}
        merged = merge(merged, {key: value for key, value in table.items() if key in known})
    return merged


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = merge(below[key], above[key])
    return merged


class Plugin:
    settings: Any
    heretic_settings: Any

    @property
    def reproducible(self) -> bool:
        return False

    def __init__(self, *, heretic_settings: Any, settings: BaseModel | None = None) -> None:
        schema = get_type_hints(type(self))["settings"]
        if not isinstance(settings, schema):
            raise TypeError(f"{type(self).__name__}.settings must be an instance of {schema}")
        self.heretic_settings = heretic_settings
        self.settings = settings

    @classmethod
    def get_settings_raw(
        cls, model_extra: dict[str, Any] | None, top_namespace: str, instance_name: str | None
    ) -> dict[str, Any]:
        return raw_settings(cls, model_extra, top_namespace, instance_name)

    @classmethod
    def validate_settings(cls, raw_namespace: dict[str, Any] | None) -> Any:
        return get_type_hints(cls)["settings"].model_validate(raw_namespace or {})

    def init(self, ctx: Context) -> None:
        return None
