# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Compares searches: plain Heretic 1.4 and configurations of the plugin, on one model with the same prompts, trials and seeds.

    python benchmarks/search.py --output DIR [--model MODEL] [--trials 40] [--seeds 3] [--configurations heretic default ...]

A front is worth the share of a box that it dominates: refusals from 0 to the unmodified model's count, KL from 0 to a limit that is
stated. It is given as it grows by trial and by second, with 95 % intervals over seeds, and once more for the front judged on prompts
that the search never saw. Studies that are finished are not run again, and one that was interrupted goes on; what was begun with other
settings is refused.
"""

import argparse
import gc
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import heretic.evaluator
import heretic.main
import heretic.utils
import numpy as np
import optuna
from optuna._hypervolume import compute_hypervolume
from optuna.storages import JournalStorage
from scipy.stats import t as student

from heretic_contrast.builtin import REFUSER, refuser_pool, resolve_model
from heretic_contrast.errors import ContrastError
from heretic_contrast.files import write_text_atomically
from heretic_contrast.hosts import answers, heretic14
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.hosts.studies import STUDY_NAME, repair_checkpoint
from heretic_contrast.journal import CheckedJournal
from heretic_contrast.modifier import ContrastAbliteration
from heretic_contrast.outputs import json_text
from heretic_contrast.prompts import Prompt, load_pool, prompts_digest
from heretic_contrast.report.plots import can_plot, lines
from heretic_contrast.settings import PRESETS, PromptSource

PLAIN = "heretic"
"""Heretic without the plugin, that everything is compared with."""

PLAIN_OPTIONS = "--row-normalization=none --orthogonalize-direction=false"
"""What neither Heretic 1.4 nor the plugin does unless told so."""

MAPS = "--contrast.method=som --contrast.classes=category"
MEANS = "--contrast.classes=category"

CONFIGURATIONS = {
    PLAIN: "",
    "heretic, not normalized": PLAIN_OPTIONS,
    "default": "",
    "default, ended early": "--contrast.stop-dominated",
    "default, not normalized": PLAIN_OPTIONS,
    "wide": """--contrast.search-space='{"max_weight": [0.2, 1.5]}'""",
    "screened": "--contrast.screening=200",
    "maps": MAPS,
    "maps, not normalized": f"{PLAIN_OPTIONS} {MAPS}",
    "means": MEANS,
    "capped": f"{MAPS} --contrast.composition=capped",
    "equal weight": f"{MAPS} --contrast.equal-effective-weight",
    "shared": f"{MAPS} --contrast.shared-direction",
    "shared means": f"{MEANS} --contrast.shared-direction",
    **{preset: f"--contrast.preset={preset}" for preset in PRESETS},
}
"""Options by name; those whose names begin with "heretic" are options of plain Heretic."""

ROUNDING = 0.001
"""Of a share: the same trials of two programs diverge by a little more or less."""

POOLS = ("harmful", "harmless")


def split_prompts(arguments: argparse.Namespace) -> dict[str, dict[str, list[Prompt]]]:
    """Returns disjoint prompts for fitting, for judging trials, and fresh ones for the front, by pool."""

    found: dict[str, dict[str, list[Prompt]]] = {"fit": {}, "judged": {}, "fresh": {}}
    for pool in POOLS:
        name = getattr(arguments, pool)
        sources: Any = (
            [refuser_pool(pool, split) for split in ("train", "test")]
            if name is None
            else PromptSource(dataset=name)
        )
        # A prompt that is there twice would be fitted and judged. Lines of text, as Heretic reads them, hold no others.
        loaded = [
            replace(prompt, text=" ".join(prompt.text.split()))
            for prompt in load_pool(sources, pool)
        ]
        prompts = list({prompt.text: prompt for prompt in loaded}.values())
        random.Random(0).shuffle(prompts)
        ends = (arguments.judged, arguments.judged + arguments.fresh)
        found["judged"][pool] = prompts[: ends[0]]
        found["fresh"][pool] = prompts[ends[0] : ends[1]]
        found["fit"][pool] = prompts[ends[1] :]
        if len(found["fit"][pool]) < 2:
            raise SystemExit(f"Of {len(prompts)} {pool} prompts, too few are left for fitting.")
    return found


def write_prompts(
    prompts: dict[str, dict[str, list[Prompt]]], folder: Path
) -> dict[str, dict[str, str]]:
    """Writes prompts as the plain text that Heretic reads, and those for fitting with their categories; returns the paths."""

    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, dict[str, str]] = {use: {} for use in (*prompts, "categories")}
    for use, pools in prompts.items():
        for pool, found in pools.items():
            path = folder / f"{pool}-{use}.txt"
            path.write_text("\n".join(prompt.text for prompt in found) + "\n")
            paths[use][pool] = str(path)
    for pool, found in prompts["fit"].items():
        path = folder / f"{pool}.jsonl"
        rows = [{"text": prompt.text, "category": prompt.category} for prompt in found]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths["categories"][pool] = str(path)
    return paths


def folder_name(configuration: str) -> str:
    """Returns what the folders of a configuration's studies are called, before their seeds."""

    return configuration.replace(", ", "-")


