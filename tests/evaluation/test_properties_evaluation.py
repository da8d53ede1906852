# SPDX-License-Identifier: AGPL-3.0-or-later

"""Properties of the measurements: coherence, divergence, intervals, geometry, samples."""

import math
import unicodedata
from collections import Counter
from itertools import pairwise
from statistics import stdev
from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from heretic_contrast.ablation.operator import Composition, compose
from heretic_contrast.errors import LONGEST_SENTENCE, ContrastError, one_line
from heretic_contrast.evaluation.capture import max_cosine, span_basis, subspace_capture
from heretic_contrast.evaluation.divergence import (
    SparseLogProbabilities,
    base_statistics,
    divergences,
    mean_with_standard_error,
)
from heretic_contrast.evaluation.geometry import (
    angle,
    measure_layer,
    occupancy,
    perturbation,
    principal_angles,
)
from heretic_contrast.evaluation.plan import Configuration
from heretic_contrast.evaluation.plan_settings import parse_layers
from heretic_contrast.evaluation.statistics import wilson_interval
from heretic_contrast.prompts import Prompt
from heretic_contrast.prompts.sampling import split_harmless, stratified_sample
from heretic_contrast.tiers.coherence import (
    ENTROPY_MINIMUM_WORDS,
    has_loop,
    is_coherent,
    longest_run,
    normalized_bigram_entropy,
    split_words,
)
from tests.made_directions import make_directions
from tests.strategies import direction_sets, normal, seeds, weights_for

words = st.lists(st.sampled_from(["a", "bake", "the", "bread", "of", "sea"]), max_size=60)


@given(words.map(" ".join) | st.text(max_size=200))
def test_bigram_entropy_is_a_share(text: str) -> None:
    entropy = normalized_bigram_entropy(text)
    assert 0 <= entropy <= 1
    found = split_words(text)
    bigrams = Counter(pairwise(found))
    if len(bigrams) == bigrams.total():
        assert entropy == pytest.approx(1)
    elif len(bigrams) == 1:
        assert entropy == pytest.approx(0, abs=1e-9)
    else:
        assert 0 < entropy < 1
        shares = np.array(list(bigrams.values())) / bigrams.total()
        expected = -(shares * np.log(shares)).sum() / np.log(bigrams.total())
        assert entropy == pytest.approx(expected)
    # Case, punctuation and the distance between words do not matter.
    assert normalized_bigram_entropy("  ".join(found).upper()) == pytest.approx(entropy) or (
        split_words(" ".join(found).upper()) != found
    )


@given(st.text(max_size=300))
def test_every_text_is_judged(text: str) -> None:
    assert is_coherent(text) in (True, False)
    if not split_words(text):
        assert not is_coherent(text)


@given(st.lists(st.sampled_from(["bake", "the", "bread", "of", "sea"]), min_size=1, max_size=9))
def test_what_repeats_back_to_back_is_a_loop(period: list[str]) -> None:
    copies = max(4, math.ceil(12 / len(period)))
    assert has_loop(" ".join(period * copies))
    assert not is_coherent("First. " + " ".join(period * copies) + " and last.")


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6))
def test_longest_run(sequence: list[int], period: int) -> None:
    found = longest_run(sequence, period)
    runs = [
        end - start
        for start in range(len(sequence))
        for end in range(start + period + 1, len(sequence) + 1)
        if all(sequence[i] == sequence[i - period] for i in range(start + period, end))
    ]
    assert found == max(runs, default=0)


@given(st.integers(ENTROPY_MINIMUM_WORDS + 1, 60))
def test_words_that_never_repeat_are_coherent(n: int) -> None:
    assert is_coherent(" ".join(f"w{index}x{index * index}" for index in range(n)))


def statistics(logits: Tensor, top_k: int) -> SparseLogProbabilities:
    return base_statistics(logits.float().clone(), top_k)


def divergence(base: SparseLogProbabilities, logits: Tensor) -> Tensor:
    return divergences(base, logits.float().clone())


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draws logits of two models, of any magnitude, with some tokens ruled out by the first or both."""

    n, size, seed = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(seeds)
    scale = 10.0 ** draw(st.integers(-30, 2))
    first = scale * normal(n, size, seed=seed)
    second = first + scale * draw(st.floats(0, 2)) * normal(n, size, seed=seed + 1)
    # At least one token stays possible.
    for token in draw(st.lists(st.integers(1, size), max_size=5)):
        if token < size:
            first[:, token] = -math.inf
            second[:, token] = draw(st.sampled_from([-math.inf, 1.0]))
    return first, second


def full_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Returns the KL divergence over the whole vocabulary, in float64."""

    p, q = first.double().log_softmax(dim=1), second.double().log_softmax(dim=1)
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(dim=1)


