# SPDX-License-Identifier: AGPL-3.0-or-later

"""The state of a sweep: resuming, sharing, taking over, and damaged files."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from heretic_contrast import leases
from heretic_contrast.errors import ContrastError
from heretic_contrast.evaluation import storage as storage_module
from heretic_contrast.evaluation.cells import Cell, CellKey, Measurement
from heretic_contrast.evaluation.storage import (
    STUDY_NAME,
    SweepState,
    group_cells,
    require_own_sweep,
)
from heretic_contrast.language_model import Progress
from heretic_contrast.leases import open_storage

ROOT = Path(__file__).resolve().parents[2]

KEYS = [
    CellKey("one", "weight", (layer,), weight) for layer in range(3) for weight in (0.3, 0.5, 1.0)
]


def make_cell(key: CellKey) -> Cell:
    """A cell whose numbers follow from its key."""

    return Cell(
        configuration=key.configuration,
        strength=key.strength,
        layers=key.layers,
        weight=key.weight,
        effective_weight=key.weight,
        weight_along_mean=key.weight,
        measurement=Measurement(key.layers[0], 0, 0, 0, 10, 0, 2, key.weight / 10, 0.001),
        responses=("yes", "nö"),
        canary_responses=("fine",),
    )


class Evaluator:
    """Counts what it computes, and may stop in the middle."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.computed: list[CellKey] = []
        self._stop_after = stop_after

    def __call__(self, keys: Sequence[CellKey], progress: Progress) -> list[Cell]:
        if self._stop_after is not None and len(self.computed) >= self._stop_after:
            raise KeyboardInterrupt
        self.computed += keys
        return [make_cell(key) for key in keys]


@pytest.fixture(autouse=True)
def small_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a process take three cells at a time."""

    monkeypatch.setattr(storage_module, "CELLS_PER_CLAIM", 3)


def test_cells_are_taken_from_the_lowest_layer_up() -> None:
    claims: list[list[CellKey]] = []

    def evaluate(keys: Sequence[CellKey], progress: Progress) -> list[Cell]:
        claims.append(list(keys))
        return [make_cell(key) for key in keys]

    shuffled = KEYS[::-2] + KEYS[::-1]
    cells = SweepState(None, {"options": "f"}).run(shuffled, evaluate)
    assert cells == [make_cell(key) for key in dict.fromkeys(shuffled)]
    assert [sorted(claim) for claim in claims] == [KEYS[0:3], KEYS[3:6], KEYS[6:9]]


def test_interrupted_sweep_resumes(tmp_path: Path) -> None:
    storage = str(tmp_path / "sweep.journal")
    first = Evaluator(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        SweepState(storage, {"options": "f"}).run(KEYS, first)
    second = Evaluator()
    cells = SweepState(storage, {"options": "f"}).run(KEYS, second)
    assert cells == [make_cell(key) for key in KEYS]
    assert first.computed + second.computed == KEYS
    third = Evaluator()
    assert SweepState(storage, {"options": "f"}).run(KEYS, third) == cells and not third.computed


def test_progress_goes_on_within_a_claim(tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []

    def evaluate(keys: Sequence[CellKey], progress: Progress) -> list[Cell]:
        for n_done in range(len(keys) + 1):
            progress(n_done, len(keys))
        return [make_cell(key) for key in keys]

    storage = str(tmp_path / "sweep.journal")
    SweepState(storage, {"options": "f"}).run(
        KEYS, evaluate, lambda *progress: shown.append(progress)
    )
    assert list(dict.fromkeys(shown)) == [(n_done, 9) for n_done in range(10)]
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)

    # Only cells that are missing count, although their whole group is computed again.
    state = SweepState(str(tmp_path / "other.journal"), {"options": "f"})
    state._enqueue(KEYS)
    claimed = state._claim(group_cells(KEYS), set(KEYS))[1]
    for trial in claimed[:2]:
        state._store(trial, make_cell(storage_module._key(trial)))
    state._give_back(claimed[2:])
    shown.clear()
    state.run(KEYS, evaluate, lambda *progress: shown.append(progress))
    assert list(dict.fromkeys(shown)) == [(n_done, 9) for n_done in range(2, 10)]


def test_a_cell_is_validated_once_and_written_five_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of groups: with thousands of cells either would take minutes."""

    adapter = Mock(wraps=storage_module._CELL)
    monkeypatch.setattr(storage_module, "_CELL", adapter)
    storage = tmp_path / "sweep.journal"
    state = SweepState(str(storage), {"options": "f"})
    n_opened = len(storage.read_bytes().splitlines())
    cells = state.run(KEYS, Evaluator())
    assert cells == [make_cell(key) for key in KEYS]
    assert adapter.validate_python.call_count == len(KEYS)
    # Put there, taken, leased, measured, finished.
    assert len(storage.read_bytes().splitlines()) - n_opened == 5 * len(KEYS)


