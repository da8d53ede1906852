# SPDX-License-Identifier: AGPL-3.0-or-later

"""Damaged files, full disks and read-only places: a sentence, the good copy kept, and the next run works."""

import errno
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from heretic_contrast import cli, leases
from heretic_contrast.commands.doctor import cache_finding
from heretic_contrast.directions import residuals as residual_cache
from heretic_contrast.directions.directions import Directions
from heretic_contrast.errors import (
    ContrastError,
    ContrastWarning,
    find_cause,
    show_warnings_as_sentences,
)
from heretic_contrast.evaluation import storage as storage_module
from heretic_contrast.evaluation.cells import Cell, CellKey
from heretic_contrast.evaluation.storage import SweepState, group_cells
from heretic_contrast.files import write_text_atomically
from heretic_contrast.hosts.studies import repair_checkpoint
from heretic_contrast.journal import CheckedJournal
from heretic_contrast.language_model import Progress
from heretic_contrast.processes import is_dead, this_process
from heretic_contrast.prompts import Prompt
from tests.command_server import ROOT, Server
from tests.conftest import Refused
from tests.evaluation.test_storage import KEYS, Evaluator, make_cell
from tests.made_directions import make_directions, random_tensor
from tests.small_runs import WholeRuns
from tests.test_files import limited_file_size

CELLS = [make_cell(key) for key in KEYS]


def opened(storage: Path) -> SweepState:
    return SweepState(str(storage), {"options": "f"})


