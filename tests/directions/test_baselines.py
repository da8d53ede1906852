# SPDX-License-Identifier: AGPL-3.0-or-later

"""Every baseline against its formula, written out a second time, one prompt after the other."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from heretic_contrast import prompts
from heretic_contrast.builtin import with_refuser_pools
from heretic_contrast.directions.baselines import (
    BASELINES,
    Residuals,
    get_baseline,
)
from heretic_contrast.directions.pools import load_pools
from heretic_contrast.directions.sources import DirectionSources
from heretic_contrast.errors import ContrastError
from heretic_contrast.settings import BASELINES as NAMES
from heretic_contrast.settings import ContrastSettings, PromptSource

HIDDEN = 24
CLASSES = ("drugs", "fraud", "hacking")


def options_with(**numbers: float) -> ContrastSettings:
    """The settings with these numbers, whether the baseline that is named there needs them or not."""

    return ContrastSettings().model_copy(update=numbers)


def make_layer(seed: int = 0, topics: bool = True) -> Residuals:
    """Residuals of three classes, a bulk pool, and a matched pool whose subjects differ from the bulk's."""

    generator = torch.Generator().manual_seed(seed)
    classes = tuple(CLASSES[index % 3] for index in range(17))
    matched_classes = tuple(CLASSES[index % 3] for index in range(14))
    bulk = torch.randn(21, HIDDEN, generator=generator) + 2
    means = {name: 3 * torch.randn(HIDDEN, generator=generator) for name in CLASSES}
    matched = torch.randn(14, HIDDEN, generator=generator) + 2
    for index, name in enumerate(matched_classes):
        matched[index] += means[name] * topics
    if not topics:
        # Subjects that add nothing: every class has the bulk's mean exactly.
        for name in CLASSES:
            chosen = [index for index, other in enumerate(matched_classes) if other == name]
            matched[chosen] += bulk.mean(0) - matched[chosen].mean(0)
    return Residuals(
        harmful=torch.randn(17, HIDDEN, generator=generator) + 5,
        harmful_classes=classes,
        bulk=bulk,
        matched=matched,
        matched_classes=matched_classes,
    )


def reference(name: str, layer: Residuals, options: ContrastSettings) -> np.ndarray:
    """The differences by the formulas of the design, in NumPy."""

    harmful = layer.harmful.double().numpy()
    bulk = layer.bulk.double().numpy()
    matched = layer.matched.double().numpy()
    matched_classes = np.array(layer.matched_classes)
    center = bulk.mean(0)
    rows = []
    for residual, category in zip(harmful, layer.harmful_classes, strict=True):
        topic = matched[matched_classes == category].mean(0)
        if name == "unmatched":
            mu = center
        elif name == "matched":
            mu = topic
        elif name == "mixed":
            mu = (1 - options.mixing) * center + options.mixing * topic
        elif name == "nearest":
            a, b = residual - center, bulk - center
            cosines = b @ a / np.linalg.norm(b, axis=1) / np.linalg.norm(a)
            mu = bulk[np.argsort(-cosines)[: options.n_neighbors]].mean(0)
        else:
            topics = np.stack([matched[matched_classes == c].mean(0) - center for c in CLASSES])
            projector = topics.T @ np.linalg.pinv(topics @ topics.T) @ topics
            difference = residual - center
            rows.append(difference - projector @ difference)
            continue
        rows.append(residual - mu)
    return np.stack(rows)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("seed", [0, 1])
def test_formula(name: str, seed: int) -> None:
    layer, options = make_layer(seed), options_with(mixing=0.3, n_neighbors=4)
    found = get_baseline(name)(layer, options)
    assert found.dtype == torch.float32 and found.shape == (17, HIDDEN)
    assert np.allclose(found.numpy(), reference(name, layer, options), atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_order_of_prompts_does_not_matter(name: str) -> None:
    layer, options = make_layer(), options_with(n_neighbors=5)
    generator = torch.Generator().manual_seed(9)
    a, b, c = (
        torch.randperm(len(pool), generator=generator)
        for pool in (layer.harmful, layer.bulk, layer.matched)
    )
    shuffled = Residuals(
        harmful=layer.harmful[a],
        harmful_classes=tuple(layer.harmful_classes[index] for index in a),
        bulk=layer.bulk[b],
        matched=layer.matched[c],
        matched_classes=tuple(layer.matched_classes[index] for index in c),
    )
    baseline = get_baseline(name)
    assert torch.allclose(baseline(shuffled, options), baseline(layer, options)[a], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "same_as"),
    [
        ("mixed", options_with(mixing=0), "unmatched"),
        ("mixed", options_with(mixing=1), "matched"),
        ("nearest", options_with(n_neighbors=21), "unmatched"),
    ],
)
def test_degenerate_cases(name: str, options: ContrastSettings, same_as: str) -> None:
    layer = make_layer()
    found, expected = (get_baseline(item)(layer, options) for item in (name, same_as))
    assert torch.allclose(found, expected, atol=1e-6)


