# SPDX-License-Identifier: AGPL-3.0-or-later

"""
All settings of the plugin, with one description per field, and presets named after their source.

The same model stands behind Heretic 2.0's table `[modifier.ContrastAbliteration]` and the `--contrast.*` flags.
This module imports neither PyTorch nor Heretic, so that `--help` stays fast.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import EntryPoints, entry_points
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import ContrastError

CategorySource = Literal["auto", "column", "lexicon", "model"]
Scale = Literal["unit", "raw", "unmatched"]
"""The length of the directions (paper, section 5.1)."""

RowNormalization = Literal["none", "pre", "full"]
Writers = Literal["all", "apart", "heretic"]
Composition = Literal["sum", "sequential", "capped"]
Sampler = Literal["tpe", "nsga2"]

DATASET_FORMATS = frozenset(
    """
    arrow audiofolder conll csv eval fasta fastq genbank harbor hdf5 iceberg imagefolder json
    lance meshfolder mmcif niftifolder pandas parquet pdb pdffolder text tsfile videofolder
    vortex webdataset xml
    """.split()
)
"""
Names that the library `datasets` takes for a file format, and not for a dataset or a folder.

It then reads whatever the current directory holds in that format. "pandas" unpickles it, which runs code.
"""


def check_dataset_name(name: str) -> str:
    """Returns the name of a dataset. Raises `ContrastError` when it is empty, or that of a file format."""

    if not name.strip():
        raise ContrastError(
            "The name of a dataset is empty: give the ID of a dataset or the path of a file or folder."
        )
    if name in DATASET_FORMATS:
        raise ContrastError(
            f'"{name}" is the name of a file format and not of a dataset: give the ID of a dataset or the path of a file, or '
            f"./{name} for a folder of that name."
        )
    return name


def validation_error(
    error: ValidationError,
    table: str | None = None,
    skip: int = 0,
    where: str = "on the command line or in config.toml",
) -> ContrastError:
    """
    Returns the first complaint of a validation error as one sentence.

    `table`: the table of `config.toml` that the settings stand in; without one, they are named as on the command line.
    `skip`: how many names before that of the setting belong to the table. `where`: where a setting without a table can be given.
    """

    details = error.errors()[0]
    kind, context = details["type"], details.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, ContrastError):
        return cause
    name = ".".join(map(str, details["loc"][skip:]))
    if table is None:
        subject, remedy = (
            f"--{name.replace('_', '-')}",
            "correct it, or see heretic-contrast --help",
        )
    else:
        subject, remedy = f'"{name}" in {table}' if name else table, "correct it"
    if kind == "unknown_setting":
        key, close = context["key"], context["nearest"]
        return ContrastError(f'There is no setting "{key}" in {subject}: did you mean "{close}"?')
    if kind == "missing":
        place = f" {where}" if table is None else ""
        return ContrastError(f"The setting {subject} is required: give it{place}.")
    if kind == "extra_forbidden" and table is not None:
        return ContrastError(
            f"This command has no setting {subject}: remove it, or keep settings of other commands in another folder."
        )
    message = details["msg"][:1].lower() + details["msg"][1:]
    if kind == "model_type":
        # pydantic names a class of Python.
        message = "input should be a table of settings"
    return ContrastError(f"The setting {subject} does not work ({message}): {remedy}.")


def error_path(error: ValidationError) -> tuple[str | int, ...]:
    """Returns where the first complaint of a validation error is; the name of an unknown setting comes last."""

    details = error.errors()[0]
    key = details.get("ctx", {}).get("key")
    return (*details["loc"], *([] if key is None else [key]))


def check_text(settings: Any) -> None:
    """
    Raises `ContrastError` when a text in raw settings, however deep, holds a null character.

    No file name can hold one, so that the text would fail wherever it is used.
    """

    waiting = [("", settings)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, str) and "\0" in value:
            raise ContrastError(f"The setting {name} holds a null character: correct it.")
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}".strip("."), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, inner) for inner in value]


PROMPT_COLUMNS = ("text", "prompt", "instruction", "question", "goal", "messages")
"""Where prompts are looked for when no column is named, in this order."""

CATEGORY_COLUMN = "category"
"""Where categories are looked for when no column is named."""


def category_name(text: str) -> str:
    """Returns the name of a category: without capitals, and 1 for 1.0, as tables write numbers where some are missing."""

    name = " ".join(text.lower().split())
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", name)


Categories = Annotated[
    list[str], AfterValidator(lambda names: [category_name(name) for name in names])
]
"""Names of categories, as those of prompts are."""


def nearest(name: str, known: Collection[str], cutoff: float = 0) -> str | None:
    """Returns the known name that is most like another, or None where none is as much as `cutoff` (0 to 1)."""

    text = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(text, known, n=1, cutoff=cutoff)), None)


def check_names(value: Any, known: Collection[str]) -> None:
    """Raises an error for pydantic when a table, or one of a list of them, has a setting that is not known."""

    for item in value if isinstance(value, list) else [value]:
        for key in item if isinstance(item, dict) else ():
            if str(key) not in known:
                raise PydanticCustomError(
                    "unknown_setting",
                    'There is no setting "{key}": did you mean "{nearest}"?',
                    {"key": str(key), "nearest": nearest(str(key), known)},
                )


class Described(BaseModel):
    """Settings whose descriptions are the texts below them."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Table(Described):
    """Settings with a table of their own, in which nothing else may stand."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def check_keys(cls, data: Any) -> Any:
        """Names an unknown key, before something is missed whose name it should have."""

        check_names(data, cls.model_fields)
        return data


class TextClassifierSettings(Described):
    """The settings of whatever may judge responses by a model of the user's choice."""

    text_classifier: str | None = Field(None, min_length=1)
    """
    Text-classification model (Hugging Face ID or path) that gives responses their tiers, or unset for the one that comes with
    the plugin. No code of its repository is run.
    """

    text_classifier_labels: dict[str, Literal["REFUSE", "EVASIVE", "COMPLY"]] = {}
    """Tier of each of its labels, as JSON. Unset where its labels are named after tiers, or refusal and compliance."""

    text_classifier_reads_prompt: bool = False
    """Whether it reads prompt and response as a pair, instead of the response alone."""

    judge_model: str | None = Field(None, min_length=1)
    """
    Language model (Hugging Face ID or path) that is asked instead whether a response declines; a study minimizes the sum of its
    probabilities. No code of its repository is run.
    """

    @property
    def classifier_name(self) -> str | None:
        return self.text_classifier or self.judge_model

    @model_validator(mode="after")
    def check_judges(self) -> "TextClassifierSettings":
        if self.text_classifier is not None and self.judge_model is not None:
            raise ContrastError(
                "Both a text classifier and a judge model are given, of which only one can judge: leave out text_classifier or "
                "judge_model."
            )
        if self.text_classifier is None:
            for name in ("text_classifier_labels", "text_classifier_reads_prompt"):
                if getattr(self, name):
                    raise ContrastError(
                        f"The setting {name} has no effect without a text classifier: give text_classifier as well, or leave it out."
                    )
        return self


