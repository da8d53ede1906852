# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Scorer plugins that look into the model, which Heretic gives its plugins since 2.0; they work beside any modifier.

Heretic initializes scorers and takes their baselines before a modifier applies LoRA adapters, and may load the
model again after an export. So nothing here keeps a model, and every score looks at the model of the moment.
"""

import math
from pathlib import Path

from pydantic import Field, PositiveInt
from rich.markup import escape

from heretic_contrast.builtin import is_builtin, model_name, with_refuser_pools
from heretic_contrast.engine.check import checked_engine
from heretic_contrast.engine.interface import Continuations
from heretic_contrast.engine.plain import PlainEngine
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation.divergence import References
from heretic_contrast.evaluation.plan import RANDOM, PreparedSweep, SweepSources
from heretic_contrast.evaluation.plan_settings import SweepPlanSettings
from heretic_contrast.evaluation.sweep import check_places, run_prepared
from heretic_contrast.hosts.surface import (
    Context,
    Score,
    from_heretic,
    log,
    progress_bar,
    require_model_access,
    require_same_vocabulary,
)
from heretic_contrast.hosts.unused import class_name
from heretic_contrast.response_scorers import DEFAULT_POOL, ContrastScorer
from heretic_contrast.settings import ContrastSettings, PromptSources, Table, require_effect


class TeacherForcedDivergenceSettings(Table):
    score_name: str = "Teacher-forced KL divergence"
    """Name of the score."""

    prompts: PromptSources | None = Field(
        None,
        description=f"Dataset of harmless prompts to measure the divergence on ({DEFAULT_POOL}).",
    )

    n_tokens: PositiveInt = 50
    """Number of tokens of the unmodified model's continuation of each prompt."""

    top_k: PositiveInt = 100
    """Number of log-probabilities kept per position; the rest shares one bucket."""


class FixedWeightSweepSettings(Table, SweepPlanSettings):
    score_name: str = "Fixed-weight sweep"
    """Name of the score."""

    contrast: ContrastSettings = Field(default_factory=ContrastSettings)
    """Settings of the directions to sweep, as in [modifier.ContrastAbliteration]; several presets are compared."""

    output: str = "sweep"
    """Directory to write the report to."""

    harmful_prompts: PromptSources | None = Field(
        None, description=f"Dataset of harmful prompts to judge responses to ({DEFAULT_POOL})."
    )

    harmless_prompts: PromptSources | None = Field(
        None,
        description=f"Dataset of harmless prompts to take canaries and reference prompts from ({DEFAULT_POOL}).",
    )


class TeacherForcedDivergence(ContrastScorer):
    """
    KL divergence from the unmodified model over its own greedy continuations (paper, section 3.3), in nats per token.

    A lower bound of the full divergence, by the log-sum inequality, since only the largest log-probabilities are kept.
    """

    settings_class = TeacherForcedDivergenceSettings
    settings: TeacherForcedDivergenceSettings
    references: References
    engine: type[PlainEngine]
    first: tuple[int, str]

    def init(self, ctx: Context) -> None:
        """
        Generates the unmodified model's continuations, and keeps its distributions.

        Raises `ContrastError` when settings or prompts do not work, or this Heretic keeps the model to itself.
        """

        super().init(ctx)
        require_model_access(ctx, type(self).__name__)
        prompts = self.load(ctx, self.settings.prompts, "harmless")
        log("* Obtaining the continuations of the unmodified model...")
        model = from_heretic(ctx.get_model(), self.heretic_settings)
        tokens = model.token_ids(prompts)
        engine = checked_engine(model, tokens)
        continuations = engine.generate(tokens, [self.settings.n_tokens] * len(tokens))
        known = Continuations(tuple(tokens), tuple(continuations))
        self.references = References(engine, known, self.settings.top_k)
        self.first = (model.model.config.get_text_config().vocab_size, model.name)
        # An export loads the model again, and two of them may not fit into memory.
        self.engine = type(engine)

    def get_score(self, ctx: Context) -> Score:
        """Measures the model as it is; the value is in nats per token. Raises `ContrastError` where that one has another vocabulary."""

        model = from_heretic(ctx.get_model(), self.heretic_settings)
        require_same_vocabulary(model.model, model.name, *self.first)
        ((mean, error),) = self.references.measure(self.engine(model))
        # A single prompt has no standard error.
        shown = "" if math.isnan(error) else f" ± {error:.4f}"
        return Score(
            value=mean, rich_display=f"[bold]{mean:.4f}[/]{shown}", md_display=f"{mean:.4f}{shown}"
        )


