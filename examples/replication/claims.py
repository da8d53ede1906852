# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The paper's claims (section 7), its tables, and hints from earlier trials, each with a rule that decides it.

Layers and weights are chosen on the paper's sweep (10 prompts, one set of directions) and then judged with other
directions, and prompts drawn anew that the sweep did not judge, so that choosing the best of many cells does not flatter it. What a claim says and its rule
stand in the documentation of the function that decides it, and are printed in the report.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .evidence import Study, SweepCell
from .statistics import MARGIN, Interval, normal_bounds
from .wording import (
    MATCHED,
    SVD,
    UNMATCHED,
    at_equal,
    layer_list,
    number,
    percent,
    plain,
    signed,
    small,
)

APPEARS, ABSENT, OPEN = "appears", "does not appear", "cannot be decided here"
CONFIRMED, OVERTURNED, UNDECIDED = "confirmed", "overturned", "undecided"


class Finding(NamedTuple):
    """What was measured, in words, and what the rule makes of it."""

    measured: str
    verdict: str


class Claim(NamedTuple):
    """A claim (its place in the paper) or a hint (the model that it came from, "" for any), and how it is decided."""

    key: str
    title: str
    says: str
    rule: str
    decide: Callable[[Study], Finding]


CLAIMS: list[Claim] = []
"""All claims in the order of the report."""

HINTS: list[Claim] = []


def claim(
    key: str, title: str, registry: list[Claim] = CLAIMS
) -> Callable[[Callable[[Study], Finding]], Callable[[Study], Finding]]:
    """Registers a decision. The first paragraph of its documentation is what the claim says, the second is the rule."""

    def register(decide: Callable[[Study], Finding]) -> Callable[[Study], Finding]:
        says, rule = (inspect.getdoc(decide) or "").split("\n\n")
        registry.append(Claim(key, title, says.replace("\n", " "), rule.replace("\n", " "), decide))
        return decide

    return register


def decided(measured: str, appears: bool | None, absent: bool | None) -> Finding:
    """Returns a finding: what is not sure either way stays open."""

    return Finding(measured, APPEARS if appears else ABSENT if absent else OPEN)


def reduces(share: Interval | None) -> bool | None:
    """Returns whether refusals fall by more than the margin: yes, no, or None where the interval allows both."""

    if share is None or share.low < 1 - MARGIN <= share.high:
        return None
    return share.high < 1 - MARGIN


def eliminates(share: Interval | None) -> bool | None:
    """Returns whether fewer refusals than the margin are left: yes, no, or None where the interval allows both."""

    if share is None or share.low <= MARGIN < share.high:
        return None
    return share.high <= MARGIN


def fresh(study: Study, preset: str) -> tuple[SweepCell | None, Interval | None]:
    """Returns the best cell of a preset, and the share of refusals there with other directions and prompts drawn anew."""

    names = {UNMATCHED: "som unmatched", MATCHED: "som matched", SVD: "svd matched"}
    condition = f"{names[preset]}, equal weight"
    cell = study.chosen_cell(preset, condition)
    if cell is None:
        return None, None
    return cell, study.share(condition, str(cell.layers[0]), cell.weight)


def where(cell: SweepCell | None) -> str:
    return "no layer" if cell is None else f"layer {cell.layers[0]}, w = {cell.weight}"


def sweep_counts(study: Study, preset: str) -> str:
    successful = study.successful(preset)
    return (
        f"{len(study.functional(preset))} of {len(study.layer_cells(preset))} layers functional, "
        f"{len(successful)} with R = 0 ({layer_list(successful)})"
    )


def inert(study: Study, preset: str) -> bool:
    """Returns whether R falls by at most 1 anywhere on the sweep."""

    return study.sweep_base - study.best_cell(preset).refusals <= 1


def does_nothing(study: Study, preset: str, on_the_sweep: str) -> Finding:
    """Decides whether a preset reduces refusals; `on_the_sweep` says what it did there."""

    cell, share = fresh(study, preset)
    measured = f"{on_the_sweep} Fresh prompts, {where(cell)}: {percent(share)} refused."
    return decided(measured, reduces(share) is False and inert(study, preset), reduces(share))


@claim("a", "Matched directions do nothing")
def claim_a(study: Study) -> Finding:
    """
    Topic-matched directions fail to reduce refusals at any tested weight on any tested layer.

    Appears: on the sweep R falls by at most 1 anywhere, and on fresh prompts at the best cell refusals surely fall by
    less than 10%. Does not appear: there they surely fall by more.
    """

    lowest = f"lowest R {study.best_cell(MATCHED).refusals} of {study.sweep_prompts}"
    return does_nothing(study, MATCHED, f"Sweep: {sweep_counts(study, MATCHED)}; {lowest}.")