class PromptSource(Table):
    """Where a pool of prompts comes from: Heretic's dataset specification, with a category column."""

    dataset: Annotated[str, AfterValidator(check_dataset_name)]
    """
    Hugging Face dataset ID, or path to a dataset on disk, a folder of data files, or a file of text (one prompt per line),
    JSON Lines, JSON, CSV, Parquet or Arrow.
    """

    config: str | None = None
    """Configuration of the dataset, where it has several."""

    commit: str | None = None
    """Hugging Face commit hash of the dataset."""

    split: str | None = None
    """Portion of the dataset to use, such as train[:400]. Required for Hugging Face datasets."""

    column: str | None = Field(
        None,
        description="Column that contains the prompts. Required for Hugging Face datasets; otherwise the first of "
        f"{', '.join(PROMPT_COLUMNS)}.",
    )

    category_column: str | None = Field(
        None,
        description=f"Column that contains the harm category of each prompt; {CATEGORY_COLUMN} where there is one.",
    )

    prefix: str = ""
    """Text to prepend to each prompt."""

    suffix: str = ""
    """Text to append to each prompt."""

    system_prompt: str | None = None
    """System prompt to use with the prompts (overrides the model's if set)."""


_SOURCES = TypeAdapter(Annotated[list[PromptSource], Field(min_length=1)])


def _validate_sources(value: Any, validate: Callable[[Any], Any]) -> Any:
    return _SOURCES.validate_python(value) if isinstance(value, list) else validate(value)


if TYPE_CHECKING:
    PromptSources = PromptSource | list[PromptSource]
    """Where a pool comes from: one source, or several, one after the other."""
else:
    # As a union, the command line would have no flag for each field of a source, and messages would name its members.
    PromptSources = Annotated[PromptSource, WrapValidator(_validate_sources), SerializeAsAny()]


def datasets_of(content: Any, keys: Collection[str] = ("dataset",)) -> list[str]:
    """Returns the names of all datasets in settings as JSON values, however deep; `keys`: what names them."""

    found: set[str] = set()
    if isinstance(content, dict):
        found.update(content[key] for key in keys if isinstance(content.get(key), str))
        content = list(content.values())
    if isinstance(content, list):
        found.update(name for value in content for name in datasets_of(value, keys))
    return sorted(found)


