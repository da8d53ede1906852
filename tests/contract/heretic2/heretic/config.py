# SPDX-License-Identifier: AGPL-3.0-or-later

"""Heretic 2.0's settings: those of 1.4, without what has become settings of plugins."""

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field, NonNegativeInt, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from .released import released

RELEASED = released("config")
ExportStrategy = RELEASED.ExportStrategy
QuantizationMethod = RELEASED.QuantizationMethod

MOVED = {
    "print_responses",
    "print_residual_geometry",
    "plot_residuals",
    "residual_plot_path",
    "residual_plot_title",
    "residual_plot_style",
    "kl_divergence_scale",
    "kl_divergence_target",
    "orthogonalize_direction",
    "row_normalization",
    "full_normalization_lora_rank",
    "winsorization_quantile",
    "refusal_markers",
    "good_prompts",
    "bad_prompts",
    "good_evaluation_prompts",
    "bad_evaluation_prompts",
}
"""Settings of Heretic 1.4 that plugins own in 2.0, or that are gone."""


class SingleDatasetSpecification(BaseModel):
    dataset: str
    commit: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None
    prefix: str = ""
    suffix: str = ""
    system_prompt: str | None = None


DatasetSpecification: TypeAlias = SingleDatasetSpecification | list[SingleDatasetSpecification]


class ScorerConfig(BaseModel):
    plugin: str
    optimization: Literal["minimize", "maximize", "none"]
    instance_name: str | None = None


class ModifierConfig(BaseModel):
    plugin: str
    instance_name: str | None = None


def default_prompts(name: str, split: str) -> SingleDatasetSpecification:
    return SingleDatasetSpecification(dataset=f"mlabonne/{name}", split=split, column="text")


class NewSettings(BaseSettings):
    """What 2.0 has and 1.4 has not; unknown tables are kept for the plugins."""

    model_config = SettingsConfigDict(extra="allow")

    batch_size_test_prompts: DatasetSpecification = Field(
        default=default_prompts("harmless_alpaca", "train[:256]"), exclude=True
    )
    response_prefix_test_prompts: DatasetSpecification = Field(
        default=[
            default_prompts("harmless_alpaca", "train[:100]"),
            default_prompts("harmful_behaviors", "train[:100]"),
        ],
        exclude=True,
    )
    scorers: list[ScorerConfig] = [
        ScorerConfig(plugin="heretic.scorers.keyword_rate.KeywordRate", optimization="minimize"),
        ScorerConfig(plugin="heretic.scorers.kl_divergence.KLDivergence", optimization="minimize"),
    ]
    modifiers: list[ModifierConfig] = [ModifierConfig(plugin="heretic.modifiers.ara.ARA")]
    checkpoint_action: str | None = None
    trial_index: NonNegativeInt | None = None
    model_action: str | None = None
    save_directory: str | None = Field(default=None, exclude=True)

    @classmethod
    def settings_customise_sources(cls, *args: Any, **kwargs: Any) -> Any:
        return RELEASED.Settings.settings_customise_sources(*args, **kwargs)


Settings = create_model(
    "Settings",
    __base__=NewSettings,
    **{
        name: (field.annotation, field)
        for name, field in RELEASED.Settings.model_fields.items()
        if name not in MOVED
    },
)