@pytest.fixture(autouse=True)
def small_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a process take three cells at a time."""

    monkeypatch.setattr(storage_module, "CELLS_PER_CLAIM", 3)


def flipped(content: bytes, position: int, generator: random.Random) -> bytes:
    """The content with one bit of one byte flipped."""

    changed = bytearray(content)
    changed[position] ^= 1 << generator.randrange(8)
    return bytes(changed)


def dead_process() -> str:
    """The name of a process of this machine that has ended."""

    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{this_process().rpartition(' ')[0]} {process.pid}"


# The journal of a sweep.


@pytest.mark.slow
def test_flipped_bits_of_a_journal_change_no_cell(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.journal"
    opened(storage).run(KEYS, Evaluator())
    content = storage.read_bytes()
    generator = random.Random(0)
    n_named = 0
    for position in generator.sample(range(len(content)), 40):
        damaged = flipped(content, position, generator)
        storage.write_bytes(damaged)
        try:
            cells = opened(storage).run(KEYS, Evaluator())
        except ContrastError as error:
            n_named += 1
            number = damaged[: len(content)].count(b"\n", 0, position) + 1
            assert f"{storage} is damaged in line {number}" in str(error)
            assert storage.read_bytes() == damaged
            # What the sentence says works.
            kept = damaged.split(b"\n")[: number - 1]
            storage.write_bytes(b"".join(line + b"\n" for line in kept))
            cells = opened(storage).run(KEYS, Evaluator())
        assert cells == CELLS
    assert n_named >= 38


@pytest.mark.slow
def test_a_journal_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.journal"
    opened(storage).run(KEYS, Evaluator())
    content = storage.read_bytes()
    for position in random.Random(0).sample(range(len(content)), 8):
        storage.write_bytes(content[:position])
        assert opened(storage).run(KEYS, Evaluator()) == CELLS
        assert opened(storage).run(KEYS, Evaluator(stop_after=0)) == CELLS


def test_half_a_line_of_another_process_harms_nobody(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.journal"

    def evaluate(keys: Sequence[CellKey], progress: Progress) -> list[Cell]:
        # Another process is killed in the middle of a write while this one computes.
        with storage.open("ab") as file:
            file.write(b'{"op_code":8,"worker_id":"half a li')
        return [make_cell(key) for key in keys]

    assert opened(storage).run(KEYS, evaluate) == CELLS
    assert opened(storage).run(KEYS, Evaluator(stop_after=0)) == CELLS


def test_a_journal_survives_a_full_disk(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.journal"
    with pytest.raises(KeyboardInterrupt):
        opened(storage).run(KEYS, Evaluator(stop_after=3))
    for room in (300, 1_500):
        limit = storage.stat().st_size + room
        with (
            limited_file_size(limit),
            pytest.raises(ContrastError, match=r"sweep\.journal could not be written"),
        ):
            opened(storage).run(KEYS, Evaluator())
        assert storage.read_bytes().endswith(b"}\n")
    evaluator = Evaluator()
    assert opened(storage).run(KEYS, evaluator) == CELLS
    assert not set(KEYS[:3]) & set(evaluator.computed)
    assert not list(tmp_path.glob("*.lock*"))


def test_a_storage_that_is_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match=r"directory"):
        opened(tmp_path)


def test_optuna_and_the_journal_read_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "study.jsonl")
    values = []
    for backend in (JournalFileBackend, CheckedJournal, JournalFileBackend, CheckedJournal):
        study = optuna.create_study(
            study_name="heretic", storage=JournalStorage(backend(path)), load_if_exists=True
        )
        assert [trial.value for trial in study.trials] == values
        trial = study.ask()
        values.append(trial.suggest_float("x", 0, 1) / 3)
        study.tell(trial, values[-1])


def test_only_processes_of_this_machine_are_known_to_be_dead() -> None:
    assert is_dead(dead_process())
    assert not is_dead(this_process())
    assert not is_dead("elsewhere " + dead_process().rpartition(" ")[2])
    assert not is_dead("")


def test_processes_of_another_container_are_not_known() -> None:
    # A host of the same name, whose processes are numbered anew.
    code = "from heretic_contrast.processes import this_process; print(this_process())"
    apart = [*"unshare --user --map-root-user --pid --fork --mount-proc".split(), sys.executable]
    try:
        found = subprocess.run([*apart, "-c", code], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if "unshare" in found.stderr:
        pytest.skip("needs namespaces")
    name, number = found.stdout.split()
    assert number == "1" and this_process().split()[0] != name
    assert not is_dead(f"{name} {dead_process().split()[1]}")


def make_claim(storage: Path) -> SweepState:
    """A state that has claimed the cells of one layer."""

    state = opened(storage)
    # A process that lives.
    state._leases.worker = f"{this_process().rpartition(' ')[0]} {os.getppid()} x"
    state._enqueue(KEYS)
    state._claim(group_cells(KEYS), set(KEYS))
    return state


def running(state: SweepState) -> list[Any]:
    return state._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def test_claimed_cells_say_whose_they_are(tmp_path: Path) -> None:
    # Otherwise a process that is killed before it computes holds them up for others.
    state = make_claim(tmp_path / "sweep.journal")
    assert len(running(state)) == 3
    for trial in running(state):
        assert trial.user_attrs["lease"]["worker"] == state._leases.worker


@pytest.mark.slow
def test_cells_that_a_dying_process_gave_back_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_claim(tmp_path / "sweep.journal")
    found: list[list[Cell]] = []

    def work() -> None:
        found.append(opened(tmp_path / "sweep.journal").run(KEYS, Evaluator()))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    # The worker has done the rest, and waits for the cells that the other process holds.
    while len(opened(tmp_path / "sweep.journal")._done()) < 6:
        time.sleep(0.05)
    # The other process is killed after it has given up its cells, and before it has enqueued them again.
    for trial in running(other):
        assert other._set_state(trial, TrialState.FAIL)
    worker.join(timeout=120)
    assert found == [CELLS]


def test_a_storage_that_fails_in_the_background_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
    storage = tmp_path / "sweep.journal"

    def evaluate(keys: Sequence[CellKey], progress: Progress) -> list[Cell]:
        with limited_file_size(storage.stat().st_size):
            time.sleep(0.3)
        return [make_cell(key) for key in keys]

    assert opened(storage).run(KEYS, evaluate) == CELLS
    assert shown == []


# The checkpoint of a search.


def make_checkpoint(path: Path, n_unfinished: int = 0) -> list[Any]:
    """Writes a checkpoint with three finished trials, and returns these."""

    study = optuna.create_study(
        study_name="heretic",
        storage=JournalStorage(CheckedJournal(str(path))),
        directions=["minimize", "minimize"],
    )
    study.set_user_attr("settings", "{}")
    study.set_user_attr("finished", False)
    for number in range(3):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("refusals", number)
        study.tell(trial, [number / 3, number / 7])
    for _ in range(n_unfinished):
        study.ask()
    return [(trial.params, trial.values) for trial in study.trials[:3]]


def read_checkpoint(path: Path) -> list[Any]:
    study = optuna.load_study(
        study_name="heretic", storage=JournalStorage(CheckedJournal(str(path)))
    )
    return [(trial.params, trial.values) for trial in study.trials]


def test_flipped_bits_of_a_checkpoint_change_no_trial(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    trials = make_checkpoint(path)
    content = path.read_bytes()
    generator = random.Random(1)
    for position in generator.sample(range(len(content)), 150):
        damaged = flipped(content, position, generator)
        path.write_bytes(damaged)
        try:
            repair_checkpoint(path)
        except ContrastError as error:
            assert f"{path} is damaged in line" in str(error)
            assert path.read_bytes() == damaged
        else:
            found = read_checkpoint(path)
            # Where the end of the last line is damaged, the last trial is unfinished.
            assert found == trials[: len(found)] and len(found) >= 2


def test_a_checkpoint_that_was_cut_off_keeps_finished_trials(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    trials = make_checkpoint(path)
    content = path.read_bytes()
    ends = [index + 1 for index, line in enumerate(content.splitlines()) if b'"values":[' in line]
    for position in range(0, len(content), 97):
        path.write_bytes(content[:position])
        repair_checkpoint(path)
        n_lines = content[:position].count(b"\n")
        n_finished = sum(end <= n_lines for end in ends)
        assert path.exists() == (n_finished > 0)
        if path.exists():
            assert read_checkpoint(path) == trials[:n_finished]


def test_a_checkpoint_survives_its_repair_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    trials = make_checkpoint(path, n_unfinished=1)
    content = path.read_bytes()
    # As a repair leaves them that was killed.
    (tmp_path / ".model.jsonl.repaired").write_bytes(content[:100])
    (tmp_path / ".model.jsonl.repaired.lock").write_text("")
    with limited_file_size(700), pytest.raises(ContrastError, match="could not be written"):
        repair_checkpoint(path)
    assert path.read_bytes() == content
    repair_checkpoint(path)
    assert read_checkpoint(path) == trials
    assert [item.name for item in tmp_path.iterdir()] == ["model.jsonl"]


# Directions files and cached residuals.


def saved_directions(path: Path) -> Directions:
    tensor = random_tensor(2, 2, 3)
    names = ("drugs", "fraud")
    provenance = {"model": "tiny", "fingerprint": None, "settings": {"baseline": "matched"}}
    options = {"names": names, "class_names": names, "provenance": provenance}
    hits = torch.arange(8).reshape(2, 2, 2)
    make_directions(tensor, tensor * 2, hits=hits, **options).save(path)
    return Directions.load(path)


def content_of(directions: Directions) -> tuple[Any, ...]:
    """Everything that a directions file says."""

    tensors = ("tensor", "class_directions", "mean_direction", "hits")
    return (
        [getattr(directions, name).tolist() for name in tensors],
        directions.names,
        directions.class_names,
        directions.aligned,
        directions.provenance,
    )


def test_no_flipped_bit_of_a_directions_file_is_believed_and_no_cut(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    expected = content_of(saved_directions(path))
    content = path.read_bytes()
    generator = random.Random(2)
    n_named = 0
    for position in range(len(content)):
        path.write_bytes(flipped(content, position, generator))
        try:
            found = Directions.load(path)
        except ContrastError as error:
            assert str(path) in str(error)
            n_named += 1
        else:
            # Spaces say nothing.
            assert content_of(found) == expected
    assert n_named > 0.95 * len(content)
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position])
        with pytest.raises(ContrastError):
            Directions.load(path)


@pytest.fixture
def cached(tmp_path: Path, tiny_llama: Any) -> Callable[[], torch.Tensor]:
    prompts = [Prompt(f"How do I bake {name}?") for name in ("bread", "a cake")]
    return lambda: residual_cache.cached_residuals(tiny_llama, prompts, tmp_path / "cache")


def test_no_flipped_bit_of_cached_residuals_is_believed(
    tmp_path: Path, cached: Callable[[], torch.Tensor], tiny_llama: Any
) -> None:
    expected = cached()
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    shape = (2, tiny_llama.n_layers + 1, tiny_llama.hidden_size)
    generator = random.Random(3)
    # The header, and a sample of the numbers.
    header = 8 + int.from_bytes(content[:8], "little")
    positions = [*range(header), *generator.sample(range(header, len(content)), 200)]
    n_refused = 0
    for position in positions:
        path.write_bytes(flipped(content, position, generator))
        found = residual_cache.load(path, shape)
        n_refused += found is None
        assert found is None or torch.equal(found, expected)
    assert n_refused > 0.95 * len(positions)
    assert residual_cache.load(path, (3, *shape[1:])) is None
    for damaged in (flipped(content, header + 5, generator), content[:-9], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        assert torch.equal(cached(), expected)
        assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, cached: Callable[[], torch.Tensor]
) -> None:
    (tmp_path / "cache").write_text("A file where the folder should be.")
    expected = cached()
    (tmp_path / "cache").unlink()
    with limited_file_size(500):
        assert torch.equal(cached(), expected)
    assert list((tmp_path / "cache").iterdir()) == []
    assert torch.equal(cached(), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_user_without_a_home_has_no_cache(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    homeless = RuntimeError("could not determine the home directory for '~/.cache'")
    monkeypatch.setattr("platformdirs.user_cache_dir", Mock(side_effect=homeless))
    prompts = [Prompt("How do I bake bread?")]
    found = residual_cache.cached_residuals(tiny_llama, prompts, None)
    assert torch.equal(found, tiny_llama.residuals(prompts))
    finding = cache_finding()
    assert not finding.fine and not finding.required and "residual-cache DIR" in finding.remedy


# Files and places.


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    dead = dead_process()
    leftover = tmp_path / f".sweep.json.abcd1234.{dead}.incomplete"
    others = [
        tmp_path / ".sweep.json.backup",
        tmp_path / f".sweep.csv.abcd1234.{dead}.incomplete",
        tmp_path / f"sweep.json.abcd1234.{dead}.incomplete",
        # These processes may still be writing.
        tmp_path / f".sweep.json.abcd1234.{this_process()}.incomplete",
        tmp_path / ".sweep.json.abcd1234.elsewhere 1.incomplete",
    ]
    for path in (leftover, *others):
        path.write_text("half")
    write_text_atomically(tmp_path / "sweep.json", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "sweep.json", *others])


@pytest.fixture(params=["below a file", "read-only"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing can be written to."""

    if request.param == "below a file":
        (tmp_path / "file").write_text("")
        yield tmp_path / "file" / "folder"
        return
    folder = tmp_path / "folder"
    folder.mkdir()
    # Not even a superuser writes to what is mounted read-only.
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("needs the permission to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", "builtin:refuser", "--output={}/directions.safetensors"],
        ["extract", "builtin:refuser", "--report={}"],
        ["extract", "builtin:refuser", "--output={}/a.st", "--contrast.preset=arditi"],
        ["sweep", "builtin:refuser", "--output={}"],
        ["sweep", "builtin:refuser", "--output=out", "--storage={}/sweep.journal"],
        ["--study-checkpoint-dir={}", "--model=builtin:refuser", "--model-action=none"],
        ["--save-directory={}", "--model=builtin:refuser", "--model-action=none"],
        ["--contrast.save-directions={}/a.st", "--model=builtin:refuser", "--model-action=none"],
        ["demo", "--output={}"],
        ["audit", "--dataset=prompts.txt", "--output={}"],
    ],
)
def test_unwritable_places_are_named_before_anything_is_computed(
    refused: Refused, arguments: list[str], unwritable: Path
) -> None:
    started = time.monotonic()
    arguments = [argument.format(unwritable) for argument in arguments]
    error = refused(arguments)
    assert str(unwritable) in error and "cannot be written" in error
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "arguments",
    [
        ["extract", "builtin:refuser", "--output=folder"],
        ["sweep", "builtin:refuser", "--output=out", "--storage=folder"],
        ["--contrast.save-directions=folder", "--model=builtin:refuser", "--model-action=none"],
        ["demo", "--output=."],
    ],
)
def test_a_folder_where_a_file_should_be_is_named(
    refused: Refused, arguments: list[str], tmp_path: Path
) -> None:
    for name in ("folder", "summary.json"):
        (tmp_path / name).mkdir()
    error = refused(arguments)
    assert "folder is a directory" in error or "summary.json is a directory" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["judge", "{}"],
        ["rebuild", "{}"],
        ["demo", "--output={}"],
        ["extract", "builtin:refuser", "--output={}"],
        ["--contrast.save-directions={}", "--model=builtin:refuser", "--model-action=none"],
        ["--contrast.warm-start={}", "--model=builtin:refuser", "--model-action=none"],
    ],
)
def test_a_name_that_is_too_long_is_a_sentence(refused: Refused, arguments: list[str]) -> None:
    name = "a" * 300
    assert name in refused([argument.format(name) for argument in arguments])


