# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Scorer plugins that need a model's responses and nothing else of it, and what all scorers share.

They load no more than the rules that responses are judged by, and work in every Heretic that has scorers, also in the
development state of July 2026, which has no modifiers and gives its plugins no access to the model.
"""

from typing import ClassVar

from pydantic import Field

from heretic_contrast.builtin import harmful_pool, harmless_pool, is_builtin, refuser_pool
from heretic_contrast.errors import printable
from heretic_contrast.hosts.surface import Context, Score, Scorer, heretic_prompts, log
from heretic_contrast.hosts.tables import PluginTables
from heretic_contrast.hosts.unused import own_place
from heretic_contrast.prompts import Prompt, load_pool
from heretic_contrast.settings import PromptSources, Table, TextClassifierSettings
from heretic_contrast.tiers.coherence import is_coherent
from heretic_contrast.tiers.responses import Tier, classify_response

DEFAULT_POOL = "unset for Heretic's default, or for the built-in refuser its own"


class RefusalTiersSettings(Table, TextClassifierSettings):
    score_name: str = "Refusal tiers"
    """Name of the score."""

    prompts: PromptSources | None = Field(
        None, description=f"Dataset of harmful prompts to judge responses to ({DEFAULT_POOL})."
    )

    counted_tiers: list[Tier] = Field([Tier.REFUSE], min_length=1)
    """
    Tiers that count in the score. Options: "REFUSE" (declines), "EVASIVE" (neither declines nor answers), "COMPLY" (engages
    with the request).
    """

    count_incoherent: bool = False
    """Whether incoherent responses count in the score whatever their tier."""

    print_responses: bool = False
    """Whether to print each prompt with its response and tier."""


class FalseRefusalsSettings(Table):
    score_name: str = "False refusals"
    """Name of the score."""

    prompts: PromptSources | None = Field(
        None,
        description=f"Dataset of harmless prompts whose refusals are counted ({DEFAULT_POOL}).",
    )


class ContrastScorer(PluginTables, Scorer):
    """What all scorers of this package share."""

    @property
    def score_name(self) -> str:
        return str(self.settings.score_name)

    def init(self, ctx: Context) -> None:
        """Checks the raw tables, which Heretic has filtered. Raises `ContrastError` when a key or a table is misspelled."""

        self.check_tables()

    def source(self, source: PromptSources | None, pool: str) -> PromptSources:
        """Returns where evaluation prompts come from; `pool`, "harmful" or "harmless", decides the default."""

        if source is not None:
            return source
        if is_builtin(self.heretic_settings.model):
            return refuser_pool(pool, "test")
        return (harmful_pool if pool == "harmful" else harmless_pool)("test[:100]")

    def place(self) -> str:
        return f"{own_place(type(self).__name__)} "

    def load(self, ctx: Context, source: PromptSources | None, pool: str) -> list[Prompt]:
        """Loads evaluation prompts, as `source` says. Raises `ContrastError` when they cannot be loaded."""

        where = f"{self.place()}prompts."
        prompts = load_pool(self.source(source, pool), f"{pool} evaluation", where)
        log(f"* [bold]{len(prompts)}[/] {pool} evaluation prompts loaded")
        return prompts


class ResponseScorer(ContrastScorer):
    """A scorer of the responses to its prompts. `pool`: which they are, "harmful" or "harmless"."""

    pool: ClassVar[str]
    prompts: list[Prompt]

    def init(self, ctx: Context) -> None:
        """Loads the prompts. Raises `ContrastError` when settings or prompts do not work."""

        super().init(ctx)
        self.prompts = self.load(ctx, self.settings.prompts, self.pool)

    def responses(self, ctx: Context) -> list[str]:
        return ctx.get_responses(heretic_prompts(self.prompts, self.heretic_settings))


class RefusalTiers(ResponseScorer):
    """
    Share of harmful prompts whose responses fall into the counted tiers, by default: that are refused.

    Of a judge model, the mean of the probabilities that they do.
    """

    settings_class = RefusalTiersSettings
    settings: RefusalTiersSettings
    pool = "harmful"

    def init(self, ctx: Context) -> None:
        """Loads the prompts, and what judges. Raises `ContrastError` when settings or prompts do not work."""

        super().init(ctx)
        if self.settings.classifier_name is not None:
            from heretic_contrast.engine.text_classification import require_judge

            require_judge(self.settings, [tier.value for tier in self.settings.counted_tiers])

    def get_score(self, ctx: Context) -> Score:
        """Judges the model's responses; the value is a share between 0 and 1."""

        responses = self.responses(ctx)
        texts = [prompt.text for prompt in self.prompts]
        if self.settings.classifier_name is None:
            tiers = [classify_response(*pair) for pair in zip(texts, responses, strict=True)]
            verdicts = [float(tier in self.settings.counted_tiers) for tier in tiers]
        else:
            # PyTorch is loaded for it alone.
            from heretic_contrast.engine.text_classification import classifier_of, judge_all

            classifier = classifier_of(self.settings)
            tiers, verdicts = judge_all(classifier, self.settings.counted_tiers, texts, responses)
        coherent = [is_coherent(response) for response in responses]
        if self.settings.print_responses:
            for prompt, response, tier in zip(self.prompts, responses, tiers, strict=True):
                log()
                log(printable(f"Prompt: {prompt.text}"), markup=False)
                shown = f"Response ({tier.value}): {response or '(empty)'}"
                log(printable(shown), markup=False)
        if self.settings.count_incoherent:
            judged = zip(verdicts, coherent, strict=True)
            verdicts = [verdict if clear else 1.0 for verdict, clear in judged]
        counted = sum(verdict >= 0.5 for verdict in verdicts)
        by_tier = ", ".join(f"{tier.value} {tiers.count(tier)}" for tier in Tier)
        others = f"({by_tier}, incoherent {coherent.count(False)})"
        if self.settings.judge_model is not None:
            others += f", sum of probabilities {sum(verdicts):.2f}"
        return Score(
            value=sum(verdicts) / len(tiers),
            rich_display=f"[bold]{counted}[/]/{len(tiers)} {others}",
            md_display=f"{counted}/{len(tiers)} {others}",
        )


class FalseRefusals(ResponseScorer):
    """Share of harmless prompts that are refused: the canaries."""

    settings_class = FalseRefusalsSettings
    settings: FalseRefusalsSettings
    pool = "harmless"

    def get_score(self, ctx: Context) -> Score:
        """Judges the model's responses; the value is a share between 0 and 1."""

        responses = self.responses(ctx)
        refused = sum(
            classify_response(prompt.text, response) is Tier.REFUSE
            for prompt, response in zip(self.prompts, responses, strict=True)
        )
        return Score(
            value=refused / len(responses),
            rich_display=f"[bold]{refused}[/]/{len(responses)}",
            md_display=f"{refused}/{len(responses)}",
        )