@given(logit_pairs(), st.integers(1, 45))
def test_divergence_is_a_bound_of_the_full_one(pair: tuple[Tensor, Tensor], top_k: int) -> None:
    first, second = pair
    full = full_divergence(first, second)
    tolerance = 1e-5 * (1 + float(full.max()))
    base = statistics(first, top_k)
    values = first.double().log_softmax(dim=1).gather(1, base.tokens.long())
    torch.testing.assert_close(base.values.double(), values, rtol=1e-4, atol=1e-4)
    found = divergence(base, second)
    assert found.shape == (len(first),) and found.dtype == torch.float64
    assert bool((found >= -tolerance).all())
    assert bool((found <= full + tolerance).all())
    if top_k >= first.shape[1]:
        assert torch.allclose(found, full, atol=tolerance)
    # What is kept of more tokens can only bring the bound nearer.
    more = divergence(statistics(first, top_k + 3), second)
    assert bool((found <= more + tolerance).all())
    assert float(divergence(base, first).abs().max()) < 1e-5
    some = torch.arange(len(first)).flip(0)[:2]
    assert divergence(base.at(some), second[some]).equal(found[some])


@given(seeds, st.integers(1, 8))
def test_divergence_from_what_is_ruled_out_is_infinite(seed: int, top_k: int) -> None:
    first, second = normal(2, 8, seed=seed), normal(2, 8, seed=seed + 1)
    second[1, int(first[1].argmax())] = -math.inf
    found = divergence(statistics(first, top_k), second)
    assert math.isfinite(float(found[0])) and float(found[1]) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_outputs(value: float) -> None:
    first, broken = normal(2, 8, seed=0), normal(2, 8, seed=1)
    broken[1, 3] = value
    found = divergence(statistics(first, 4), broken)
    assert math.isfinite(float(found[0])) and float(found[1]) == math.inf
    with pytest.raises(ContrastError, match=r"^The outputs of the unmodified model .*\.$"):
        statistics(broken, 4)


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=20),
    st.floats(0.1, 10),
)
def test_mean_over_positions(parts: list[tuple[float, int]], factor: float) -> None:
    sums = [value * count for value, count in parts]
    counts = [count for _, count in parts]
    mean, error = mean_with_standard_error(sums, counts)
    expected = np.average([value for value, _ in parts], weights=counts)
    assert mean == pytest.approx(expected, abs=1e-9)
    assert math.isnan(error) if len(parts) == 1 else error >= 0
    scaled = mean_with_standard_error([factor * value for value in sums], counts)
    assert scaled == pytest.approx((factor * mean, factor * error), nan_ok=True, abs=1e-9)
    backwards = mean_with_standard_error(sums[::-1], counts[::-1])
    assert backwards == pytest.approx((mean, error), nan_ok=True, abs=1e-9)
    # Where all prompts have as many positions, it is the standard error of their means.
    if len(parts) > 1:
        values = [value for value, _ in parts]
        _, error = mean_with_standard_error([7 * value for value in values], [7] * len(parts))
        assert error == pytest.approx(stdev(values) / math.sqrt(len(parts)), abs=1e-9)


def test_error_of_a_mean_over_prompts_of_different_lengths() -> None:
    # With the mean 9 / 6, the prompts are off by −0.5, −1 and 1.5, whose squares add up to 3.5.
    found = mean_with_standard_error([1.0, 2.0, 6.0], [1, 2, 3])
    assert found == pytest.approx((1.5, math.sqrt(3 / 2 * 3.5) / 6))


@given(st.data(), st.integers(1, 10**6))
def test_more_trials_with_the_same_share_say_more(data: st.DataObject, n: int) -> None:
    successes = data.draw(st.integers(0, n))
    assert wilson_interval(10 * successes, 10 * n)[1] <= wilson_interval(successes, n)[1]


