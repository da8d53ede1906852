# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Three explanations of the failure, each with the controls that tell it apart, and the paper's open question.

All on all layers at once, at equal weight, at equal effective weight and at equal divergence.
"""

from .evidence import Study
from .rules import MATCHED, SVD, UNMATCHED
from .statistics import Contrast, Interval, share_interval
from .wording import at_equal, layer_list, percent, plain, ratio, reading, signed, small, table

EQUAL_WEIGHT = (
    "som unmatched, equal weight",
    "som matched, equal weight",
    "raw unmatched",
    "raw matched",
    "lengthened matched",
)

EQUAL_EFFECTIVE = (
    "mean unmatched",
    "mean matched",
    "som unmatched",
    "som matched",
    "svd matched",
    "svd1 matched",
    "som random",
)

LABELS = {
    "raw unmatched": "unmatched, own length",
    "raw matched": "matched, own length",
    "lengthened matched": "matched, unmatched length",
    "som unmatched, equal weight": "unmatched, length 1",
    "som matched, equal weight": "matched, length 1",
    "svd matched": "matched, SVD",
    "svd1 matched": "matched, first singular vector",
    "som random": "random",
}


def label(condition: str) -> str:
    """Returns what a condition is called in the report."""

    return LABELS.get(condition, condition.replace("som ", "").replace("mean ", "mean, "))


def share_table(study: Study, conditions: tuple[str, ...], weight_title: str) -> str:
    """Returns the share of refusals by weight (rows) and condition (columns), with KL."""

    found = {name: study.outcomes(name) for name in conditions}
    present = {name: item for name, item in found.items() if item is not None}
    weights = sorted({weight for item in present.values() for weight in item.weights})
    rows = []
    for weight in weights:
        row = [f"{weight:g}"]
        for item in present.values():
            if weight not in item.weights:
                row.append("–")
                continue
            index = item.weights.index(weight)
            share = share_interval(item, study.draws, index)
            row.append(f"{percent(share)}, KL {small(float(item.kl[index].mean()))}")
        rows.append(row)
    return table([weight_title, *map(label, present)], rows, right=[0])


def contrast_table(study: Study, pairs: list[tuple[str, str, str, str | None]]) -> str:
    """Returns contrasts at equal divergence: what is compared, with its conditions."""

    rows = []
    for what, condition, reference, like in pairs:
        found = study.contrast(condition, reference, like=like)
        rows.append(
            [
                what,
                *(_contrast_cells(found) if found is not None else ["–", "–", "–", "not measured"]),
            ]
        )
    return table(
        [
            "Compared",
            "KL",
            "Refused, difference in points",
            "KL needed to halve refusals",
            "Reading",
        ],
        rows,
        right=[1, 2, 3],
    )


def _contrast_cells(found: Contrast) -> list[str]:
    return [small(found.level), signed(found.difference), ratio(found.ratio), reading(found)]


def magnitude(study: Study) -> str:
    """Is it the length of the directions? Directions of one length, their own, and the other baseline's."""

    own = study.contrast("raw matched", "raw unmatched")
    unit = study.contrast("som matched", "som unmatched")
    lengthened = study.contrast("lengthened matched", "raw unmatched")
    length = study.shape_interval("som matched", "norm_ratio")
    weight, difference, mended = _widest(study)
    lines = [
        f"- Length of matched over unmatched class directions, mean over layers: {plain(length)}.",
        f"- At equal KL, matched minus unmatched: with one length {at_equal(unit)}; with their own length {at_equal(own)}; matched "
        f"directions with the unmatched length {at_equal(lengthened)}.",
        f"- At equal weight (w = {weight:g}, of all weights the one where own lengths cost most): with their own length {signed(difference)} points more refusals "
        f"than unmatched; lengthened to the unmatched length {signed(mended)}."
        if difference is not None
        else "- At equal weight: not measured.",
        f"- **Reading**: {_magnitude_reading(unit, difference, mended)}",
    ]
    return "\n".join(lines)


def _widest(study: Study) -> tuple[float, Interval | None, Interval | None]:
    """Returns the weight at which matched directions of their own length differ most from unmatched ones."""

    found = study.outcomes("raw matched")
    best: tuple[float, Interval | None, Interval | None] = (0.0, None, None)
    for weight in found.weights if found is not None else ():
        difference = study.share_difference("raw matched", "raw unmatched", "all", weight)
        if difference is not None and (best[1] is None or difference.value > best[1].value):
            mended = study.share_difference("lengthened matched", "raw unmatched", "all", weight)
            best = (weight, difference, mended)
    return best


def _magnitude_reading(unit: Contrast | None, own: Interval | None, mended: Interval | None) -> str:
    if unit is None or own is None or mended is None:
        return "Not decided, a control is missing."
    short = own.low > 0 and own.value >= 0.1
    if unit.verdict == "worse":
        part = "Length is not the cause: at equal length and equal KL matched directions are worse."
    elif unit.verdict in ("equal", "better"):
        part = "At equal length and equal KL matched directions are as good as unmatched ones."
    else:
        part = "Whether matched directions are worse at equal length and equal KL is not decided."
    if not short:
        return (
            f"{part} At equal weight their own length costs nothing that can be told from chance."
        )
    if mended.high < own.low:
        return f"{part} At equal weight their own length does leave more refusals, and lengthening mends it: length decides how large a weight is needed."
    if mended.low > 0:
        return f"{part} At equal weight they leave more refusals with their own length, and still do when lengthened."
    return f"{part} At equal weight they leave more refusals with their own length, and lengthening does not surely mend it."