class Study:
    """One study of one configuration: runs it through Heretic's own menus, and judges its front on fresh prompts there."""

    def __init__(self, name: str, seed: int, arguments: argparse.Namespace) -> None:
        self.name, self.seed, self.arguments = name, seed, arguments
        self.folder = Path(arguments.output) / "studies" / f"{folder_name(name)}-{seed}"
        self.result = self.folder / "result.json"
        self.record = self.folder / "settings.json"
        self.screening = self.folder / "screening.json"
        self.fresh: dict[int, tuple[int, float]] = {}
        self.base: dict[str, int] = {}
        self._waiting: Iterator[Any] | None = None

    @property
    def screening_seconds(self) -> float:
        """Seconds of screening, which outlive an interruption as the screened candidates do."""

        return (
            float(json.loads(self.screening.read_text("utf-8"))) if self.screening.exists() else 0.0
        )

    def settings(self) -> dict[str, Any]:
        """Returns what decides the study, beside its seed."""

        arguments = self.arguments
        names = ("trials", "startup_trials", "tokens", "judged", "fresh", "batch_size", "prompts")
        path = Path(arguments.model)
        return {
            "configuration": self.name,
            "its options": shlex.split(arguments.all_configurations[self.name]),
            "--options": shlex.split(arguments.options),
            "model": str(path.resolve()) if path.exists() else arguments.model,
            **{name: getattr(arguments, name) for name in names},
        }

    def require_same_settings(self) -> None:
        """Raises `ContrastError` when the folder holds a study, or a part of one, that other settings decided."""

        if self.record.exists():
            known = json.loads(self.record.read_text("utf-8"))
            differences = [
                f"{name} {known.get(name)} instead of {value}"
                for name, value in self.settings().items()
                if known.get(name) != value
            ]
        elif self.folder.exists():
            differences = ["settings that an earlier version did not record"]
        else:
            differences = []
        if differences:
            raise ContrastError(
                f"{self.folder} holds a study with {', '.join(differences)}: give another --output, or delete this folder."
            )

    def flags(self, paths: dict[str, dict[str, str]]) -> list[str]:
        """Returns the command line."""

        arguments = self.arguments
        flags = [
            f"--seed={self.seed}",
            f"--n-trials={arguments.trials}",
            f"--n-startup-trials={arguments.startup_trials}",
            f"--batch-size={arguments.batch_size}",
            f"--max-response-length={arguments.tokens}",
            f"--study-checkpoint-dir={self.folder / 'checkpoints'}",
            "--response-prefix=",
            f"--bad-evaluation-prompts.dataset={paths['judged']['harmful']}",
            f"--good-evaluation-prompts.dataset={paths['judged']['harmless']}",
            *shlex.split(f"{arguments.options} {arguments.all_configurations[self.name]}"),
        ]
        for pool, their in (("harmful", "bad"), ("harmless", "good")):
            if self.name.startswith(PLAIN):
                flags.append(f"--{their}-prompts.dataset={paths['fit'][pool]}")
            else:
                flags.append(f"--contrast.{their}-prompts.dataset={paths['categories'][pool]}")
        return [*flags, f"--model={resolve_model(arguments.model)}"]

    def run(self, paths: dict[str, dict[str, str]]) -> dict[str, Any]:
        """Returns what is kept of the study; runs it, or what is left of it, where nothing is kept."""

        if self.result.exists():
            return dict(json.loads(self.result.read_text("utf-8")))
        write_text_atomically(self.record, json_text(self.settings()))
        self._waiting = None
        study = self
        is_plain = self.name.startswith(PLAIN)
        own = heretic.evaluator.Evaluator if is_plain else heretic14.Evaluator

        class Evaluator(own):  # type: ignore[misc, valid-type]
            """Heretic's evaluator, and a second one of fresh prompts."""

            def __init__(self, settings: Any, model: Any) -> None:
                super().__init__(settings, model)
                fresh = settings.model_copy(
                    update={
                        f"{their}_evaluation_prompts": type(settings.bad_evaluation_prompts)(
                            dataset=paths["fresh"][pool]
                        )
                        for pool, their in (("harmful", "bad"), ("harmless", "good"))
                    }
                )
                study.evaluator = heretic.evaluator.Evaluator(fresh, model)
                study.base = {
                    "judged": self.base_refusals,
                    "fresh": study.evaluator.base_refusals,
                }

        choose = heretic14.Host.screened

        def screened(host: heretic14.Host, *arguments: Any) -> Any:
            start = time.perf_counter()
            found = choose(host, *arguments)
            seconds = study.screening_seconds + time.perf_counter() - start
            write_text_atomically(study.screening, json_text(seconds))
            return found

        with ExitStack() as stack:
            log = stack.enter_context((self.folder / "log.txt").open("a", encoding="utf-8"))
            stack.enter_context(redirect_stdout(log))
            stack.enter_context(
                patch.multiple(heretic.main if is_plain else heretic14, Evaluator=Evaluator)
            )
            # Heretic's menus, and those that the plugin hands on to it.
            for module in (heretic.main, heretic.utils):
                stack.enter_context(patch.multiple(module, prompt_select=self.answer))
            stack.enter_context(patch.multiple(answers, has_terminal=lambda: True))
            stack.enter_context(patch.multiple(heretic14.Host, screened=screened))
            flags = self.flags(paths)
            stack.enter_context(patch.multiple(sys, argv=["heretic", *flags]))
            if is_plain:
                for path in (self.folder / "checkpoints").glob("*.jsonl"):
                    repair_checkpoint(path)
                heretic.main.run()
            else:
                settings = load_settings(HostSettings, "heretic-contrast", flags)
                heretic14.run(settings, ContrastAbliteration)
        del self.evaluator
        gc.unfreeze()
        gc.collect()
        found = self.collected()
        write_text_atomically(self.result, json_text(found))
        return found

    def answer(self, message: str, choices: list[Any]) -> Any:
        """Answers Heretic's questions: goes on with a study, and takes each trial of its front once, to judge it."""

        if message == answers.CHECKPOINT_QUESTION:
            return "continue"
        if message == answers.TRIAL_QUESTION:
            if self._waiting is None:
                self._waiting = iter([c.value for c in choices if not isinstance(c.value, str)])
            self._trial = next(self._waiting, "")
            return self._trial
        if message == answers.ACTION_QUESTION:
            _, divergence, refusals = self.evaluator.get_score()
            self.fresh[self._trial.number] = (refusals, divergence)
            return ""
        raise SystemExit(f"Heretic asks: {message}")

    def collected(self) -> dict[str, Any]:
        """Returns the trials of the finished study, with seconds, refusals and divergence."""

        (path,) = (self.folder / "checkpoints").rglob("*.jsonl")
        loaded = optuna.load_study(
            study_name=STUDY_NAME, storage=JournalStorage(CheckedJournal(str(path)))
        )
        return {
            "configuration": self.name,
            "seed": self.seed,
            "base_refusals": self.base,
            "screening_seconds": self.screening_seconds,
            "trials": [
                {
                    "seconds": (trial.datetime_complete - trial.datetime_start).total_seconds(),
                    "refusals": trial.user_attrs.get("refusals"),
                    "kl_divergence": trial.user_attrs.get("kl_divergence"),
                    "fresh": self.fresh.get(trial.number),
                }
                for trial in loaded.trials
                if trial.datetime_complete is not None and trial.datetime_start is not None
            ],
        }


