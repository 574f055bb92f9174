"""Our files are what was written: one flipped bit anywhere, in any kind of them, is refused
(unit).
"""

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import RECORD, read_record, save_edited
from knowedit.edits.history import History
from knowedit.errors import EditError, KnowEditError, StatisticsError
from knowedit.io import tensors
from knowedit.io.tensors import checksum, format_of, opened, read_file, understood, write_file
from knowedit.statistics.files.store import LayerStatistics
from knowedit.statistics.files.store import read as read_statistics
from tests.knowedit.edits.test_edit import an_edit

TESTS = Path(__file__).parent.parent
V1 = TESTS / "edits" / "files" / "v1"
STATISTICS = TESTS / "statistics" / "files"


def of(file):
    """A reader of any kind of file by the format that the file has."""
    form = format_of(file)
    return lambda path: read_file(path, form, "a file of ours")


KINDS = {  # a file of the first version and what reads it; it is written anew, with checksums
    "edit": (V1 / "memit-llama.safetensors", Edit.load),
    "memory edit": (V1 / "serac-llama.safetensors", None),
    "history": (V1 / "history-llama.safetensors", History.load),
    "MEND network": (V1 / "mend-network-llama.safetensors", None),
    "SERAC network": (V1 / "serac-network-llama.safetensors", None),
    "statistics": (STATISTICS / "layer-001.safetensors", LayerStatistics.load),
    "checkpoint": (next(STATISTICS.glob("checkpoint-*")), read_statistics),
}

#: Around which bytes of the header are damaged: its syntax, numbers and names, and ours.
WORDS = ["__metadata__", '"knowedit"', '"format', '"checksums"', '"dtype"', '"F', '"shape":',
         '"data_offsets":', '\\"\\":', "}}", '{"']  # fmt: skip


def places(data):
    """Bytes to damage: of the length, the header, its padding, and the tensors; all of a small
    file.
    """
    if len(data) < 600:
        return range(len(data))
    length = int.from_bytes(data[:8], "little")
    head, step = data[8 : 8 + length].decode(), max(1, length // 60)
    starts = [head.find(word) for word in WORDS]
    words = [range(8 + at, 18 + at) for at in starts if 0 <= at < length - 10]
    header = [*range(8), *range(9, 8 + length, step)]
    ends = [*range(5 + length, 8 + length), len(data) - 1]
    numbers = range(8 + length, len(data), max(1, (len(data) - length) // 40))
    return [*header, *(place for word in words for place in word), *ends, *numbers]


def assert_every_flip_is_refused(path, read):
    data = path.read_bytes()
    tried = places(data)
    for number, place in enumerate(tried):
        damaged = bytearray(data)
        damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged)
        with pytest.raises(KnowEditError, match=path.name):
            read(path)
    path.write_bytes(data)
    read(path)
    assert len(tried) > 150


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_is_refused(kind, tmp_path):
    old, read = KINDS[kind]
    with opened(old) as file:
        path = write_file(tmp_path / "file", file.tensors(), file.header)
    assert_every_flip_is_refused(path, read or of(old))


def test_one_flipped_bit_of_any_byte_is_refused(tmp_path):
    parts = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    path = write_file(tmp_path / "file", parts, {"format": "x/1", "n": 1})
    assert_every_flip_is_refused(path, lambda path: read_file(path, "x/1", "a file"))


def test_one_flipped_bit_of_an_undo_record_is_refused(tiny_llama, tmp_path):
    edits = [an_edit(tiny_llama), an_edit(tiny_llama, seed=1)]
    record = save_edited(tiny_llama, edits, tmp_path / "edited") / RECORD
    assert_every_flip_is_refused(record, read_record)


def test_a_checksum_knows_dtype_shape_and_bits():
    others = [torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0.0, 0, 0, -0.0])]
    assert len({checksum(tensor) for tensor in (torch.zeros(4), *others)}) == 4
    turned = torch.arange(6).view(2, 3).T
    assert checksum(turned) == checksum(turned.contiguous())
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.float64, torch.int8):
        assert checksum(torch.ones(3, dtype=dtype)) != checksum(torch.zeros(3, dtype=dtype))
    assert checksum(torch.zeros(0, 3)) != checksum(torch.zeros(0, 4))
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor([1.0]))


def test_single_tensors_are_checked_as_they_are_read(tmp_path):
    parts = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    path = write_file(tmp_path / "x", parts, {"format": "x/1"})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of b
    path.write_bytes(data)
    with opened(path, StatisticsError, "fetch it again") as file:
        assert torch.equal(file.tensor("a"), parts["a"]) and file.header == {"format": "x/1"}
        with pytest.raises(StatisticsError, match=r"x is damaged: b is not .*; fetch it again"):
            file.tensor("b")


def test_files_without_checksums_are_read_with_one_note(caplog, monkeypatch):
    monkeypatch.setattr(tensors, "_NOTED", [])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Edit.load(V1 / "memit-llama.safetensors")
            LayerStatistics.load(STATISTICS / "layer-001.safetensors")
    assert [r.message.count("without checksums") for r in caplog.records] == [1]


def test_checksums_that_went_astray_are_no_older_file(tmp_path):
    path = write_file(tmp_path / "x", {"a": torch.zeros(2)}, {"format": "x/1"})
    with safe_open(path, framework="pt") as file:
        known = file.metadata()
    save_file({"a": torch.ones(2)}, path, {"knowedit": known["knowedit"], "chccksums": "{}"})
    with pytest.raises(EditError, match="its header is not what was written"):
        read_file(path, "x/1", "a file")


@pytest.mark.parametrize("wrong", [KeyError("a"), TypeError("b"), AttributeError("c")])
def test_a_field_that_is_missing_or_wrong_names_the_file(wrong):
    said = r"x is not an edit of this version .*Error: .*; make it again"
    with pytest.raises(EditError, match=said), understood("x", "an edit"):
        raise wrong
