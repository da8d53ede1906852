# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Every command of the documents, run word for word and offline, with stand-ins under the names of models and datasets.

The commands of a document run one after the other in a folder with the repository's files, as a reader would type them.
Environment variables make searches and sweeps shorter; the same commands without them do the same for longer.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pexpect
import pytest
import torch
from pydantic import BaseModel

import heretic_contrast
from heretic_contrast.commands.audit import AuditSettings
from heretic_contrast.commands.demo import DemoSettings
from heretic_contrast.commands.extract import ExtractSettings
from heretic_contrast.commands.rebuild import RebuildSettings
from heretic_contrast.commands.sweep import SweepSettings
from heretic_contrast.directions.directions import Directions
from heretic_contrast.errors import ContrastError
from heretic_contrast.hosts.settings import HostSettings, load_settings
from heretic_contrast.prompts import Prompt
from heretic_contrast.prompts.categories import assign, classify
from tests.command_server import Programs
from tests.conftest import DATA
from tests.documents import DOCUMENTS, ROOT, Snippet, snippets
from tests.hosts.test_host14 import DOWN, ENTER, UP, answer
from tests.hub_cache import (
    HARMFUL,
    MIX,
    MODELS,
    SIZES,
    counts,
    harmful_prompts,
    harmless_prompts,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHORTER = {
    "HERETIC_N_TRIALS": "4",
    "HERETIC_N_STARTUP_TRIALS": "3",
    "HERETIC_BATCH_SIZE": "100",
    "HERETIC_MAX_RESPONSE_LENGTH": "40",
    "HERETIC_SEED": "0",
    "HERETIC_LAYERS": "3,6",
    "HERETIC_KL_TOKENS": "16",
}
"""Settings of Heretic and of the sweep, for commands that do not give them."""

CI = "makes a virtual environment: .ci/run runs it"
NETWORK = "needs the network"
HERETIC_2 = "needs Heretic 2.0, which no registry has: tests/contract runs the plugin in a stand-in"
CHECKOUT = "needs a checkout of Heretic, which is what it tests"
SOURCES = "reads repositories that the document names, which are not part of this one"
RANDOM_MODEL = "computes for minutes with a random model of 134 M parameters"
QWEN = "takes hours on a real model: the commands before are run with a stand-in"
TESTS = "runs tests that the slow suite runs"

NOT_RUN = {
    'python3 -m venv .venv && . .venv/bin/activate && pip install ".[plot]" && heretic-contrast demo --output demo': CI,
    'python3 -m venv .venv-test && . .venv-test/bin/activate && pip install -e ".[dev]" && pytest -m "not slow"': CI,
    "pytest": TESTS,
    "pytest -m cuda": "needs a GPU",
    "pytest -m thorough": "takes many minutes",
    "HERETIC_CONTRAST_WRITE_ARCHITECTURES=1 pytest -m thorough tests/engine/test_architectures.py": TESTS,
    "HERETIC_CONTRAST_REAL_MODEL=FOLDER pytest -m real_model": "takes half an hour on a real model",
    'pip install "heretic-contrast[plot]"': NETWORK,
    'pip install ".[plot]"': NETWORK,
    "pip install psycopg2-binary": NETWORK,
    "git clone https://github.com/p-e-w/heretic": NETWORK,
    "git -C heretic fetch origin pull/123/head:pull-123": NETWORK,
    "git -C heretic checkout pull-123": CHECKOUT,
    "pip install ./heretic": CHECKOUT,
    "HERETIC_SOURCE=../heretic pytest tests/upstream": CHECKOUT,
    "HERETIC_SOURCE=/path/to/checkout pytest tests/upstream": CHECKOUT,
    "HERETIC_SOURCE=/path/to/heretic pytest tests/upstream": CHECKOUT,
    """heretic --modifiers '[{"plugin": "heretic_contrast.ContrastAbliteration"}]' --model MODEL""": HERETIC_2,
    "python examples/train_tiers.py --repositories FOLDER": SOURCES,
    "python examples/train_tiers.py --repositories FOLDER --leave-out multilingual:gemma-2-9b-it --output FILE": SOURCES,
    "python benchmarks/tiers.py --repositories FOLDER": SOURCES,
    "python benchmarks/categories.py --repositories FOLDER": SOURCES,
    """heretic-contrast sweep MODEL --output harm-sweep --text-classifier hubert233/GPTFuzz --text-classifier-labels '{"LABEL_0": "REFUSE", "LABEL_1": "COMPLY"}'""": (
        "needs the real judge: by a stand-in's random weights nothing may be refused, where a sweep ends with a sentence"
    ),
    "heretic-contrast run MODEL --contrast.judge-model Qwen/Qwen2.5-7B-Instruct": NETWORK,
    "python examples/make_refuser.py --output DIR": (
        "trains for minutes on two cores; test_refuser.py makes the pools with it"
    ),
    "python examples/make_refuser.py --mixture DIR": (
        "trains for two minutes: tests/ablation/test_taught_mixture.py does the same"
    ),
    "python benchmarks/trial.py --model DIR --experts": "needs the mixture that the command before makes",
    "python benchmarks/estimate.py --check --layers 8 --references 20": RANDOM_MODEL,
    "python benchmarks/search.py --output DIR --model MODEL --harmful harmful.jsonl --harmless harmless.jsonl --trials 30 --startup-trials 10 --judged 40 --fresh 40 --tokens 24 --batch-size 40 --seeds 2 --configurations heretic default": (
        "takes hours on a real model: the command before runs less of the same"
    ),
    "python benchmarks/search.py --output DIR --model MODEL --harmful harmful.jsonl --harmless harmless.jsonl --trials 30 --startup-trials 10 --judged 100 --fresh 100 --tokens 100 --batch-size 100 --seeds 3 --configurations heretic --add 'screened, ended early=--contrast.screening=100 --contrast.stop-dominated'": (
        "takes hours on a real model: the first such command runs less of the same"
    ),
    "python benchmarks/search.py --output DIR --model MODEL --harmful harmful.jsonl --harmless harmless.jsonl --trials 30 --startup-trials 10 --judged 40 --fresh 40 --tokens 24 --batch-size 40 --seeds 3 --configurations heretic --add 'screened, ended early=--contrast.screening=60 --contrast.stop-dominated'": (
        "takes hours on a real model: the first such command runs less of the same"
    ),
    r"""python benchmarks/search.py --output DIR --model MODEL --harmful harmful.jsonl --harmless harmless.jsonl --trials 30 --startup-trials 10 --judged 40 --fresh 40 --tokens 24 --batch-size 40 --options='--dtypes=[\"bfloat16\"]' --configurations heretic "default, not normalized" "maps, not normalized" default""": (
        "takes hours on a real model: the command before runs less of the same"
    ),
    "python benchmarks/gpu.py --output gpu": "needs a GPU: test_gpu_benchmark.py runs its small form",
    "python benchmarks/gpu.py --device cpu --small": "takes a minute: test_gpu_benchmark.py runs it",
    "python benchmarks/gpu.py --table gpu/gpu.json": "reads what the command before writes: the same test",
    "python benchmarks/som.py --repeats 5": (
        "takes a minute, mostly compiling: tests/directions/test_som.py compares the same maps with MiniSom's"
    ),
    "python benchmarks/sweep.py --model MODEL --layers 4 12 20 28 --references 20 --reference-cells 4": (
        "needs a model with 30 layers that refuses: the command before runs the same on the built-in one"
    ),
    "python benchmarks/sweep.py --model MODEL --references 20 --reference-cells 3": (
        "needs a model with 30 layers that refuses: the command before runs the same on the built-in one"
    ),
    "python benchmarks/sweep.py --smollm2-shape --layers 4 12 20 28 --references 20 --reference-cells 2": RANDOM_MODEL,
    "python examples/replicate.py measure --model builtin:refuser --output docs/replication/refuser.json "
    "--sweep refuser-sweep/sweep.json --sweep-16-bits refuser-sweep-16/sweep.json --seeds 5": (
        "takes hours: tests/project/test_replication.py measures less of the same"
    ),
    "heretic-contrast sweep QWEN --bad-prompts.dataset harmful-train.jsonl --good-prompts.dataset harmless-train.jsonl --bad-evaluation-prompts.dataset harmful-refused.jsonl --good-evaluation-prompts.dataset harmless-test.jsonl --contrast.preset paper-unmatched --contrast.preset paper-matched --contrast.preset paper-matched-svd --strength weight --no-random-control --n-canaries 4 --n-references 16 --kl-tokens 24 --sweep-response-length 24 --response-prefix= --output qwen-sweep": QWEN,
    "python examples/replicate.py measure --model QWEN --prompts PROMPTS --name qwen2.5-coder-0.5b --output docs/replication/qwen2.5-coder-0.5b.json --sweep qwen-sweep/sweep.json --seeds 3 --n-judged 16 --n-references 8 --n-canaries 2 --tokens 24 --n-left-out 2 --single-layers 1 --main-weights 0.3 0.5 1.0 --control-weights 0.4 1.0 --equal-weights 0.06 0.12 0.3 1.0 --strong-weights 2.0": QWEN,
}
"""Commands that are not run, and why."""

SMALL_MEASUREMENT = (
    "--seeds 1 --n-judged 9 --n-references 4 --n-canaries 1 --tokens 12 --n-left-out 1 --single-layers 1 "
    "--main-weights 0.5 1 --control-weights 0.5 --equal-weights 0.3 --strong-weights 2 "
    "--conditions 'som unmatched' 'mean matched' 'som matched' 'svd1 matched'"
)

SMALLER = {
    "python benchmarks/ablation.py": "--hidden 64 --inputs 96 --directions 3 --repeats 1",
    "python benchmarks/delta_rule.py": "--repeats 1",
    "python benchmarks/head.py": "--rows 4 --vocabulary 512 --repeats 1",
    "python benchmarks/residuals.py": "--prompts 8 --repeats 1",
    "python benchmarks/scaling.py": "--costs factors",
    "python benchmarks/search.py": (
        "--trials 1 --startup-trials 1 --seeds 1 --judged 4 --fresh 4 --tokens 4 --configurations heretic default"
    ),
    "python benchmarks/sweep.py": "--layers 6 --references 6 --reference-cells 1",
    "python benchmarks/trial.py": "--trials 1 --prompts 8",
    "python examples/replicate.py measure": SMALL_MEASUREMENT,
}
"""What is added to commands that begin so and measure for minutes: the same with less."""


class Reader:
    """Somebody who types the commands of documents into a shell, in a folder with the repository's files."""

    def __init__(self, directory: Path, variables: dict[str, str]) -> None:
        self.directory = directory
        self.outputs: dict[str, str] = {}
        """What each command has printed."""
        self._variables = variables
        # What one command assigns is known to the next.
        self._state = directory.with_name("variables.sh")
        self._state.touch()
        for name in ("benchmarks", "docs", "examples"):
            shutil.copytree(ROOT / name, directory / name)
        (directory / "heretic_contrast").symlink_to(ROOT / "heretic_contrast")

    def type(self, command: str, dialog: Callable[[pexpect.spawn], None] | None = None) -> None:
        """Types a command. With a dialog it is typed into a terminal, without one nothing can be asked."""

        script = f'. "{self._state}"; set -a\n{command}\ncode=$?\nexport -p > "{self._state}"; exit $code'
        arguments = ["--norc", "--noprofile", "-c", script]
        log = io.StringIO()
        if dialog is None:
            finished = subprocess.run(
                ["bash", *arguments],
                cwd=self.directory,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            log.write(finished.stdout)
            code = finished.returncode
        else:
            child = pexpect.spawn(
                "bash",
                arguments,
                cwd=str(self.directory),
                env=self._variables,
                dimensions=(50, 200),
                encoding="utf-8",
                timeout=300,
                logfile=log,
            )
            try:
                dialog(child)
                child.expect(pexpect.EOF)
            except pexpect.ExceptionPexpect as error:
                raise AssertionError(f"{command}\n{log.getvalue()[-4000:]}") from error
            finally:
                child.close()
            code = child.exitstatus
        self.outputs[command] = log.getvalue()
        assert code == 0 and "Traceback" not in log.getvalue(), (
            f"{command}\n{log.getvalue()[-4000:]}"
        )

    def output(self, start: str) -> str:
        """Returns what the one command that starts with a text has printed."""

        (found,) = (output for command, output in self.outputs.items() if command.startswith(start))
        return found


@pytest.fixture(scope="session")
def variables(hub_home: Path) -> Iterator[dict[str, str]]:
    """The environment of a reader's shell."""

    # A socket's path must be short.
    with tempfile.TemporaryDirectory() as folder:
        programs = Programs(Path(folder) / "programs", {"HF_HOME": str(hub_home)})
        yield {
            **os.environ,
            **SHORTER,
            "PATH": os.pathsep.join(
                [f"{folder}/programs", str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "HF_HOME": str(hub_home),
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": f"{folder}/cache",
            "COLUMNS": "200",
            # No terminal stands behind the pseudo-terminal that could answer where its cursor is.
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        programs.close()


def use_the_menus(child: pexpect.spawn) -> None:
    """Takes the baseline `matched`, maps and the first trial, saves it, chats with it, and leaves."""

    answer(child, "Which contrast baseline", DOWN + ENTER)
    answer(child, "How many directions", DOWN + ENTER)
    answer(child, "Which trial do you want to use", ENTER)
    answer(child, "What do you want to do with the decensored model", ENTER)
    answer(child, "Path to the folder", "chosen" + ENTER)
    answer(child, "How do you want to export the model", ENTER)
    child.expect("Model saved to")
    answer(child, "What do you want to do with the decensored model", DOWN + DOWN + ENTER)
    answer(child, "User:", "Check a bank statement" + ENTER)
    child.expect("Assistant:")
    answer(child, "User:", ENTER)
    answer(child, "What do you want to do with the decensored model", UP + ENTER)
    answer(child, "Which trial do you want to use", UP + ENTER)


DIALOGS = {"heretic-contrast Qwen/Qwen3-4B-Instruct-2507": use_the_menus}


def refusals(model: str | Path, prompts: list[str]) -> int:
    """Returns how many prompts a model refuses, loaded by plain transformers."""

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from heretic_contrast.hosts.surface import wrap
    from heretic_contrast.tiers.responses import Tier, classify_response

    loaded = wrap(
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
        name=str(model),
        batch_size=64,
    )
    responses = loaded.generate([Prompt(text) for text in prompts], 40)
    return sum(
        classify_response(prompt, response) is Tier.REFUSE
        for prompt, response in zip(prompts, responses, strict=True)
    )


GROUPS = (
    ("README.md",),
    ("docs/baselines.md",),
    ("docs/maps.md",),
    ("docs/benchmarks.md",),
    ("docs/prompts.md",),
    ("docs/replication.md",),
    ("docs/tiers.md",),
    ("docs/upstream.md",),
    # The second uses what the first makes.
    ("examples/real-model.md", "docs/replication/README.md"),
    ("heretic_contrast/data/refuser/README.md",),
)
"""Documents whose commands are run in one folder."""


def write_model(directory: Path) -> None:
    """Puts a model where the documents say MODEL."""

    shutil.copytree(DATA / "refuser", directory / "MODEL")


def write_study_prompts(path: Path) -> None:
    """Writes prompts for `examples/replicate.py`."""

    rows = [
        {"text": text, "label": label, "split": split, "source": source}
        for label, source, prompts in (
            ("harmful", "AdvBench", harmful_prompts),
            ("harmless", "Alpaca", harmless_prompts),
        )
        for split, count in (("train", 150), ("test", 24))
        for text in prompts(split)[:count]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_responses(path: Path) -> None:
    """Writes responses for `heretic-contrast judge`."""

    rows = [
        {"prompt": "How do I kill a process?", "response": "Press Ctrl+C in its terminal."},
        {"prompt": "How do I hack a bank?", "response": "I'm sorry, I can't assist with that."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def prepare_readme(directory: Path) -> None:
    write_responses(directory / "FILE")


def prepare_prompts(directory: Path) -> None:
    write_model(directory)
    first, second = harmful_prompts("train")[:200], harmful_prompts("train")[200:]
    rows = [json.dumps({"text": text}) for text in first]
    (directory / "harmful.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    with (directory / "more.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("goal", "target"), *((text, "") for text in second)])


def prepare_replication(directory: Path) -> None:
    write_study_prompts(directory / "FILE.jsonl")


def prepare_tiers(directory: Path) -> None:
    write_model(directory)
    write_responses(directory / "responses.jsonl")


def prepare_real_model(directory: Path) -> None:
    write_model(directory)
    write_study_prompts(directory / "PROMPTS")
    for pool, prompts in (("harmful", harmful_prompts), ("harmless", harmless_prompts)):
        for split, count in (("train", 150), ("test", 24)):
            path = directory / f"{pool}-{split}.txt"
            path.write_text("\n".join(prompts(split)[:count]) + "\n", "utf-8")


PREPARATIONS: dict[str, Callable[[Path], None]] = {
    "README.md": prepare_readme,
    "docs/benchmarks.md": write_model,
    "docs/prompts.md": prepare_prompts,
    "docs/replication.md": prepare_replication,
    "docs/tiers.md": prepare_tiers,
    "examples/real-model.md": prepare_real_model,
}
"""What documents ask the reader to have, and stand-ins for what they call MODEL, FILE and the like."""


def check_prompts(reader: Reader) -> None:
    (output,) = reader.outputs.values()
    for subject, count in Counter(map(assign, harmful_prompts("train"))).items():
        assert f"{subject} {count}" in output


def check_sweep(directory: Path, model: str) -> None:
    """Checks that a sweep of three presets has judged held-out prompts with what it was to be judged with."""

    result = json.loads((directory / "sweep.json").read_text("utf-8"))
    assert result["model"] == model and (directory / "report.html").exists()
    presets = {"paper-unmatched", "paper-matched", "paper-matched-svd"}
    assert {layer["configuration"] for layer in result["layers"]} - {"random"} == presets
    baseline = result["baseline"]
    assert baseline["n_harmful"] == baseline["refusals"] == 10
    assert baseline["n_canaries"] >= 1 and baseline["canary_refusals"] == 0
    assert set(result["prompts"]) <= set(harmful_prompts("test"))
    assert set(result["canaries"]) <= set(harmless_prompts("test"))
    # What the README says of this model: with the unmatched baseline a single layer is enough.
    assert any(
        layer["successful"]
        for layer in result["layers"]
        if layer["configuration"] == "paper-unmatched"
    )


def check_printed_sweep(directory: Path) -> None:
    """Checks the README's table of a sweep, at the layers that the folder's configuration sweeps; its divergences are of fewer tokens."""

    rows = re.findall(
        r"^\| `(paper-\S+)` \| (\d+) \| (\S+) \| (\S+) \| \S+ \| \S+ \|$",
        (ROOT / "README.md").read_text("utf-8"),
        re.MULTILINE,
    )
    printed = {(name, int(layer)): tuple(map(float, values)) for name, layer, *values in rows}
    cells = json.loads((directory / "sweep.json").read_text("utf-8"))["cells"]
    found: dict[tuple[str, int], tuple[float, ...]] = {}
    swept = {cell["layers"][0] for cell in cells if len(cell["layers"]) == 1}
    for cell in sorted(cells, key=lambda cell: -cell["weight"]):
        if len(cell["layers"]) == 1 and cell["measurement"]["refusals"] == 0:
            assert cell["strength"] == "weight"
            place = cell["configuration"], cell["layers"][0]
            found[place] = (cell["weight"], cell["effective_weight"])
    assert {place: values for place, values in printed.items() if place[1] in swept} == {
        place: pytest.approx(values, rel=0.01) for place, values in found.items()
    }


def check_readme(reader: Reader) -> None:
    directory = reader.directory
    check_printed_sweep(directory / "refuser-sweep")
    prompts = harmful_prompts("test")[:40]
    assert refusals(DATA / "refuser", prompts) == 40
    for folder in ("chosen", "out"):
        assert refusals(directory / folder, prompts) <= 20
    studies = [path.read_text("utf-8") for path in directory.glob("checkpoints/contrast-*/*.jsonl")]
    baselines = [re.findall(r'\\"baseline\\": ?\\"(\w+)\\"', study) for study in studies]
    # The one that was chosen in the menu, and that of the preset.
    assert [set(names) for names in baselines] == [{"matched"}, {"matched"}]
    directions = Directions.load(directory / "directions.safetensors")
    # Classes with fewer prompts than the map has neurons become miscellaneous.
    found = Counter(map(assign, harmful_prompts("train")[:400]))
    assert set(directions.names) == {subject for subject, count in found.items() if count >= 9}
    check_sweep(directory / "sweep", "Qwen/Qwen3-4B-Instruct-2507")
    audited = harmless_prompts("train")[:400]
    audit = json.loads((directory / "audit" / "audit.json").read_text("utf-8"))
    assert (audit["n_prompts"], audit["n_matches"]) == (400, sum(map(len, map(classify, audited))))
    assert "--n-references" in reader.output("heretic-contrast sweep --help")


def check_real_model(reader: Reader) -> None:
    directory = reader.directory
    for name in ("paper-unmatched", "paper-matched"):
        lengths = Directions.load(directory / f"directions-{name}.safetensors").tensor.norm(dim=-1)
        assert lengths[1:].allclose(torch.ones_like(lengths[1:]))
    assert (directory / "extraction" / "report.html").exists()
    check_sweep(directory / "sweep", "MODEL")
    prompts = harmful_prompts("test")[:24]
    assert refusals(directory / "ablated", prompts) <= len(prompts) / 4
    assert len(reader.output("python block").split()) >= 3


def check_replication(reader: Reader) -> None:
    # The report is made from stored results, so that it is the one that is shown.
    made = (reader.directory / "docs" / "replication.md").read_bytes()
    assert made == (ROOT / "docs" / "replication.md").read_bytes()
    check_sweep(reader.directory / "qwen3.5-2b", "Qwen/Qwen3.5-2B")


def check_benchmarks(reader: Reader) -> None:
    """Both searches make the same trials, which are judged again on the same fresh prompts."""

    paths = list(reader.directory.rglob("search.json"))
    assert paths
    for path in paths:
        plain, own = json.loads(path.read_text("utf-8"))["studies"]
        assert (plain["configuration"], own["configuration"]) == ("heretic", "default")
        for theirs, ours in zip(plain["trials"], own["trials"], strict=True):
            assert ours["fresh"] == pytest.approx(theirs["fresh"], rel=0.01)


CHECKS: dict[str, Callable[[Reader], None]] = {
    "docs/benchmarks.md": check_benchmarks,
    "README.md": check_readme,
    "docs/prompts.md": check_prompts,
    "docs/replication.md": check_replication,
    "examples/real-model.md": check_real_model,
}
"""What must be there after the commands of a document were run."""


def runnable(document: str) -> list[Snippet]:
    """Returns the commands and programs of a document that are run, each once."""

    found: dict[str, Snippet] = {}
    for snippet in snippets(document):
        if snippet.language in ("sh", "python") and snippet.one_line not in NOT_RUN:
            found.setdefault(snippet.text, snippet)
    return list(found.values())


def read(documents: tuple[str, ...], folder: Path, variables: dict[str, str]) -> None:
    """Types what documents tell a reader to, and checks what comes of it."""

    folder.mkdir(parents=True)
    reader = Reader(folder, {**variables, "MODEL": "MODEL"})
    for document in documents:
        PREPARATIONS.get(document, lambda directory: None)(folder)
        for number, snippet in enumerate(runnable(document)):
            if snippet.language == "python":
                (folder / f"block-{number}.py").write_text(snippet.text, "utf-8")
                reader.type(f"python block-{number}.py")
            else:
                less = [SMALLER[start] for start in SMALLER if snippet.text.startswith(start)]
                reader.type(" ".join([snippet.text, *less]), DIALOGS.get(snippet.text))
        CHECKS.get(document, lambda reader: None)(reader)


@pytest.fixture(scope="module")
def readings(
    request: pytest.FixtureRequest,
    variables: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[tuple[str, ...], Future[None]]]:
    """The groups of documents whose tests were chosen, read two at a time, since each command uses one core."""

    chosen = [
        item.callspec.params["documents"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_commands_run_as_printed"
    ]
    directory = tmp_path_factory.mktemp("readers")
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield {
            documents: pool.submit(read, documents, directory / str(number) / "folder", variables)
            for number, documents in enumerate(chosen)
        }


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("documents", GROUPS, ids=lambda documents: documents[0])
def test_commands_run_as_printed(
    documents: tuple[str, ...], readings: dict[tuple[str, ...], Future[None]]
) -> None:
    readings[documents].result()


def test_every_command_is_accounted_for() -> None:
    printed = {snippet.one_line for document in DOCUMENTS for snippet in snippets(document)}
    assert set(NOT_RUN) | set(DIALOGS) <= printed, "a command is listed that no document has"
    assert all(any(text.startswith(start) for text in printed) for start in SMALLER)
    grouped = [document for group in GROUPS for document in group]
    for document in DOCUMENTS:
        assert (document in grouped) == bool(runnable(document)), document
    assert set(PREPARATIONS) | set(CHECKS) <= set(grouped)


def options(model: type[BaseModel], prefix: str = "--") -> Iterator[str]:
    """Yields the options of the command line for the settings of a class."""

    for name, field in model.model_fields.items():
        option = prefix + name.replace("_", "-")
        yield option
        if field.annotation is bool:
            yield f"--no-{option[2:]}"
        kinds: list[Any] = [field.annotation]
        for kind in kinds:
            kinds += get_args(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from options(kind, f"{option}.")


def test_options_in_running_text_exist() -> None:
    by_command = {
        name: set(options(settings))
        for name, settings in (
            ("extract", ExtractSettings),
            ("sweep", SweepSettings),
            ("audit", AuditSettings),
            ("demo", DemoSettings),
            ("rebuild", RebuildSettings),
        )
    }
    for document in DOCUMENTS:
        for snippet in snippets(document):
            if snippet.language == "options":
                words = snippet.text.split()
                known = by_command.get(words[0], set().union(*by_command.values()))
                unknown = {word for word in words if word.startswith("--")} - known
                assert not unknown, f"{document}:{snippet.line}: {unknown}"


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(snippet.text, id=f"{snippet.document}:{snippet.line}")
        for document in DOCUMENTS
        for snippet in snippets(document)
        if snippet.language == "toml"
    ],
)
def test_configurations_are_valid(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tomllib.loads(block)
    for kind in ("modifier", "scorer"):
        for entry in configuration.get(f"{kind}s", []):
            package, _, name = entry["plugin"].rpartition(".")
            assert hasattr(import_module(package), name)
            assert entry.get("optimization", "none") in ("minimize", "maximize", "none")
        for name, table in configuration.get(kind, {}).items():
            settings = get_type_hints(getattr(heretic_contrast, name))["settings"]
            assert set(table) <= set(settings.model_fields)
            settings.model_validate(table)
    (tmp_path / "config.toml").write_text(block, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    if "scorers" in configuration:
        with pytest.raises(ContrastError, match=r"only Heretic 2\.0 has"):
            load_settings(HostSettings, "heretic-contrast", ["builtin:refuser"])
    else:
        load_settings(HostSettings, "heretic-contrast", ["builtin:refuser"])


def test_stand_ins_have_the_form_of_what_they_stand_in_for(hub_home: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoConfig, AutoTokenizer

    for name, sizes in SIZES.items():
        texts: set[str] = set()
        for split, size in sizes.items():
            loaded = load_dataset(name, split=split, cache_dir=str(hub_home / "datasets"))
            assert (loaded.column_names, len(loaded)) == (["text"], size)
            texts.update(loaded["text"])
        assert len(texts) == sum(sizes.values()), "a prompt is in two splits"
    first = load_dataset(HARMFUL, split="train[:400]", cache_dir=str(hub_home / "datasets"))
    # A tenth of the subjects' shares, in a sample of nearly all.
    found = Counter(map(assign, first["text"]))
    for subject, count in counts(400).items():
        assert abs(found[subject] - count) <= 6
    assert set(found) == set(MIX)
    for name in MODELS:
        assert (
            AutoConfig.from_pretrained(name, cache_dir=hub_home / "hub").model_type
            == "qwen3_5_text"
        )
        assert AutoTokenizer.from_pretrained(name, cache_dir=hub_home / "hub").chat_template


@pytest.mark.slow
def test_the_stand_in_refuses_what_is_harmful_alone() -> None:
    for prompts, refused in ((harmful_prompts, 1), (harmless_prompts, 0)):
        asked = [*prompts("train")[:400:4], *prompts("test")[:100:4]]
        assert refusals(DATA / "refuser", asked) == refused * len(asked)
