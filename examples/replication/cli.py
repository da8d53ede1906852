# SPDX-License-Identifier: AGPL-3.0-or-later

"""The commands `measure` and `report`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from heretic_contrast.errors import ContrastError
from heretic_contrast.files import write_text_atomically
from heretic_contrast.outputs import require_writable_directory

from .measurement import measure_study
from .pools import StudyOptions


def parser() -> argparse.ArgumentParser:
    """Returns the parser of both commands."""

    top = argparse.ArgumentParser(
        description="Measures the paper's claims on a model, and reports."
    )
    commands = top.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="measure a model")
    measure.add_argument("--model", required=True, help="builtin:refuser, a folder, or a name")
    measure.add_argument("--prompts", type=Path, help="JSON Lines: text, label, split, source")
    measure.add_argument("--name", help="what the model is called in the report")
    measure.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    measure.add_argument("--work", type=Path, help="directory for unfinished work")
    measure.add_argument(
        "--sweep", type=Path, required=True, help="sweep.json of heretic-contrast sweep"
    )
    measure.add_argument(
        "--sweep-16-bits", type=Path, help="that of a part of its cells, with --dtypes [bfloat16]"
    )
    measure.add_argument("--batch-size", type=int, default=64)
    for field in fields(StudyOptions):
        option = "--" + field.name.replace("_", "-")
        default: Any = field.default
        if isinstance(default, tuple):
            kind = str if field.name == "conditions" else float
            measure.add_argument(option, type=kind, nargs="+", default=default)
        else:
            measure.add_argument(option, type=type(default), default=default)
    report = commands.add_parser("report", help="write the report from stored results")
    report.add_argument("--results", type=Path, required=True, help="directory of results")
    report.add_argument("--output", type=Path, required=True, help="Markdown file")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Bad input ends with one sentence and exit code 2."""

    chosen = parser().parse_args(arguments)
    try:
        if chosen.command == "measure":
            run_measure(chosen)
        else:
            from .report import write_report

            write_report(chosen.results, chosen.output)
    except ContrastError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on where it was.", file=sys.stderr)
        sys.exit(130)


def run_measure(chosen: argparse.Namespace) -> None:
    """Measures a model, and writes the results."""

    require_writable_directory(chosen.output.parent)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from heretic_contrast.builtin import REFUSER, resolve_model
    from heretic_contrast.evaluation.cells import SweepResult
    from heretic_contrast.hosts.surface import log, progress_bar, wrap

    from .conditions import require_conditions
    from .measurement import require_own_sweep
    from .pools import builtin_pools, file_pools

    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    options = StudyOptions(
        **{field.name: getattr(chosen, field.name) for field in fields(StudyOptions)}
    )
    if chosen.model != REFUSER and chosen.prompts is None:
        raise ContrastError(
            "Only the built-in refuser has prompts of its own: give --prompts FILE.jsonl."
        )
    pools = builtin_pools() if chosen.prompts is None else file_pools(chosen.prompts)
    require_conditions(pools, options.conditions)
    sweeps = []
    for path in filter(None, (chosen.sweep, chosen.sweep_16_bits)):
        try:
            sweeps.append(SweepResult.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise ContrastError(
                f"{path} cannot be read as a sweep: give the sweep.json of heretic-contrast sweep."
            ) from error
    folder = resolve_model(chosen.model)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ContrastError(
            f"The model {chosen.model} could not be loaded: check its name or path."
        ) from error
    if torch.cuda.is_available():
        loaded = loaded.to("cuda")
    name = chosen.name or chosen.output.stem
    model = wrap(loaded, tokenizer, name=name, batch_size=chosen.batch_size)
    work = chosen.work or chosen.output.with_suffix(".work")
    require_own_sweep(model, sweeps[0], chosen.sweep)
    with progress_bar() as show:
        results = measure_study(model, pools, options, work, log, show, *sweeps)
    write_text_atomically(
        chosen.output, json.dumps(results, sort_keys=True, separators=(",", ":")) + "\n"
    )
    log(f"Results written to {chosen.output}; {work} can be removed.")
