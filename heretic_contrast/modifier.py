# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The plugin itself: a Heretic 2.0 modifier, which the host for Heretic 1.4 runs as well.

Imports are absolute in files of plugins, since Heretic can load one by its path, outside of any package.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from optuna import Trial
from optuna.trial import FrozenTrial
from peft.tuners.lora.layer import LoraLayer
from rich.markup import escape

from heretic_contrast.ablation.changes import (
    Changes,
    beyond_adapters,
    require_known_writers,
    takes_adapter,
)
from heretic_contrast.ablation.lora import (
    lora_factors,
    require_mergeable,
    require_no_adapters,
    set_factors,
    zero_factors,
)
from heretic_contrast.ablation.operator import Operator, compose, equalize
from heretic_contrast.ablation.writers import EMBEDDINGS, Writer, with_embeddings
from heretic_contrast.builtin import is_builtin, with_refuser_pools
from heretic_contrast.directions.directions import Directions
from heretic_contrast.directions.extraction import extract, names_before_extraction
from heretic_contrast.directions.pools import Pools, load_pools
from heretic_contrast.errors import ContrastError, one_line
from heretic_contrast.hosts.lora_targets import adapters_on_writers
from heretic_contrast.hosts.surface import (
    HAS_PLUGIN_SURFACE,
    Context,
    Modifier,
    checkpointed_trials,
    from_heretic,
    log,
    progress_bar,
)
from heretic_contrast.hosts.tables import PluginTables
from heretic_contrast.hosts.unused import own_place
from heretic_contrast.identity import OF_THE_MODEL, Identity, differences
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.search.parameters import (
    HERETIC_20_RANGES,
    Parameters,
    configuration_digest,
    layer_vectors,
    require_ranges,
    require_ranges_of,
    suggest_parameters,
)
from heretic_contrast.settings import (
    ContrastSettings,
    inputs_of,
    require_effect,
)
from heretic_contrast.weights import base_weight