def test_a_place_that_may_not_be_entered_is_a_sentence() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "locked/file")
    sentence = "locked/file cannot be used (Permission denied): give another place."
    assert cli.sentence_of(error) == sentence
    assert cli.sentence_of(FileNotFoundError(errno.ENOENT, "No such file", "file")) is None


@pytest.mark.parametrize("closed", [[1], [2], [1, 2]])
def test_output_may_be_closed(closed: list[int]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    completed = subprocess.run(
        [sys.executable, "-m", "heretic_contrast", "doctor", "please"],
        cwd=ROOT,
        preexec_fn=close,
        capture_output=True,
        text=True,
    )
    assert (completed.returncode, completed.stdout) == (2, "")
    error = completed.stderr
    assert not error if 2 in closed else error.startswith("Error: ") and error.count("\n") == 1


def test_a_warning_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    show_warnings_as_sentences()
    unread = Mock(write=Mock(side_effect=BrokenPipeError))
    for stream in (None, unread):
        monkeypatch.setattr(sys, "stderr", stream)
        warnings.showwarning("Something is to be known.", ContrastWarning, "file", 1)
    unread.write.assert_called_once_with("Warning: Something is to be known.\n")


@pytest.mark.parametrize(
    ("system", "number", "is_lost"),
    [
        ("posix", errno.EPIPE, True),
        ("posix", errno.EINVAL, False),
        ("nt", errno.EINVAL, True),
        ("nt", errno.ENOSPC, False),
    ],
)
def test_closed_pipes_of_windows_are_known(
    system: str, number: int, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = Mock(side_effect=OSError(number, "closed"))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Mock(flush=fails, fileno=fails))
        patched.setattr(os, "name", system)
        found = cli.has_lost_its_reader()
    assert found == is_lost


def test_output_to_a_full_disk_is_a_sentence() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "wb") as full:
        completed = subprocess.run(
            [sys.executable, "-m", "heretic_contrast", "--version"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert completed.returncode == 2
    assert completed.stderr.startswith("Error: The disk is full")
    assert len(completed.stderr.splitlines()) == 1


def test_causes_are_found_behind_other_errors() -> None:
    try:
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise ValueError
        except ValueError as error:
            raise ContrastError("The model could not be loaded.") from error
    except ContrastError as error:
        assert find_cause(error, KeyboardInterrupt) is not None
        assert find_cause(error, OSError) is None


# Whole commands on a disk that fills.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """A function that puts a disk of a size in bytes on a folder, or changes its size."""

    mounted: list[Path] = []

    def mount(folder: Path, n_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = f"{'remount,' if folder in mounted else ''}size={n_bytes}"
        completed = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
        )
        if completed.returncode != 0:
            pytest.skip("needs the permission to mount a file system")
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder", "n_bytes", "named"),
    [
        ("extract", "output", 50_000, "directions-paper-matched.safetensors could not be written"),
        ("sweep", "output", 16_000, "sweep.journal could not be written"),
        ("sweep", "output", 160_000, "could not be written"),
        ("search", "checkpoints", 12_000, ".jsonl could not be written"),
        ("search", "output", 3_000_000, "The model could not be saved to output/model"),
    ],
)
def test_commands_survive_a_full_disk(
    name: str,
    folder: str,
    n_bytes: int,
    named: str,
    command_server: Server,
    whole_runs: WholeRuns,
    small_disk: Callable[[Path, int], None],
    tmp_path: Path,
) -> None:
    case, _, expected = whole_runs.get(name)
    small_disk(tmp_path / folder, n_bytes)
    command = command_server.run(case.arguments, tmp_path)
    output = command.output()
    assert command.code == 2, output[-3000:]
    assert "Traceback" not in output
    *before, sentence = [line for line in output.splitlines() if line.startswith("Error: ")]
    # Where Heretic saves, its own line with the bare reason comes first.
    assert len(before) == ((name, folder) == ("search", "output"))
    assert named in sentence and "No space left on device" in sentence
    assert not list(tmp_path.rglob("*.incomplete")) and not list(tmp_path.rglob(".unfinished"))
    small_disk(tmp_path / folder, 100_000_000)
    command = command_server.run(case.arguments, tmp_path)
    assert command.code == 0, command.output()[-3000:]
    assert case.result(tmp_path) == expected


@pytest.mark.slow
def test_a_saved_model_survives_a_failure_to_replace_it(
    command_server: Server,
    whole_runs: WholeRuns,
    small_disk: Callable[[Path, int], None],
    tmp_path: Path,
) -> None:
    case, _, expected = whole_runs.get("search")
    small_disk(tmp_path / "output", 9_000_000)
    assert command_server.run(case.arguments, tmp_path).code == 0
    assert case.result(tmp_path) == expected
    # There is no room for a second model beside the first.
    other = [*case.arguments, "--contrast.seed=1"]
    command = command_server.run(other, tmp_path)
    assert command.code == 2, command.output()[-3000:]
    assert "could not be saved to output/model" in command.output()
    found = {name: content for name, content in expected.items() if name.startswith("model/")}
    assert len(found) >= 5
    for name, content in found.items():
        assert (tmp_path / "output" / name).read_bytes() == content
    small_disk(tmp_path / "output", 100_000_000)
    assert command_server.run(other, tmp_path).code == 0


class InterruptedName(str):
    """The name of a module, in whose wording the user presses Ctrl+C."""

    def __repr__(self) -> str:
        raise KeyboardInterrupt


def test_an_interruption_that_python_loses_is_none_of_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `datasets` tries to import what need not be there, while prompts are read."""

    module = ModuleType("optional")
    monkeypatch.setattr(module, "__name__", InterruptedName("optional"))
    monkeypatch.setitem(sys.modules, "optional", module)

    def read(*arguments: Any) -> None:
        exec("from optional import missing")

    monkeypatch.setattr("heretic_contrast.prompts.read_rows", read)
    ended = Mock(side_effect=SystemExit(130))
    monkeypatch.setattr("heretic_contrast.cli.end_interrupted", ended)
    words = ["heretic-contrast", "audit", "--dataset=prompts.txt", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as information:
        cli.main()
    assert information.value.code == 130
    ended.assert_called_once_with("audit")
