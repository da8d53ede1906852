# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The paper's claims (section 7) and tables, each with a rule that decides it from what was measured.

Layers and weights are chosen on the paper's sweep (10 prompts, one set of directions) and then judged with other
directions and prompts drawn anew, so that choosing the best of many cells does not flatter it.
"""

from collections.abc import Sequence

from .evidence import Study
from .rules import (
    ABSENT,
    APPEARS,
    MATCHED,
    OPEN,
    SVD,
    UNMATCHED,
    Claim,
    Finding,
    eliminates,
    fresh_share,
    reduces,
    sweep_counts,
    where,
)
from .statistics import MARGIN, normal_bounds
from .wording import at_equal, layer_list, number, percent, plain, signed, small


def claim_a(study: Study) -> Finding:
    cell, share = fresh_share(study, MATCHED, "som matched, equal weight")
    lowest = study.best_cell(MATCHED)
    measured = (
        f"Sweep: {sweep_counts(study, MATCHED)}; lowest R {lowest.refusals} of {study.sweep_prompts}. "
        f"Fresh prompts, {where(cell)}: {percent(share)} refused."
    )
    if reduces(share):
        return Finding(measured, ABSENT)
    if reduces(share) is False and study.sweep_base - lowest.refusals <= 1:
        return Finding(measured, APPEARS)
    return Finding(measured, OPEN)


def claim_b1(study: Study) -> Finding:
    cell, share = fresh_share(study, UNMATCHED, "som unmatched, equal weight")
    n_successful = len(study.successful(UNMATCHED))
    measured = f"Sweep: {sweep_counts(study, UNMATCHED)}. Fresh prompts, {where(cell)}: {percent(share)} refused."
    done = eliminates(share)
    if n_successful and done:
        return Finding(measured, APPEARS)
    if not n_successful and done is False:
        return Finding(measured, ABSENT)
    return Finding(measured, OPEN)


CHEAP_KL, CHEAP_WEIGHT, CHEAP_LAYERS = 0.005, 0.5, 3


def claim_b2(study: Study) -> Finding:
    surely, perhaps, kls = [], [], []
    for layer, cells in study.layer_cells(UNMATCHED).items():
        found = [c for c in cells if c.refusals == 0 and c.weight <= CHEAP_WEIGHT]
        if not found:
            continue
        cell = min(found, key=lambda c: c.kl)
        low, high = normal_bounds(cell.kl - study.sweep_floor, cell.kl_error)
        kls.append(f"layer {layer} {small(cell.kl)}")
        if high < CHEAP_KL:
            surely.append(layer)
        if low < CHEAP_KL:
            perhaps.append(layer)
    measured = (
        f"R = 0 at w ≤ {CHEAP_WEIGHT} on {len(kls)} layers (KL: {', '.join(kls) or 'none'}); "
        f"{len(surely)} of them surely below {CHEAP_KL}, {len(perhaps)} perhaps."
    )
    if len(surely) >= CHEAP_LAYERS:
        return Finding(measured, APPEARS)
    return Finding(measured, ABSENT if len(perhaps) < CHEAP_LAYERS else OPEN)


def claim_c1(study: Study) -> Finding:
    parts, signs = [], []
    for label, what in (("subspace", "pair_capture"), ("largest cosine", "pair_max_cosine")):
        first = study.shape_interval("som unmatched", what)
        second = study.shape_interval("svd matched", what)
        difference = study.shape_difference("som unmatched", "svd matched", what)
        if first is None or second is None or difference is None:
            return Finding("not measured", OPEN)
        parts.append(
            f"{label}: {100 * first.value:.1f} % against {100 * second.value:.1f} %, {signed(difference)} points"
        )
        signs.append(1 if difference.low > 0 else -1 if difference.high <= 0 else 0)
    measured = f"{'; '.join(parts)} ({study.data['n_pairs'][0]} pairs)."
    if signs == [1, 1]:
        return Finding(measured, APPEARS)
    return Finding(measured, ABSENT if signs == [-1, -1] else OPEN)


def claim_c2(study: Study) -> Finding:
    gap = study.shape_difference("som unmatched", "svd matched", "pair_capture")
    cell, unmatched = fresh_share(study, UNMATCHED, "som unmatched, equal weight")
    svd_cell, svd = fresh_share(study, SVD, "svd matched, equal weight")
    measured = (
        f"Capture gap {signed(gap)} points; unmatched {percent(unmatched)} refused ({where(cell)}), "
        f"matched with SVD {percent(svd)} ({where(svd_cell)}; on the sweep at lowest R {study.best_cell(SVD).refusals})."
    )
    if gap is None:
        return Finding(measured, OPEN)
    inert = eliminates(unmatched) is False and not study.successful(UNMATCHED)
    if inert or reduces(svd) is True:
        return Finding(measured, ABSENT)
    nowhere = study.sweep_base - study.best_cell(SVD).refusals <= 1
    if gap.high < 0.2 and eliminates(unmatched) and reduces(svd) is False and nowhere:
        return Finding(measured, APPEARS)
    return Finding(measured, OPEN)


MUCH_SHORTER, NOT_MUCH_SHORTER = 0.2, 0.5


def claim_d1(study: Study) -> Finding:
    ratio = study.shape_interval("som matched", "norm_ratio")
    if ratio is None:
        return Finding("not measured", OPEN)
    by_layer = [v for v in study.shape_by_layer("som matched", "norm_ratio") if v is not None]
    measured = (
        f"Matched over unmatched, mean over layers: {plain(ratio)}; by layer from {number(min(by_layer))} to "
        f"{number(max(by_layer))}."
    )
    if ratio.high < MUCH_SHORTER:
        return Finding(measured, APPEARS)
    return Finding(measured, ABSENT if ratio.low > NOT_MUCH_SHORTER else OPEN)


def claim_d2(study: Study) -> Finding:
    floor = study.data["seeds"][0]["noise_floor"]
    if not floor or not floor.get("som matched"):
        return Finding("not measured", OPEN)
    weights = floor["weights"]
    successes = [
        (cell, floor["som unmatched"][cell.layers[0]][weights.index(cell.weight)])
        for cell in study.single_cells(UNMATCHED)
        if cell.refusals == 0 and cell.weight in weights
    ]
    below = [(cell, value) for cell, value in successes if value is not None and value < 1]
    strongest = weights.index(max(weights))
    matched = [row[strongest] for row in floor["som matched"] if row[strongest] is not None]
    raw = [row[strongest] for row in floor["raw matched"] if row[strongest] is not None]
    n_below, n_raw = sum(value < 1 for value in matched), sum(value < 1 for value in raw)
    measured = (
        f"At w = {max(weights)} the matched perturbation is below the natural variation on {n_below} of {len(matched)} layers "
        f"(with its own length: {n_raw}); unmatched directions reach R = 0 in {len(successes)} cells, in {len(below)} of them below it."
    )
    if below:
        return Finding(measured, ABSENT)
    if successes and n_below == len(matched):
        return Finding(measured, APPEARS)
    return Finding(measured, OPEN)


def claim_d3(study: Study) -> Finding:
    raw = study.contrast("raw matched", "raw unmatched")
    unit = study.contrast("som matched", "som unmatched")
    mean = study.contrast("mean matched", "mean unmatched")
    measured = (
        f"Matched minus unmatched, points refused at equal KL, all layers: with one length {at_equal(unit)} (SOM), "
        f"{at_equal(mean)} (mean); each with its own length {at_equal(raw)}."
    )
    verdicts = [item.verdict for item in (unit, mean) if item is not None]
    if raw is None or not verdicts:
        return Finding(measured, OPEN)
    if "worse" in verdicts:
        return Finding(measured, ABSENT)
    if raw.verdict == "worse" and set(verdicts) <= {"equal", "better"}:
        return Finding(measured, APPEARS)
    return Finding(measured, OPEN)


def claim_e1(study: Study) -> Finding:
    cell = study.chosen_cell(MATCHED, "som matched, equal weight")
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
    if difference.low > 0 and difference.value >= MARGIN:
        return Finding(measured, APPEARS)
    return Finding(measured, ABSENT if difference.high < MARGIN else OPEN)


def claim_e2(study: Study) -> Finding:
    everything = study.contrast("svd matched", "som matched")
    first = study.contrast("svd1 matched", "som matched")
    measured = f"All layers, at equal KL: all singular vectors {at_equal(everything)}; the first alone {at_equal(first)}."
    if everything is None or first is None:
        return Finding(measured, OPEN)
    if everything.verdict == "worse" and first.verdict in ("equal", "better"):
        return Finding(measured, APPEARS)
    if everything.verdict in ("equal", "better"):
        return Finding(measured, ABSENT)
    return Finding(measured, OPEN)


def table_1(study: Study) -> Finding:
    rows = []
    for layer, cells in study.layer_cells(UNMATCHED).items():
        cell = next((c for c in cells if c.refusals == 0), None)
        if cell is not None:
            reduction = study.sweep_base / max(cell.kl - study.sweep_floor, 1e-12)
            rows.append(
                (reduction, f"{layer} (w = {cell.weight}, KL {small(cell.kl)}, {reduction:.0f})")
            )
    found = claim_b1(study)
    listed = "; ".join(text for _, text in sorted(rows, reverse=True)[:6])
    return Finding(
        f"Layers with R = 0, their smallest weight, KL and efficiency, best first: {listed or 'none'}"
        f"{f' and {len(rows) - 6} more' if len(rows) > 6 else ''}.",
        found.verdict,
    )


def table_2(study: Study) -> Finding:
    cells = study.single_cells(MATCHED)
    lowest = study.best_cell(MATCHED)
    return Finding(
        f"Lowest R {lowest.refusals} of {study.sweep_prompts} ({where(lowest)}); R = {study.sweep_base} in "
        f"{sum(cell.refusals == study.sweep_base for cell in cells)} of {len(cells)} cells.",
        claim_a(study).verdict,
    )


def table_3(study: Study) -> Finding:
    cells = study.single_cells(SVD)
    lowest = study.best_cell(SVD)
    cell, share = fresh_share(study, SVD, "svd matched, equal weight")
    measured = (
        f"Lowest R {lowest.refusals} of {study.sweep_prompts} ({where(lowest)}); R = {study.sweep_base} in "
        f"{sum(c.refusals == study.sweep_base for c in cells)} of {len(cells)} cells. Fresh prompts, {where(cell)}: "
        f"{percent(share)} refused."
    )
    if reduces(share):
        return Finding(measured, ABSENT)
    if reduces(share) is False and study.sweep_base - lowest.refusals <= 1:
        return Finding(measured, APPEARS)
    return Finding(measured, OPEN)


def synergy(study: Study) -> Finding:
    found = [
        item
        for item in study.data["sweep"]["synergies"]
        if (item[0], item[1]) == (UNMATCHED, "weight")
    ]
    if not found:
        return Finding("not measured", OPEN)
    reached = sum(item[4] <= 1 for item in found)
    best = max(found, key=lambda item: item[5])
    return Finding(
        f"{reached} of {len(found)} tested pairs reach R ≤ 1; the highest synergy is {best[5]:+d} (layers {layer_list(best[2])}).",
        APPEARS if reached > len(found) / 2 and best[5] >= 2 else ABSENT,
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "a",
        "Matched directions do nothing",
        "Topic-matched directions fail to reduce refusals at any tested weight on any tested layer.",
        f"Appears: on the sweep R falls by at most 1 anywhere, and on fresh prompts at the best cell refusals surely fall by "
        f"less than {MARGIN:.0%}. Does not appear: there they surely fall by more.",
        claim_a,
    ),
    Claim(
        "b1",
        "Unmatched directions eliminate refusals",
        "Unmatched directions reach R = 0 on single layers.",
        f"Appears: some layer has R = 0 on the sweep, and on fresh prompts at the best cell surely at most {MARGIN:.0%} are refused. "
        "Does not appear: neither.",
        claim_b1,
    ),
    Claim(
        "b2",
        "… cheaply",
        "They do so at w = 0.5 on three layers with KL below 0.005.",
        "Counted on the sweep, with KL's standard error: appears if three layers surely do; does not appear if fewer than three may.",
        claim_b2,
    ),
    Claim(
        "c1",
        "Unmatched directions capture more",
        "Unmatched directions capture 68.9 % of the refusal-mediating variance, matched ones with SVD 60.2 %.",
        "Both readings of capture must agree on the sign of the difference, surely.",
        claim_c1,
    ),
    Claim(
        "c2",
        "A small gap in capture, a total one in function",
        "A gap of 9 points in capture goes with a total gap in function.",
        f"Appears: the gap is surely below 20 points, unmatched surely leaves at most {MARGIN:.0%}, matched with SVD surely reduces by less, and on the sweep R falls by at most 1 anywhere. "
        "Does not appear: unmatched surely leaves more and has R = 0 nowhere on the sweep, or matched with SVD surely reduces.",
        claim_c2,
    ),
    Claim(
        "d1",
        "Matched differences are an order of magnitude shorter",
        "The norm of matched differences is an order of magnitude smaller than that of unmatched ones.",
        f"Mean ratio over layers. Appears: surely below {MUCH_SHORTER}. Does not appear: surely above {NOT_MUCH_SHORTER}.",
        claim_d1,
    ),
    Claim(
        "d2",
        "… and fall below the noise floor",
        "At w = 1.2 the matched ablation changes the residual stream by less than its natural variation over decoding steps, "
        "which is why it does nothing.",
        "Does not appear: unmatched directions reach R = 0 in some cell although they are below it, too. Appears: they never do, and "
        "matched ones are below it on all layers.",
        claim_d2,
    ),
    Claim(
        "d3",
        "Small magnitude is why matched directions fail",
        "The failure is attributable to the small magnitude of the extracted directions.",
        "Does not appear: at equal KL matched directions of the same length are surely worse, too. Appears: they are not, but with "
        "their own length they are.",
        claim_d3,
    ),
    Claim(
        "e1",
        "SVD makes it worse",
        "SVD orthogonalization introduces an additional failure (at uniform weight).",
        f"Refusals left by SVD minus without, on fresh prompts at the best matched cell, same weight. Appears: surely more, and by "
        f"{MARGIN:.0%}. Does not appear: surely not by {MARGIN:.0%}.",
        claim_e1,
    ),
    Claim(
        "e2",
        "… by spreading the signal over axes",
        "It does so by distributing the shared refusal signal across orthogonal axes.",
        "Appears: at equal KL all singular vectors are worse than the plain directions, the first one alone is not. Does not appear: "
        "all of them are as good, so that only strength was lost.",
        claim_e2,
    ),
    Claim(
        "Table 1",
        "Layers with R = 0, unmatched",
        "Six layers; efficiencies of 2193 to 2358 at w = 0.5, 222 to 536 at w = 0.8.",
        "As b1.",
        table_1,
    ),
    Claim(
        "Table 1, text",
        "Synergy of layer pairs",
        "Pairs at w = 0.3 reach R ≤ 1 in the majority of combinations; the best has a synergy of +6.",
        "Appears: more than half of the tested pairs reach R ≤ 1, and some synergy is at least +2. No intervals: one set of 10 prompts.",
        synergy,
    ),
    Claim(
        "Table 2", "R, matched", "R = 10 of 10 nearly everywhere, at lowest 9.", "As a.", table_2
    ),
    Claim(
        "Table 3",
        "R, matched with SVD",
        "R = 10 of 10 everywhere.",
        "As a, for matched directions with SVD.",
        table_3,
    ),
    Claim(
        "Table 4",
        "Capture",
        "68.9 % against 60.2 % on average.",
        "As c1.",
        claim_c1,
    ),
)
"""All claims in the order of the report."""


def decide_all(studies: Sequence[Study]) -> list[tuple[Claim, list[Finding]]]:
    """Returns the finding of every claim for every study."""

    return [(claim, [claim.decide(study) for study in studies]) for claim in CLAIMS]
