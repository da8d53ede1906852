# SPDX-License-Identifier: AGPL-3.0-or-later

"""
The command line many times over, each in a process of its own that can be killed.

Importing PyTorch and Heretic takes longer than the smallest run. A server imports them once and forks for each command;
what is forked runs `heretic_contrast.cli.main` as the program does.
"""

import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Audit events of changes to a file system, besides opening a file to write."""


MODULES = (
    "heretic.main",
    "matplotlib.figure",
    "transformers.models.qwen3_5.modeling_qwen3_5",
    "heretic_contrast.commands.extract",
    "heretic_contrast.commands.run",
    "heretic_contrast.commands.sweep",
    "heretic_contrast.evaluation.storage",
    "heretic_contrast.hosts.surface",
    "heretic_contrast.report",
    "heretic_contrast.directions.som_kernel",
)
"""What commands import late, because it is slow."""


def environment(*packages: Path) -> dict[str, str]:
    """Returns the environment of a server, for which folders of packages come before what is installed."""

    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(
            [*map(str, packages), str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
    }


class Server:
    """Starts commands one after the other."""

    def __init__(self, *heretic: Path) -> None:
        """`heretic`: a folder with a Heretic that takes the place of the installed one."""

        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server"],
            cwd=ROOT,
            env=environment(*heretic),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(
        self,
        arguments: list[str],
        directory: Path,
        kill_at_change: int | None = None,
        kill_at_write: int | None = None,
        torn_bytes: int = 0,
        max_file_size: int | None = None,
    ) -> "Command":
        """
        Starts a command in a directory that it also keeps its cache in.

        `kill_at_change`: the change to its directory before which it kills itself, counted from 0. `kill_at_write`: the
        file in the middle of writing which it kills itself, `torn_bytes` before its end. `max_file_size`: in bytes.
        """

        directory.mkdir(parents=True, exist_ok=True)
        self._send(
            {
                "arguments": arguments,
                "directory": str(directory),
                "kill_at_change": kill_at_change,
                "kill_at_write": kill_at_write,
                "torn_bytes": torn_bytes,
                "max_file_size": max_file_size,
            }
        )
        return Command(self, int(self.receive()["pid"]), directory)

    def run(self, arguments: list[str], directory: Path, **options: Any) -> "Command":
        """Runs a command to its end."""

        command = self.start(arguments, directory, **options)
        command.wait()
        return command

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Returns the server's next message."""

        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the server."""

        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Command:
    """A command that runs, or has run."""

    def __init__(self, server: Server, pid: int, directory: Path) -> None:
        self._server = server
        self.pid = pid
        self.log = directory / "log.txt"
        self.code: int | None = None
        self.seconds = 0.0
        self.n_changes = 0
        self.n_writes = 0

    def output(self) -> str:
        """Returns what it has printed."""

        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Waits until it has printed a text."""

        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        """Sends a signal. The process cannot be gone for good before `wait` has been called."""

        os.kill(self.pid, number)

    def wait(self) -> int:
        """Returns the exit code, negative for a signal."""

        self._server._send({"wait": self.pid})
        message = self._server.receive()
        self.code, self.seconds = int(message["code"]), float(message["seconds"])
        self.n_changes, self.n_writes = message["changes"], message["writes"]
        return self.code


