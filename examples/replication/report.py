# SPDX-License-Identifier: AGPL-3.0-or-later

"""The replication report as Markdown, made entirely from stored results."""

from collections.abc import Sequence
from pathlib import Path

from heretic_contrast.files import write_text_atomically
from heretic_contrast.report.plots import can_plot

from . import explanations
from .claims import decide_all
from .evidence import Study, load_studies
from .hints import decide_hints
from .rules import Claim, Finding
from .statistics import CONFIDENCE, MARGIN, N_DRAWS
from .wording import number, table

GPU_COMMAND = (
    "heretic-contrast sweep Qwen/Qwen3.5-2B --contrast.preset paper-unmatched --contrast.preset paper-matched "
    "--contrast.preset paper-matched-svd --strength both --n-harmful 10 "
    "--kl-tokens 50 --synergy-weight 0.3 --output qwen3.5-2b"
)
"""The paper's sweep on the paper's model, as one command."""

GPU_LAYERS, GPU_PARAMETERS, GPU_WEIGHTS, GPU_CONFIGURATIONS, GPU_STRENGTHS = 24, 2e9, 5, 4, 2
GPU_TOKENS_PER_REFERENCE, GPU_REFERENCES = 100, 100
GPU_FLOPS = 3e13
"""What a consumer GPU sustains in 16 bits, cautiously; an assumption of the estimate, not a measurement."""


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

    decided = decide_all(studies)
    parts = [
        _head(studies),
        _summary(studies, decided),
        _how(studies),
        _claims(studies, decided, figures),
        "## Why: three explanations",
        "The paper explains the failure by the small magnitude of matched directions. Two other explanations fit its numbers: "
        "that nearly parallel directions add up under a uniform weight, which SVD undoes, and that a matched baseline takes away a topic "
        "that the ablation needs. Each has a control here. All layers at once.",
        *(_explanations(study) for study in studies),
        "## Hints from earlier trials",
        "Before this measurement, single trials (one seed, 12 to 45 prompts) had suggested the following. Those that "
        "concern the built-in refuser came from an earlier model of the same kind with fewer subjects.",
        *(_hints(study) for study in studies),
        "## The open question: magnitude and purity",
        "The paper ends on the question whether some baseline has both the magnitude of the unmatched one and the purity of the matched "
        f"one (section 6). Here a baseline has both if its directions are surely longer than {explanations.LONG} of the unmatched length, surely "
        "lie closer to the differences of prompt pairs on the same subject (cosine) than the unmatched ones, and refusals at equal KL are equal "
        "or better. It surely does not if one of these surely fails.",
        *(_open_question(study) for study in studies),
        _limits(studies),
        _decide_elsewhere(),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _head(studies: Sequence[Study]) -> str:
    names = " and ".join(f"`{study.name}`" for study in studies)
    return (
        "# Which of the paper's claims appear\n\n"
        "[arXiv:2603.22061](https://arxiv.org/abs/2603.22061) reports that topic-matched contrast baselines fail on Qwen 3.5 2B. This page "
        f"says which of its claims appear on {names}, and what explains them there. It is made from the stored results in "
        "[replication](replication) by\n\n"
        "```sh\npython examples/replicate.py report --results docs/replication --output docs/replication.md\n```"
    )


def _summary(studies: Sequence[Study], decided: Sequence[tuple[Claim, list[Finding]]]) -> str:
    rows = [
        [claim.key, claim.title, *(finding.verdict for finding in findings)]
        for claim, findings in decided
    ]
    lines = ["## Summary", table(["", "Claim", *(study.name for study in studies)], rows)]
    for study in studies:
        counts = {
            verdict: sum(
                findings[studies.index(study)].verdict == verdict for _, findings in decided
            )
            for verdict in ("appears", "does not appear", "cannot be decided here")
        }
        _, answer = explanations.open_question(study)
        lines.append(
            f"`{study.name}`: of {len(decided)} claims and tables {counts['appears']} appear, {counts['does not appear']} do not, "
            f"{counts['cannot be decided here']} cannot be decided. Does any baseline have magnitude and purity? {answer}"
        )
    return "\n\n".join(lines)


def _how(studies: Sequence[Study]) -> str:
    rows = []
    for study in studies:
        data = study.data
        prompts = data["n_prompts"]
        rows.append(
            [
                study.name,
                f"{data['n_parameters'] / 1e6:.3g} million",
                str(data["n_layers"]),
                f"{data['n_refused']['judged']} of {prompts['judged']}",
                ", ".join(
                    f"{prompts[name]} {name}"
                    for name in prompts
                    if name not in ("judged", "references")
                ),
                str(study.n_seeds),
                f"{len(data['seeds'][0]['judged'])}, {data['options']['n_references']}",
                str(sum(len(c["weights"]) for seed in data["seeds"] for c in seed["curves"])),
            ]
        )
    return "\n\n".join(
        [
            "## What was measured",
            table(
                [
                    "Model",
                    "Parameters",
                    "Layers",
                    "Judged prompts that it refuses",
                    "Prompts for directions",
                    "Seeds",
                    "Judged and reference prompts per seed",
                    "Cells",
                ],
                rows,
                right=[1, 2, 5, 6, 7],
            ),
            "**Sweep**: the paper's protocol. One set of directions from all prompts, every layer alone, weights 0.3 to 1.2 on every "
            "direction; where it was run so, again at equal effective weight, and with random directions. "
            + " ".join(_sweep_size(study) for study in studies),
            "**Controls**: each seed draws its own two thirds of every pool, its own judged prompts among those that the unmodified model refuses, "
            "its own reference prompts and its own maps. Conditions differ in one thing at a time. Directions have length 1 unless their length is "
            "the question; lengths are then in units of the unmatched baseline's mean length in the same layer. *Effective weight* is "
            "the largest amount of any unit direction that is removed, λ_max(Σ w v vᵀ).",
            f"**Intervals** ({CONFIDENCE:.0%}) are bootstrapped over seeds and prompts at once ({N_DRAWS:,} draws, crossed, since seeds share a pool of "
            "prompts; the same draws for all conditions, so that differences are paired). Single shares have the wider of this and Wilson's "
            "interval. Means over layers or prompt pairs are bootstrapped over seeds and these. *Surely* means: the whole interval. "
            "*Fresh prompts*: the best cell of the sweep, among those that were measured again, with other directions and prompts drawn anew.",
            "**Equal KL**: the least share refused that is reached at a divergence of at most so much, interpolated in √KL between weights, at the "
            "divergence at which the reference refuses half. *Worse* and *better*: the interval of the difference excludes 0 and the difference is at least "
            f"{100 * MARGIN:.0f} points (one prompt in ten, the paper's resolution). *Equal*: the interval lies within {100 * MARGIN:.0f} points. Else "
            "*undecided*.",
        ]
    )


def _sweep_size(study: Study) -> str:
    swept = study.data["sweep"]
    references = swept.get("n_references")
    return (
        f"`{study.name}`: {len(study.cells)} cells, {study.sweep_prompts} judged prompts (R of the unmodified model {study.sweep_base}), "
        f"KL over {swept.get('kl_tokens')} tokens of {references} reference prompts."
    )


def _claims(
    studies: Sequence[Study],
    decided: Sequence[tuple[Claim, list[Finding]]],
    figures: dict[str, dict[str, str]],
) -> str:
    parts = ["## Claims of section 7, and Tables 1 to 4"]
    for claim, findings in decided:
        rows = [
            [study.name, finding.measured, f"**{finding.verdict}**"]
            for study, finding in zip(studies, findings, strict=True)
        ]
        parts.append(
            f"### {claim.key}: {claim.title}\n\nThe paper: {claim.says}\n\nRule: {claim.rule}\n\n"
            + table(["Model", "Measured", "Verdict"], rows)
        )
    captions = {
        "sweep": "R by layer and weight, every layer alone",
        "curves": "Share refused against KL, all layers at once, with bands",
        "lengths": "Length of class directions over unmatched, by layer",
        "capture": "Capture by layer",
    }
    for study in studies:
        for what, caption in captions.items():
            if what in figures.get(study.name, {}):
                parts.append(
                    f"{caption}, `{study.name}`:\n\n![{caption}, {study.name}](images/{figures[study.name][what]})"
                )
    return "\n\n".join(parts)


def _explanations(study: Study) -> str:
    return "\n\n".join(
        [
            f"### {study.name}",
            "Refused at **equal weight** of every direction:",
            explanations.share_table(study, explanations.EQUAL_WEIGHT, "Weight"),
            "Refused at **equal effective weight**:",
            explanations.share_table(study, explanations.EQUAL_EFFECTIVE, "Effective weight"),
            "At **equal KL**:",
            explanations.contrast_table(study, _baseline_pairs(study)),
            "**Small magnitude?**",
            explanations.magnitude(study),
            "**Parallel directions adding up?**",
            explanations.compounding(study),
            "**A lost topic?**",
            explanations.topic(study),
            "Incoherent responses by effective weight (they count as not refused):",
            explanations.incoherence(study),
        ]
    )


def _baseline_pairs(study: Study) -> list[tuple[str, str, str, str | None]]:
    pairs: list[tuple[str, str, str, str | None]] = []
    for method, text in (("mean", "one mean direction"), ("som", "class directions")):
        for baseline in ("matched", "sensitive", "mixed", "nearest", "random"):
            name = f"{method} {baseline}"
            if study.outcomes(name) is not None:
                pairs.append((f"{baseline} − unmatched, {text}", name, f"{method} unmatched", None))
    for name, reference in (
        ("svd unmatched", "som unmatched"),
        ("svd1 unmatched", "som unmatched"),
        ("svd matched", "som matched"),
        ("svd1 matched", "som matched"),
        ("som unmatched", "mean unmatched"),
        ("som matched", "mean matched"),
    ):
        if study.outcomes(name) is not None:
            pairs.append((f"{_plain_name(name)} − {_plain_name(reference)}", name, reference, None))
    return pairs


def _plain_name(name: str) -> str:
    method, baseline = name.split(" ")
    words = {
        "som": "class directions",
        "mean": "mean direction",
        "svd": "SVD",
        "svd1": "first singular vector",
    }
    return f"{baseline} {words[method]}"


def _hints(study: Study) -> str:
    rows = [
        [hint.says, finding.measured, f"**{finding.verdict}**", hint.rule]
        for hint, finding in decide_hints(study)
    ]
    return f"### {study.name}\n\n" + table(["Hint", "Measured", "", "Rule"], rows)


def _open_question(study: Study) -> str:
    text, answer = explanations.open_question(study)
    return f"### {study.name}\n\n{text}\n\n{answer}"


def _limits(studies: Sequence[Study]) -> str:
    largest = max(study.data["n_parameters"] for study in studies) / 1e6
    prompts = ", ".join(f"{study.data['n_refused']['judged']} ({study.name})" for study in studies)
    seeds = ", ".join(f"{study.n_seeds} ({study.name})" for study in studies)
    pairs = ", ".join(
        f"{study.data['n_pairs'][0]} of {study.data['n_pairs'][1]} ({study.name})"
        for study in studies
    )
    return "\n".join(
        [
            "## Limits",
            "",
            f"- The models are tiny (at most {number(largest, 0)} million parameters) and were taught to refuse by fine-tuning on a few hundred prompts with "
            "few wordings. Such refusal is shallow: it may lie in fewer directions, and be easier to remove, than that of a model of billions. No "
            "verdict here carries over to Qwen 3.5 2B by itself.",
            "- The categories of prompts that have none come from a word list, and classes that are too small for a map are merged.",
            f"- Judged prompts come from pools of {prompts}; seeds share them. Intervals say how much another draw from the same pools would change, "
            f"not how much other pools would. With {seeds} seeds, intervals are somewhat too narrow.",
            f"- Capture rests on the prompt pairs that behave as assumed: {pairs}.",
            "- Refusals are told by rules about a response's form. Responses that are incoherent count as not refused, so that R = 0 at a large KL is no success.",
            "- Many comparisons are made. Each interval covers its own value in 95 % of repetitions, not all of them together.",
            "- The paper leaves the length of directions, the learning rate and the neighborhood of the maps open. This project's choice may differ.",
        ]
    )


def gpu_minutes() -> float:
    """Returns how long the forward passes of the command's divergences take, from operations and an assumed speed."""

    cells = GPU_LAYERS * GPU_WEIGHTS * GPU_CONFIGURATIONS * GPU_STRENGTHS
    # Layers below the ablated one are run once: half of them on average.
    operations = cells * GPU_REFERENCES * GPU_TOKENS_PER_REFERENCE * 2 * GPU_PARAMETERS / 2
    return operations / GPU_FLOPS / 60


def _decide_elsewhere() -> str:
    cells = GPU_LAYERS * GPU_WEIGHTS * GPU_CONFIGURATIONS * GPU_STRENGTHS
    return "\n".join(
        [
            "## Deciding it on Qwen 3.5 2B",
            "",
            "On a machine with a GPU, this runs the paper's protocol on the paper's model, with the random control and equal effective weight beside it:",
            "",
            f"```sh\n{GPU_COMMAND}\n```",
            "",
            f"It has {cells} cells of single layers. By the number of operations ({GPU_REFERENCES} reference prompts of about {GPU_TOKENS_PER_REFERENCE} tokens "
            f"per cell, half of the layers, {GPU_FLOPS / 1e12:.0f} TFLOP/s) the divergences take about {gpu_minutes():.0f} minutes; generation adds at most "
            "as much again in most cases. This is an estimate: it was not measured. The sweep judges each cell on 10 prompts, as the paper does; "
            "`--n-harmful 100` and several `--contrast.seed` give intervals that decide.",
            "",
            "The controls of this page run there, too, with `python examples/replicate.py measure --model Qwen/Qwen3.5-2B --prompts FILE.jsonl --name qwen3.5-2b "
            "--sweep qwen3.5-2b/sweep.json --output docs/replication/qwen3.5-2b.json`, where the file has one object a line with text, label (harmful, harmless), split "
            "(train, test) and source.",
        ]
    )