@claim("b1", "Unmatched directions eliminate refusals")
def claim_b1(study: Study) -> Finding:
    """
    Unmatched directions reach R = 0 on single layers.

    Appears: some layer has R = 0 on the sweep, and on fresh prompts at the best cell surely at most 10% are refused.
    Does not appear: neither.
    """

    cell, share = fresh(study, UNMATCHED)
    successful = bool(study.successful(UNMATCHED))
    measured = f"Sweep: {sweep_counts(study, UNMATCHED)}. Fresh prompts, {where(cell)}: {percent(share)} refused."
    done = eliminates(share)
    return decided(measured, successful and done, not successful and done is False)


CHEAP_KL, CHEAP_WEIGHT, CHEAP_LAYERS = 0.005, 0.5, 3


@claim("b2", "… cheaply")
def claim_b2(study: Study) -> Finding:
    """
    They do so at w = 0.5 on three layers with KL below 0.005.

    Counted on the sweep, with KL's standard error: appears if three layers surely do; does not appear if fewer than three may.
    """

    surely, perhaps, kls = 0, 0, []
    for layer, cells in study.layer_cells(UNMATCHED).items():
        found = [c for c in cells if c.refusals == 0 and c.weight <= CHEAP_WEIGHT]
        if found:
            cell = min(found, key=lambda c: c.kl)
            low, high = normal_bounds(cell.kl - study.sweep_floor, cell.kl_error)
            kls.append(f"layer {layer} {small(cell.kl)}")
            surely += high < CHEAP_KL
            perhaps += low < CHEAP_KL
    measured = (
        f"R = 0 at w ≤ {CHEAP_WEIGHT} on {len(kls)} layers (KL: {', '.join(kls) or 'none'}); "
        f"{surely} of them surely below {CHEAP_KL}, {perhaps} perhaps."
    )
    return decided(measured, surely >= CHEAP_LAYERS, perhaps < CHEAP_LAYERS)


@claim("c1", "Unmatched directions capture more")
def claim_c1(study: Study) -> Finding:
    """
    Unmatched directions capture 68.9 % of the refusal-mediating variance, matched ones with SVD 60.2 %.

    Both readings of capture must agree on the sign of the difference, surely.
    """

    parts, more, less = [], True, True
    for label, what in (("subspace", "pair_capture"), ("largest cosine", "pair_max_cosine")):
        first = study.shape_interval("som unmatched", what)
        second = study.shape_interval("svd matched", what)
        difference = study.shape_difference("som unmatched", "svd matched", what)
        if first is None or second is None or difference is None:
            return Finding("not measured", OPEN)
        parts.append(
            f"{label}: {100 * first.value:.1f} % against {100 * second.value:.1f} %, {signed(difference)} points"
        )
        more, less = more and difference.low > 0, less and difference.high <= 0
    return decided(f"{'; '.join(parts)} ({study.data['n_pairs'][0]} pairs).", more, less)


@claim("c2", "A small gap in capture, a total one in function")
def claim_c2(study: Study) -> Finding:
    """
    A gap of 9 points in capture goes with a total gap in function.

    Appears: the gap is surely below 20 points, unmatched surely leaves at most 10%, matched with SVD surely reduces by less, and on the sweep R falls by at most 1 anywhere.
    Does not appear: unmatched surely leaves more and has R = 0 nowhere on the sweep, or matched with SVD surely reduces.
    """

    gap = study.shape_difference("som unmatched", "svd matched", "pair_capture")
    cell, unmatched = fresh(study, UNMATCHED)
    svd_cell, svd = fresh(study, SVD)
    measured = (
        f"Capture gap {signed(gap)} points; unmatched {percent(unmatched)} refused ({where(cell)}), "
        f"matched with SVD {percent(svd)} ({where(svd_cell)}; on the sweep at lowest R {study.best_cell(SVD).refusals})."
    )
    if gap is None:
        return Finding(measured, OPEN)
    fails = eliminates(unmatched) is False and not study.successful(UNMATCHED)
    absent = fails or reduces(svd) is True
    total = eliminates(unmatched) and reduces(svd) is False and inert(study, SVD)
    return decided(measured, not absent and gap.high < 0.2 and total, absent)


MUCH_SHORTER, NOT_MUCH_SHORTER = 0.2, 0.5


