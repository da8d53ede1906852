# SPDX-License-Identifier: AGPL-3.0-or-later

"""
Commands that are killed or interrupted at random moments, and then give the same bytes as if nothing had happened.

HERETIC_CONTRAST_KILLS is the number of kills in all, HERETIC_CONTRAST_KILL_SEED chooses other moments.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.command_server import ROOT, Command, Server
from tests.small_runs import Case, WholeRuns

pytest.importorskip("heretic.analyzer", reason="needs Heretic 1.4")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.xdist_group("kills"),  # They share whole runs.
]

N_KILLS = int(os.environ.get("HERETIC_CONTRAST_KILLS", "24"))
SEED = int(os.environ.get("HERETIC_CONTRAST_KILL_SEED", "0"))

IMPORT_SECONDS = 5.0
"""About how long the program takes to start, in which it can be killed as well."""


def kill_program(case: Case, directory: Path, generator: random.Random) -> bool:
    """Kills the whole program, most likely while it starts."""

    directory.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "heretic_contrast", *case.arguments],
        cwd=directory,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(directory / "cache"),
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(timeout=generator.uniform(0.1, 1.5 * IMPORT_SECONDS))
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def kill_forked(
    server: Server,
    case: Case,
    directory: Path,
    whole: Command,
    kind: str,
    generator: random.Random,
) -> bool:
    """Kills a forked command at a moment of a kind; returns whether it had not finished before."""

    arguments = case.arguments
    if kind == "time":
        command = server.start(arguments, directory)
        time.sleep(generator.uniform(0, whole.seconds))
        command.signal(signal.SIGKILL)
    elif kind == "change":
        command = server.start(
            arguments, directory, kill_at_change=generator.randrange(whole.n_changes)
        )
    else:
        command = server.start(
            arguments,
            directory,
            kill_at_write=generator.randrange(whole.n_writes),
            torn_bytes=generator.randint(1, 200),
        )
    code = command.wait()
    assert code in (0, -signal.SIGKILL), command.output()[-3000:]
    return code != 0


@pytest.mark.parametrize("name", ["extract", "search", "sweep"])
def test_killed_commands_give_the_same_bytes(
    name: str,
    command_server: Server,
    whole_runs: WholeRuns,
    tmp_path: Path,
) -> None:
    server = command_server
    case, whole, expected = whole_runs.get(name)
    generator = random.Random(f"{SEED} {name}")
    n_kills = (N_KILLS + 2) // 3
    kinds: Counter[str] = Counter()
    n_sequences = 0
    while kinds.total() < n_kills:
        directory = tmp_path / str(n_sequences)
        n_sequences += 1
        finished = False
        for _ in range(min(generator.randint(3, 6), n_kills - kinds.total())):
            # One kill comes while the program starts.
            kind = generator.choice(["time", "change", "write"]) if kinds else "start"
            if kind == "start":
                finished = not kill_program(case, directory, generator)
            else:
                finished = not kill_forked(server, case, directory, whole, kind, generator)
            if finished:
                break
            kinds[kind] += 1
        if not finished:
            command = server.run(case.arguments, directory)
            assert command.code == 0, command.output()[-3000:]
        found = case.result(directory)
        assert not list(directory.rglob("*.incomplete"))
        assert sorted(found) == sorted(expected)
        assert [key for key in expected if found[key] != expected[key]] == []
    print(f"{name}: {dict(kinds)} kills in {n_sequences} runs, all equal")


@pytest.mark.parametrize("name", ["extract", "search", "sweep"])
def test_interrupted_commands_say_how_to_resume(
    name: str,
    command_server: Server,
    whole_runs: WholeRuns,
    tmp_path: Path,
) -> None:
    server = command_server
    case, _, expected = whole_runs.get(name)
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        command = server.start(case.arguments, directory)
        command.wait_for(case.middle)
        command.signal(signal.SIGINT)
        # On a busy machine it may have ended before the signal comes.
        if command.wait() != 0:
            break
    assert command.code == 130
    output = command.output()
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("Interrupted. ")
    assert "to resume." in output.splitlines()[-1]
    assert not (directory / "output" / "model" / "config.json").exists()
    resumed = server.run(case.arguments, directory)
    assert resumed.code == 0, resumed.output()[-3000:]
    assert case.result(directory) == expected


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("search", "Loading model"),
        ("search", "Extracting directions"),
        ("search", "Running trial 1"),
        ("search", "Restoring model"),
        ("search", "Saving merged model"),
        ("sweep", "Loading model"),
        ("sweep", "Measuring the unmodified model"),
        ("sweep", "Measuring capture"),
    ],
)
def test_interruption_in_any_phase(
    name: str, phase: str, command_server: Server, whole_runs: WholeRuns, tmp_path: Path
) -> None:
    case, whole, _ = whole_runs.get(name)
    assert phase in whole.output()
    command = command_server.start(case.arguments, tmp_path)
    command.wait_for(phase)
    # What ends a service or a job ends a command as Ctrl+C does.
    terminated = phase in ("Running trial 1", "Saving merged model", "Measuring capture")
    command.signal(signal.SIGTERM if terminated else signal.SIGINT)
    assert command.wait() == 130, command.output()[-3000:]
    output = command.output()
    assert "Traceback" not in output and output.splitlines()[-1].startswith("Interrupted. ")
    assert not (tmp_path / "output" / "model" / "config.json").exists()
