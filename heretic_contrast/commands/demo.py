# SPDX-License-Identifier: AGPL-3.0-or-later

"""`heretic-contrast demo`: the whole way on the built-in model, headless."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.markup import escape

from ..builtin import REFUSER, refuser_pool
from ..errors import ContrastError
from ..files import write_text_atomically
from ..hosts.arguments import PROGRAM, normalize_arguments
from ..hosts.installed import installed_surface, require_heretic
from ..hosts.settings import HostSettings, contrast_table, file_table, is_typed, load_settings
from ..hosts.unused import config_file
from ..outputs import json_text, require_writable_file
from ..prompts import Prompt, load_pool

MAX_RESPONSE_LENGTH = 24
"""Tokens that show whether a response of the built-in model refuses."""


class DemoSettings(HostSettings):
    """Settings of `demo`."""

    model: str = REFUSER
    """The built-in model."""

    output: str | None = Field(None, exclude=True)
    """Directory for the saved model, the directions and summary.json."""

    n_trials: int = 40
    """Number of trials."""

    n_startup_trials: int = 20
    """Number of trials that sample randomly."""


def main(arguments: Sequence[str]) -> None:
    """Uses the preset `paper-unmatched`, unless another is given. Raises `ContrastError` when the output does not work."""

    require_heretic("demo", arguments)
    started = time.perf_counter()
    arguments = ["--model", REFUSER, *arguments]
    given = set(contrast_table(config_file()))
    sys.argv = [PROGRAM, *normalize_arguments(DemoSettings, arguments)]
    names = {"preset", "directions"}
    # An environment variable may hold them, too.
    given |= {n for n in names if is_typed("contrast", n) or file_table("contrast", n)}
    if not given & names:
        arguments = ["--contrast.preset", "paper-unmatched", *arguments]
    settings = load_settings(DemoSettings, f"{PROGRAM} demo", arguments)
    if not settings.output:
        raise ContrastError("The demo needs a place for its results: give --output DIR.")
    output = Path(settings.output)
    written = output / "summary.json"
    require_writable_file(written)
    # What the user gave comes last and wins.
    flags = [*headless_arguments(settings, output), *arguments]
    settings = load_settings(DemoSettings, PROGRAM, flags)
    if settings.model_action != "save":
        raise ContrastError("The demo judges the model that it saves: leave --model-action out.")
    from ..modifier import ContrastAbliteration

    if installed_surface() == "2.0":
        from ..hosts.heretic20 import count_refusals, run
    else:
        from ..hosts.evaluator import count_refusals
        from ..hosts.heretic14 import run
    # That of an earlier model says nothing about the one that is saved now.
    written.unlink(missing_ok=True)
    run(settings, ContrastAbliteration)

    summary = judge(settings, count_refusals)
    summary["model_directory"] = settings.save_directory
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_text_atomically(written, json_text(summary, sort_keys=False))
    show(summary, output)


def headless_arguments(settings: DemoSettings, output: Path) -> list[str]:
    return [
        "--seed=0",
        f"--n-trials={settings.n_trials}",
        f"--n-startup-trials={settings.n_startup_trials}",
        "--batch-size=64",
        f"--max-response-length={MAX_RESPONSE_LENGTH}",
        # Given, so that no forward pass looks for one: the refuser's responses have none.
        "--response-prefix=",
        "--checkpoint-action=restart",
        "--trial-index=0",
        "--model-action=save",
        "--export-strategy=merge",
        f"--save-directory={output / 'model'}",
        f"--study-checkpoint-dir={output / 'checkpoints'}",
        f"--contrast.save-directions={output / 'directions.safetensors'}",
    ]


def judge(
    settings: HostSettings,
    count_refusals: Callable[[HostSettings, Sequence[Prompt], Sequence[str]], int],
) -> dict[str, Any]:
    """Returns refusals and the first token's KL divergence (nats) on held-out prompts, by plain transformers."""

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..directions.directions import Directions
    from ..hosts.surface import wrap

    pools = {
        name: load_pool(refuser_pool(name, "test"), name)
        for name in ("harmful", "matched", "harmless")
    }
    saved, directions_file = settings.save_directory, settings.contrast.save_directions
    # The demo's arguments name both, and what the user gave takes their place.
    assert saved is not None and directions_file is not None
    refusals: dict[str, dict[str, int]] = {}
    first_tokens = {}
    for name, folder in (("original", settings.model), ("modified", saved)):
        model = wrap(
            AutoModelForCausalLM.from_pretrained(folder),
            # None is saved with an adapter.
            AutoTokenizer.from_pretrained(settings.model),
            name=name,
            batch_size=64,
        )
        refusals[name] = {
            pool: count_refusals(settings, prompts, model.generate(prompts, MAX_RESPONSE_LENGTH))
            for pool, prompts in pools.items()
        }
        with torch.no_grad():
            logits = model.model(**model.tokenize(pools["harmless"]), logits_to_keep=1).logits
        first_tokens[name] = torch.log_softmax(logits[:, -1].float(), dim=-1)
    base, modified = first_tokens["original"], first_tokens["modified"]
    divergence = (base.exp() * (base - modified)).sum(dim=-1).mean()
    directions = Directions.load(directions_file)
    return {
        "base_refusals": refusals["original"]["harmful"],
        "refusals": refusals["modified"]["harmful"],
        "n_prompts": len(pools["harmful"]),
        "base_false_refusals": refusals["original"]["matched"] + refusals["original"]["harmless"],
        "false_refusals": refusals["modified"]["matched"] + refusals["modified"]["harmless"],
        "n_harmless_prompts": len(pools["matched"]) + len(pools["harmless"]),
        "kl_divergence": float(divergence),
        # As the file says, where they were taken from one.
        "baseline": directions.settings.get("baseline", settings.contrast.baseline),
        "n_directions": directions.n_directions,
    }


def show(summary: dict[str, Any], output: Path) -> None:
    from rich.table import Column, Table

    from ..hosts.surface import log

    numbers = (Column(name, justify="right") for name in ("Original", "Modified"))
    title = "Held-out prompts, judged on the saved model"
    table = Table("Measurement", *numbers, title=title)
    for kind, prefix in (("harmful", ""), ("harmless", "false_")):
        total = summary["n_prompts" if kind == "harmful" else "n_harmless_prompts"]
        counts = (summary[f"base_{prefix}refusals"], summary[f"{prefix}refusals"])
        table.add_row(f"Refused, of {total} {kind}", *map(str, counts))
    table.add_row("KL divergence of the first token", "0", f"{summary['kl_divergence']:.4f}")
    log()
    log(table)
    log(f"Finished in {summary['seconds']:.0f} s. Everything is in [bold]{escape(str(output))}[/].")
