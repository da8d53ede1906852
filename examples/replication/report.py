# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The replication report, made entirely from stored results: its text is `report.md.jinja`, its tables and readings are here.

Three explanations of the failure have controls that tell them apart, all on all layers at once, at equal weight, at equal effective
weight and at equal divergence; and the paper's open question is asked of every baseline.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from jinja2 import Environment, StrictUndefined

from heretic_contrast.files import write_text_atomically
from heretic_contrast.report.plots import can_plot

from . import claims, wording
from .conditions import SHUFFLED
from .evidence import COMMON, Study, load_studies
from .statistics import Contrast, Interval, share_interval
from .wording import NONE, label, percent, plain, ratio, reading, signed, small, table

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

STRONG = ("mean unmatched", "mean matched", "svd matched", "svd1 matched")
"""What is measured at high effective weights, on single layers."""

CAPTIONS = {
    "sweep": "R by layer and weight, every layer alone",
    "curves": "Share refused against KL, all layers at once, with bands",
    "lengths": "Length of class directions over unmatched, by layer",
    "capture": "Capture by layer",
}

GOOD = ("equal", "better")

Pair = tuple[str, str, str]
"""What is compared, a condition, and its reference."""


def write_report(results: Path, output: Path) -> None:
    """
    Writes the report, and its plots into the directory `images` beside it.

    Raises `ContrastError` when there are no results, or a file cannot be written.
    """

    studies = load_studies(results)
    figures: dict[str, dict[str, str]] = {}
    if can_plot():
        from .figures import write_figures

        figures = {study.name: write_figures(study, output.parent / "images") for study in studies}
    write_text_atomically(output, render(studies, figures))