@claim("d1", "Matched differences are an order of magnitude shorter")
def claim_d1(study: Study) -> Finding:
    """
    The norm of matched differences is an order of magnitude smaller than that of unmatched ones.

    Mean ratio over layers. Appears: surely below 0.2. Does not appear: surely above 0.5.
    """

    ratio = study.shape_interval("som matched", "norm_ratio")
    if ratio is None:
        return Finding("not measured", OPEN)
    measured = (
        f"Matched over unmatched, mean over layers: {plain(ratio)}; by layer from "
        f"{_range(study.shape_by_layer('som matched', 'norm_ratio'))}."
    )
    return decided(measured, ratio.high < MUCH_SHORTER, ratio.low > NOT_MUCH_SHORTER)


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{number(min(known))} to {number(max(known))}"


@claim("d2", "… and fall below the noise floor")
def claim_d2(study: Study) -> Finding:
    """
    At w = 1.2 the matched ablation changes the residual stream by less than its natural variation over decoding steps, which is why it does nothing.

    Does not appear: unmatched directions reach R = 0 in some cell although they are below it, too. Appears: they reach it in cells above it alone, and matched ones are below it on all layers.
    """

    floor = study.data["seeds"][0]["noise_floor"]
    if not floor or not floor.get("som matched"):
        return Finding("not measured", OPEN)
    weights = floor["weights"]
    successes = [
        floor["som unmatched"][cell.layers[0]][weights.index(cell.weight)]
        for cell in study.single_cells(UNMATCHED)
        if cell.refusals == 0 and cell.weight in weights
    ]
    n_successes_below = sum(value is not None and value < 1 for value in successes)
    strongest = weights.index(max(weights))
    matched, raw = (
        [row[strongest] for row in floor[name] if row[strongest] is not None]
        for name in ("som matched", "raw matched")
    )
    n_below = sum(value < 1 for value in matched)
    measured = (
        f"At w = {max(weights)} the matched perturbation is below the natural variation on {n_below} of {len(matched)} layers "
        f"(with its own length: {sum(value < 1 for value in raw)}); unmatched directions reach R = 0 in {len(successes)} cells, "
        f"in {n_successes_below} of them below it."
    )
    all_below = bool(successes) and not n_successes_below and n_below == len(matched)
    return decided(measured, all_below, n_successes_below > 0)


@claim("d3", "Small magnitude is why matched directions fail")
def claim_d3(study: Study) -> Finding:
    """
    The failure is attributable to the small magnitude of the extracted directions.

    Does not appear: at equal KL matched directions of the same length are surely worse, too. Appears: they are not, but with their own length they are.
    """

    raw, unit, mean = (
        study.common_contrast(f"{method} matched", f"{method} unmatched")
        for method in ("raw", "som", "mean")
    )
    measured = (
        f"Matched minus unmatched, points refused at equal KL, all layers: with one length {at_equal(unit)} (SOM), "
        f"{at_equal(mean)} (mean); each with its own length {at_equal(raw)}."
    )
    verdicts = {item.verdict for item in (unit, mean) if item is not None}
    if raw is None or not verdicts:
        return Finding(measured, OPEN)
    good = raw.verdict == "worse" and verdicts <= {"equal", "better"}
    return decided(measured, good, "worse" in verdicts)


@claim("e1", "SVD makes it worse")
def claim_e1(study: Study) -> Finding:
    """
    SVD orthogonalization introduces an additional failure (at uniform weight).

    Refusals left by SVD minus without, on fresh prompts at the best matched cell, same weight. Appears: surely more, and by
    10%. Does not appear: surely not by 10%.
    """

    cell, _ = fresh(study, MATCHED)
    if cell is None:
        return Finding("not measured", OPEN)
    difference = study.share_difference(
        "svd matched, equal weight", "som matched, equal weight", str(cell.layers[0]), cell.weight
    )
    measured = (
        f"Sweep with SVD: {sweep_counts(study, SVD)}. Fresh prompts, {where(cell)}: SVD leaves "
        f"{signed(difference)} points more refusals at equal weight."
    )
    if difference is None:
        return Finding(measured, OPEN)
    worse = difference.low > 0 and difference.value >= MARGIN
    return decided(measured, worse, difference.high < MARGIN)