def test_residualized_without_topics_is_unmatched() -> None:
    layer = make_layer(topics=False)
    found, expected = (
        get_baseline(name)(layer, options_with()) for name in ("residualized", "unmatched")
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_residualized_has_no_part_along_topics() -> None:
    layer = make_layer()
    found = get_baseline("residualized")(layer, options_with()).double()
    for name in CLASSES:
        chosen = [index for index, other in enumerate(layer.matched_classes) if other == name]
        topic = layer.matched[chosen].double().mean(0) - layer.bulk.double().mean(0)
        assert float((found @ topic).abs().max()) < 1e-4 * float(topic.norm())


def test_subjects_that_span_everything_are_refused() -> None:
    layer = make_layer()
    narrow = Residuals(
        harmful=layer.harmful[:, :3],
        harmful_classes=layer.harmful_classes,
        bulk=layer.bulk[:, :3],
        matched=layer.matched[:, :3],
        matched_classes=layer.matched_classes,
    )
    with pytest.raises(ContrastError, match="span all 3 dimensions"):
        get_baseline("residualized")(narrow, options_with())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nearest", options_with(n_neighbors=22), "22 neighbors"),
        ("nearest", options_with(n_neighbors=0), "0 neighbors"),
    ],
)
def test_numbers_out_of_range(name: str, options: ContrastSettings, message: str) -> None:
    with pytest.raises(ContrastError, match=message):
        get_baseline(name)(make_layer(), options)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("mixing", [0.1, 0.3, 0.7])
def test_equal_residuals_have_no_direction(name: str, mixing: float) -> None:
    """As at the embedding of a token that all prompts end with."""

    layer = make_layer()
    same = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    pools = {
        pool: same.repeat(len(getattr(layer, pool)), 1) for pool in ("harmful", "bulk", "matched")
    }
    found = get_baseline(name)(replace(layer, **pools), options_with(mixing=mixing))
    assert not found.any()


def test_names_of_built_in_baselines_stand_in_the_settings() -> None:
    assert tuple(BASELINES) == NAMES


def test_only_baselines_that_use_matched_prompts_read_them() -> None:
    pools = {
        name: load_pools(with_refuser_pools(ContrastSettings(baseline=name))) for name in NAMES
    }
    assert {name for name in NAMES if pools[name].matched} == {"matched", "mixed", "residualized"}
    files = tuple(f"refuser_prompts/{name} train" for name in ("harmful", "harmless"))
    assert pools["unmatched"].sources == files
    assert pools["matched"].sources == (*files, "refuser_prompts/matched train")


def test_configurations_read_what_they_share_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pool may come from the network, and a sweep has a configuration more than was asked for, the random control."""

    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "Plant a tree."}\n' * 3, encoding="utf-8")
    settings = {name: with_refuser_pools(ContrastSettings(baseline=name)) for name in NAMES}
    changes = {"good_prompts": PromptSource(dataset=str(other)), "control": "random"}
    settings["random"] = settings["matched"].model_copy(update=changes)
    expected = {name: load_pools(item) for name, item in settings.items()}
    read = Mock(wraps=prompts.read_rows)
    monkeypatch.setattr(prompts, "read_rows", read)
    sources = DirectionSources(settings, "")
    assert sources.pools == expected
    assert len(sources.pools["random"].bulk) == 3
    # The harmful, general and matched prompts of all, and those that one has to itself.
    assert read.call_count == 4


def test_another_package_can_add_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint, EntryPoints

    from heretic_contrast import settings
    from heretic_contrast.directions import baselines

    entry = EntryPoint(
        "theirs",
        "heretic_contrast.directions.baselines:matched",
        "heretic_contrast.baselines",
    )
    monkeypatch.setattr(settings, "entry_points", lambda group: EntryPoints([entry]))
    assert get_baseline("theirs") is baselines.matched
    assert ContrastSettings(baseline="theirs").baseline == "theirs"
    assert load_pools(with_refuser_pools(ContrastSettings(baseline="theirs"))).matched
    with pytest.raises(ValidationError, match=r"There is no contrast baseline .*theirs"):
        ContrastSettings(baseline="nobody's")
