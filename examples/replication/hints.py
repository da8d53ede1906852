# SPDX-License-Identifier: AGPL-3.0-or-later

"""Hints from earlier trials with one seed, and whether this measurement confirms or overturns them."""

from collections.abc import Callable
from dataclasses import dataclass

from .claims import claim_a, claim_e1
from .evidence import Study
from .rules import ABSENT, APPEARS, MATCHED, UNMATCHED, Finding
from .wording import at_equal, layer_list, number, plain

CONFIRMED, OVERTURNED, UNDECIDED = "confirmed", "overturned", "undecided"

REFUSER, SMOLLM2 = "refuser", "smollm2-refuser"


@dataclass(frozen=True)
class Hint:
    """A hint: the model that it came from (None: any), what it said, the rule, and the function that decides."""

    model: str | None
    says: str
    rule: str
    decide: Callable[[Study], Finding]


def _from_verdict(
    verdict: str | None, confirming: tuple[str, ...], overturning: tuple[str, ...]
) -> str:
    if verdict in confirming:
        return CONFIRMED
    return OVERTURNED if verdict in overturning else UNDECIDED


def _contrast(
    condition: str, reference: str, confirming: tuple[str, ...], overturning: tuple[str, ...]
) -> Callable[[Study], Finding]:
    """Returns a decision by the contrast of two conditions on all layers at equal KL."""

    def decide(study: Study) -> Finding:
        found = study.contrast(condition, reference)
        verdict = None if found is None else found.verdict
        return Finding(at_equal(found), _from_verdict(verdict, confirming, overturning))

    return decide


def matched_works(study: Study) -> Finding:
    measured, verdict = claim_a(study)
    return Finding(measured, _from_verdict(verdict, (ABSENT,), (APPEARS,)))


def svd_fails(study: Study) -> Finding:
    measured, verdict = claim_e1(study)
    return Finding(measured, _from_verdict(verdict, (APPEARS,), (ABSENT,)))


def two_layers(study: Study) -> Finding:
    found = {preset: study.successful(preset) for preset in (UNMATCHED, MATCHED)}
    measured = "; ".join(f"{preset}: {layer_list(layers)}" for preset, layers in found.items())
    both = all({3, 7} <= set(layers) for layers in found.values())
    return Finding(
        f"Layers with R = 0 on the sweep: {measured}.", CONFIRMED if both else OVERTURNED
    )


def lengths_by_depth(study: Study) -> Finding:
    layers = range(study.data["n_layers"])
    early = study.shape_interval("som matched", "norm_ratio", [x for x in layers if x < 3])
    late = study.shape_interval("som matched", "norm_ratio", [x for x in layers if x >= 3])
    if early is None or late is None:
        return Finding("not measured", UNDECIDED)
    measured = f"Ratio on layers 0 to 2: {plain(early)}; from layer 3 on: {plain(late)}."
    if early.low > 0.5 or late.high < 0.8:
        return Finding(measured, OVERTURNED)
    return Finding(measured, CONFIRMED if early.high < 0.5 and late.low > 0.8 else UNDECIDED)


def similar_lengths(study: Study) -> Finding:
    ratio = study.shape_interval("mean sensitive", "norm_ratio")
    if ratio is None:
        return Finding("not measured", UNDECIDED)
    values = [v for v in study.shape_by_layer("mean sensitive", "norm_ratio") if v is not None]
    measured = (
        f"Mean over layers {plain(ratio)}, by layer {number(min(values))} to {number(max(values))}."
    )
    if ratio.low > 0.8:
        return Finding(measured, CONFIRMED)
    return Finding(measured, OVERTURNED if ratio.high < 0.8 else UNDECIDED)