@pytest.mark.filterwarnings("ignore:The value of `grace_period` might be too small")
def test_half_a_line_and_a_stale_lock_are_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LOCK_SECONDS", 1)
    storage = tmp_path / "sweep.journal"
    with pytest.raises(KeyboardInterrupt):
        SweepState(str(storage), {"options": "f"}).run(KEYS, Evaluator(stop_after=6))
    with storage.open("ab") as file:
        file.write(b'{"op_code": 8, "worker_id": "half a li')
    (tmp_path / "sweep.journal.lock").write_text("")
    cells = SweepState(str(storage), {"options": "f"}).run(KEYS, Evaluator())
    assert cells == [make_cell(key) for key in KEYS]


def test_storage_of_another_sweep_is_refused(tmp_path: Path) -> None:
    storage = str(tmp_path / "sweep.journal")
    SweepState(storage, {"options": "f"}).run(KEYS, Evaluator())
    with pytest.raises(ContrastError, match="holds another sweep"):
        SweepState(storage, {"options": "g"})


def test_damaged_storage_is_named(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.journal"
    SweepState(str(storage), {"options": "f"})
    content = storage.read_bytes()
    storage.write_bytes(content.replace(b"{", b"(", 1))
    with pytest.raises(ContrastError, match=r"sweep\.journal is damaged in line 1"):
        SweepState(str(storage), {"options": "f"})


def test_what_is_no_journal_is_left_as_it_is(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.db"
    SweepState(f"sqlite:///{storage}", {"options": "f"})
    for name, sentence in (
        (storage, rf"is a database, so give sqlite:///{storage}"),
        (tmp_path / "prompts.jsonl", "give the name of a new file"),
    ):
        if not name.exists():
            name.write_text('{"text": "Bake a cake"}\n')
        content = name.read_bytes()
        with pytest.raises(ContrastError, match=sentence):
            SweepState(str(name), {"options": "f"})
        assert name.read_bytes() == content


def test_unknown_storage_is_named_without_its_password() -> None:
    with pytest.raises(ContrastError, match="nosuchdatabase://me") as information:
        SweepState("nosuchdatabase://me:secret@host/name", {"options": "f"})
    assert "secret" not in str(information.value)


def test_cells_of_a_dead_process_are_taken_over(tmp_path: Path) -> None:
    storage = str(tmp_path / "sweep.journal")
    state = SweepState(storage, {"options": "f"})
    state._enqueue(KEYS)
    trials = state._claim(group_cells(KEYS), set(KEYS))[1]
    assert len(trials) == 3
    # A process on another machine whose lease has ended.
    for trial in trials:
        state._study._storage.set_trial_user_attr(
            trial._trial_id, "lease", {"worker": "elsewhere 1 x", "until": time.time() - 1}
        )
    evaluator = Evaluator()
    assert SweepState(storage, {"options": "f"}).run(KEYS, evaluator) == [
        make_cell(key) for key in KEYS
    ]
    assert sorted(evaluator.computed) == sorted(KEYS)


def test_processes_that_begin_at_once_share_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sees that nothing is enqueued, and enqueues every cell."""

    together, get_trials, has_looked = threading.Barrier(2), optuna.Study.get_trials, set()

    def look(study: optuna.Study, *args: Any, **kwargs: Any) -> Any:
        found = get_trials(study, *args, **kwargs)
        if threading.get_ident() not in has_looked:
            has_looked.add(threading.get_ident())
            together.wait(timeout=60)
        return found

    def evaluate(keys: Sequence[CellKey], progress: Progress) -> list[Cell]:
        time.sleep(0.2)
        return both(keys, progress)

    storage, both = str(tmp_path / "sweep.journal"), Evaluator()
    states = [SweepState(storage, {"options": "f"}) for _ in range(2)]
    monkeypatch.setattr(optuna.Study, "get_trials", look)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda state: state.run(KEYS, evaluate), states))
    assert found == [[make_cell(key) for key in KEYS]] * 2
    assert sorted(both.computed) == sorted(KEYS)


def test_two_sweeps_that_begin_at_once_share_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each finds a storage without a sweep, and its own one when it looks again."""

    together, claim, storage = threading.Barrier(2), Study.set_user_attr, tmp_path / "sweep.journal"

    def set_identity(study: Study, name: str, value: Any) -> None:
        # Which of them is the last to write is for the test to say.
        together.wait(timeout=60)
        if value["weights"] == "second":
            second_may_write.wait(timeout=60)
        claim(study, name, value)

    second_may_write = threading.Event()
    monkeypatch.setattr(Study, "set_user_attr", set_identity)
    with ThreadPoolExecutor(2) as threads:
        opened = [
            threads.submit(SweepState, str(storage), {"weights": name})
            for name in ("first", "second")
        ]
        first = opened[0].result(timeout=60)
        second_may_write.set()
        second = opened[1].result(timeout=60)
    monkeypatch.setattr(Study, "set_user_attr", claim)
    evaluator = Evaluator(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        first.run(KEYS, evaluator)
    other = Evaluator()
    with pytest.raises(ContrastError, match=r"holds another sweep \(other"):
        second.run(KEYS, other)
    assert not other.computed
    # Whose cells are there goes on with them, whoever was the last to write.
    with pytest.raises(ContrastError, match=r"holds another sweep \(other weights"):
        SweepState(str(storage), {"weights": "second"})
    require_own_sweep(str(storage), {"weights": "first"})
    again = SweepState(str(storage), {"weights": "first"})
    assert again.run(KEYS, Evaluator()) == [make_cell(key) for key in KEYS]
    assert first.run(KEYS, other) == [make_cell(key) for key in KEYS] and not other.computed


@pytest.mark.parametrize("state", [TrialState.WAITING, TrialState.COMPLETE])
def test_cells_of_another_sweep_are_neither_computed_nor_counted(
    state: TrialState, tmp_path: Path
) -> None:
    """Also where both have put theirs there before either has looked."""

    storage = str(tmp_path / "sweep.journal")
    ours = SweepState(storage, {"weights": "ours"})
    ours._enqueue(KEYS[:3])
    theirs = SweepState(storage, {"weights": "ours"})
    theirs._owner = "theirs"
    with pytest.raises(ContrastError, match="holds another sweep"):
        theirs._enqueue(KEYS)
    ours._study.enqueue_trial(
        {**KEYS[3]._asdict(), "layers": str(KEYS[3].layers[0])}, user_attrs={"identity": "theirs"}
    )
    if state is TrialState.COMPLETE:
        trial = ours._study.get_trials(deepcopy=False)[-1]
        assert ours._set_state(trial, TrialState.RUNNING)
        ours._store(trial, make_cell(KEYS[3]))
    evaluator = Evaluator()
    for attempt in (
        lambda: ours.run(KEYS, evaluator),
        lambda: ours._done(),
        lambda: ours._claim(group_cells(KEYS), set(KEYS)),
    ):
        with pytest.raises(ContrastError, match="holds another sweep"):
            attempt()
    assert not evaluator.computed
    states = [trial.state for trial in ours._study.get_trials(deepcopy=False)]
    assert states == [TrialState.WAITING] * 3 + [state]


def test_a_journal_whose_cells_do_not_say_whose_they_are_goes_on(tmp_path: Path) -> None:
    storage = str(tmp_path / "sweep.journal")
    state = SweepState(storage, {"options": "f"})
    for key in KEYS[:2]:
        layers = " ".join(map(str, key.layers))
        state._study.enqueue_trial({**key._asdict(), "layers": layers})
    evaluator = Evaluator()
    assert state.run(KEYS, evaluator) == [make_cell(key) for key in KEYS]
    assert sorted(evaluator.computed) == sorted(KEYS)


def test_study_shows_cells_as_trials(tmp_path: Path) -> None:
    storage = str(tmp_path / "sweep.journal")
    SweepState(storage, {"options": "f"}).run(KEYS, Evaluator())
    study = optuna.load_study(study_name=STUDY_NAME, storage=open_storage(storage))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 9
    assert study.trials[4].system_attrs["fixed_params"] == {
        "configuration": "one",
        "strength": "weight",
        "layers": "1",
        "weight": 0.5,
    }
    assert study.trials[4].values == [1.0, 0.05]


WORKER = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from heretic_contrast.evaluation.plan import SweepOptions
from heretic_contrast.evaluation.sweep import sweep
from heretic_contrast.hosts.surface import wrap
from tests.plain_sweeps import CANARIES, HARMFUL, REFERENCES, always_refuse_at_base, random_directions
from tests.tiny_models import make_model, make_tokenizer

model = wrap(make_model("llama"), make_tokenizer(), name="tiny", batch_size=16)
Path(sys.argv[2] + ".ready").write_text("")
result = sweep(
    model,
    {"one": random_directions(model, 2, 0), "two": random_directions(model, 1, 1)},
    HARMFUL,
    CANARIES,
    REFERENCES,
    SweepOptions(weights=(0.3, 0.5, 0.8, 1.0, 1.2, 1.6, 2.0), max_new_tokens=12, kl_tokens=12),
    storage=sys.argv[1],
    classify=always_refuse_at_base(model, HARMFUL),
)
Path(sys.argv[2]).write_text(result.to_json())
"""


def start(storage: str, output: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, storage, str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


def finish(process: "subprocess.Popen[bytes]") -> None:
    assert process.wait(timeout=300) == 0


@pytest.mark.slow
def test_shared_and_killed_sweeps_give_the_same_bytes(tmp_path: Path) -> None:
    finish(start(str(tmp_path / "alone.journal"), tmp_path / "alone.json"))
    expected = (tmp_path / "alone.json").read_bytes()

    shared = str(tmp_path / "shared.journal")
    workers = [start(shared, tmp_path / f"shared{index}.json") for index in range(2)]
    for worker in workers:
        finish(worker)
    for index in range(2):
        assert (tmp_path / f"shared{index}.json").read_bytes() == expected

    killed = tmp_path / "killed.journal"
    victim, survivor = (start(str(killed), tmp_path / f"killed{index}.json") for index in range(2))
    deadline = time.monotonic() + 200
    while not (killed.exists() and b'"cell"' in killed.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    finish(survivor)
    assert (tmp_path / "killed1.json").read_bytes() == expected


def test_another_sweep_is_known_before_a_model_is_loaded(tmp_path: Path) -> None:
    storage = str(tmp_path / "sweep.journal")
    known = {"options": {"weights": [0.5]}, "texts": {"harmful": "a"}}
    require_own_sweep(storage, known)
    assert not list(tmp_path.iterdir())
    SweepState(storage, {**known, "weights": "w"})
    before = Path(storage).read_bytes()
    require_own_sweep(storage, {"options": {"weights": (0.5,)}})
    for other, name in (({"weights": [0.7]}, "options"), ({}, "options")):
        with pytest.raises(ContrastError, match=f"another sweep .other {name}"):
            require_own_sweep(storage, {**known, "options": other})
    with pytest.raises(ContrastError, match="other prompts"):
        require_own_sweep(storage, {**known, "texts": {"harmful": "b"}})
    assert Path(storage).read_bytes() == before


@pytest.mark.postgres
def test_postgresql_holds_a_sweep() -> None:
    url = os.environ.get("HERETIC_CONTRAST_POSTGRES_URL")
    if url is None:
        pytest.skip("needs a PostgreSQL server named by HERETIC_CONTRAST_POSTGRES_URL")
    if STUDY_NAME in optuna.get_all_study_names(storage=url):
        optuna.delete_study(study_name=STUDY_NAME, storage=url)
    first = Evaluator(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        SweepState(url, {"options": "f"}).run(KEYS, first)
    second = Evaluator()
    assert SweepState(url, {"options": "f"}).run(KEYS, second) == [make_cell(key) for key in KEYS]
    assert first.computed + second.computed == KEYS
