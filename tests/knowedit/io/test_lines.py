"""Unit: text files line by line, and the place in every error."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from knowedit.errors import CorpusError
from knowedit.io.lines import kind, named, number_of, read_lines


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.txt", ".txt"),
        ("a.txt.gz", ".txt"),
        ("a.gz", ""),
        ("b/a.b.jsonl.gz", ".jsonl"),
        ("a", ""),
    ],
)
def test_the_kind_of_a_file_leaves_its_archive_aside(name, found):
    assert kind(Path(name)) == found


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_end_at_line_feeds_only(tmp_path, pack):
    path = tmp_path / ("a.txt" if pack is bytes else "a.txt.gz")
    path.write_bytes(pack("\ufeffone\r\ntwo\u2028still\rtwo\nthree".encode()))
    assert list(read_lines(path, CorpusError)) == [
        (1, "one\r\n"),
        (2, "two\u2028still\rtwo\n"),
        (3, "three"),
    ]


def test_errors_name_file_line_and_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(CorpusError, match=r"a\.txt:2: byte 4 \(0xe9\) is not UTF-8; save"):
        list(read_lines(path, CorpusError))
    with pytest.raises(CorpusError, match=r"none\.txt: cannot be read \(No such file"):
        list(read_lines(tmp_path / "none.txt", CorpusError))
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"one\n" * 9)[:-6])
    with pytest.raises(CorpusError, match=r"a\.txt\.gz: broken gzip archive after line \d"):
        list(read_lines(packed, CorpusError))


def test_one_is_no_plural():
    told = [number_of(count, "fact") for count in (0, 1, 2, 1000)]
    assert told == ["0 facts", "1 fact", "2 facts", "1,000 facts"]


def test_names_in_a_row_have_their_number():
    assert named("layer", [5]) == "layer 5"
    assert named("layer", (4, 5)) == "layers 4, 5" and named("layer", []) == "layers "