@claim("e2", "… by spreading the signal over axes")
def claim_e2(study: Study) -> Finding:
    """
    It does so by distributing the shared refusal signal across orthogonal axes.

    Appears: at equal KL all singular vectors are worse than the plain directions, the first one alone is not. Does not appear: all of them are as good, so that only strength was lost.
    """

    everything = study.contrast("svd matched", "som matched")
    first = study.contrast("svd1 matched", "som matched")
    measured = f"All layers, at equal KL: all singular vectors {at_equal(everything)}; the first alone {at_equal(first)}."
    if everything is None or first is None:
        return Finding(measured, OPEN)
    spread = everything.verdict == "worse" and first.verdict in ("equal", "better")
    return decided(measured, spread, everything.verdict in ("equal", "better"))


@claim("Table 1", "Layers with R = 0, unmatched")
def table_1(study: Study) -> Finding:
    """
    Six layers; efficiencies of 2193 to 2358 at w = 0.5, 222 to 536 at w = 0.8.

    As b1.
    """

    rows = []
    for layer, cells in study.layer_cells(UNMATCHED).items():
        cell = next((c for c in cells if c.refusals == 0), None)
        if cell is not None:
            reduction = study.sweep_base / max(cell.kl - study.sweep_floor, 1e-12)
            rows.append(
                (reduction, f"{layer} (w = {cell.weight}, KL {small(cell.kl)}, {reduction:.0f})")
            )
    listed = "; ".join(text for _, text in sorted(rows, reverse=True)[:6])
    return Finding(
        f"Layers with R = 0, their smallest weight, KL and efficiency, best first: {listed or 'none'}"
        f"{f' and {len(rows) - 6} more' if len(rows) > 6 else ''}.",
        claim_b1(study).verdict,
    )


@claim("Table 1, text", "Synergy of layer pairs")
def synergy(study: Study) -> Finding:
    """
    Pairs at w = 0.3 reach R ≤ 1 in the majority of combinations; the best has a synergy of +6.

    Appears: more than half of the tested pairs reach R ≤ 1, and some synergy is at least +2. No intervals: one set of 10 prompts.
    """

    found = [item for item in study.data["sweep"]["synergies"] if item[:2] == [UNMATCHED, "weight"]]
    if not found:
        return Finding("not measured", OPEN)
    reached = sum(item[4] <= 1 for item in found)
    best = max(found, key=lambda item: item[5])
    appears = reached > len(found) / 2 and best[5] >= 2
    return decided(
        f"{reached} of {len(found)} tested pairs reach R ≤ 1; the highest synergy is {best[5]:+d} (layers {layer_list(best[2])}).",
        appears,
        not appears,
    )


def _lowest(study: Study, preset: str) -> str:
    cells, lowest = study.single_cells(preset), study.best_cell(preset)
    return (
        f"Lowest R {lowest.refusals} of {study.sweep_prompts} ({where(lowest)}); R = {study.sweep_base} in "
        f"{sum(cell.refusals == study.sweep_base for cell in cells)} of {len(cells)} cells."
    )


@claim("Table 2", "R, matched")
def table_2(study: Study) -> Finding:
    """
    R = 10 of 10 nearly everywhere, at lowest 9.

    As a.
    """

    return Finding(_lowest(study, MATCHED), claim_a(study).verdict)


@claim("Table 3", "R, matched with SVD")
def table_3(study: Study) -> Finding:
    """
    R = 10 of 10 everywhere.

    As a, for matched directions with SVD.
    """

    return does_nothing(study, SVD, _lowest(study, SVD))


@claim("Table 4", "Capture")
def table_4(study: Study) -> Finding:
    """
    68.9 % against 60.2 % on average.

    As c1.
    """

    return claim_c1(study)


REFUSER, SMOLLM2 = TAUGHT = "refuser", "smollm2-refuser"
"""The models that were taught to refuse for this measurement."""


def confirmed(measured: str, yes: bool, no: bool) -> Finding:
    """Returns what becomes of a hint."""

    return Finding(measured, CONFIRMED if yes else OVERTURNED if no else UNDECIDED)


@claim(REFUSER, "matched", HINTS)
def matched_works(study: Study) -> Finding:
    """
    The matched baseline does not fail on this model.

    Confirmed where claim a does not appear, overturned where it appears.
    """

    measured, verdict = claim_a(study)
    return confirmed(measured, verdict == ABSENT, verdict == APPEARS)


@claim(REFUSER, "SVD", HINTS)
def svd_fails(study: Study) -> Finding:
    """
    The failure of SVD at uniform weight appears.

    Confirmed where claim e1 appears, overturned where it does not.
    """

    measured, verdict = claim_e1(study)
    return confirmed(measured, verdict == APPEARS, verdict == ABSENT)