def compounding(study: Study) -> str:
    """Do parallel directions just add up? Equal weight against equal effective weight, SVD against none."""

    lines = []
    for name, text in (("som unmatched", "unmatched"), ("som matched", "matched")):
        parallel = study.shape_interval(name, "parallel")
        lines.append(
            f"- {text.capitalize()} directions at w = 1 remove their strongest shared component {plain(parallel)} times over "
            f"(1 would remove it once, 2 flips its sign)."
        )
    n_layers = study.data["n_layers"]
    for preset in (UNMATCHED, MATCHED, SVD):
        equal = study.successful(preset)
        text = (
            f"- `{preset}`, one layer alone, weights of 0.3 to 1.2: R = 0 on {len(equal)} of {n_layers} layers at equal "
            f"weight ({layer_list(equal)})"
        )
        if study.single_cells(preset, "effective"):
            effective = study.successful(preset, "effective")
            text += f", on {len(effective)} at equal effective weight ({layer_list(effective)})"
        lines.append(f"{text}.")
    for weight in (0.3, 1.0):
        equal_weight = study.share("som matched, equal weight", "all", weight)
        lines.append(
            f"- Matched on all layers, w = {weight:g}: {percent(equal_weight)} refused at equal weight without SVD, "
            f"{percent(study.share('svd matched', 'all', weight))} with SVD; at equal effective weight "
            f"{percent(study.share('som matched', 'all', weight))} without SVD."
        )
    everything = study.contrast("svd matched", "som matched")
    first = study.contrast("svd1 matched", "som matched")
    lines.append(
        f"- At equal KL, SVD minus none: all vectors {at_equal(everything)}; the first vector alone {at_equal(first)}."
    )
    lines.append(f"- **Reading**: {_compounding_reading(study, everything, first)}")
    return "\n".join(lines)


def _compounding_reading(study: Study, everything: Contrast | None, first: Contrast | None) -> str:
    if everything is None or first is None:
        return "Not decided, a control is missing."
    counts = [
        (len(study.successful(preset)), len(study.successful(preset, "effective")))
        for preset in (UNMATCHED, MATCHED)
        if study.single_cells(preset, "effective")
    ]
    strength = (
        "What single layers achieve at equal weight rests on parallel directions adding up. "
        if counts and sum(a for a, _ in counts) > 2 * sum(b for _, b in counts)
        else ""
    )
    if everything.verdict == "worse":
        rest = "Lost strength is not all that SVD costs: at equal KL it is still worse, " + (
            "while its first vector alone is as good or better. The other vectors cost divergence and remove no refusals."
            if first.verdict in ("equal", "better")
            else "and so is its first vector, or that is not decided."
        )
    elif everything.verdict in ("equal", "better"):
        rest = "SVD costs strength alone: at equal KL it is as good."
    else:
        rest = "Whether SVD costs more than strength is not decided."
    return strength + rest


TOPIC_PAIRS: list[tuple[str, str, str, str | None]] = [
    ("residualized − unmatched, mean", "mean residualized", "mean unmatched", None),
    ("residualized − unmatched, SOM", "som residualized", "som unmatched", None),
    (
        "unmatched without the judged category − with it",
        "som unmatched, left out",
        "som unmatched",
        "som unmatched, left out",
    ),
    (
        "matched without the judged category − with it",
        "som matched, left out",
        "som matched",
        "som matched, left out",
    ),
    (
        "matched, filtered by behavior − unfiltered, mean",
        "mean matched, filtered",
        "mean matched",
        None,
    ),
    (
        "matched, filtered by behavior − unfiltered, SOM",
        "som matched, filtered",
        "som matched",
        None,
    ),
    ("XSTest safe as matched pool − shipped pool, mean", "mean sensitive", "mean matched", None),
    ("XSTest safe as matched pool − shipped pool, SOM", "som sensitive", "som matched", None),
]


