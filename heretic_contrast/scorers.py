# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Scorer plugins that look into the model, which Heretic gives its plugins since 2.0; they work beside any modifier.

Heretic initializes scorers and takes their baselines before a modifier applies LoRA adapters, and may load the
model again after an export. So nothing here keeps a model, and every score looks at the model of the moment.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from .builtin import is_builtin, with_refuser_pools
from .directions import Directions
from .errors import ContrastError
from .evaluation.interventions import TeacherForcing
from .evaluation.sampling import split_harmless, stratified_sample
from .evaluation.sweep import (
    WEIGHTS,
    References,
    SweepEvaluator,
    SweepOptions,
    run_cells,
    without_extraction_prompts,
)
from .extraction import assign_categories, extract, load_pools
from .files import require_writable_directory
from .hosts.surface import (
    Context,
    Score,
    language_model,
    log,
    progress_bar,
    require_model_access,
    scorer_entries,
)
from .prompts import Prompt, prompts_digest
from .response_scorers import DEFAULT_POOL, ContrastScorer
from .settings import ContrastSettings, PromptSources


class TeacherForcedDivergenceSettings(BaseModel):
    """Settings of `TeacherForcedDivergence`."""

    model_config = ConfigDict(extra="forbid")

    score_name: str = Field(
        default="Teacher-forced KL divergence",
        description="Name of the score.",
    )

    prompts: PromptSources | None = Field(
        default=None,
        description=f"Dataset of harmless prompts to measure the divergence on ({DEFAULT_POOL}).",
    )

    n_tokens: PositiveInt = Field(
        default=50,
        description="Number of tokens of the unmodified model's continuation of each prompt.",
    )

    top_k: PositiveInt = Field(
        default=100,
        description="Number of log-probabilities kept per position; the rest shares one bucket.",
    )


class FixedWeightSweepSettings(BaseModel):
    """Settings of `FixedWeightSweep`."""

    model_config = ConfigDict(extra="forbid")

    score_name: str = Field(
        default="Fixed-weight sweep",
        description="Name of the score.",
    )

    contrast: ContrastSettings = Field(
        default_factory=ContrastSettings,
        description="Settings of the directions to sweep, as in [modifier.ContrastAbliteration]; several presets are compared.",
    )

    output: str = Field(
        default="sweep",
        description="Directory to write the report to.",
    )

    harmful_prompts: PromptSources | None = Field(
        default=None,
        description=f"Dataset of harmful prompts to judge responses to ({DEFAULT_POOL}).",
    )

    harmless_prompts: PromptSources | None = Field(
        default=None,
        description=f"Dataset of harmless prompts to take canaries and reference prompts from ({DEFAULT_POOL}).",
    )

    layers: list[int] | None = Field(
        default=None,
        description="Decoder layers to test, or unset for all.",
    )

    weights: list[float] = Field(
        default=list(WEIGHTS),
        description="Weights to test, increasing (the paper's by default).",
    )

    n_harmful: PositiveInt = Field(
        default=10,
        description="Number of harmful prompts, stratified over categories (the paper: 10).",
    )

    n_canaries: PositiveInt = Field(
        default=10,
        description="Number of harmless prompts whose false refusals are counted.",
    )

    n_references: PositiveInt = Field(
        default=90,
        description="Number of harmless prompts that the KL divergence is measured on (the paper: 100).",
    )

    kl_tokens: PositiveInt = Field(
        default=50,
        description="Number of teacher-forced tokens per reference prompt (the paper: 50).",
    )

    response_length: PositiveInt = Field(
        default=50,
        description="Maximum number of tokens of a judged response.",
    )

    synergy_size: int = Field(
        default=0,
        ge=0,
        description="Number of layers in the sets that are tested for synergy (0 = none).",
    )


class TeacherForcedDivergence(ContrastScorer):
    """
    KL divergence from the unmodified model over its own greedy continuations (paper, section 3.3), in nats per token.

    A lower bound of the full divergence, by the log-sum inequality, since only the largest log-probabilities are kept.
    """

    settings_class = TeacherForcedDivergenceSettings
    settings: TeacherForcedDivergenceSettings
    references: References

    def init(self, ctx: Context) -> None:
        """
        Generates the unmodified model's continuations, and keeps its distributions.

        Raises `ContrastError` when settings or prompts do not work, or this Heretic keeps the model to itself.
        """

        super().init(ctx)
        require_model_access(ctx, type(self).__name__)
        prompts = self.load(ctx, self.settings.prompts, "harmless")
        log("* Obtaining the continuations of the unmodified model...")
        model = language_model(ctx, self.heretic_settings)
        self.references = References(
            TeacherForcing(model),
            prompts,
            self.settings.n_tokens,
            self.settings.top_k,
            model.batch_size,
        )
        # An export loads the model again, and two of them may not fit into memory.
        self.references.release_model()

    def get_score(self, ctx: Context) -> Score:
        """Measures the model as it is; the value is in nats per token."""

        forcing = TeacherForcing(language_model(ctx, self.heretic_settings))
        mean, error = self.references.measure_model(forcing)
        return Score(
            value=mean,
            rich_display=f"[bold]{mean:.4f}[/] ± {error:.4f}",
            md_display=f"{mean:.4f} ± {error:.4f}",
        )