def render(studies: Sequence[Study], figures: dict[str, dict[str, str]]) -> str:
    """Returns the whole report."""

    decided = [(item, [item.decide(study) for study in studies]) for item in claims.CLAIMS]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= globals() | vars(claims) | vars(wording)
    environment.filters |= {
        name: getattr(wording, name)
        for name in ("at_equal", "layer_list", "percent", "plain", "signed")
    }
    environment.filters |= {"cell": lambda text: text.replace("|", "\\|"), "code": "`{}`".format}
    template = Path(__file__).with_name("report.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        studies=studies,
        figures=figures,
        decided=decided,
        findings_of=lambda index: [findings[index] for _, findings in decided],
        captions=CAPTIONS,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def share_table(
    study: Study, conditions: tuple[str, ...], weight_title: str, scopes: Sequence[str] = ("all",)
) -> str:
    """Returns the share of refusals by weight (rows) and condition (columns), with KL; of several layers alone, each with rows of its own."""

    rows, names = [], [name for name in conditions if study.outcomes(name, scopes[0]) is not None]
    for scope in scopes:
        found = [item for name in names if (item := study.outcomes(name, scope)) is not None]
        for weight in sorted({weight for item in found for weight in item.weights}):
            row = [f"{weight:g}" if scope == "all" else f"layer {scope}, {weight:g}"]
            for item in found:
                if weight not in item.weights:
                    row.append(NONE)
                    continue
                index = item.weights.index(weight)
                share = percent(share_interval(item, study.draws, index))
                row.append(f"{share}, KL {small(float(item.kl[index].mean()))}")
            rows.append(row)
    return table([weight_title, *map(label, names)], rows, right=[0])


def contrast_table(study: Study, pairs: Sequence[Pair], at: str | None = None) -> str:
    """
    Returns contrasts at equal divergence: what is compared, with its conditions.

    That is where each reference halves refusals, or `at` does; where neither does, one mean direction of unmatched prompts.
    """

    rows = []
    for what, condition, reference in pairs:
        found = study.contrast(condition, reference, at) if at else None
        found = found or study.common_contrast(condition, reference)
        cells = [NONE, NONE, NONE, "not comparable"]
        if found is not None:
            cells = [small(found.level), signed(found.difference), ratio(found.ratio)]
            cells.append(reading(found))
        rows.append([what, *cells])
    header = "Compared|KL|Refused, difference in points|KL needed to halve refusals|Reading"
    return table(header.split("|"), rows, right=[1, 2, 3])


MAP_SETTINGS = {
    "som": "MiniSom's defaults: 3 × 3, rectangular, σ 1, learning rate 0.5, 10,000 iterations, one winner",
    "slower": "learning rate 0.1",
    "slow": "learning rate 0.01",
    "narrower": "σ 0.5",
    "narrow": "σ 0.33",
    "hexagonal": "hexagonal",
    "short": "1,000 iterations",
    "long": "100,000 iterations",
    "small": "2 × 2",
    "large": "4 × 4",
    "three": "three winners",
    "piras": "4 × 4, hexagonal, σ 0.33, learning rate 0.01 (Piras et al.)",
    "means": "no map: the mean of each class",
}
"""Settings of the maps by the method that uses them; each but the first and the last two changes one thing."""


def maps_table(studies: Sequence[Study], reference: str) -> str:
    """Returns what settings of maps do to refusals at equal divergence, against a method with the unmatched baseline."""

    rows = []
    for method, text in MAP_SETTINGS.items():
        if method != reference:
            pair = (f"{method} unmatched", f"{reference} unmatched")
            found = [study.contrast(*pair, at=COMMON) for study in studies]
            rows.append([text, *map(against, found)])
    return table(["Maps", *(study.name for study in studies)], rows)


def maps_reading(studies: Sequence[Study]) -> str:
    """Returns how many settings of maps are surely better, or worse, than one mean direction, and what classes without maps are."""

    def verdicts(condition: str, reference: str) -> list[str]:
        pair = (f"{condition} unmatched", reference)
        found = [study.contrast(*pair, at=COMMON) for study in studies]
        return [item.verdict for item in found if item is not None and not item.below]

    maps = [verdicts(method, "mean unmatched") for method in MAP_SETTINGS if method != "means"]
    better = sum("better" in row for row in maps)
    worse = sum(len(row) > 0 and set(row) == {"worse"} for row in maps)
    against_one = verdicts("means", "mean unmatched")
    against_maps = verdicts("means", "som unmatched")
    return (
        f"Of these {len(maps)} settings of maps {better or 'none'} left fewer refusals than one mean direction on any model that was measured at that "
        f"divergence, and {worse} left more on every such model. Directions per class without maps, the mean of each class, are worse than one mean "
        f"direction on {against_one.count('worse') or 'none'} of {len(against_one)} such models, and better than maps with MiniSom's defaults on "
        f"{against_maps.count('better') or 'none'} of {len(against_maps)}."
    )


def against(found: Contrast | None) -> str:
    """Returns a difference in points of refusals with how it is to be read."""

    return NONE if found is None else f"{signed(found.difference)}: {reading(found)}"


CHOICES = (
    ("a matched baseline", "mean matched", "mean unmatched"),
    ("a mixture of both baselines", "mean mixed", "mean unmatched"),
    ("the nearest harmless prompts as baseline", "mean nearest", "mean unmatched"),
    (
        "dropping prompts that do not behave as assumed",
        "mean unmatched, filtered",
        "mean unmatched",
    ),
    ("the mean of each class", "means unmatched", "mean unmatched"),
    ("one map per class", "som unmatched", "mean unmatched"),
    ("maps of 2 × 2 per class", "small unmatched", "mean unmatched"),
    ("one map per class, then SVD", "svd unmatched", "mean unmatched"),
    ("its first singular vector alone", "svd1 unmatched", "mean unmatched"),
)
"""What a user may choose instead of the difference in means between harmful and general harmless prompts."""


def choice_table(studies: Sequence[Study]) -> str:
    """Returns for each choice what it does to refusals at equal divergence on each model, and what follows."""

    rows = []
    for what, condition, reference in CHOICES:
        found = [study.contrast(condition, reference) for study in studies]
        verdicts = [item.verdict for item in found if item is not None]
        if not verdicts:
            continue
        if "worse" in verdicts:
            advice = "by model" if "better" in verdicts else "no"
        else:
            advice = "yes" if "better" in verdicts else "no gain is known"
        rows.append([what, *map(against, found), advice])
    return table(["Instead", *(study.name for study in studies), "Use it?"], rows)


def baseline_pairs(study: Study) -> list[Pair]:
    """Returns the comparisons of baselines and of what is made of class directions, as far as they were measured."""

    pairs: list[Pair] = []
    for method, text in (("mean", "one mean direction"), ("som", "class directions")):
        for baseline in ("matched", "sensitive", "mixed", "nearest", "random", SHUFFLED):
            what = f"{baseline} − unmatched, {text}"
            pairs.append((what, f"{method} {baseline}", f"{method} unmatched"))
    words = {
        "som": "class directions",
        "mean": "mean direction",
        "svd": "SVD",
        "svd1": "first singular vector",
    }
    compared = [
        (first, "som", name) for name in ("unmatched", "matched") for first in ("svd", "svd1")
    ]
    compared += [("som", "mean", name) for name in ("unmatched", "matched")]
    for first, second, baseline in compared:
        what = f"{baseline} {words[first]} − {baseline} {words[second]}"
        pairs.append((what, f"{first} {baseline}", f"{second} {baseline}"))
    return [pair for pair in pairs if study.outcomes(pair[1]) is not None]


TOPICS = (
    ("residualized − unmatched", "residualized", "unmatched"),
    ("matched, filtered by behavior − unfiltered", "matched, filtered", "matched"),
    ("XSTest safe as matched pool − shipped pool", "sensitive", "matched"),
    ("unmatched, filtered by behavior − unmatched", "unmatched, filtered", "unmatched"),
    ("matched, filtered by behavior − unmatched", "matched, filtered", "unmatched"),
    ("matched, filtered − unmatched, filtered", "matched, filtered", "unmatched, filtered"),
)
"""What is compared of both kinds of directions: in words, a baseline, and its reference."""


def topic_pairs(study: Study) -> list[Pair]:
    """Without the topic's part, without the category that is judged, and with other matched pools."""

    pairs: list[Pair] = [
        (f"{what}, {text}", f"{method} {condition}", f"{method} {reference}")
        for what, condition, reference in TOPICS
        for method, text in (("mean", "mean"), ("som", "SOM"))
    ]
    # After what was residualized.
    pairs[2:2] = [
        (f"{name} without the judged category − with it", f"som {name}, left out", f"som {name}")
        for name in ("unmatched", "matched")
    ]
    return [pair for pair in pairs if all(study.outcomes(name) is not None for name in pair[1:])]


def widest(study: Study) -> tuple[float, Interval | None, Interval | None]:
    """
    Returns the weight at which matched directions of their own length differ most from unmatched ones.

    With the differences in refusals of these, and of matched directions that were lengthened.
    """

    found = study.outcomes("raw matched")
    best: tuple[float, Interval | None, Interval | None] = (0.0, None, None)
    for weight in found.weights if found is not None else ():
        difference = study.share_difference("raw matched", "raw unmatched", "all", weight)
        if difference is not None and (best[1] is None or difference.value > best[1].value):
            mended = study.share_difference("lengthened matched", "raw unmatched", "all", weight)
            best = (weight, difference, mended)
    return best


def magnitude_reading(study: Study, own: Interval | None, mended: Interval | None) -> str:
    """Is it the length of the directions? Directions of one length, their own, and the other baseline's."""

    unit = verdicts_of(study, "matched", "unmatched")
    if not unit or own is None or mended is None:
        return "Not decided, a control is missing."
    part = f"At equal length and equal KL, matched against unmatched directions: {by_method(unit)}."
    if "worse" in unit.values():
        part = f"Length is not the cause. {part}"
    if not (own.low > 0 and own.value >= 0.1):
        return (
            f"{part} At equal weight their own length costs nothing that can be told from chance."
        )
    if mended.high < own.low:
        return f"{part} At equal weight their own length does leave more refusals, and lengthening mends it: length decides how large a weight is needed."
    if mended.low > 0:
        return f"{part} At equal weight they leave more refusals with their own length, and still do when lengthened."
    return f"{part} At equal weight they leave more refusals with their own length, and lengthening does not surely mend it."


def verdicts_of(
    study: Study, baseline: str, reference: str, at: str | None = None
) -> dict[str, str]:
    """Returns what both kinds of directions of one baseline are at equal divergence, against those of another; "som" and "mean" where measured."""

    verdicts = {}
    for method in ("mean", "som"):
        pair = (f"{method} {baseline}", f"{method} {reference}")
        found = study.contrast(*pair, at) if at else study.common_contrast(*pair)
        if found is not None:
            verdicts[method] = reading(found)
    return verdicts


def by_method(verdicts: dict[str, str]) -> str:
    """Returns what both kinds of directions are, once where they are the same."""

    if len(verdicts) > 1 and len(set(verdicts.values())) == 1:
        return f"{verdicts['mean']} (both one mean direction and class directions)"
    names = {"mean": "one mean direction", "som": "class directions"}
    return ", ".join(f"{verdict} ({names[method]})" for method, verdict in verdicts.items())


def compounding_reading(study: Study) -> str:
    """Do parallel directions just add up? Equal weight against equal effective weight, SVD against none."""

    everything = study.contrast("svd matched", "som matched")
    first = study.contrast("svd1 matched", "som matched")
    if everything is None or first is None:
        return "Not decided, a control is missing."
    presets = [
        preset
        for preset in (claims.UNMATCHED, claims.MATCHED)
        if study.single_cells(preset, "effective")
    ]
    by_weight, by_effect = (
        sum(len(study.successful(preset, strength)) for preset in presets)
        for strength in ("weight", "effective")
    )
    strength = (
        "What single layers achieve at equal weight rests on parallel directions adding up. "
        if by_weight > 2 * by_effect
        else ""
    )
    if everything.verdict == "worse":
        rest = "Lost strength is not all that SVD costs: at equal KL it is still worse, " + (
            "while its first vector alone is as good or better. The other vectors cost divergence and remove no refusals."
            if first.verdict in GOOD
            else "and so is its first vector, or that is not decided."
        )
    elif everything.verdict in GOOD:
        rest = "SVD costs strength alone: at equal KL it is as good."
    else:
        rest = "Whether SVD costs more than strength is not decided."
    return strength + rest


def topic_reading(study: Study) -> str:
    """Is it the lost topic? Without the topic's part, without the category that is judged, other matched pools."""

    readings = []
    residualized = verdicts_of(study, "residualized", "unmatched", COMMON)
    if residualized:
        readings.append(
            f"Without what subjects alone contribute, against unmatched directions: {by_method(residualized)}"
        )
    without = study.contrast("som unmatched, left out", "som unmatched", COMMON)
    if without is not None:
        readings.append(f"class directions on a category that they never saw: {reading(without)}")
    filtered = verdicts_of(study, "matched, filtered", "matched", COMMON)
    if not study.data["n_refused"]["matched"]:
        readings.append("no matched prompt is refused, so that nothing could spoil the pool")
    elif filtered:
        readings.append(
            f"matched directions without prompts that do not behave as assumed: {by_method(filtered)}"
        )
    text = "; ".join(readings) or "not measured"
    return f"{text[0].upper()}{text[1:]}."


def incoherence_table(study: Study) -> str:
    """Returns how many responses are incoherent at the strongest weights, where R no longer means much."""

    rows = []
    for condition in EQUAL_EFFECTIVE:
        found = study.outcomes(condition)
        if found is not None:
            shares = (found.incoherent * found.judged).sum(axis=(1, 2)) / found.judged.sum()
            pairs = zip(found.weights, shares, strict=True)
            rows.append([label(condition), *(f"{100 * v:.0f} % at {w:g}" for w, v in pairs)])
    width = max(map(len, rows), default=1)
    padded = [row + [NONE] * (width - len(row)) for row in rows]
    return table(["Condition", *[""] * (width - 1)], padded)


def precision_table(studies: Sequence[Study]) -> str:
    """Returns what 16 bits change of the sweep's cells, and of the claims that rest on them."""

    rows = []
    for study in studies:
        other = study.in_16_bits()
        if other is None:
            continue
        swapped = {cell.key(): cell for cell in other.cells}
        pairs = [(cell, swapped[cell.key()]) for cell in study.cells if cell.key() in swapped]
        steps = [abs(first.refusals - second.refusals) for first, second in pairs]
        ratios = [second.kl / first.kl for first, second in pairs if first.kl > study.sweep_floor]
        both = [
            item.with_cells([pair[index] for pair in pairs])
            for index, item in enumerate((study, other))
        ]
        names = {cell.configuration for cell in other.cells}
        n_layers = sum(len(other.layer_cells(name)) for name in names)
        functional, successful = (
            [sum(len(layers(item, name)) for name in names) for item in both]
            for layers in (Study.functional, Study.successful)
        )
        merged = study.with_cells([swapped.get(cell.key(), cell) for cell in study.cells])
        changed = [
            item.key
            for item in claims.CLAIMS
            if item.decide(study).verdict != item.decide(merged).verdict
        ]
        rows.append(
            [
                study.name,
                str(other.data["sweep"]["dtype"]),
                f"{study.sweep_base} → {other.sweep_base}",
                f"{steps.count(0)} of {len(steps)}",
                str(max(steps)),
                f"{median(ratios):.2f}",
                f"{functional[0]} → {functional[1]} of {n_layers}",
                f"{successful[0]} → {successful[1]}",
                ", ".join(changed) or "none",
            ]
        )
    header = "Model|Type|R unmodified|Cells with the same R|Largest change of R|Median ratio of KL|Functional|R = 0|Verdicts that change"
    return table(header.split("|"), rows, right=[3, 4, 5, 6, 7])


LONG = 0.8
"""From which share of the unmatched length on directions are long."""


def open_question(study: Study) -> tuple[str, str]:
    """
    Returns the table of magnitude, purity and effect of every baseline, and the answer for this model.

    Magnitude: norm over that of the unmatched baseline. Purity: cosine with the differences of prompt pairs on the same subject.
    """

    rows, winners, undecided = [], [], []
    for method in ("mean", "som"):
        for baseline in ("unmatched", "matched", "sensitive", "mixed", "nearest", "residualized"):
            name, reference = f"{method} {baseline}", f"{method} unmatched"
            length = study.shape_interval(name, "norm_ratio")
            if length is None:
                continue
            gain = study.shape_difference(name, reference, "pair_max_cosine")
            found = study.common_contrast(name, reference)
            effect, minus = NONE, plain(gain, 3)
            if baseline == "unmatched":
                effect = minus = "reference"
            elif gain is not None:
                if found is not None:
                    effect = f"{signed(found.difference)}: {reading(found)}"
                fails = length.high < LONG or gain.high <= 0
                has_both = length.low > LONG and gain.low > 0
                verdict = "undecided" if found is None else found.verdict
                if has_both and verdict in GOOD:
                    winners.append(name)
                elif not fails and verdict != "worse":
                    undecided.append(name)
            cosines = [
                plain(study.shape_interval(name, what)) for what in ("cosine", "pair_max_cosine")
            ]
            rows.append([name, plain(length), *cosines, minus, effect])
    header = "Directions|Length over unmatched|Cosine with unmatched|Cosine with pairs|minus unmatched|Refused at equal KL, points"
    text = table(header.split("|"), rows, right=[1, 2, 3, 4])
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
