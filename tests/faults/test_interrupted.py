"""Ctrl-C before any line of the code that writes: bits and files are those of before, or those of
after, and the next call works (unit).

A few lines, drawn anew for each number of KNOWEDIT_FAULTS; `make faults` tries a great many.
"""

import os
import random

import pytest

from knowedit.edits import edit as edit_module
from knowedit.edits.export import folder as folder_module
from knowedit.edits.export.folder import RECORD, restore, save_edited
from knowedit.io import files as files_module
from knowedit.io import tensors as tensors_module
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.load import fingerprint_of, load_model
from knowedit_kernels.lowrank import ledger as ledger_module
from tests.interrupting import interrupted
from tests.knowedit.edits.test_edit import a_trained_edit, an_edit

POINTS = int(os.environ.get("KNOWEDIT_FAULTS", "6"))
IN_MEMORY = {module.__file__ for module in (edit_module, ledger_module)}
ON_DISK = {module.__file__ for module in (folder_module, files_module, tensors_module)}


def points(lines):
    """Some of so many lines."""
    return sorted(random.Random(POINTS).sample(range(1, lines + 1), min(POINTS, lines)))


@pytest.mark.parametrize("doing", ["apply", "undo", "with", "with and an error"])
def test_edits_in_memory(tiny_llama, doing):
    edit, other, plain = a_trained_edit(tiny_llama), an_edit(tiny_llama, 5), tiny_llama.fingerprint

    def within(error=None):
        with edit.applied_to(tiny_llama):
            if error:
                raise error

    def fails():
        with pytest.raises(ZeroDivisionError):
            within(ZeroDivisionError())

    action = {
        "apply": lambda: edit.apply(tiny_llama),
        "undo": lambda: edit.undo(tiny_llama),
        "with": within,
        "with and an error": fails,
    }[doing]
    other.apply(tiny_llama)
    states = {False: weights_fingerprint(tiny_llama.hf)}
    edit.apply(tiny_llama)
    states[True] = weights_fingerprint(tiny_llama.hf)

    def start():
        if edit.is_applied(tiny_llama) != (doing == "undo"):
            (edit.apply if doing == "undo" else edit.undo)(tiny_llama)

    start()
    lines = interrupted(action, IN_MEMORY)
    for stop in points(lines):
        start()
        interrupted(action, IN_MEMORY, stop)
        applied = edit.is_applied(tiny_llama)
        assert weights_fingerprint(tiny_llama.hf) == states[applied], stop
    for left in (edit, other):
        if left.is_applied(tiny_llama):
            left.undo(tiny_llama)
    assert weights_fingerprint(tiny_llama.hf) == plain == tiny_llama.fingerprint


def only_to_be_removed(folder):
    """Whether all that is hidden in a folder is what the next run there removes."""
    return all(files_module.PART.fullmatch(path.name) for path in folder.glob(".*"))


@pytest.fixture
def saved(tiny_llama, tmp_path):
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    return load_model(str(tmp_path / "model"))


def test_edited_folders(saved, tmp_path):
    edits, number, plain = [an_edit(saved), an_edit(saved, 1)], 0, saved.fingerprint
    lines = interrupted(lambda: save_edited(saved, edits, tmp_path / "0"), ON_DISK)
    for number, stop in enumerate(points(lines), 1):
        folder = tmp_path / str(number)
        interrupted(lambda: save_edited(saved, edits, folder), ON_DISK, stop)  # noqa: B023
        assert not saved.ledger.active and saved.fingerprint == plain, stop
        assert not folder.exists() or restore(folder) == plain, stop
    assert weights_fingerprint(saved.hf) == plain and only_to_be_removed(tmp_path)


@pytest.mark.parametrize("only", [False, True])
def test_undone_folders(saved, tmp_path, only):
    edits, plain = [an_edit(saved), an_edit(saved, 1)], saved.fingerprint
    keys = [edits[0].key] if only else []
    wanted = save_edited(saved, edits, tmp_path / "0")
    lines = interrupted(lambda: restore(wanted, keys), ON_DISK)
    left = fingerprint_of(wanted)
    for number, stop in enumerate(points(lines), 1):
        folder = save_edited(saved, edits, tmp_path / str(number))
        interrupted(lambda: restore(folder, keys), ON_DISK, stop)  # noqa: B023
        assert only_to_be_removed(folder), stop
        if (folder / RECORD).exists() and edits[0].key in (folder / RECORD).read_text("latin1"):
            restore(folder, keys)
        assert fingerprint_of(folder) == left, stop
        assert not only or restore(folder) == plain, stop
