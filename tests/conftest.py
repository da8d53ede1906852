# SPDX-License-Identifier: AGPL-3.0-or-later

"""Fixtures that several test files share."""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Tests must never look anything up, and never touch the user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As many processes as cores run the tests: several threads in each would compete for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run and machine. Profile "thorough" tries many more; a slow test runs it.
settings.register_profile(
    "quick",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=500)
settings.load_profile(os.environ.get("HERETIC_CONTRAST_PROPERTIES", "quick"))

DATA = Path(__file__).resolve().parents[1] / "heretic_contrast" / "data"


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Spares what is there for good to the collections that Heretic makes for every batch."""

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gives all tests of a session one cache of their own."""

    directory = tmp_path_factory.getbasetemp() / "cache"
    directory.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))


def small_pool(directory: Path, pool: str, split: str, per_category: int) -> str:
    """Writes a JSON Lines file with a few prompts of each category."""

    seen: Counter[str] = Counter()
    lines = []
    source = DATA / "refuser_prompts" / pool / f"{split}.jsonl"
    for line in source.read_text(encoding="utf-8").splitlines():
        category = json.loads(line).get("category") or ""
        seen[category] += 1
        if seen[category] <= per_category:
            lines.append(line)
    path = directory / f"{pool}-{split}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


Refused = Callable[[Sequence[str]], str]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs the command line in the test's folder, which it leaves with code 2, and returns its one sentence."""

    def run(arguments: Sequence[str]) -> str:
        from heretic_contrast import cli

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["heretic-contrast", *arguments])
        with pytest.raises(SystemExit) as information:
            cli.main()
        assert information.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        (sentence,) = (line for line in error.splitlines() if line.startswith("Error: "))
        return sentence

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public research data that is not part of the repository."""

    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get("HERETIC_CONTRAST_SHARED_DATA", default))
    if not directory.is_dir():
        pytest.skip("needs the research data named by HERETIC_CONTRAST_SHARED_DATA")
    return directory


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random Llama, wrapped."""

    from heretic_contrast.hosts.surface import wrap
    from tests.tiny_models import make_model, make_tokenizer

    return wrap(make_model("llama"), make_tokenizer(), name="tiny-llama", batch_size=4)


@pytest.fixture(scope="session")
def tiny_hybrid() -> Any:
    """A random Qwen3.5 with linear and full attention, wrapped."""

    from heretic_contrast.hosts.surface import wrap
    from tests.tiny_models import make_model, make_tokenizer

    return wrap(make_model("qwen3_5"), make_tokenizer(), name="tiny-hybrid", batch_size=4)


@pytest.fixture(scope="session")
def refuser() -> Any:
    """The built-in refuser, wrapped."""

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from heretic_contrast.hosts.surface import wrap

    folder = DATA / "refuser"
    return wrap(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        name="builtin:refuser",
        batch_size=64,
    )


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for HF_HOME that has stand-ins for the models and datasets that the documents name."""

    from tests.hub_cache import write_home

    return write_home(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="session")
def command_server() -> Iterator[Any]:
    """Runs the command line without importing everything each time."""

    from tests.command_server import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole_runs(command_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The smallest runs, uninterrupted."""

    from tests.small_runs import WholeRuns

    return WholeRuns(command_server, tmp_path_factory.mktemp("whole"))