class FixedWeightSweep(ContrastScorer):
    """
    The paper's evaluator (section 3.3) of the unmodified model: which of its layers are functional, which successful.

    The sweep is run once, as the baseline, and writes its report. It does not depend on what a trial changes, so
    that every trial gets the same score: configure it with `optimization = "none"`.
    """

    settings_class = FixedWeightSweepSettings
    settings: FixedWeightSweepSettings
    prepared: PreparedSweep
    score: Score

    def init(self, ctx: Context) -> None:
        """
        Reads the prompts and directions files.

        Raises `ContrastError` when they or the settings do not work, the model lacks what is to be swept, the score is to be
        optimized or of another model, the output cannot be written or is that of another sweep, or this Heretic keeps the model to
        itself.
        """

        super().init(ctx)
        name = type(self).__name__
        require_model_access(ctx, name)
        if self.heretic_settings.evaluate_model is not None:
            raise ContrastError(
                f"The fixed-weight sweep is measured on {model_name(self.heretic_settings.model)} before Heretic loads what "
                f"evaluate_model names, and would be shown as that model's score: leave {name} out of scorers, or evaluate_model."
            )
        tables = (self.heretic_settings.model_extra or {}).get("scorer", {})
        outputs = []
        for entry in getattr(self.heretic_settings, "scorers", []):
            if class_name(entry.plugin) != name:
                continue
            table = {**tables.get(name, {}), **tables.get(f"{name}_{entry.instance_name}", {})}
            default = FixedWeightSweepSettings.model_fields["output"].default
            outputs.append(Path(table.get("output", default)).resolve())
            if entry.optimization != "none":
                raise ContrastError(
                    "The fixed-weight sweep is measured once, on the unmodified model, so that every trial has the same score "
                    f'and there is nothing to {entry.optimization}: set optimization = "none" for FixedWeightSweep in scorers.'
                )
        if outputs.count(Path(self.settings.output).resolve()) > 1:
            raise ContrastError(
                f"Several fixed-weight sweeps have the output {self.settings.output}, which holds one: give each instance of {name} an "
                f"output of its own, in [scorer.{name}_INSTANCE]."
            )
        contrast = self.settings.contrast
        if contrast.directions is not None:
            # Heretic has looked for the response prefix, which pools are needed for otherwise.
            require_effect(sorted({"bad_prompts", "good_prompts"} & contrast.model_fields_set))
        if is_builtin(self.heretic_settings.model):
            contrast = with_refuser_pools(contrast)
        where = self.place()
        self.prepared = PreparedSweep(
            self.settings,
            contrast,
            SweepSources(
                harmful=self.source(self.settings.harmful_prompts, "harmful"),
                harmless=self.source(self.settings.harmless_prompts, "harmless"),
                harmful_setting=f"{where}harmful_prompts.",
                harmless_setting=f"{where}harmless_prompts.",
                contrast_setting=f"{where}contrast.",
            ),
            Path(self.settings.output),
            model_name(self.heretic_settings.model),
            # Heretic has looked for it.
            self.heretic_settings.response_prefix or "",
            log,
        )
        model = from_heretic(
            ctx.get_model(), self.heretic_settings, writers=self.prepared.contrast.writers
        )
        check_places(model, self.prepared.options)

    def get_baseline_score(self, ctx: Context) -> Score:
        """Runs the sweep; the value is the share of layers that are successful, in the best configuration and strength."""

        from heretic_contrast.report import write_sweep_report
        from heretic_contrast.report.sweep_report import label

        result, capture, geometry = run_prepared(
            from_heretic(
                ctx.get_model(),
                self.heretic_settings,
                self.prepared.contrast.batch_size,
                self.prepared.contrast.writers,
            ),
            self.prepared,
            log,
            progress_bar,
            self.heretic_settings.max_response_length,
            self.heretic_settings.batch_size or self.heretic_settings.max_batch_size,
        )
        write_sweep_report(result, Path(self.settings.output), log, capture, geometry)
        shown = []
        best = 0.0
        for configuration, strength in result.configurations():
            layers = result.summaries_of(configuration, strength)
            functional = sum(summary.functional for summary in layers)
            successful = sum(summary.successful for summary in layers)
            if configuration != RANDOM:
                best = max(best, successful / len(layers))
            shown.append(
                f"{label(configuration, strength)}: {functional} functional, {successful} successful of {len(layers)} layers"
            )
        text = "; ".join(shown)
        self.score = Score(value=best, rich_display=escape(text), md_display=text)
        return self.score

    def get_score(self, ctx: Context) -> Score:
        """Returns the score of the sweep that ran as the baseline."""

        return self.score
