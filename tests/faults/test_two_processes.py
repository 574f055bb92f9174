"""Two command lines at once in one place: neither loses what the other wrote, and nothing is mixed
(unit).

Each ends well, or is told that another run is writing there and writes nothing; then the same
command, once the other has ended, does the rest.
"""

import json
import os

import pytest

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.journal import Journal
from knowedit.models.load import fingerprint_of
from tests.knowedit.cli.examples import FACTS
from tests.knowedit.edits.test_edit import an_edit
from tests.processes import Forked

FT = ("--method", "ft", "--set", "layers=[1]", "--set", "steps=2")
FT_L = ("--method", "ft-l", "--set", "layers=[1]", "--set", "steps=2")
REFUSED = "error: another run is writing to"


@pytest.fixture
def place(tiny_llama, tmp_path, own_cache):
    """A folder with a model, and a fact and an edit for each of two."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    for number, fact in enumerate(FACTS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(fact) + "\n")
        an_edit(tiny_llama, number, size=0.01).save(tmp_path / f"{number}.edit")
    return tmp_path


def both(place, *commands, says):
    """Run the commands at once, in processes of their own; which of them ended well. The others
    said `says`, in one line.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "KNOWEDIT_CACHE": str(place / "cache"),
    }  # fmt: skip
    started = [Forked(("-m", "knowedit", *words), place, environment) for words in commands]
    done = []
    for process in started:
        _, said = process.communicate()
        done.append(process.returncode == 0)
        assert done[-1] or (process.returncode == 1 and says in said), said
        assert "Traceback" not in said
    assert any(done)
    return done


def in_turn(place, *commands):
    """Both at once; then again what was refused."""
    done = both(place, *commands, says=REFUSED)
    for well, words in zip(done, commands, strict=True):
        if not well:
            assert both(place, words, says=REFUSED) == [True]


def test_a_history_keeps_what_both_wrote(place):
    in_turn(
        place,
        *(
            ("edit", "model", f"{n}.jsonl", "-o", f"{n}.new", "--history", "h", *FT, "--force")
            for n in range(2)
        ),
    )
    history = History.load(place / "h")
    assert sorted(fact.subject for fact in history.facts) == ["Brazil", "France"]
    assert {edit.key for edit in history.edits} == {Edit.load(place / f"{n}.new").key for n in "01"}


def test_a_folder_of_results_holds_the_rows_of_both(place):
    dataset = ("eval", "model", "--dataset", "0.jsonl", "-o", "run")
    in_turn(place, (*dataset, *FT), (*dataset, *FT_L))
    found = json.loads((place / "run" / "results.json").read_text())
    assert sorted(one["method"] for one in found) == ["FT", "FT-L"]
    rows = (place / "run" / "prompts.jsonl").read_text().splitlines()
    assert len(rows) == sum(one["evaluation"]["prompts"] for one in found)


def test_one_of_two_writes_an_edited_folder(place, tiny_llama):
    done = both(
        place,
        *(("apply", "model", f"{n}.edit", "-o", "out", "--force") for n in range(2)),
        says="out exists; choose another folder",
    )
    assert done.count(True) == 1
    with Edit.load(place / f"{done.index(True)}.edit").applied_to(tiny_llama):
        tiny_llama.hf.save_pretrained(place / "alone")
    assert fingerprint_of(place / "out") == fingerprint_of(place / "alone")
    assert [path.name for path in place.glob(".*.part")] == []


def test_one_of_two_begins_a_session(place):
    done = both(
        place,
        ("session", "open", "kept", "model", *FT),
        ("session", "open", "kept", "model", *FT_L),
        says="kept exists; choose another folder",
    )
    assert done.count(True) == 1
    assert Journal(place / "kept").method["kind"] == ("ft" if done[0] else "ft-l")


def test_a_session_keeps_what_both_wrote(place):
    assert both(place, ("session", "open", "kept", "model", *FT), says="") == [True]
    in_turn(place, *(("session", "apply", "kept", f"{n}.jsonl", "--force") for n in range(2)))
    history = Journal(place / "kept").read()
    assert sorted(fact.subject for fact in history.facts) == ["Brazil", "France"]
    assert len(history) == 2


def test_a_session_that_is_compacted_while_it_is_written_to(place):
    assert both(place, ("session", "open", "kept", "model", *FT), says="") == [True]
    assert both(place, ("session", "apply", "kept", "0.jsonl", "--force"), says="") == [True]
    in_turn(
        place,
        ("session", "compact", "kept"),
        ("session", "apply", "kept", "1.jsonl", "--force"),
    )
    history = Journal(place / "kept").read()
    assert sorted(fact.subject for fact in history.facts) == ["Brazil", "France"]
