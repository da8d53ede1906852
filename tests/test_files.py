# SPDX-License-Identifier: AGPL-3.0-or-later

"""Writing files where writing fails."""

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from heretic_contrast import files
from heretic_contrast.builtin import pool_name
from heretic_contrast.errors import ContrastError, printable
from heretic_contrast.files import write_text_atomically
from heretic_contrast.outputs import require_writable_directory, require_writable_file
from heretic_contrast.settings import PromptSource


@contextmanager
def limited_file_size(n_bytes: int) -> Iterator[None]:
    """Makes every write beyond a size fail, as on a disk that is full."""

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_whole_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_text_atomically(path, "whole")
    with limited_file_size(1_000), pytest.raises(ContrastError, match=r"sweep\.json could not"):
        write_text_atomically(path, "x" * 100_000)
    assert path.read_text() == "whole"
    assert [item.name for item in tmp_path.iterdir()] == ["sweep.json"]
    write_text_atomically(path, "next")
    assert path.read_text() == "next"


def test_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ContrastError, match="cannot be written to"):
        require_writable_directory(tmp_path / "file" / "directory")
    with pytest.raises(ContrastError, match=r"cannot be written to \(it is a file\)"):
        require_writable_directory(tmp_path / "file")


def test_a_place_that_refuses_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on Windows, where any folder seems writable and tempfile tries one name after the other.
    refuse = Mock(side_effect=PermissionError(errno.EACCES, "Access is denied"))
    monkeypatch.setattr(os, "open", refuse)
    windows = SimpleNamespace(**{**vars(os), "name": "nt", "O_TEMPORARY": 0})
    monkeypatch.setattr(tempfile, "_os", windows)
    monkeypatch.setattr(tempfile, "TemporaryFile", tempfile.NamedTemporaryFile)
    monkeypatch.setattr(tempfile, "TMP_MAX", 10)
    with pytest.raises(ContrastError, match=r"cannot be written to \(Access is denied\)"):
        require_writable_directory(tmp_path)
    assert refuse.call_count == 1


def test_what_a_killed_process_left_while_it_looked_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".writable.incomplete").write_text("")
    require_writable_directory(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("system", "n_refused", "n_tries"), [("nt", 3, 4), ("nt", 99, 11), ("posix", 3, 1)]
)
def test_what_somebody_looks_at_is_replaced_later(
    system: str, n_refused: int, n_tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.json"
    path.write_text("old")
    original, waits = os.replace, Mock()

    def refuse(*places: Path) -> None:
        if move.call_count <= n_refused:
            raise PermissionError(errno.EACCES, "Access is denied")
        original(*places)

    move = Mock(side_effect=refuse)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", move)
        patched.setattr(files, "time", SimpleNamespace(sleep=waits), raising=False)
        patched.setattr(os, "name", system)
        with suppress(ContrastError):
            write_text_atomically(path, "new")
    assert move.call_count == n_tries and waits.call_count == n_tries - 1
    assert path.read_text() == ("new" if n_tries > n_refused else "old")


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ContrastError, match=r"pipe is a device, a pipe or a socket"):
        require_writable_file(path)
    assert path.is_fifo()


def test_where_a_link_leads_is_looked_at_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    link, loop = tmp_path / "link", tmp_path / "loop"
    link.symlink_to(tmp_path / "file" / "below")
    with pytest.raises(ContrastError, match="cannot be written to"):
        require_writable_file(link)
    loop.symlink_to(loop)
    write_text_atomically(loop, "after")
    assert loop.read_text(encoding="utf-8") == "after"


def test_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("before", encoding="utf-8")
    link.symlink_to(target)
    write_text_atomically(link, "after")
    assert link.is_symlink() and target.read_text(encoding="utf-8") == "after"


def test_a_name_that_is_no_utf_8_is_stored_as_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"b\xe8d.jsonl")
    path.write_text("")
    assert pool_name(PromptSource(dataset=str(path))).encode() == b"b?d.jsonl"


def test_text_is_shown_but_for_what_steers_a_terminal() -> None:
    ordinary = "Je refuse\u202f!\n日本語\u3000全角\tمی\u200cخواهم 👩\u200d👩"
    assert printable(ordinary) == ordinary
    assert printable("\x1b[2J\u202ea\u2028\x9b") == r"\x1b[2J\u202ea\u2028\x9b"


def test_what_is_no_part_of_a_folder_that_is_read_is_written_again(tmp_path: Path) -> None:
    folder, read = tmp_path / "model", [str(tmp_path / "model")]
    (folder / "out").mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "config.json", "out/train.jsonl"):
        with pytest.raises(ContrastError, match=r"lies in .*model, which is read, so it cannot be"):
            require_writable_file(folder / name, read)
    for name in ("directions.safetensors", "out/unmatched.safetensors"):
        (folder / name).touch()
        require_writable_file(folder / name, read)