def inputs_of(content: Any) -> list[str]:
    """Returns the names of all that is read in settings as JSON values, which may be files or folders."""

    names = (
        "dataset directions evaluate_model file judge_model model pairs text_classifier warm_start"
    )
    return datasets_of(content, names.split())


PAPER: dict[str, Any] = {"method": "som", "classes": "category", "svd": False}
"""What the configurations of arXiv:2603.22061 have in common: one SOM per harm class."""

ONE_MAP: dict[str, Any] = {
    "baseline": "unmatched",
    "method": "som",
    "classes": "single",
    "som_rows": 4,
    "som_columns": 4,
    "som_learning_rate": 0.01,
    "som_topology": "hexagonal",
}
"""What those have in common that train one SOM for all harmful prompts."""

PRESETS: dict[str, dict[str, Any]] = {
    # Section 3.2 of arXiv:2603.22061.
    "paper-unmatched": {**PAPER, "baseline": "unmatched"},
    "paper-matched": {**PAPER, "baseline": "matched"},
    "paper-matched-svd": {**PAPER, "baseline": "matched", "svd": True},
    # After Piras et al. (2026): one SOM for all harmful prompts with the settings of their code, several neurons, one ablation
    # after the other. They search which neurons, most often five to seven, and take those of one layer for all.
    "som-sequential": {
        **ONE_MAP,
        "som_sigma": 0.33,
        "winners": 7,
        "composition": "sequential",
        "embeddings": True,
    },
    # Arditi et al. (2024): the difference in means, removed from everything that writes into the residual stream.
    "arditi": {
        "baseline": "unmatched",
        "method": "mean",
        "classes": "single",
        "embeddings": True,
    },
    # After Heretic's pull request 196, with the winners it meant to take: the densest neurons. There each direction has a
    # maximum and a minimum weight per component.
    "som-summed": {**ONE_MAP, "som_sigma": 0.5, "winners": 4, "composition": "sum"},
}
"""Published configurations, with this project's choice where nothing else is known, and what takes the maps of others alone."""


Range = tuple[float, float]
"""The lowest and the highest value of a parameter that is searched."""

HERETIC_RANGES: dict[str, Range] = {
    "max_weight": (0.8, 1.5),
    "max_weight_position": (0.6, 1.0),
    "min_weight": (0.0, 1.0),
    "min_weight_distance": (0.0, 0.6),
    "scale": (0.0, 1.0),
    "rest": (-1.0, 1.0),
}
"""
What Heretic 1.4 searches for each component, and the plugin for each direction.

Positions and distances are fractions of the last layer's index, a distance being at least one layer; the smallest weight is a
fraction of the largest one. `rest` multiplies the scales of what classes add to a shared direction, below 0 as 0, so that half of the
random trials are Heretic's.
"""


BASELINES = ("unmatched", "matched", "mixed", "nearest", "residualized")
"""The built-in baselines."""


def other_baselines() -> EntryPoints:
    return entry_points(group="heretic_contrast.baselines")


def baseline_names() -> list[str]:
    return [*BASELINES, *sorted({entry.name for entry in other_baselines()} - set(BASELINES))]


EXTRACTION_FIELDS = set(
    """
    baseline mixing n_neighbors classes category_source exclude_categories small_classes method
    som_rows som_columns som_iterations som_sigma som_learning_rate som_neighborhood
    som_topology winners svd svd_rank shared_direction scale winsorization_quantile orthogonalize_direction
    control drop_misbehaving seed
    """.split()
)
"""The settings that decide directions."""

ABLATION_FIELDS = set(
    """
    writers embeddings composition equal_effective_weight row_normalization full_normalization_lora_rank
    """.split()
)
"""The settings that decide what is ablated by directions at given weights."""


def said_ablation(path: str) -> dict[str, Any]:
    """Returns these settings as the provenance of a directions file says them; none where it does not, or cannot be read."""

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            said = json.loads(file.metadata()["provenance"])["ablation"]
        return {name: said[name] for name in ABLATION_FIELDS if name in said}
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
        # Whoever loads the directions says what is wrong.
        return {}


def has_several_directions(settings: "ContrastSettings") -> bool:
    return settings.classes == "category" or settings.winners > 1


class Need(NamedTuple):
    """What settings of these names need to have an effect, which nobody is told who has given one of `unless`."""

    names: set[str]
    is_met: Callable[["ContrastSettings"], bool]
    sentence: str
    unless: frozenset[str] = frozenset()