class FixedWeightSweep(ContrastScorer):
    """
    The paper's evaluator (section 3.3) of the unmodified model: which of its layers are functional, which successful.

    The sweep is run once, as the baseline, and writes its report. It does not depend on what a trial changes, so
    that every trial gets the same score: configure it with `optimization = "none"`.
    """

    settings_class = FixedWeightSweepSettings
    settings: FixedWeightSweepSettings
    score: Score | None = None

    def init(self, ctx: Context) -> None:
        """
        Checks the settings.

        Raises `ContrastError` when they do not work, the score is to be optimized, the output cannot be written, or this
        Heretic keeps the model to itself.
        """

        super().init(ctx)
        require_model_access(ctx, type(self).__name__)
        for entry in scorer_entries(self.heretic_settings, type(self).__name__):
            if entry.optimization != "none":
                raise ContrastError(
                    "The fixed-weight sweep is measured once, on the unmodified model, so that every trial has the same score "
                    f'and there is nothing to {entry.optimization}: set optimization = "none" for FixedWeightSweep in scorers.'
                )
        require_writable_directory(Path(self.settings.output))

    def get_baseline_score(self, ctx: Context) -> Score:
        """Runs the sweep; the value is the share of layers that are successful, in the best configuration."""

        from .report import write_sweep_report

        settings = self.settings
        model = language_model(ctx, self.heretic_settings)
        contrast = settings.contrast
        if is_builtin(self.heretic_settings.model):
            contrast = with_refuser_pools(contrast)
        directions = {}
        used: dict[str, Prompt] = {}
        for name, configuration in contrast.configurations().items():
            if configuration.directions is not None:
                directions[name] = Directions.load(configuration.directions)
                continue
            pools = load_pools(configuration, "[scorer.FixedWeightSweep] contrast.")
            used.update({p.text: p for p in (*pools.harmful, *pools.bulk, *pools.matched)})
            with progress_bar() as progress:
                directions[name] = extract(model, pools, configuration, log, progress)

        harmful_prompts = self.load(ctx, settings.harmful_prompts, "harmful")
        harmless_prompts = self.load(ctx, settings.harmless_prompts, "harmless")
        harmful_prompts, _ = without_extraction_prompts(harmful_prompts, list(used.values()))
        harmless_prompts, _ = without_extraction_prompts(harmless_prompts, list(used.values()))
        harmful_prompts = assign_categories(
            harmful_prompts, contrast.category_source, model, "harmful evaluation"
        )
        harmful = stratified_sample(harmful_prompts, settings.n_harmful, contrast.seed)
        canaries, references = split_harmless(
            harmless_prompts, settings.n_canaries, settings.n_references, contrast.seed
        )
        evaluator = SweepEvaluator(
            model,
            directions,
            harmful,
            canaries,
            references,
            SweepOptions(
                layers=None if settings.layers is None else tuple(settings.layers),
                weights=tuple(settings.weights),
                max_new_tokens=settings.response_length,
                kl_tokens=settings.kl_tokens,
                synergy_size=settings.synergy_size,
            ),
        )
        log(f"* Sweeping [bold]{len(evaluator.grid())}[/] cells...")
        with progress_bar() as progress:
            cells = run_cells(evaluator, None, progress)
        result = evaluator.result(
            cells,
            {
                name: {"count": len(prompts), "digest": prompts_digest(prompts)}
                for name, prompts in (
                    ("extraction", list(used.values())),
                    ("harmful", harmful),
                    ("canaries", canaries),
                    ("references", references),
                )
            },
        )
        write_sweep_report(result, Path(settings.output), log)
        summaries = result.summaries()
        shown = []
        best = 0.0
        for title, _ in result.configurations():
            layers = [summary for summary in summaries if summary.configuration == title]
            functional = sum(summary.functional for summary in layers)
            successful = sum(summary.successful for summary in layers)
            best = max(best, successful / len(layers))
            shown.append(
                f"{title}: {functional} functional, {successful} successful of {len(layers)} layers"
            )
        text = "; ".join(shown)
        self.score = Score(value=best, rich_display=text, md_display=text)
        return self.score

    def get_score(self, ctx: Context) -> Score:
        """
        Returns the score of the sweep that ran as the baseline.

        Raises `ContrastError` when none has run.
        """

        if self.score is None:
            raise ContrastError(
                "The sweep is measured on the unmodified model, as the baseline, which has not been taken yet."
            )
        return self.score