class Counter:
    """Counts the changes that this process makes to a directory, and kills it at one of them."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.n_changes = 0
        self.n_writes = 0
        self._request = request
        self._sync = os.fsync
        sys.addaudithook(self._audit)
        os.fsync = self._fsync

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str):
            return
        if not os.path.abspath(path).startswith(self._request["directory"]):
            return
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            if self.n_changes == self._request["kill_at_change"]:
                os.kill(os.getpid(), signal.SIGKILL)
            self.n_changes += 1

    def _fsync(self, descriptor: int) -> None:
        # At this moment all is there that was written; a kill in the middle had left less.
        if self.n_writes == self._request["kill_at_write"]:
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, max(0, size - self._request["torn_bytes"]))
            os.kill(os.getpid(), signal.SIGKILL)
        self.n_writes += 1
        self._sync(descriptor)


CLIENT = """\
#!{python} -ES
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = [os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]
    socket.send_fds(connection, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
    sys.exit(int(connection.recv(4) or 70))
"""


class Programs:
    """
    `heretic-contrast`, and `python` with a script, for shells that look for programs in a folder.

    They hand their arguments, environment, working directory and terminal over to a server, which forks for them, so that
    not everything is imported each time.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        """Writes the programs to a new folder, and starts their server with some variables of the environment."""

        folder.mkdir()
        address = folder / "socket"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(address))
        self._socket.listen()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server", str(self._socket.fileno())],
            cwd=ROOT,
            env={**environment(), **variables},
            stdin=subprocess.DEVNULL,
            pass_fds=[self._socket.fileno()],
        )
        for name in ("heretic-contrast", "python"):
            path = folder / name
            path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
            path.chmod(0o755)

    def close(self) -> None:
        """Ends the server."""

        self._process.terminate()
        self._process.wait(timeout=60)
        self._socket.close()


def run_main(arguments: list[str], script: bool = False) -> int:
    """Runs `heretic-contrast`, or a script of Python's that the arguments begin with, and returns the exit code."""

    from heretic_contrast.cli import main

    sys.argv = arguments if script else ["heretic-contrast", *arguments]
    code: Any = 0
    try:
        if script:
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def run_command(request: dict[str, Any], counts: BinaryIO) -> None:
    """Runs a command in this process, which ends."""

    directory = request["directory"]
    os.chdir(directory)
    os.environ["XDG_CACHE_HOME"] = os.path.join(directory, "cache")
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # A shell that starts tests in the background makes them ignore Ctrl+C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["max_file_size"] is not None:
        limit = (request["max_file_size"], resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    counter = Counter(request)
    code = run_main(request["arguments"])
    counts.write(json.dumps({"changes": counter.n_changes, "writes": counter.n_writes}).encode())
    counts.flush()
    os._exit(code)


def import_everything() -> None:
    """Imports what commands need, with one thread, since threads do not survive a fork."""

    for name in MODULES:
        import_module(name)
    from heretic_contrast.hosts.surface import HAS_PLUGIN_SURFACE

    import_module(f"heretic_contrast.hosts.{'heretic20' if HAS_PLUGIN_SURFACE else 'heretic14'}")
    import torch

    torch.set_num_threads(1)
    # Nothing that has been imported is garbage, and looking for it would copy its memory into every fork.
    gc.collect()
    gc.freeze()


def serve_programs(listener: socket.socket) -> None:
    """Forks for every caller of a program, until this process is ended."""

    import_everything()
    # Nobody waits for what is forked: its caller learns the exit code from the process itself.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            while not message.endswith(b"\n"):
                message += connection.recv(1 << 16)
            name, arguments, directory, variables = json.loads(message)
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(variables)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            # The streams of this process were made for other files.
            sys.stdin, sys.stdout, sys.stderr = (
                open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
                for number, mode in ((0, "r"), (1, "w"), (2, "w"))
            )
            code = run_main(arguments, script=name == "python")
            connection.send(str(code).encode())
            os._exit(0)
        connection.close()


def serve() -> None:
    """Answers requests until standard input ends."""

    # Whatever is printed while importing is no answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    import_everything()
    running: dict[int, tuple[float, BinaryIO]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            started, counts = running.pop(pid)
            _, status = os.waitpid(pid, 0)
            answer: dict[str, Any] = {
                "code": os.waitstatus_to_exitcode(status),
                "seconds": time.monotonic() - started,
                **json.loads(counts.read() or b'{"changes": 0, "writes": 0}'),
            }
            counts.close()
        else:
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                run_command(request, os.fdopen(writing, "wb"))
            os.close(writing)
            running[pid] = time.monotonic(), os.fdopen(reading, "rb")
            answer = {"pid": pid}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        serve_programs(socket.socket(fileno=int(sys.argv[1])))
