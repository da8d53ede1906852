# SPDX-License-Identifier: AGPL-3.0-or-later

"""The pools of prompts that directions are fitted to, each harmful prompt with its class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..builtin import harmful_pool, harmless_pool, matched_pool, pool_name
from ..errors import ContrastError
from ..language_model import LanguageModel
from ..prompts import Prompt, load_pool, text_digest
from ..prompts.categories import assign
from ..settings import BASELINES, CategorySource, ContrastSettings, PromptSources
from .baselines import NEEDS_MATCHED, require_matched, require_neighbors
from .classes import ClassSelection, select_classes
from .transforms import SHARED

Log = Callable[..., None]
"""Prints a line with rich markup; without one, an empty line."""


@dataclass(frozen=True)
class Pools:
    harmful: tuple[Prompt, ...]
    bulk: tuple[Prompt, ...]
    matched: tuple[Prompt, ...]
    dropped: tuple[tuple[str, int, int], ...] = ()
    """What a behavior filter found: name of the pool, number of misbehaving prompts, number of all prompts."""

    sources: tuple[str, ...] = ()
    """What the files and datasets are called that they were read from, where they were."""

    def named(self) -> dict[str, tuple[Prompt, ...]]:
        return {"harmful": self.harmful, "harmless": self.bulk, "matched": self.matched}

    def digests(self) -> set[str]:
        """Returns the digests of all texts."""

        return {text_digest(prompt.text) for pool in self.named().values() for prompt in pool}


def require_apart(
    harmful: Sequence[Prompt], harmless: Sequence[Prompt], name: str, consequence: str
) -> None:
    """Raises `ContrastError` when a prompt is called both harmful and harmless."""

    known = {text_digest(prompt.text) for prompt in harmless}
    shared = [prompt.text for prompt in harmful if text_digest(prompt.text) in known]
    if shared:
        raise ContrastError(
            f'The prompt "{min(shared)}" stands both in the harmful and in the {name} pool, so it would be {consequence}: '
            "remove it from one of them."
        )


Read = Callable[[PromptSources, str, str], list[Prompt]]
"""Reads a pool, as `load_pool` does."""


def load_pools(
    settings: ContrastSettings, where: str = "--contrast.", read: Read = load_pool
) -> Pools:
    """
    Reads the pools that the settings name, and assigns categories; those that a model assigns are left open.

    `where` is what messages put before the name of a setting: a flag, or a table of `config.toml`. Raises `ContrastError` when
    a pool cannot be read or is empty, a category is missing, a prompt stands both in the harmful and in a harmless pool, or
    no directions can be fitted to such pools.
    """

    harmful, bulk = load_plain_pools(settings, where, read)
    sources = list(_plain_sources(settings))
    matched: list[Prompt] = []
    # Baselines of other packages may use what is given.
    if settings.baseline in NEEDS_MATCHED or (
        settings.matched_prompts is not None and settings.baseline not in BASELINES
    ):
        sources.append(settings.matched_prompts or matched_pool())
        matched = read(sources[-1], "matched harmless", f"{where}matched_prompts.")
    for name, pool in (("harmless", bulk), ("matched harmless", matched)):
        require_apart(harmful, pool, name, "contrasted with itself")
    names = tuple(map(pool_name, sources))
    pools = Pools(tuple(harmful), tuple(bulk), tuple(matched), sources=names)
    if needs_model(settings):
        return pools
    pools = with_categories(pools, settings, None)
    select(pools, settings)
    return pools


def load_plain_pools(
    settings: ContrastSettings, where: str, read: Read = load_pool
) -> tuple[list[Prompt], list[Prompt]]:
    """Returns the harmful and the general harmless prompts that the settings name, without assigning categories."""

    harmful, harmless = _plain_sources(settings)
    return (
        read(harmful, "harmful", f"{where}bad_prompts."),
        read(harmless, "harmless", f"{where}good_prompts."),
    )


def _plain_sources(settings: ContrastSettings) -> tuple[PromptSources, PromptSources]:
    return (
        settings.bad_prompts or harmful_pool("train[:400]"),
        settings.good_prompts or harmless_pool("train[:400]"),
    )


def needs_model(settings: ContrastSettings) -> bool:
    """Returns whether categories are only known once a model is loaded."""

    return needs_categories(settings) and settings.category_source == "model"


def needs_categories(settings: ContrastSettings) -> bool:
    return settings.classes == "category" or bool(settings.exclude_categories)


def with_categories(pools: Pools, settings: ContrastSettings, model: LanguageModel | None) -> Pools:
    """
    Returns the pools with the categories of the harmful and of the matched prompts.

    `model`: asked where the settings say so. Raises `ContrastError` as `assign_categories` does.
    """

    if not needs_categories(settings):
        return pools
    source = settings.category_source
    return replace(
        pools,
        harmful=tuple(assign_categories(pools.harmful, source, model, "harmful")),
        matched=tuple(assign_categories(pools.matched, source, model, "matched harmless")),
    )


def select(pools: Pools, settings: ContrastSettings) -> ClassSelection:
    """
    Returns the classes of the pools that get directions.

    Raises `ContrastError` when a class is too small or called as what all share, none is left, or the baseline lacks prompts.
    """

    selection = select_classes(
        class_names_of(pools.harmful), class_names_of(pools.matched), settings
    )
    if settings.shared_direction and SHARED in selection.names:
        raise ContrastError(
            f'The category "{SHARED}" has the name of the direction that all classes share: rename it, or set shared_direction to false.'
        )
    if settings.baseline in NEEDS_MATCHED:
        require_matched(selection.harmful_classes, selection.matched_classes)
    if settings.baseline == "nearest":
        require_neighbors(settings.n_neighbors, len(pools.bulk))
    return selection


def class_names_of(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    return tuple(prompt.category or "all" for prompt in prompts)


def assign_categories(
    prompts: Sequence[Prompt], source: CategorySource, model: LanguageModel | None, what: str
) -> list[Prompt]:
    """
    Returns the prompts with a category each.

    Raises `ContrastError` when the source is the column and a prompt has none; `what` names the pool.
    """

    if source == "lexicon":
        return [replace(prompt, category=assign(prompt.text)) for prompt in prompts]
    if source == "model" and prompts:
        assert model is not None
        # Few ask the model; the word list, or a column, is what pools come with.
        from .model_categories import classify_with_model

        categories = classify_with_model(model, prompts)
        return [
            replace(prompt, category=category)
            for prompt, category in zip(prompts, categories, strict=True)
        ]
    missing = [prompt.text for prompt in prompts if prompt.category is None]
    if missing and source == "column":
        raise ContrastError(
            f"{len(missing)} of {len(prompts)} {what} prompts have no category, but one direction per category is asked for: "
            'name the column with category_column, set category_source to "lexicon", or set classes to "single".'
        )
    return [
        prompt if prompt.category is not None else replace(prompt, category=assign(prompt.text))
        for prompt in prompts
    ]


def filter_by_behavior(pools: Pools, model: LanguageModel, max_new_tokens: int) -> Pools:
    """
    Drops harmful prompts that the model does not refuse, and harmless ones that it refuses (Arditi et al., 2024).

    Raises `ContrastError` when a pool would be empty.
    """

    # No other step of an extraction needs the tiers, whose numbers are read from a file.
    from ..tiers.responses import Tier, classify_response

    found = []
    kept = {}
    for name, prompts, should_refuse in (
        ("harmful", pools.harmful, True),
        ("harmless", pools.bulk, False),
        ("matched harmless", pools.matched, False),
    ):
        responses = model.generate(prompts, max_new_tokens)
        kept[name] = tuple(
            prompt
            for prompt, response in zip(prompts, responses, strict=True)
            if (classify_response(prompt.text, response) is Tier.REFUSE) == should_refuse
        )
        found.append((name, len(prompts) - len(kept[name]), len(prompts)))
        if prompts and not kept[name]:
            raise ContrastError(
                f"The model {'answers' if should_refuse else 'refuses'} all {len(prompts)} {name} prompts, so none would be left: "
                "use other prompts, or leave drop_misbehaving off."
            )
    return replace(
        pools,
        harmful=kept["harmful"],
        bulk=kept["harmless"],
        matched=kept["matched harmless"],
        dropped=tuple(found),
    )