def cosine_matrix(vectors: Tensor) -> Tensor:
    directions = make_directions(
        torch.ones(2, 1, vectors.shape[1]), vectors.expand(2, *vectors.shape)
    )
    return torch.tensor(
        measure_layer("a", Configuration(directions), 0).cosines, dtype=torch.float64
    )


@given(direction_sets(lowest=-30, highest=30, most=12))
def test_cosines(vectors: Tensor) -> None:
    cosines = cosine_matrix(vectors)
    assert torch.allclose(cosines, cosines.T, atol=1e-12)
    assert float(cosines.abs().max()) <= 1 + 1e-9
    nonzero = (vectors != 0).any(dim=1).double()
    assert torch.allclose(cosines.diagonal(), nonzero)
    # Lengths do not matter, and neither does the sign of two directions at once.
    powers = torch.tensor([2.0 ** (index % 7) for index in range(len(vectors))])
    assert torch.allclose(cosine_matrix(vectors * powers[:, None]), cosines, atol=1e-9)
    for first, second in zip(vectors, vectors.roll(1, 0), strict=True):
        found = angle(first, second)
        assert found == angle(second, first) or math.isnan(found)
        if math.isnan(found):
            assert not bool(first.any()) or not bool(second.any())
        else:
            assert 0 <= found <= 180
            assert angle(first, -second) == pytest.approx(180 - found, abs=1e-6)
            pair = cosine_matrix(torch.stack([first, second]))[0, 1]
            assert math.cos(math.radians(found)) == pytest.approx(float(pair), abs=1e-9)


@given(direction_sets(most=12, hidden=20), st.integers(1, 12), seeds)
def test_principal_angles_are_those_of_scipy(vectors: Tensor, n: int, seed: int) -> None:
    other = normal(n, vectors.shape[1], seed=seed)
    bases = [span_basis(item) for item in (vectors, other)]
    found = principal_angles(*bases)
    assert len(found) == min(len(basis) for basis in bases)
    if not len(found):
        return
    expected = scipy.linalg.subspace_angles(*(basis.T.numpy() for basis in bases))
    assert np.allclose(found.numpy(), np.degrees(np.sort(expected)), atol=1e-5)
    # A span lies in itself, whatever lengths and order its directions have.
    scaled = span_basis(vectors.flip(0) * 2.0**50)
    assert float(principal_angles(bases[0], scaled).abs().max()) < 1e-3