@claim(REFUSER, "layers", HINTS)
def two_layers(study: Study) -> Finding:
    """
    Layers 3 and 7 reach R = 0 under both baselines.

    Counted on the sweep: confirmed if both layers do under both.
    """

    found = {preset: study.successful(preset) for preset in (UNMATCHED, MATCHED)}
    measured = "; ".join(f"{preset}: {layer_list(layers)}" for preset, layers in found.items())
    both = all({3, 7} <= set(layers) for layers in found.values())
    return confirmed(f"Layers with R = 0 on the sweep: {measured}.", both, not both)


@claim(REFUSER, "lengths", HINTS)
def lengths_by_depth(study: Study) -> Finding:
    """
    Before layer 3 matched differences are 3 to 4 times shorter than unmatched ones, after it as long.

    Confirmed: mean ratio surely below 0.5 before, surely above 0.8 from there on. Overturned: surely above 0.5 before, or surely below 0.8 after.
    """

    early, late = (
        study.shape_interval("som matched", "norm_ratio", list(layers))
        for layers in (range(3), range(3, study.data["n_layers"]))
    )
    if early is None or late is None:
        return Finding("not measured", UNDECIDED)
    measured = f"Ratio on layers 0 to 2: {plain(early)}; from layer 3 on: {plain(late)}."
    no = early.low > 0.5 or late.high < 0.8
    return confirmed(measured, not no and early.high < 0.5 and late.low > 0.8, no)


def contrast_hint(model: str, condition: str, says: str, *yes: str) -> None:
    """Registers a hint that the contrast of a condition with "mean unmatched" decides: on all layers, at equal KL."""

    no = [verdict for verdict in ("equal", "better", "worse") if verdict not in yes]

    def decide(study: Study) -> Finding:
        found = study.contrast(condition, "mean unmatched")
        verdict = None if found is None else found.verdict
        return confirmed(at_equal(found), verdict in yes, verdict in no)

    rule = f"confirmed if {' or '.join(yes)}, overturned if {' or '.join(no)}"
    rule = f'By the difference at equal KL on all layers ("worse", "better", "equal" as above): {rule}.'
    HINTS.append(Claim(model, condition, says, rule, decide))


contrast_hint(
    SMOLLM2,
    "mean sensitive",
    "With XSTest's safe prompts as the matched pool, the matched baseline is worse than the unmatched one, although all directions have one length (mean direction).",
    "worse",
)
contrast_hint(
    SMOLLM2,
    "mean matched",
    "So it is with another matched pool (here: the one shipped with the package).",
    "worse",
)
contrast_hint(
    SMOLLM2,
    "mean matched, filtered",
    "Dropping the matched prompts that the model refuses does not mend it (here: in the shipped pool).",
    "worse",
)


@claim(SMOLLM2, "lengths", HINTS)
def similar_lengths(study: Study) -> Finding:
    """
    Matched differences (XSTest) are nearly as long as unmatched ones (0.81 to 1.12).

    Confirmed: mean ratio over layers surely above 0.8. Overturned: surely below.
    """

    return _sensitive(study, "norm_ratio", lambda x: x.low > 0.8, lambda x: x.high < 0.8)


@claim(SMOLLM2, "angles", HINTS)
def different_angles(study: Study) -> Finding:
    """
    They point elsewhere: cosines of 0.1 to 0.65 with the unmatched direction.

    Confirmed: mean cosine over layers surely below 0.65. Overturned: surely above.
    """

    return _sensitive(study, "cosine", lambda x: x.high < 0.65, lambda x: x.low > 0.65)


def _sensitive(
    study: Study, what: str, yes: Callable[[Interval], bool], no: Callable[[Interval], bool]
) -> Finding:
    mean = study.shape_interval("mean sensitive", what)
    if mean is None:
        return Finding("not measured", UNDECIDED)
    by_layer = _range(study.shape_by_layer("mean sensitive", what))
    return confirmed(f"Mean over layers {plain(mean)}, by layer {by_layer}.", yes(mean), no(mean))


contrast_hint(
    SMOLLM2,
    "mean residualized",
    "The unmatched direction without its topic (residualized) works as well as the unmatched one (here: topics from the shipped pool).",
    "equal",
    "better",
)
contrast_hint(
    "",
    "mean nearest",
    "The baseline `nearest` seemed to need half the divergence of `unmatched` with one draw of prompts, and lay on the same curve with another: there is no difference.",
    "equal",
)


def decide_hints(study: Study) -> list[tuple[Claim, Finding]]:
    """Returns the hints that concern a model, with what becomes of them."""

    return [(hint, hint.decide(study)) for hint in HINTS if hint.key in ("", study.name)]
