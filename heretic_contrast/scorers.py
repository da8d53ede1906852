# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Scorer plugins for Heretic 2.0, which work beside any modifier.

Heretic initializes scorers and takes their baselines before a modifier applies LoRA adapters, and may load the
model again after an export. So nothing here keeps a model, and every score looks at the model of the moment.
"""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from .builtin import harmful_pool, harmless_pool, is_builtin, refuser_pool, with_refuser_pools
from .directions import Directions
from .errors import ContrastError
from .evaluation.coherence import is_coherent
from .evaluation.interventions import TeacherForcing
from .evaluation.responses import Tier, classify_response
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
    Scorer,
    heretic_prompts,
    language_model,
    log,
    progress_bar,
    prompt_loader,
)
from .hosts.tables import check_tables, show_errors_as_sentences, validated
from .prompts import Prompt, load_pool, prompts_digest
from .settings import ContrastSettings, PromptSource

DEFAULT_POOL = "unset for Heretic's default, or for the built-in refuser its own"


class RefusalTiersSettings(BaseModel):
    """Settings of `RefusalTiers`."""

    model_config = ConfigDict(extra="forbid")

    score_name: str = Field(
        default="Refusal tiers",
        description="Name of the score.",
    )

    prompts: PromptSource | None = Field(
        default=None,
        description=f"Dataset of harmful prompts to judge responses to ({DEFAULT_POOL}).",
    )

    counted_tiers: list[Tier] = Field(
        default=[Tier.REFUSE],
        min_length=1,
        description=(
            "Tiers that count in the score. Options: "
            '"REFUSE" (declines), "EVASIVE" (neither declines nor answers), "COMPLY" (engages with the request).'
        ),
    )

    count_incoherent: bool = Field(
        default=False,
        description="Whether incoherent responses count in the score whatever their tier.",
    )

    print_responses: bool = Field(
        default=False,
        description="Whether to print each prompt with its response and tier.",
    )


class TeacherForcedDivergenceSettings(BaseModel):
    """Settings of `TeacherForcedDivergence`."""

    model_config = ConfigDict(extra="forbid")

    score_name: str = Field(
        default="Teacher-forced KL divergence",
        description="Name of the score.",
    )

    prompts: PromptSource | None = Field(
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


class FalseRefusalsSettings(BaseModel):
    """Settings of `FalseRefusals`."""

    model_config = ConfigDict(extra="forbid")

    score_name: str = Field(
        default="False refusals",
        description="Name of the score.",
    )

    prompts: PromptSource | None = Field(
        default=None,
        description=f"Dataset of harmless prompts whose refusals are counted ({DEFAULT_POOL}).",
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

    harmful_prompts: PromptSource | None = Field(
        default=None,
        description=f"Dataset of harmful prompts to judge responses to ({DEFAULT_POOL}).",
    )

    harmless_prompts: PromptSource | None = Field(
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


class ContrastScorer(Scorer):
    """
    What all scorers of this package share.

    `settings_class`: the class of the scorer's settings, whose table is `[scorer.NAME]` with the name of the scorer's class.
    """

    settings_class: ClassVar[type[BaseModel]]

    @property
    def reproducible(self) -> bool:
        """Whether Heretic can rebuild a score from its settings alone: it would need this package."""

        return False

    @property
    def score_name(self) -> str:
        """What the command line and the model card call the score."""

        return str(self.settings.score_name)

    @classmethod
    def validate_settings(cls, raw_namespace: dict[str, Any] | None) -> Any:
        """Validates the plugin's table. Raises `ContrastError` with the first complaint."""

        return validated(cls.settings_class, raw_namespace, f"[scorer.{cls.__name__}]")

    def init(self, ctx: Context) -> None:
        """Checks the raw tables, which Heretic has filtered. Raises `ContrastError` when a key or a table is misspelled."""

        show_errors_as_sentences()
        check_tables(self.heretic_settings, "scorer", type(self).__name__, self.settings_class)

    def load(self, ctx: Context, source: PromptSource | None, pool: str) -> list[Prompt]:
        """
        Loads evaluation prompts.

        `pool`: "harmful" or "harmless", which decides the default. Raises `ContrastError` when they cannot be loaded.
        """

        if source is None:
            if is_builtin(self.heretic_settings.model):
                source = refuser_pool(pool, "test")
            else:
                source = (harmful_pool if pool == "harmful" else harmless_pool)("test[:100]")
        prompts = load_pool(source, prompt_loader(ctx), f"{pool} evaluation")
        log(f"* [bold]{len(prompts)}[/] {pool} evaluation prompts loaded")
        return prompts


class RefusalTiers(ContrastScorer):
    """Share of harmful prompts whose responses fall into the counted tiers, by default: that are refused."""

    settings_class = RefusalTiersSettings
    settings: RefusalTiersSettings
    prompts: list[Prompt]

    def init(self, ctx: Context) -> None:
        """Loads the prompts. Raises `ContrastError` when settings or prompts do not work."""

        super().init(ctx)
        self.prompts = self.load(ctx, self.settings.prompts, "harmful")

    def get_score(self, ctx: Context) -> Score:
        """Judges the model's responses; the value is a share between 0 and 1."""

        responses = ctx.get_responses(heretic_prompts(self.prompts, self.heretic_settings))
        tiers = [
            classify_response(prompt.text, response)
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]
        coherent = [is_coherent(response) for response in responses]
        if self.settings.print_responses:
            for prompt, response, tier in zip(self.prompts, responses, tiers, strict=True):
                log()
                log(f"Prompt: {prompt.text}", markup=False)
                log(f"Response ({tier.value}): {response or '(empty)'}", markup=False)
        counted = sum(
            tier in self.settings.counted_tiers or (self.settings.count_incoherent and not clear)
            for tier, clear in zip(tiers, coherent, strict=True)
        )
        others = ", ".join(
            [
                *(f"{tier.value} {tiers.count(tier)}" for tier in Tier),
                f"incoherent {coherent.count(False)}",
            ]
        )
        return Score(
            value=counted / len(tiers),
            rich_display=f"[bold]{counted}[/]/{len(tiers)} ({others})",
            md_display=f"{counted}/{len(tiers)} ({others})",
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

        Raises `ContrastError` when settings or prompts do not work.
        """

        super().init(ctx)
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


class FalseRefusals(ContrastScorer):
    """Share of harmless prompts that are refused: the canaries."""

    settings_class = FalseRefusalsSettings
    settings: FalseRefusalsSettings
    prompts: list[Prompt]

    def init(self, ctx: Context) -> None:
        """Loads the prompts. Raises `ContrastError` when settings or prompts do not work."""

        super().init(ctx)
        self.prompts = self.load(ctx, self.settings.prompts, "harmless")

    def get_score(self, ctx: Context) -> Score:
        """Judges the model's responses; the value is a share between 0 and 1."""

        responses = ctx.get_responses(heretic_prompts(self.prompts, self.heretic_settings))
        refused = sum(
            classify_response(prompt.text, response) is Tier.REFUSE
            for prompt, response in zip(self.prompts, responses, strict=True)
        )
        return Score(
            value=refused / len(responses),
            rich_display=f"[bold]{refused}[/]/{len(responses)}",
            md_display=f"{refused}/{len(responses)}",
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
        """Checks the settings. Raises `ContrastError` when they do not work, or the output cannot be written."""

        super().init(ctx)
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
            pools = load_pools(configuration, prompt_loader(ctx), model)
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