@given(direction_sets(lowest=-30, highest=30, hidden=40), seeds, st.integers(1, 6))
def test_capture(vectors: Tensor, seed: int, n_pairs: int) -> None:
    basis = span_basis(vectors)
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-9)
    exact = vectors.double()
    rest = exact - (exact @ basis.T) @ basis
    assert bool((rest.norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all())
    differences = normal(n_pairs, vectors.shape[1], seed=seed)
    subspace, cosine = subspace_capture(differences, basis), max_cosine(differences, vectors)
    assert bool((subspace <= 1 + 1e-9).all())
    # No direction of the span is nearer than the projection. Directions below the tolerance of the rank are no part of it.
    assert bool((cosine <= subspace + 1e-5).all()) and bool((cosine >= 0).all())
    for factor in (2.0**-90, 2.0**90):
        assert torch.allclose(subspace_capture(differences * factor, basis), subspace)
        assert torch.allclose(max_cosine(differences * factor, vectors), cosine)
    if bool(vectors.any()):
        inside = subspace_capture(vectors, basis)
        assert torch.allclose(
            inside[inside.isfinite()], torch.ones(1, dtype=torch.float64), atol=1e-5
        )


@given(
    st.data(),
    direction_sets(most=10, hidden=24, lowest=-2, highest=2),
    st.sampled_from(get_args(Composition)),
    seeds,
)
def test_occupancy_and_perturbation(
    data: st.DataObject, vectors: Tensor, composition: Composition, seed: int
) -> None:
    weights = data.draw(weights_for(vectors, highest=1.0))
    if composition == "sequential":
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    y = normal(6, vectors.shape[1], seed=seed).double()
    projections = y @ vectors.double().T
    second = projections.T @ projections / len(y)
    energy = y.square().sum(dim=1).mean()

    shares = occupancy(second, energy, vectors)
    assert bool((shares >= 0).all()) and bool((shares <= 1 + 1e-9).all())
    unit = torch.nn.functional.normalize(vectors.double(), dim=1, eps=1e-300)
    expected = ((y @ unit.T).square().mean(dim=0) / energy).sqrt()
    assert torch.allclose(shares, expected, atol=1e-9)

    operator = compose(vectors, weights, composition)
    rows, kernel = operator.vectors.double(), operator.kernel.double()
    outputs = y @ (rows.T @ kernel @ rows).T
    size = math.sqrt(float(outputs.square().sum(dim=1).mean()))
    scale = 1e-4 * float(vectors.double().norm(dim=1).max() ** 2)
    inverse = torch.linalg.pinv(vectors.double())
    assert perturbation(second, inverse, operator) == pytest.approx(size, rel=1e-3, abs=scale)


prompts = st.lists(
    st.builds(
        Prompt,
        text=st.text(alphabet="abcdef", min_size=1, max_size=4),
        category=st.none() | st.sampled_from(["drugs", "fraud", "hacking"]),
    ),
    max_size=30,
)


@given(st.data(), prompts, st.integers(0, 10))
def test_stratified_samples(data: st.DataObject, pool: list[Prompt], seed: int) -> None:
    sizes = Counter(prompt.category or "" for prompt in pool)
    count = data.draw(st.integers(len(sizes), len(pool)) | st.integers(0, 40))
    if not len(sizes) <= count <= len(pool):
        with pytest.raises(ContrastError, match=r"\.$"):
            stratified_sample(pool, count, seed)
        return
    found = stratified_sample(pool, count, seed)
    assert len(found) == count and not Counter(found) - Counter(pool)
    assert found == stratified_sample(data.draw(st.permutations(pool)), count, seed)
    # As even as the pool allows: who has fewer than another has given all.
    counts = Counter(prompt.category or "" for prompt in found)
    for name in sizes:
        assert counts[name] == sizes[name] or counts[name] >= max(counts.values()) - 1


@given(prompts, st.integers(1, 12), st.integers(1, 12), st.integers(0, 10))
def test_canaries_and_references_are_apart(
    pool: list[Prompt], n_canaries: int, n_references: int, seed: int
) -> None:
    try:
        canaries, references = split_harmless(pool, n_canaries, n_references, seed)
    except ContrastError as error:
        assert str(error).endswith(".")
        n_categories = len({prompt.category or "" for prompt in pool})
        assert not n_categories <= n_canaries + n_references <= len(pool)
        return
    assert (len(canaries), len(references)) == (n_canaries, n_references)
    assert not (Counter(canaries) + Counter(references)) - Counter(pool)


@pytest.mark.parametrize(("n_canaries", "n_references"), [(60, 40), (50, 50), (10, 90), (70, 30)])
def test_canaries_lie_between_references(n_canaries: int, n_references: int) -> None:
    """In the order of the sample, which is that of categories and texts."""

    pool = [Prompt(f"{number:03}") for number in range(100)]
    canaries, _ = split_harmless(pool, n_canaries, n_references, 0)
    numbers = [int(prompt.text) for prompt in canaries]
    for end in range(10, 101, 10):
        assert abs(sum(number < end for number in numbers) - end * n_canaries / 100) <= 1


@given(st.sets(st.integers(0, 9999), min_size=1, max_size=20))
def test_layers_are_read_as_they_are_written(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers))) == tuple(sorted(layers))
    low, high = min(layers), max(layers)
    assert parse_layers(f" {low} - {high} ") == tuple(range(low, high + 1))


@given(
    st.text(alphabet="0123456789-, al٣²", max_size=12) | st.text(max_size=8) | st.just("9" * 6000)
)
def test_any_text_names_layers_or_is_refused(text: str) -> None:
    try:
        layers = parse_layers(text)
    except ContrastError:
        return
    assert layers is None or (layers == tuple(sorted(set(layers))) and min(layers) >= 0)


@given(st.text(max_size=60) | st.text(min_size=1, max_size=3).map(lambda text: text * 3000))
def test_messages_are_shown_on_one_line(text: str) -> None:
    line = one_line(text)
    assert all(
        unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in line
    )
    assert len(line) <= 10 * LONGEST_SENTENCE + 20
    assert one_line(line) == line or len(line) > LONGEST_SENTENCE
    plain = " ".join(text.split())
    if plain.isprintable() and len(plain) <= LONGEST_SENTENCE:
        assert line == plain
