"""Unit: a file or a folder is there whole or not at all."""

from __future__ import annotations

import os

import pytest

from knowedit.io.files import atomic_file, atomic_folder, cache_dir, trim


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
