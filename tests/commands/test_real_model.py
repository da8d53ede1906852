# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The whole pipeline on a real language model that refuses: see examples/real-model.md.

    HERETIC_CONTRAST_REAL_MODEL=FOLDER pytest -m real_model

`FOLDER` holds the model. Its prompts are those of `smollm2-refuser/prompts.jsonl` in the research data.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic_contrast.directions.directions import Directions
from heretic_contrast.language_model import LanguageModel
from heretic_contrast.prompts import Prompt
from heretic_contrast.tiers.coherence import is_coherent
from heretic_contrast.tiers.responses import Tier, classify_response

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.timeout(3600),
    pytest.mark.xdist_group("real_model"),
]

BASELINES = ("unmatched", "matched", "mixed", "nearest", "residualized")

MAXIMUM_MEMORY = 6 * 10**9
"""Bytes that no process may exceed."""

RESPONSE_LENGTH = 24


@pytest.fixture(scope="module")
def folder() -> str:
    """The folder of the model."""

    path = os.environ.get("HERETIC_CONTRAST_REAL_MODEL")
    if path is None:
        pytest.skip("needs the model named by HERETIC_CONTRAST_REAL_MODEL")
    return str(Path(path).resolve())


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[str, str]:
    """Text files with one prompt per line: harmful and general harmless prompts, for fitting and for judging."""

    directory = tmp_path_factory.mktemp("pools")
    lines = (shared_data / "smollm2-refuser" / "prompts.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = {}
    for label, source in (("harmful", None), ("harmless", "Alpaca")):
        for split, count in (("train", 150), ("test", 40)):
            texts = [
                " ".join(row["text"].split())
                for row in rows
                if (row["label"], row["split"]) == (label, split)
                and source in (None, row["source"])
            ]
            path = directory / f"{label}-{split}.txt"
            path.write_text("\n".join(texts[:count]) + "\n", "utf-8")
            found[f"{label}-{split}"] = str(path)
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is written; the cache of residuals is shared."""

    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module", autouse=True)
def memory_stays_below_the_limit() -> Iterator[None]:
    """Checks the largest resident set of all commands that the module has run."""

    yield
    # Linux counts kilobytes.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MAXIMUM_MEMORY


def run(work: Path, *arguments: str) -> str:
    """Runs heretic-contrast, and returns what it printed."""

    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            "from heretic_contrast.cli import main; main()",
            *arguments,
            "--response-prefix=",
            "--seed=0",
        ],
        env={**os.environ, "XDG_CACHE_HOME": str(work / "cache"), "COLUMNS": "200"},
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def prompt_arguments(pools: dict[str, str]) -> list[str]:
    return [
        f"--bad-prompts.dataset={pools['harmful-train']}",
        f"--good-prompts.dataset={pools['harmless-train']}",
        f"--bad-evaluation-prompts.dataset={pools['harmful-test']}",
        f"--good-evaluation-prompts.dataset={pools['harmless-test']}",
        "--contrast.small-classes=merge",
    ]


def wrapped(folder: str) -> LanguageModel:
    """Returns a model as plain transformers loads it."""

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from heretic_contrast.hosts.surface import wrap

    return wrap(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        name="real model",
    )


def refused(model: LanguageModel, prompts: list[Prompt]) -> list[bool]:
    """Returns whether each prompt is refused."""

    responses = model.generate(prompts, RESPONSE_LENGTH)
    return [
        classify_response(prompt.text, response) is Tier.REFUSE
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def test_every_baseline_is_extracted(folder: str, pools: dict[str, str], work: Path) -> None:
    tensors = {}
    for baseline in BASELINES:
        path = work / f"{baseline}.safetensors"
        run(
            work,
            "extract",
            folder,
            *prompt_arguments(pools),
            f"--contrast.baseline={baseline}",
            f"--output={path}",
        )
        directions = Directions.load(path)
        n_layers, n_directions, hidden_size = directions.tensor.shape
        assert (n_layers, hidden_size) == (31, 576) and n_directions >= 2
        torch.testing.assert_close(
            directions.tensor[1:].norm(dim=-1), torch.ones(n_layers - 1, n_directions)
        )
        tensors[baseline] = directions.tensor
    for baseline in BASELINES[1:]:
        cosines = (tensors[baseline] * tensors["unmatched"]).sum(dim=-1)
        assert cosines[1:].mean() < 0.999


def test_sweep_finds_functional_layers(folder: str, pools: dict[str, str], work: Path) -> None:
    output = work / "sweep"
    run(
        work,
        "sweep",
        folder,
        *prompt_arguments(pools),
        "--contrast.preset=paper-unmatched",
        "--layers=12,22",
        "--weights=[0.5,1.2]",
        "--strength=weight",
        "--n-canaries=4",
        "--n-references=8",
        "--kl-tokens=16",
        f"--sweep-response-length={RESPONSE_LENGTH}",
        f"--output={output}",
    )
    result: dict[str, Any] = json.loads((output / "sweep.json").read_text("utf-8"))
    # Two configurations (the other one is the random control), two layers, two weights, one pair of layers each.
    assert len([cell for cell in result["cells"] if len(cell["layers"]) == 1]) >= 8
    assert any(
        layer["functional"]
        for layer in result["layers"]
        if layer["configuration"] == "paper-unmatched"
    )
    assert (output / "report.html").stat().st_size > 10_000


def test_saved_model_refuses_less_and_still_chats(
    folder: str, pools: dict[str, str], work: Path
) -> None:
    run(
        work,
        *prompt_arguments(pools),
        f"--model={folder}",
        "--contrast.preset=paper-unmatched",
        "--n-trials=10",
        "--n-startup-trials=6",
        "--batch-size=32",
        f"--max-response-length={RESPONSE_LENGTH}",
        "--checkpoint-action=restart",
        "--trial-index=0",
        "--model-action=save",
        "--export-strategy=merge",
        f"--save-directory={work / 'model'}",
        f"--study-checkpoint-dir={work / 'checkpoints'}",
    )
    harmful = [Prompt(text) for text in Path(pools["harmful-test"]).read_text("utf-8").splitlines()]
    before = refused(wrapped(folder), harmful)
    modified = wrapped(str(work / "model"))
    after = refused(modified, harmful)
    assert sum(before) >= len(harmful) / 2
    assert sum(after) <= sum(before) / 2
    (answer,) = modified.generate([Prompt("Name three kinds of fruit.")], RESPONSE_LENGTH)
    assert len(answer.split()) >= 3 and is_coherent(answer)