def topic(study: Study) -> str:
    """Is it the lost topic? Without the topic's part, without the category that is judged, other matched pools."""

    pairs = [row for row in TOPIC_PAIRS if study.outcomes(row[1]) is not None]
    left_out = study.outcomes("som unmatched, left out")
    notes = [
        f"- The left-out control judges {left_out.n_judged} responses to {left_out.n_distinct} prompts."
        if left_out is not None
        else "- The left-out control was not measured."
    ]
    refused = study.data["n_refused"]["matched"]
    notes.append(
        f"- Of {study.data['n_prompts']['matched']} matched prompts the unmodified model refuses {refused}."
    )
    residualized = [study.contrast(f"{m} residualized", f"{m} unmatched") for m in ("mean", "som")]
    without = study.contrast(
        "som unmatched, left out", "som unmatched", like="som unmatched, left out"
    )
    filtered = study.contrast("som matched, filtered", "som matched") or study.contrast(
        "mean matched, filtered", "mean matched"
    )
    readings = []
    verdicts = {item.verdict for item in residualized if item is not None}
    if verdicts and verdicts <= {"equal", "better"}:
        readings.append("Directions work without what subjects alone contribute")
    elif "worse" in verdicts:
        readings.append("Taking out what subjects alone contribute costs at equal KL")
    else:
        readings.append("Whether directions need what subjects contribute is not decided")
    if without is not None:
        readings.append(
            {
                "equal": "they work on a category that they never saw",
                "better": "they work on a category that they never saw",
                "worse": "they work less on a category that they never saw",
            }.get(
                without.verdict,
                "whether they work on a category that they never saw is not decided",
            )
        )
    if filtered is not None:
        readings.append(
            {
                "better": "matched prompts that are refused do spoil the matched baseline",
                "equal": "refused matched prompts are not what spoils the matched baseline",
                "worse": "dropping refused matched prompts makes it worse",
            }.get(filtered.verdict, "whether refused matched prompts matter is not decided")
        )
    return (
        contrast_table(study, pairs)
        + "\n\n"
        + "\n".join([*notes, f"- **Reading**: {'; '.join(readings)}."])
    )


LONG, AS_GOOD = 0.8, ("equal", "better")


def open_question(study: Study) -> tuple[str, str]:
    """
    Returns the table of magnitude, purity and effect of every baseline, and the answer for this model.

    Magnitude: norm over that of the unmatched baseline. Purity: cosine with the differences of prompt pairs on the same subject.
    """

    rows, winners, undecided = [], [], []
    for method in ("mean", "som"):
        for baseline in ("unmatched", "matched", "sensitive", "mixed", "nearest", "residualized"):
            name = f"{method} {baseline}"
            length = study.shape_interval(name, "norm_ratio")
            if length is None:
                continue
            purity = study.shape_interval(name, "pair_max_cosine")
            gain = study.shape_difference(name, f"{method} unmatched", "pair_max_cosine")
            found = study.contrast(name, f"{method} unmatched")
            effect = "reference" if baseline == "unmatched" else "–"
            if baseline != "unmatched" and gain is not None:
                if found is not None:
                    effect = f"{signed(found.difference)}: {reading(found)}"
                tests = (
                    _sure(length.low > LONG, length.high < LONG),
                    _sure(gain.low > 0, gain.high <= 0),
                    None
                    if found is None
                    else _sure(found.verdict in AS_GOOD, found.verdict == "worse"),
                )
                if all(test is True for test in tests):
                    winners.append(name)
                elif False not in tests:
                    undecided.append(name)
            rows.append(
                [
                    name,
                    plain(length),
                    plain(study.shape_interval(name, "cosine")),
                    plain(purity),
                    "reference" if baseline == "unmatched" else plain(gain, 3),
                    effect,
                ]
            )
    text = table(
        [
            "Directions",
            "Length over unmatched",
            "Cosine with unmatched",
            "Cosine with pairs",
            "minus unmatched",
            "Refused at equal KL, points",
        ],
        rows,
        right=[1, 2, 3, 4],
    )
    if winners:
        answer = f"**Yes, on this model**: {', '.join(winners)}."
    elif undecided:
        answer = f"**Not decided on this model**: {', '.join(undecided)} may have both."
    else:
        answer = "**No, not on this model**: every baseline surely lacks one of the three."
    return text, f"{answer}{_premise(study)}"


def _premise(study: Study) -> str:
    """Returns where the matched baseline itself is not short, or not purer, so that there is nothing to reconcile."""

    lacking = []
    for method in ("mean", "som"):
        length = study.shape_interval(f"{method} matched", "norm_ratio")
        gain = study.shape_difference(f"{method} matched", f"{method} unmatched", "pair_max_cosine")
        if length is not None and length.value > LONG:
            lacking.append(f"{method} matched directions are not short ({length.value:.2f})")
        if gain is not None and gain.low <= 0:
            lacking.append(f"{method} matched directions are not surely purer")
    if not lacking:
        return ""
    return f" What the question presupposes does not hold everywhere here: {'; '.join(lacking)}."


def _sure(yes: bool, no: bool) -> bool | None:
    return True if yes else False if no else None


def incoherence(study: Study) -> str:
    """Returns how many responses are incoherent at the strongest weights, where R no longer means much."""

    rows = []
    for condition in EQUAL_EFFECTIVE:
        found = study.outcomes(condition)
        if found is None:
            continue
        share = (found.incoherent * found.judged).sum(axis=(1, 2)) / found.judged.sum()
        rows.append(
            [
                label(condition),
                *(
                    f"{100 * value:.0f} % at {weight:g}"
                    for weight, value in zip(found.weights, share, strict=True)
                ),
            ]
        )
    width = max(map(len, rows), default=1)
    header = ["Condition", *["" for _ in range(width - 1)]]
    return table(header, [row + ["–"] * (width - len(row)) for row in rows])
