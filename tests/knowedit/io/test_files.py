"""Unit: a file or a folder is there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from knowedit.errors import KnowEditError
from knowedit.io import files
from knowedit.io.files import (
    atomic_file,
    atomic_folder,
    cache_dir,
    leftovers,
    locked,
    size_of,
    trim,
)


def test_a_file_appears_when_its_block_ends_well(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half-way")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_its_block_ends_well(tmp_path):
    path = tmp_path / "out"
    path.mkdir()  # an empty one may be there
    with atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.txt").write_text("one")
        assert not list(path.iterdir())
    assert (path / "inner" / "a.txt").read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_a_folder_goes_where_a_link_leads(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        (tmp_path / f"to {name}").symlink_to(name)
        with atomic_folder(tmp_path / f"to {name}") as temporary:
            (temporary / "a.txt").write_text("one")
        assert (tmp_path / name / "a.txt").read_text() == "one"
        assert (tmp_path / f"to {name}").is_symlink()


@pytest.mark.parametrize("kind", [atomic_file, atomic_folder])
def test_a_full_disk_names_what_was_being_written(tmp_path, kind):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as writing to an open file says

    with pytest.raises(OSError, match=r"No space left on device: '.*new'"), kind(tmp_path / "new"):
        full()
    with pytest.raises(ConnectionError) as raised, kind(tmp_path / "new"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")  # no fault of the disk
    assert raised.value.filename is None and list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "mine.txt").write_text("keep")
    refused = pytest.raises(FileExistsError, match="out exists; choose another folder")
    with refused, atomic_folder(path):
        raise AssertionError("the block must not run")
    with pytest.raises(RuntimeError, match="half-way"), atomic_folder(tmp_path / "other"):
        raise RuntimeError("half-way")
    assert (path / "mine.txt").read_text() == "keep" and list(tmp_path.iterdir()) == [path]


def test_the_cache_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    assert cache_dir("a", "b") == tmp_path / "cache" / "a" / "b" and cache_dir("a", "b").is_dir()
    monkeypatch.delenv("KNOWEDIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "knowedit"


def test_the_least_recently_used_folders_go_first(tmp_path):
    for age, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(bytes(100))
        os.utime(tmp_path / name, (age, age))
    assert trim(tmp_path, 300) == 0
    assert trim(tmp_path, 200, keep=tmp_path / "a") == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


# -- what killed runs leave, and two runs at once -------------------------------------------------

WRITES = """
import sys, time
from pathlib import Path
from knowedit.io.files import atomic_file, atomic_folder, locked
with locked("out"), atomic_folder("out") as folder, atomic_file("a.json") as file:
    (folder / "model").write_text("half of a model")
    file.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writing(tmp_path, monkeypatch):
    """A process that is writing a folder and a file, and has locked the folder."""
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", WRITES], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_next_run_removes_what_a_killed_one_left(writing, tmp_path):
    assert leftovers(tmp_path) == []  # it is still being written
    with atomic_file("a.json") as file:
        file.write_text("mine")
    assert len(list(tmp_path.glob(".*.part"))) == 2
    with pytest.raises(KnowEditError, match="another run is writing to out; wait"), locked("out"):
        raise AssertionError("the block must not run")
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    left = leftovers(tmp_path)
    assert [path.name.split(".")[1] for path in left] == ["a", "out"]
    assert sum(map(size_of, left)) == len("half of a model") + len("half")
    with locked("out"), atomic_folder("out"):
        pass
    assert [path.name.split(".")[1] for path in leftovers(tmp_path)] == ["a"]
    with atomic_file("a.json"):
        pass
    assert not list(tmp_path.glob(".*.part"))


def test_what_another_machine_writes_is_left_for_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_machine", lambda: "there")
    with atomic_file(tmp_path / "a") as there:
        old = tmp_path / ".a.abcdef12.part"  # as earlier versions called it
        for path in (there, old):
            path.write_text("x")
        monkeypatch.setattr(files, "_machine", lambda: "here")
        assert leftovers(tmp_path) == []
        for path in (there, old):
            os.utime(path, (time.time() - 90_000,) * 2)
        assert leftovers(tmp_path, "a") == sorted([there, old]) == leftovers(tmp_path)
        assert leftovers(tmp_path, "b") == leftovers(tmp_path / "absent") == []


def test_a_lock_is_for_one_and_lasts_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.01)
    with locked(tmp_path / "new" / "h"):
        refused = pytest.raises(KnowEditError, match="another run is writing to")
        with refused, locked(tmp_path / "new" / "h"):
            raise AssertionError("the block must not run")
        with locked(tmp_path / "new" / "other"), locked(None):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "new" / "h")
        with refused, locked(tmp_path / "link"):
            raise AssertionError("the block must not run")
    with locked(tmp_path / "new" / "h"):
        pass