def different_angles(study: Study) -> Finding:
    cosine = study.shape_interval("mean sensitive", "cosine")
    if cosine is None:
        return Finding("not measured", UNDECIDED)
    values = [v for v in study.shape_by_layer("mean sensitive", "cosine") if v is not None]
    measured = f"Mean over layers {plain(cosine)}, by layer {number(min(values))} to {number(max(values))}."
    if cosine.high < 0.65:
        return Finding(measured, CONFIRMED)
    return Finding(measured, OVERTURNED if cosine.low > 0.65 else UNDECIDED)


AT_EQUAL_KL = 'By the difference at equal KL on all layers ("worse", "better", "equal" as above)'

HINTS: tuple[Hint, ...] = (
    Hint(
        REFUSER,
        "The matched baseline does not fail on this model.",
        "Confirmed where claim a does not appear, overturned where it appears.",
        matched_works,
    ),
    Hint(
        REFUSER,
        "The failure of SVD at uniform weight appears.",
        "Confirmed where claim e1 appears, overturned where it does not.",
        svd_fails,
    ),
    Hint(
        REFUSER,
        "Layers 3 and 7 reach R = 0 under both baselines.",
        "Counted on the sweep: confirmed if both layers do under both.",
        two_layers,
    ),
    Hint(
        REFUSER,
        "Before layer 3 matched differences are 3 to 4 times shorter than unmatched ones, after it as long.",
        "Confirmed: mean ratio surely below 0.5 before, surely above 0.8 from there on. Overturned: surely above 0.5 before, or "
        "surely below 0.8 after.",
        lengths_by_depth,
    ),
    Hint(
        SMOLLM2,
        "With XSTest's safe prompts as the matched pool, the matched baseline is worse than the unmatched one, although all "
        "directions have one length (mean direction).",
        f"{AT_EQUAL_KL}: confirmed if worse, overturned if equal or better.",
        _contrast("mean sensitive", "mean unmatched", ("worse",), ("equal", "better")),
    ),
    Hint(
        SMOLLM2,
        "So it is with another matched pool (here: the one shipped with the package).",
        f"{AT_EQUAL_KL}: confirmed if worse, overturned if equal or better.",
        _contrast("mean matched", "mean unmatched", ("worse",), ("equal", "better")),
    ),
    Hint(
        SMOLLM2,
        "Dropping the matched prompts that the model refuses does not mend it (here: in the shipped pool).",
        f"{AT_EQUAL_KL}: confirmed if the filtered baseline is still worse than unmatched, overturned if equal or better.",
        _contrast("mean matched, filtered", "mean unmatched", ("worse",), ("equal", "better")),
    ),
    Hint(
        SMOLLM2,
        "Matched differences (XSTest) are nearly as long as unmatched ones (0.81 to 1.12).",
        "Confirmed: mean ratio over layers surely above 0.8. Overturned: surely below.",
        similar_lengths,
    ),
    Hint(
        SMOLLM2,
        "They point elsewhere: cosines of 0.1 to 0.65 with the unmatched direction.",
        "Confirmed: mean cosine over layers surely below 0.65. Overturned: surely above.",
        different_angles,
    ),
    Hint(
        SMOLLM2,
        "The unmatched direction without its topic (residualized) works as well as the unmatched one (here: "
        "topics from the shipped pool).",
        f"{AT_EQUAL_KL}: confirmed if equal or better, overturned if worse.",
        _contrast("mean residualized", "mean unmatched", ("equal", "better"), ("worse",)),
    ),
    Hint(
        None,
        "The baseline `nearest` seemed to need half the divergence of `unmatched` with one draw of prompts, and lay on the "
        "same curve with another: there is no difference.",
        f"{AT_EQUAL_KL}: confirmed if equal, overturned if better or worse.",
        _contrast("mean nearest", "mean unmatched", ("equal",), ("better", "worse")),
    ),
)


def decide_hints(study: Study) -> list[tuple[Hint, Finding]]:
    """Returns the hints that concern a model, with what becomes of them."""

    return [(hint, hint.decide(study)) for hint in HINTS if hint.model in (None, study.name)]