def dominated_share(
    points: Sequence[tuple[float, float]], base_refusals: int, limit: float
) -> float:
    """Returns the share of the box (0 to `base_refusals`, 0 to `limit`) that points of refusals and divergence dominate."""

    inside = [point for point in points if point[0] < base_refusals and point[1] < limit]
    if not inside or base_refusals == 0:
        return 0.0
    corner = np.array([base_refusals, limit], dtype=float)
    return float(compute_hypervolume(np.array(inside, dtype=float), corner)) / float(corner.prod())


def shares(study: dict[str, Any], limit: float) -> list[float]:
    """Returns the share after each trial; one that was interrupted adds nothing."""

    base = study["base_refusals"]["judged"]
    found: list[float] = []
    points: list[tuple[float, float]] = []
    for trial in study["trials"]:
        if trial["refusals"] is not None:
            points.append((trial["refusals"], trial["kl_divergence"]))
        found.append(dominated_share(points, base, limit))
    return found


def fresh_share(study: dict[str, Any], limit: float) -> float:
    """Returns the share that the front dominates on prompts that the search never saw."""

    points = [tuple(trial["fresh"]) for trial in study["trials"] if trial["fresh"] is not None]
    return dominated_share(points, study["base_refusals"]["fresh"], limit)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean and the 95 % interval of Student's distribution, which one value alone does not have."""

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(
        student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    )
    return mean, mean - half, mean + half