NEEDS = (
    Need(
        {name for name in EXTRACTION_FIELDS if name.startswith("som_")} | {"winners"},
        lambda settings: settings.method == "som",
        "on a mean: give the method som as well, or a preset that trains maps",
        frozenset({"method"}),
    ),
    Need(
        set(
            "composition equal_effective_weight shared_direction small_classes svd svd_rank".split()
        ),
        has_several_directions,
        "on one direction: give the classes category as well, or a preset with several directions",
        frozenset({"method", "classes"}),
    ),
    Need(
        {"svd_rank"},
        lambda settings: settings.svd,
        "without svd: give that as well, or leave it out",
        frozenset({"svd"}),
    ),
    Need(
        {"mixing"},
        lambda settings: settings.baseline not in {*BASELINES} - {"mixed"},
        "with another baseline than mixed: give that as well, or leave it out",
    ),
    Need(
        {"n_neighbors"},
        lambda settings: settings.baseline not in {*BASELINES} - {"nearest"},
        "with another baseline than nearest: give that as well, or leave it out",
    ),
    Need(
        {"sensitive_prompts"},
        lambda settings: settings.counts_false_refusals,
        "without false_refusals or max_false_refusals: give one of them as well, or leave it out",
    ),
    Need(
        {"divergence_tokens"},
        lambda settings: settings.divergence == "teacher-forced",
        "on the divergence of the first token: give the divergence teacher-forced as well, or leave it out",
    ),
    Need(
        {"counted_tiers"},
        lambda settings: (
            settings.refusal_classifier == "tiers" or settings.classifier_name is not None
        ),
        "on markers: give the refusal classifier tiers as well, or leave it out",
    ),
)
"""The settings that have no effect without others. Baselines of other packages may use all that there are."""

SEVERAL = "several"
"""The context in which one of several presets is validated: what has no effect with one of them may have one with another."""