class ContrastAbliteration(PluginTables, Modifier[Parameters]):
    """
    Ablates refusal directions that come from a selectable contrast baseline.

    One direction per harm class and layer (arXiv:2603.22061), with a weight each that Heretic's study searches.
    """

    settings_class = ContrastSettings
    settings: ContrastSettings
    directions: Directions
    identity: Identity

    known_pools: Pools | None = None
    """The prompts that directions are extracted from, which a host may have read before; read once, since files change."""

    known_directions: Directions | None = None
    """Those of a file, which a host may have read before, too."""

    @cached_property
    def changes(self) -> Changes:
        """What a trial changes beside the adapters."""

        return Changes()

    @property
    def modifier_name(self) -> str:
        """What the command line and the model card call the plugin."""

        return "Contrast abliteration"

    @property
    def parameters_class(self) -> type[Parameters]:
        """What a trial's parameters are restored with; said here, so that a mixin in front does not hide it."""

        return Parameters

    @property
    def lora_rank(self) -> int:
        """The rank of the LoRA adapters: that of the change, which is exact but for `full` row normalization."""

        _, n_directions, hidden_size = self.directions.tensor.shape
        if self.settings.row_normalization == "full":
            # No weight has a rank above the hidden size, and the adapters take as much memory as their rank says.
            return min(self.settings.full_normalization_lora_rank or n_directions + 2, hidden_size)
        return n_directions

    @property
    def projection_seed(self) -> int:
        """The seed of `full` row normalization's random projection: Heretic's, so that one direction gives what Heretic's own gives."""

        seed: int | None = self.heretic_settings.seed
        return self.settings.seed if seed is None else seed

    @property
    def configuration(self) -> str:
        return configuration_digest(self.directions, self.settings.ablation())

    def init(self, ctx: Context) -> None:
        """Makes directions, and applies LoRA adapters. Raises `ContrastError` when settings, prompts or a directions file do not fit."""

        self.check_tables()
        self.settings.require_single_configuration()
        is_own = is_builtin(self.heretic_settings.model)
        if HAS_PLUGIN_SURFACE and self.settings.directions is not None and not is_own:
            # This package's commands have asked this of what was given, and put pools of Heretic or of the built-in model among it.
            idle = {"bad_prompts", "good_prompts", "category_source"}
            require_effect(sorted(idle & self.settings.model_fields_set))
        if self.settings.directions is None:
            self.settings.require_categories()
        if is_own:
            self.settings = with_refuser_pools(self.settings)
        if self.settings.save_directions is not None:
            # Directions that are not kept need no file.
            from heretic_contrast.outputs import require_writable_file

            # Beside its own prompts, Heretic's settings name those of its scorers.
            read = [item.model_dump(mode="json") for item in (self.settings, self.heretic_settings)]
            require_writable_file(Path(self.settings.save_directions), inputs_of(read))
        model = self.model(ctx, self.settings.batch_size).identified()
        self.require_changeable(model)
        self.identity = model.identity()
        space = self.settings.search_space
        if self.settings.directions is not None:
            self.directions = self.known_directions or Directions.load(self.settings.directions)
            self.directions.require_model(model, self.settings.directions)
            if said := self.settings.ablation_of_file():
                log(f"* Ablation of the directions file: [bold]{escape(said)}[/]")
            for note in self.directions.asked_otherwise(model, self.settings.directions):
                log(f"* [yellow]{escape(one_line(note))}[/]")
        else:
            # The host for Heretic 1.4 has a command line, too.
            table = f"{own_place(type(self).__name__)} "
            where = getattr(self.heretic_settings, "contrast_setting", table)
            pools = self.known_pools = self.known_pools or load_pools(self.settings, where)
            names = names_before_extraction(pools, self.settings)
            require_ranges(space, "direction", names)
            with progress_bar() as progress:
                self.directions = extract(
                    model,
                    pools,
                    self.settings,
                    log,
                    progress,
                    self.heretic_settings.max_response_length,
                )
        if self.settings.save_directions is not None:
            provenance = {**self.directions.provenance, "ablation": self.settings.ablation()}
            replace(self.directions, provenance=provenance).save(self.settings.save_directions)
        require_ranges_of(self.directions, space)
        if not bool(self.directions.tensor.any()):
            raise ContrastError(
                "All directions are zero, so there is nothing to ablate: the harmful and the harmless prompts do not differ."
            )
        listed = escape(one_line(", ".join(self.directions.names)))
        log(f"* Directions: [bold]{self.directions.n_directions}[/] per layer ({listed})")
        without_adapter = {
            writer.component
            for layer in model.writers
            for writer in layer
            if not takes_adapter(writer) and writer.component != EMBEDDINGS
        }
        if without_adapter and self.settings.row_normalization != "none":
            listed = ", ".join(sorted(without_adapter))
            log(f"* The rows of {listed} are not normalized, since no adapter changes them")
        if HAS_PLUGIN_SURFACE:
            # Before Heretic stores its settings in the study, under which nobody could go on with it.
            self.require_same_study(checkpointed_trials(self.heretic_settings), model)
        self._apply_lora(ctx)

    def require_same_study(self, trials: Sequence[FrozenTrial], model: LanguageModel) -> None:
        """Raises `ContrastError` when the last of a study's trials belongs to another configuration."""

        stored = [trial.user_attrs.get("parameters", {}) for trial in trials]
        for parameters in [item for item in stored if "configuration" in item][-1:]:
            Parameters.from_dict(parameters).require_fit(
                self.directions, model.component_names, self.configuration
            )

    def model(self, ctx: Context, batch_size: int | None = None) -> LanguageModel:
        settings = self.heretic_settings
        model = from_heretic(ctx.get_model(), settings, batch_size, self.settings.writers)
        return with_embeddings(model) if self.settings.embeddings else model

    def _apply_lora(self, ctx: Context) -> None:
        heretic_model = ctx.get_model()

        def adapting() -> AbstractContextManager[None]:
            return adapters_on_writers(heretic_model, self.model(ctx), self.changes)

        # The host for Heretic 1.4 applies adapters by itself after it has loaded the model again.
        heretic_model.changes = self.changes
        heretic_model.adapting = adapting
        with adapting():
            heretic_model.apply_lora(self.lora_rank)

    def require_changeable(self, model: LanguageModel) -> None:
        """Raises `ContrastError` when writers of a model cannot be changed, or saved, as the settings say, hours before they are."""

        require_no_adapters(model.model, model.name)
        require_ranges(self.settings.search_space, "component", model.component_names)
        quantization = getattr(self.heretic_settings, "quantization", None)
        require_known_writers(model, getattr(quantization, "value", quantization) == "bnb_4bit")
        beyond = beyond_adapters(model)
        strategy = getattr(self.heretic_settings, "export_strategy", None)
        strategy = getattr(strategy, "value", strategy)
        writers = [writer for layer in model.writers for writer in layer]
        if strategy == "merge":
            require_mergeable(writer.layer for writer in writers if takes_adapter(writer))
        if beyond and strategy == "adapter":
            remedy = "embeddings = false" if beyond == [EMBEDDINGS] else "writers = heretic"
            raise ContrastError(
                f"No LoRA adapter carries {', '.join(beyond)} of {model.name}: give --export-strategy merge, or leave them as "
                f"they are with {remedy}."
            )

    def suggest_parameters(self, ctx: Context, trial: Trial) -> Parameters:
        """
        Samples the parameters of a trial.

        Raises `ContrastError` when the trial before belongs to another configuration: Heretic 2.0 goes on with a study under what
        `config.toml` holds by then of settings that the study has no value for.
        """

        model = self.model(ctx)
        self.require_same_study(trial.study.get_trials(deepcopy=False), model)
        return suggest_parameters(
            trial,
            model.component_names,
            model.n_layers,
            self.directions,
            self.settings.search_space,
            HERETIC_20_RANGES if HAS_PLUGIN_SURFACE else {},
            self.configuration,
        )

    @torch.no_grad()
    def modify_model(self, ctx: Context, parameters: Parameters) -> None:
        """
        Writes the LoRA factors of every component in every layer.

        Raises `ContrastError` when the parameters belong to another configuration.

        Both factors are written even where the weight is 0, since resetting a model clears only one of them, and
        the same parameters must give the same factors after any history.
        """

        model = self.model(ctx)
        parameters.require_fit(self.directions, model.component_names, self.configuration)
        scales = torch.tensor(
            [parameters.scales[name] for name in self.directions.names], dtype=torch.float64
        )
        self.changes.undo()
        for layer_index, writers in enumerate(model.writers):
            vectors = layer_vectors(
                self.directions, parameters.direction_index, layer_index, self.directions.scale
            )
            operators: dict[str, Operator | None] = {}
            for writer in writers:
                component = writer.component
                if component not in operators:
                    weights = scales * parameters.kernels[component].weight(layer_index)
                    if self.settings.equal_effective_weight:
                        weights = equalize(vectors, weights, self.settings.composition)
                    operator = compose(vectors, weights, self.settings.composition)
                    operators[component] = operator if bool(weights.any()) else None
                self._change(layer_index, writer, operators[component])

    def _change(self, layer_index: int, writer: Writer, operator: Operator | None) -> None:
        if takes_adapter(writer):
            module = writer.module
            if not isinstance(module, LoraLayer):
                raise ContrastError(
                    f"The {writer.component} of layer {layer_index} carries no LoRA adapter, so it cannot be modified: "
                    "this architecture, or this version of Heretic, is not supported."
                )
            if operator is None:
                zero_factors(module)
            else:
                factors = lora_factors(
                    writer.operator(operator),
                    base_weight(module),
                    self.settings.row_normalization,
                    self.lora_rank,
                    self.projection_seed,
                )
                set_factors(module, *factors)
        if operator is not None:
            self.changes.add(layer_index, writer, operator)

    def reset_model(self, ctx: Context) -> None:
        """
        Undoes the modification; after an export, the reloaded model gets its LoRA adapters anew.

        Raises `ContrastError` when that is another model.
        """

        self.changes.undo()
        heretic_model = ctx.get_model()
        # Under Heretic 1.4 the model itself applies the adapters after it has been loaded again, and compares it.
        if not heretic_model.reset_model():
            self.require_same_model(ctx)
            self._apply_lora(ctx)

    def require_same_model(self, ctx: Context) -> None:
        """Raises `ContrastError` when a model that has been loaded again has become another one, and lets go of it."""

        model = self.model(ctx)
        different = differences(self.identity, model.identity(), OF_THE_MODEL)
        if different:
            # Whatever Heretic is asked for next, nothing is made of it.
            heretic_model = ctx.get_model()
            heretic_model.model, heretic_model.needs_reload = None, True
            raise ContrastError(
                f"{model.name} has become another model since it was loaded (other {different}): what was saved before is "
                "whole; start again for the new one."
            )