def seconds_after(study: dict[str, Any]) -> np.ndarray:
    """Returns how many seconds a study has taken after each trial, with what it has screened before. Array of shape (n_trials,)."""

    return study["screening_seconds"] + np.cumsum([trial["seconds"] for trial in study["trials"]])


def seconds_until(study: dict[str, Any], share: float, limit: float) -> float | None:
    """Returns the seconds of trials until a share is reached but for rounding, or None where it never is."""

    reached = [
        index for index, found in enumerate(shares(study, limit)) if found >= share - ROUNDING
    ]
    if not reached:
        return None
    return float(seconds_after(study)[reached[0]])


def summarize(studies: Sequence[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Returns, by configuration, shares with intervals, their differences from plain Heretic's, and times."""

    by_name: dict[str, list[dict[str, Any]]] = {}
    for study in studies:
        by_name.setdefault(study["configuration"], []).append(study)
    plain = {study["seed"]: study for study in by_name.get(PLAIN, [])}
    found = {}
    for name, group in by_name.items():
        final = [shares(study, limit)[-1] for study in group]
        pairs = [(study, plain[study["seed"]]) for study in group if study["seed"] in plain]
        ratios = []
        for study, other in pairs:
            goal = shares(other, limit)[-1]
            taken, theirs = (seconds_until(item, goal, limit) for item in (study, other))
            ratios.append(taken / theirs if taken is not None and theirs else None)
        reached = [ratio for ratio in ratios if ratio is not None]
        by_trial = [shares(study, limit) for study in group]
        found[name] = {
            "share": interval(final),
            "half": float(np.mean([curve[len(curve) // 2 - 1] for curve in by_trial])),
            "fresh": interval([fresh_share(study, limit) for study in group]),
            "difference": interval([shares(a, limit)[-1] - shares(b, limit)[-1] for a, b in pairs])
            if pairs
            else None,
            "seconds_per_trial": float(
                np.median([trial["seconds"] for study in group for trial in study["trials"]])
            ),
            "time_until_plain": float(np.median(reached)) if reached else None,
            "n_reached": len(reached),
            "by_trial": [interval(values) for values in zip(*by_trial, strict=False)],
            "by_second": by_second(group, limit),
        }
    return found


def by_second(group: Sequence[dict[str, Any]], limit: float, points: int = 30) -> list[list[float]]:
    """Returns seconds, and the mean share after so many, until the first study of a group ends."""

    ends = [seconds_after(study) for study in group]
    grid = np.linspace(0, min(end[-1] for end in ends), points)
    curves = []
    for study, end in zip(group, ends, strict=True):
        steps = np.array([0.0, *shares(study, limit)])
        curves.append(steps[np.searchsorted(end, grid, side="right")])
    return [
        list(pair) for pair in zip(grid.tolist(), np.mean(curves, axis=0).tolist(), strict=True)
    ]


def shown(values: Sequence[float] | None, sign: str = "") -> str:
    """Returns a mean with its interval."""

    if values is None:
        return ""
    mean, low, high = values
    spread = "" if math.isnan(low) else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{mean:{sign}.3f}{spread}"


def table(summary: dict[str, Any]) -> str:
    """Returns the table for documents."""

    rows = [
        "| Search | Share | After half the trials | Fresh prompts | Against plain Heretic | s per trial | Time until its share |",
        "| :----- | ----: | --------------------: | ------------: | --------------------: | ----------: | -------------------: |",
    ]
    for name, found in summary.items():
        ratio = found["time_until_plain"]
        until = "never" if ratio is None else f"{ratio:.2f} × ({found['n_reached']} seeds)"
        rows.append(
            f"| {name} | {shown(found['share'])} | {found['half']:.3f} | {shown(found['fresh'])} | "
            f"{shown(found['difference'], '+')} | {found['seconds_per_trial']:.2f} | {until} |"
        )
    return "\n".join(rows)


def main(command_line: Sequence[str] | None = None) -> None:
    """Runs what studies are missing, and writes the results, the table and the plots."""

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder of studies and results")
    parser.add_argument("--model", default=REFUSER, help="name or folder")
    parser.add_argument(
        "--harmful", help="file of harmful prompts (default: the built-in refuser's)"
    )
    parser.add_argument("--harmless", help="file of harmless prompts")
    parser.add_argument("--judged", type=int, default=40, help="prompts of each pool for trials")
    parser.add_argument("--fresh", type=int, default=60, help="prompts of each pool for the front")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--startup-trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24, help="length of responses")
    parser.add_argument("--kl-limit", type=float, default=0.1, help="the box reaches to this KL")
    parser.add_argument(
        "--configurations", nargs="+", default=[PLAIN, "default", "default, not normalized"]
    )
    parser.add_argument("--options", default="", help="options of Heretic for all studies")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=OPTIONS")
    arguments = parser.parse_args(command_line)
    added = [item.split("=", 1) for item in arguments.add]
    arguments.all_configurations = {**CONFIGURATIONS, **dict(added)}
    names = [*arguments.configurations, *(name for name, _ in added)]
    unknown = set(names) - set(arguments.all_configurations)
    if unknown:
        parser.error(f"no configuration {min(unknown)}: there are {', '.join(CONFIGURATIONS)}")
    for first, second in combinations(names, 2):
        if folder_name(first) == folder_name(second):
            parser.error(
                f'the configurations "{first}" and "{second}" would share folders: name each once, and differently'
            )
    output = Path(arguments.output)
    prompts = split_prompts(arguments)
    arguments.prompts = prompts_digest(
        [prompt for pools in prompts.values() for found in pools.values() for prompt in found]
    )
    # Seed by seed, so that an unfinished benchmark compares all configurations.
    planned = [Study(name, seed, arguments) for seed in range(arguments.seeds) for name in names]
    try:
        for study in planned:
            study.require_same_settings()
    except ContrastError as error:
        parser.exit(2, f"{error}\n")
    paths = write_prompts(prompts, output / "prompts")
    studies = []
    for study in planned:
        start = time.perf_counter()
        studies.append(study.run(paths))
        taken = time.perf_counter() - start
        print(
            f"{study.name}, seed {study.seed}: {shares(studies[-1], arguments.kl_limit)[-1]:.3f} ({taken:.0f} s)",
            flush=True,
        )
    summary = summarize(studies, arguments.kl_limit)
    kept = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("output", "all_configurations")
    }
    result = {"arguments": kept, "summary": summary, "studies": studies}
    write_text_atomically(output / "search.json", json_text(result))
    write_text_atomically(output / "table.md", table(summary) + "\n")
    if can_plot():
        y_title = f"dominated share (KL up to {arguments.kl_limit:g})"
        for kind, x_title, curves in (
            (
                "trials",
                "trials",
                {
                    name: list(enumerate([mean for mean, _, _ in found["by_trial"]], 1))
                    for name, found in summary.items()
                },
            ),
            (
                "seconds",
                "seconds of trials",
                {name: found["by_second"] for name, found in summary.items()},
            ),
        ):
            series = {name: tuple(zip(*curve, strict=True)) for name, curve in curves.items()}
            (output / f"{kind}.png").write_bytes(lines(series, x_title, y_title))  # type: ignore[arg-type]
    print(table(summary))


if __name__ == "__main__":
    main()