class ContrastSettings(Table, TextClassifierSettings):
    """Settings of the plugin."""

    model_config = ConfigDict(validate_default=True, allow_inf_nan=False)

    preset: list[str] = Field(
        [],
        description="Published configuration to start from; other settings given explicitly override it. Options: "
        + ", ".join(f'"{name}"' for name in PRESETS)
        + ". Extraction and sweep accept several, to compare them.",
    )

    baseline: str = "unmatched"
    """
    What harmful residuals are contrasted against. Options: "unmatched" (mean of general harmless prompts), "matched" (mean of
    harmless prompts on the subject of the same class), "mixed" (a mixture of both), "nearest" (the general harmless prompts
    nearest to each harmful one), "residualized" (unmatched, without what the subjects alone contribute).
    """

    mixing: float = Field(0.5, ge=0, le=1)
    """Share of the matched reference in the baseline "mixed" (0 = unmatched, 1 = matched)."""

    n_neighbors: int = Field(10, ge=1)
    """Number of harmless prompts that make the reference of the baseline "nearest"."""

    classes: Literal["category", "single"] = "single"
    """
    What gets a direction of its own. Options: "category" (each harm category, as in the paper), "single" (all harmful prompts
    together, as in Heretic).
    """

    category_source: CategorySource = "auto"
    """
    Where the category of a harmful prompt comes from. Options: "auto" (the column where there is one, else the lexicon),
    "column", "lexicon" (word list shipped with the plugin), "model" (the loaded model is asked).
    """

    exclude_categories: Categories = []
    """
    Harm categories to leave out when directions are fitted. The control for topic: a direction of a topic cannot know a topic
    it never saw.
    """

    small_classes: Literal["error", "drop", "merge"] = "merge"
    """
    What to do with a class that has fewer prompts than the SOM has neurons. Options: "merge" (into the class miscellaneous,
    or drop them where even together they are too few), "drop", "error".
    """

    method: Literal["som", "mean"] = "mean"
    """
    How the difference vectors of a class become a direction. Options: "som" (densest neuron of a self-organizing map, as in the
    paper), "mean" (their mean, as in Heretic).
    """

    som_rows: int = Field(3, ge=1, le=64)
    """Rows of the self-organizing map (the paper: 3)."""

    som_columns: int = Field(3, ge=1, le=64)
    """Columns of the self-organizing map (the paper: 3)."""

    som_iterations: int = Field(10_000, ge=1, le=10_000_000)
    """Training iterations of the self-organizing map (the paper: 10,000)."""

    som_sigma: float = Field(1.0, gt=0)
    """Initial width of the neighborhood (the paper gives none; MiniSom's default)."""

    som_learning_rate: float = Field(0.5, gt=0)
    """Initial learning rate (the paper gives none; MiniSom's default)."""

    som_neighborhood: Literal["gaussian", "mexican_hat", "bubble", "triangle"] = "gaussian"
    """
    Neighborhood function (the paper gives none; MiniSom's default). Options: "gaussian", "mexican_hat", "bubble", "triangle".
    """

    som_topology: Literal["rectangular", "hexagonal"] = "rectangular"
    """Topology of the map (the paper gives none; MiniSom's default). Options: "rectangular", "hexagonal"."""

    winners: int = Field(1, ge=1)
    """Number of neurons per class that become directions, densest first (the paper: 1)."""

    svd: bool = False
    """Whether to orthogonalize the directions of each layer by singular value decomposition."""

    svd_rank: int | None = Field(None, ge=1)
    """Number of singular vectors to keep, or unset to keep as many as there were directions."""

    shared_direction: bool = False
    """
    Whether several directions become the one that Heretic takes (of all harmful prompts against the general harmless ones) and,
    orthogonal to it and to one another, what each class adds. The search then contains Heretic's own: the others start at 0.
    """

    scale: Scale = "unit"
    """
    Length of the directions. Options: "unit" (Heretic's convention), "raw" (as trained), "unmatched" (the length that the
    unmatched baseline gives; the control for magnitude).
    """

    winsorization_quantile: float = Field(1.0, ge=0, le=1)
    """
    Quantile of the absolute values of a residual's components that the components are clamped to (1 = no winsorization),
    against massive activations.
    """

    orthogonalize_direction: bool = True
    """
    Whether to adjust the directions so that only the component that is orthogonal to the mean residual of harmless prompts is
    subtracted, as Heretic does.
    """

    control: Literal["none", "random"] = "none"
    """
    Control that takes the place of the directions. Options: "none", "random" (random directions of the same count, norms and
    mutual cosines).
    """

    drop_misbehaving: bool = False
    """
    Whether to drop harmful prompts that the model answers and harmless prompts that it refuses before directions are fitted
    (Arditi et al., 2024), by the tiers that come with the plugin, whatever else judges responses. They are counted either way when
    this is set.
    """

    writers: Writers = "all"
    """
    What is ablated. Options: "all" (everything that adds to the residual stream: experts and recurrent layers too, with biases,
    and with regard to norms behind it), "apart" (the same, with components of their own for linear attention, convolutions
    and shared experts that Heretic counts among others), "heretic" (the output projections that Heretic finds, as Heretic ablates
    them).
    """

    embeddings: bool = False
    """
    Whether the embeddings (of tokens, and of positions where these are learned) are ablated as well, with the directions of
    the first layer. A sweep does so where it ablates the first layer and all its components.
    """

    composition: Composition = "sum"
    """
    How the ablations of several directions are put together. Options: "sum" (the paper), "sequential" (one after the other),
    "capped" (the sum, with eigenvalues capped at the largest weight).
    """

    equal_effective_weight: bool = False
    """
    Whether to rescale the weights so that parallel directions remove no more than a single one would. The control for
    compounding.
    """

    row_normalization: RowNormalization = "full"
    """
    How to apply row normalization of the weights, where a LoRA adapter changes them. Options: "none" (no normalization), "pre" (compute
    LoRA adapter relative to row-normalized weights), "full" (like "pre", but renormalizes to preserve original row magnitudes, as
    Heretic does).
    """

    full_normalization_lora_rank: int | None = Field(None, ge=1)
    """The rank of the LoRA adapter when "full" row normalization is used, or unset to use the number of directions plus 2."""

    search_space: dict[str, Range] = Field(
        {},
        description="Ranges of the search that differ from Heretic's, by parameter, each as [lowest, highest]. Parameters: "
        + ", ".join(f'"{name}"' for name in HERETIC_RANGES)
        + '. One component or direction has a range of its own as "mlp.down_proj.max_weight" or "scale.drugs". '
        "Positions and distances are fractions of the last layer's index, min_weight is a fraction of max_weight, "
        "and a max_weight or a rest (the scale of all that classes add to a shared direction) below 0 counts as 0.",
    )

    sampler: Sampler = "tpe"
    """
    Sampler of the study under Heretic 1.4. Options: "tpe" (multivariate tree-structured Parzen estimator), "nsga2"
    (evolutionary, the counterpart of the paper's strategy).
    """

    stop_dominated: bool = False
    """
    Whether a trial ends as soon as a finished one has no larger divergence and no more refusals than it has already (Heretic 1.4).
    Trials of the Pareto front never end so. The sampler takes those that do for bad ones.
    """

    storage: str | None = Field(None, exclude=True)
    """
    Storage of the study, which any number of processes share: any URL that Optuna knows, such as sqlite:///study.db, or the path of
    a journal file; unset for a checkpoint of its own (Heretic 1.4).
    """

    warm_start: str | None = None
    """
    The sweep.json of a sweep (with the composition and at the strength that are searched, the latter weight unless
    equal_effective_weight is given), or an earlier study (its checkpoint, or its storage; of several directions with the same two
    settings), whose best layers and weights, or parameters, at most ten, become the first trials of the study; what lies beyond
    the ranges of the search is moved to their ends (Heretic 1.4).
    """

    screening: int = Field(0, ge=0)
    """
    Number of candidates that are compared on a few prompts by the first tokens of responses alone, before the study begins with the best
    of them, a third of its trials at most (Heretic 1.4). One takes a small part of a trial's time.
    """

    patience: int | None = Field(None, ge=1)
    """After how many trials without a new point on the Pareto front the study ends, or unset to run all (Heretic 1.4)."""

    divergence: Literal["first-token", "teacher-forced"] = "first-token"
    """
    What divergence is minimized in the study under Heretic 1.4. Options: "first-token" (of the first token of responses to
    harmless prompts, as Heretic's), "teacher-forced" (the mean over the unmodified model's own responses to them, a lower bound as in the sweep).
    """

    divergence_tokens: int = Field(50, ge=1)
    """Number of tokens of each response that the divergence "teacher-forced" is measured over (Heretic 1.4)."""

    refusal_classifier: Literal["markers", "tiers"] = "markers"
    """
    What counts as a refusal in the study under Heretic 1.4. Options: "markers" (Heretic's keywords), "tiers" (the three-tier
    classifier, or the text classifier or judge model where one is given, which needs no more to be used).
    """

    counted_tiers: list[Literal["REFUSE", "EVASIVE", "COMPLY"]] = Field(["REFUSE"], min_length=1)
    """Tiers that count as a refusal when the refusal classifier is "tiers" (Heretic 1.4)."""

    false_refusals: Literal["ignore", "objective"] = "ignore"
    """
    Whether the refusals of sensitive harmless prompts are minimized in the study under Heretic 1.4. Options: "ignore", "objective"
    (beside refusals and divergence).
    """

    max_false_refusals: float | None = Field(None, ge=0, le=1)
    """
    Share of the sensitive prompts that may be refused at most (Heretic 1.4): a trial above it is worse than any other, and the menu
    leaves it out. Unset for no limit.
    """

    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Random seed of the self-organizing maps and of random controls."""

    batch_size: int = Field(32, ge=1)
    """Number of prompts to process in parallel when residuals are collected."""

    good_prompts: PromptSources | None = None
    """Dataset of general harmless prompts, or unset to use Heretic's good prompts."""

    bad_prompts: PromptSources | None = None
    """Dataset of harmful prompts, or unset to use Heretic's bad prompts."""

    matched_prompts: PromptSources | None = None
    """Dataset of harmless prompts on the subjects of the harm categories, or unset to use the pool shipped with the plugin."""

    finalist_prompts: PromptSources | None = None
    """
    Dataset of harmful prompts that the search never sees. Before the menu, the trials of the Pareto front are judged on them, with
    responses of 150 tokens, or as long as the search's where these are longer; unset to leave that out (Heretic 1.4).
    """

    sensitive_prompts: PromptSources | None = None
    """
    Dataset of harmless prompts that are easily refused, whose refusals are counted where false_refusals or max_false_refusals ask for it (Heretic
    1.4).
    Unset to use the pool of matched prompts shipped with the plugin.
    """

    directions: str | None = None
    """
    File of directions to use instead of extracting them (see heretic-contrast extract), and how to ablate where nothing else is given.
    """

    save_directions: str | None = None
    """File to save the directions to."""

    residual_cache: str | None = None
    """Directory to cache residuals in, or unset to use the user's cache directory."""

    @field_validator("residual_cache")
    @classmethod
    def check_residual_cache(cls, value: str | None) -> str | None:
        if value is not None and os.path.isfile(value):
            raise ContrastError(
                f"The residual cache {value} is a file: give a folder, or leave it out."
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        check_text(data)
        if data.get("directions") is not None:
            # The categories are also those of the prompts that are judged, which the seed chooses.
            idle = EXTRACTION_FIELDS - {"category_source", "seed"}
            idle |= {"preset", "matched_prompts"}
            require_effect([name for name in data if name in idle and data[name] not in ([], None)])
        if "preset" not in data:
            return data
        presets = data["preset"]
        if isinstance(presets, str):
            presets = [presets]
        if isinstance(presets, list):
            data = {**data, "preset": presets}
            for name in presets:
                # Whatever else stands in the list is refused by its type.
                if isinstance(name, str) and name not in PRESETS:
                    raise ContrastError(
                        f'There is no preset "{name}": choose one of {", ".join(PRESETS)}.'
                    )
            if len(presets) == 1 and isinstance(presets[0], str):
                preset = PRESETS[presets[0]]
                if data.get("writers") == "heretic":
                    preset = {key: value for key, value in preset.items() if key != "embeddings"}
                data = {**preset, **data}
        return data

    @field_validator("search_space", mode="before")
    @classmethod
    def flatten_search_space(cls, value: Any) -> Any:
        """Takes tables inside the table, which TOML makes of names with dots that have no quotes."""

        if not isinstance(value, dict):
            return value
        flat: dict[str, Any] = {}
        for name, inner in value.items():
            tables = cls.flatten_search_space(inner) if isinstance(inner, dict) else {"": inner}
            flat |= {f"{name}.{key}".rstrip("."): item for key, item in tables.items()}
        return flat

    @field_validator("search_space")
    @classmethod
    def check_search_space(cls, value: dict[str, Range]) -> dict[str, Range]:
        for name, (low, high) in value.items():
            parameter = general_parameter(name)
            close = None
            if parameter not in HERETIC_RANGES:
                close = nearest(parameter, HERETIC_RANGES)
            elif name.startswith("embeddings.") and parameter != "max_weight":
                # They have a weight instead of a kernel.
                close = "embeddings.max_weight"
            elif parameter in ("scale", "rest") and not name.startswith(("scale", "rest")):
                # Directions have these, and no component.
                close = parameter
            if close is not None:
                raise ContrastError(
                    f'There is no parameter "{name}" for search_space: did you mean "{close}"?'
                )
            remedy = None
            if low > high:
                remedy = "give the lowest value first"
            elif parameter.startswith(("max_weight_", "min_weight")) and (low < 0 or high > 1):
                remedy = "it is a fraction, so give values between 0 and 1"
            if remedy is not None:
                raise ContrastError(
                    f'The range of "{name}" in search_space goes from {low:g} to {high:g}: {remedy}.'
                )
        return value

    @field_validator("baseline")
    @classmethod
    def check_baseline(cls, value: str) -> str:
        # Other packages are looked through only where they are needed.
        if value not in BASELINES and value not in baseline_names():
            raise ContrastError(
                f'There is no contrast baseline "{value}": choose one of {", ".join(baseline_names())}.'
            )
        return value

    @model_validator(mode="after")
    def leave_rows(self) -> "ContrastSettings":
        """Leaves out Heretic's normalization and orthogonalization, which no published configuration has, beside a preset."""

        if self.preset:
            # They do not count as given, so that Heretic's own flags stand before them.
            if "row_normalization" not in self.model_fields_set:
                self.__dict__["row_normalization"] = "none"
            if "orthogonalize_direction" not in self.model_fields_set:
                self.__dict__["orthogonalize_direction"] = False
        return self

    @model_validator(mode="after")
    def ablate_as_extracted(self) -> "ContrastSettings":
        """Ablates as a directions file says of the configuration that it was extracted with, where nothing else is given."""

        if self.directions is None or not os.path.isfile(self.directions):
            return self
        try:
            said = ContrastSettings.model_validate(said_ablation(self.directions), context=SEVERAL)
        except ValidationError as error:
            raise ContrastError(
                f"The directions file {self.directions} does not say how to ablate in a way that works: extract it again."
            ) from error
        # They do not count as given, so that Heretic's own flags stand before them.
        for name in said.model_fields_set - self.model_fields_set:
            if name != "embeddings" or self.writers != "heretic":
                self.__dict__[name] = getattr(said, name)
        return self

    @model_validator(mode="after")
    def check_together(self, info: ValidationInfo) -> "ContrastSettings":
        given = self.model_fields_set
        alone = len(self.preset) <= 1 and self.directions is None and info.context != SEVERAL
        idle = self.without_effect() if alone else {}
        n_neurons = self.som_rows * self.som_columns
        has_judge = self.classifier_name is not None
        for is_wrong, sentence in (
            (
                len(self.preset) <= 1 and self.method == "som" and self.winners > n_neurons,
                f"{self.winners} winners are asked for, but a map of {self.som_rows} × {self.som_columns} has {n_neurons} neurons: "
                "use a larger map or fewer winners.",
            ),
            *((True, sentence) for sentence in idle.values()),
            (
                self.embeddings and self.writers == "heretic",
                "Heretic ablates no embeddings: leave out embeddings, or use the writers all.",
            ),
            (
                self.shared_direction and (self.svd or self.scale != "unit"),
                "What classes add to a shared direction is orthogonal and of length 1 already: leave out svd and scale, or "
                "shared_direction.",
            ),
            (
                self.stop_dominated and self.sampler != "tpe",
                "The sampler nsga2 needs every trial to its end: leave out stop_dominated, or use the sampler tpe.",
            ),
            (
                has_judge
                and self.refusal_classifier == "markers"
                and "refusal_classifier" in given,
                "Refusals are counted by markers, which a text classifier or judge model has no part in: leave it out, or use the "
                "refusal classifier tiers.",
            ),
            (
                alone and "rest" in self.search_space and not self.shared_direction,
                'The range of "rest" in search_space has no effect without shared_direction: give that as well, or leave it out.',
            ),
            (
                self.shared_direction and "scale.shared" in self.search_space,
                'The range of "scale.shared" in search_space has no effect, since the scale of the shared direction is 1: leave it out.',
            ),
        ):
            if is_wrong:
                raise ContrastError(sentence)
        if has_judge:
            self.refusal_classifier = "tiers"
        return self

    def without_effect(self) -> dict[str, str]:
        """Returns why each setting has no effect that was given beside what nobody has asked for, by name."""

        preset = PRESETS[self.preset[0]] if len(self.preset) == 1 else {}
        own = {name for name, value in self.given().items() if value != preset.get(name, ...)}
        fields = type(self).model_fields
        changed = {
            name for name in own if name in preset or getattr(self, name) != fields[name].default
        }
        return {
            name: f"The setting {name} has no effect {need.sentence}."
            for need in NEEDS
            if not need.is_met(self) and not need.unless & own
            for name in sorted(changed & need.names)
        }

    @property
    def counts_false_refusals(self) -> bool:
        return self.false_refusals == "objective" or self.max_false_refusals is not None

    def objectives(self) -> dict[str, Any]:
        """Returns what the numbers of a trial under Heretic 1.4 are of, as JSON values."""

        names = {"divergence", "refusal_classifier"}
        if self.divergence == "teacher-forced":
            names.add("divergence_tokens")
        if self.refusal_classifier == "tiers":
            names.add("counted_tiers")
        return self.model_dump(mode="json", include=names)

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}

    def ablation(self) -> dict[str, Any]:
        """Returns the settings that decide what is ablated by directions at given weights, as JSON values."""

        return self.model_dump(mode="json", include=ABLATION_FIELDS)

    def ablation_of_file(self, but: Collection[str] = ()) -> str:
        """Returns what a directions file has changed of the ablation, for a line that says so; empty where that is nothing."""

        open_fields = ABLATION_FIELDS - self.model_fields_set - {*but}
        changed = self.model_dump(mode="json", include=open_fields, exclude_defaults=True)
        return ", ".join(f"{name} = {json.dumps(value)}" for name, value in changed.items())

    def configurations(self) -> dict[str, "ContrastSettings"]:
        """Returns the settings of each configuration, or of each preset. Raises `ContrastError` when one does not work."""

        if self.directions is not None:
            return {PurePath(self.directions).stem: self}
        if len(self.preset) <= 1:
            return {self.preset[0] if self.preset else self.baseline: self}
        found = {}
        for name in self.preset:
            try:
                found[name] = ContrastSettings.model_validate(
                    {**self.given(), "preset": [name]}, context=SEVERAL
                )
            except ValidationError as error:
                # Each setting works by itself, so that only what they are together can be wrong.
                cause = error.errors()[0].get("ctx", {}).get("error", error)
                raise ContrastError(f"With the preset {name}: {cause}") from error
        first, *others = (item.without_effect() for item in found.values())
        for name in first:
            if all(name in other for other in others):
                raise ContrastError(first[name])
        return found

    def require_single_configuration(self) -> None:
        """Raises `ContrastError` when several presets are given where only one can be used."""

        if len(self.preset) > 1:
            raise ContrastError(
                f"Several presets are given ({', '.join(self.preset)}), but a model can only be made with one: "
                "give one, or compare them with heretic-contrast sweep."
            )

    def require_categories(self) -> None:
        """Raises `ContrastError` when it is said where categories come from, and no direction that is extracted needs any."""

        if self.category_source != "auto" and not any(
            item.classes == "category" or item.exclude_categories
            for item in self.configurations().values()
        ):
            raise ContrastError(
                "The setting category_source has no effect on one direction: give the classes category as well, or leave it out."
            )


def require_effect(names: Sequence[str]) -> None:
    """Raises `ContrastError` when settings are given, of these names, that have no effect beside a file of directions."""

    if names:
        listed = ", ".join(sorted(names))
        raise ContrastError(
            f"The directions are taken from a file, beside which these settings have no effect: {listed}; leave them out, or "
            "leave out directions to extract new ones."
        )


def general_parameter(name: str) -> str:
    """Returns the parameter of all components or directions that one of them has under this name."""

    return "scale" if name.startswith("scale.") else name.rpartition(".")[2]
