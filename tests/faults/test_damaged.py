"""Inputs that are damaged, hostile or unlucky: an error of ours that names the file, and nothing
else (unit).

Files are made here with right checksums, so that what is wrong with them is what their contents
say: as another program, an earlier version or a hand would leave them.
"""

import gzip
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from knowedit.cli import app
from knowedit.cli.inspection import describe
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import save_edited
from knowedit.edits.history import History
from knowedit.edits.journal import Journal
from knowedit.errors import CorpusError, EditError, KnowEditError, ModelError, StatisticsError
from knowedit.facts.wordings.paraphrase import Endpoint, ParaphraseError, paraphrases
from knowedit.io.lines import printable
from knowedit.io.tensors import opened, write_file
from knowedit.models.load import load_model
from knowedit.report.run import report
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.files import npz
from knowedit.statistics.files.store import LayerStatistics
from tests.knowedit.edits.test_edit import an_edit

FILES = Path(__file__).parent.parent / "knowedit"
V1 = FILES / "edits" / "files" / "v1"
LAYER = FILES / "statistics" / "files" / "layer-001.safetensors"
WRONG = (None, 7, -1, 1e400, "x", "\x1b]0;t\x07", [], ["x"], {}, {"a": 1}, [[[]]], True)


def mutants(value, count, seed):
    """Copies of a record with one part of it taken away or replaced, at any depth."""
    chance = random.Random(seed)
    for _ in range(count):
        copy = json.loads(json.dumps(value))
        place = copy
        while True:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.7:
                place = place[key]
                continue
            if chance.random() < 0.3:
                del place[key]
            else:
                place[key] = chance.choice(WRONG)
            break
        yield copy


def only_our_errors(read, path):
    """Whether a file is read; what it raises is ours and names it."""
    try:
        read(path)
        return True
    except KnowEditError as error:
        assert path.name in str(error), error
        return False


@pytest.mark.parametrize(
    "file, read",
    [
        (V1 / "memit-llama.safetensors", Edit.load),
        (V1 / "neuron-patch-llama.safetensors", describe),
        (V1 / "history-llama.safetensors", History.load),
        (V1 / "mend-network-llama.safetensors", describe),
        (LAYER, LayerStatistics.load),
        (LAYER, describe),
    ],
    ids=lambda given: getattr(given, "stem", getattr(given, "__qualname__", "")),
)
def test_headers_with_wrong_fields(tmp_path, file, read):
    with opened(file) as known:
        header, tensors = known.header, known.tensors()
    outcomes = [
        only_our_errors(read, write_file(tmp_path / "file", tensors, mutant))
        for mutant in mutants(header, 60, seed=len(header))
    ]
    assert False in outcomes
    for name in tensors:
        less = {other: tensor for other, tensor in tensors.items() if other != name}
        only_our_errors(read, write_file(tmp_path / "file", less, header))


def test_an_edit_is_understood_before_anything_is_written(tiny_llama, tmp_path):
    """A report that is null changed the weights, and then raised."""
    edit, shown = an_edit(tiny_llama), tiny_llama.fingerprint
    record = {"format": edit.format, "fingerprint": shown, **edit.record()}
    path = write_file(tmp_path / "e.safetensors", edit.tensors(), {**record, "report": None})
    with pytest.raises(EditError, match=r"e\.safetensors is not an edit of this version"):
        Edit.load(path)
    assert tiny_llama.fingerprint == shown


# -- text and archives ----------------------------------------------------------------------------


def corpus_of(path):
    return list(Corpus.parse(str(path)).documents())


def test_damaged_corpora(tmp_path):
    import pyarrow
    import pyarrow.parquet

    nested = tmp_path / "deep.jsonl"
    nested.write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(CorpusError, match=r"deep\.jsonl:1: not valid JSON"):
        corpus_of(nested)
    table = pyarrow.table({"text": [f"text number {i}" for i in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    packed, chance = gzip.compress(whole), random.Random(0)
    for name, data in (("b.parquet", whole), ("b.parquet.gz", packed)):
        path = tmp_path / name
        for _ in range(150):
            damaged = bytearray(data[: chance.choice([len(data), chance.randrange(len(data))])])
            for _ in range(chance.randrange(1, 4) if damaged else 0):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            path.write_bytes(damaged)
            only_our_errors(corpus_of, path)


def test_damaged_npz(tmp_path):
    path, chance = tmp_path / "model.layers.1.mlp.down_proj_float32_mom2_100.npz", random.Random(0)
    np.savez(path, **{"mom2.mom2": np.eye(3, dtype="f4"), "mom2.count": 4, "sample_size": 2})
    whole = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        only_our_errors(npz.read, path)
    with path.open("wb") as stream:
        np.save(stream, np.eye(3))  # no archive
    with pytest.raises(StatisticsError, match="cannot be read as .npz"):
        npz.read(path)
    np.savez(path, **{"mom2.mom2": np.zeros((0, 0), "f4"), "mom2.count": 4})
    with pytest.raises(StatisticsError, match="is empty"):
        npz.read(path)


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "[1]", '[{"method": 1}]', "{}", "[]"])
def test_damaged_results(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(KnowEditError, match=r"results\.json"):
        report(tmp_path)


# -- models ---------------------------------------------------------------------------------------


class Marker:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_models_whose_weights_are_damaged(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama.hf.save_pretrained("model")
    tiny_llama.tokenizer.save_pretrained("model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="'model' could not be loaded"):
        load_model("model")
    weights.unlink()
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Marker()))
    with pytest.raises(ModelError, match="'model' could not be loaded") as raised:
        load_model("model")
    assert "weights_only" not in str(raised.value) and not Path("ran").exists()


# -- the disk -------------------------------------------------------------------------------------


class Full:
    """A disk on which nothing has room: safetensors says so in an error of its own class."""

    def __init__(self, *_args, **_kwargs):
        from safetensors import SafetensorError

        raise SafetensorError("I/O error: No space left on device (os error 28)")


def full(_folder):
    """As the library of tokenizers says it."""
    raise Exception("No space left on device (os error 28)")


def test_a_full_disk_is_an_error_that_names_the_file(tiny_llama, tmp_path, monkeypatch):
    edit = an_edit(tiny_llama)
    monkeypatch.setattr("knowedit.io.tensors.save_file", Full)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written.*No space left"):
        edit.save(tmp_path / "a.safetensors")
    with pytest.raises(OSError, match="adapter could not be written.*No space left"):
        monkeypatch.setattr("knowedit.edits.export.peft.save_file", Full)
        edit.export(tmp_path / "adapter", tiny_llama)
    with pytest.raises(OSError, match="edited could not be written.*No space left"):
        monkeypatch.setattr(tiny_llama.hf, "save_pretrained", Full)
        save_edited(tiny_llama, [edit], tmp_path / "edited")
    with pytest.raises(OSError, match="edited could not be written.*No space left"):
        monkeypatch.setattr(tiny_llama.hf, "save_pretrained", lambda folder: None)
        monkeypatch.setattr(tiny_llama.tokenizer, "save_pretrained", full)
        save_edited(tiny_llama, [edit], tmp_path / "edited")
    assert not list(tmp_path.iterdir()) and not tiny_llama.ledger.active


# -- names, terminals, secrets --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../escaped", "/etc/x", "a/../../b", "", ".hidden", "a\nb"])
def test_names_of_modules_never_become_paths(tmp_path, name):
    with pytest.raises(StatisticsError, match="cannot be part of a file's name"):
        npz.write(tmp_path / "out", _with(LayerStatistics.load(LAYER), module=name), "rome")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("style", ["rome", "easyedit"])
@pytest.mark.parametrize("name", ["..", "../..", "a/..", ".hidden", "a\nb", ""])
def test_names_of_models_never_become_paths(tmp_path, name, style):
    found = _with(LayerStatistics.load(LAYER), model=name)
    try:
        path = npz.write(tmp_path / "out", found, style)
    except StatisticsError as error:
        assert "cannot be part of a file's name" in str(error)
        assert not list(tmp_path.iterdir())
    else:  # "a/.." is a_.. for those who put the whole name into one part
        assert (name, style, path.parent.parent.name) == ("a/..", "rome", "a_..")


def _with(found, **changes):
    return type(found)(**{**vars(found), **changes})


def test_what_files_say_moves_no_cursor(tmp_path, capsys, monkeypatch, tiny_llama):
    edit = an_edit(tiny_llama)
    edit.report.warnings = ["\x1b[2J\x9bgone\rover\x07 but\ttabs\nand lines"]
    path = edit.save(tmp_path / "a.safetensors")
    monkeypatch.setattr("sys.argv", ["knowedit", "inspect", str(path)])
    with pytest.raises(SystemExit, match="0"):
        app.main()
    said = capsys.readouterr().out
    assert "\\x1b[2J\\x9bgone\\x0dover\\x07 but\ttabs\nand lines" in said and "\x1b" not in said
    assert printable("naïve 東京 🙂\n") == "naïve 東京 🙂\n"


def test_an_error_that_was_not_foreseen_is_one_line(capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr("knowedit.cli.inspection.describe", fail)
    monkeypatch.setattr("sys.argv", ["knowedit", "inspect", "x"])
    with pytest.raises(SystemExit, match="1"):
        app.main()
    said = capsys.readouterr().err
    assert said.startswith("error: ZeroDivisionError: by nothing; ") and said.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["knowedit", "--verbose", "inspect", "x"])
    with pytest.raises(ZeroDivisionError):
        app.main()


def test_passwords_of_an_endpoint_are_neither_kept_nor_said(own_cache, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(own_cache))
    server = Endpoint("http://me:s3cret@127.0.0.1:9/v1?key=s3cret", "m", retries=0, timeout=1)
    assert server.shown == "http://127.0.0.1:9/v1"
    with pytest.raises(ParaphraseError) as raised:
        paraphrases("2 + 2 =", 2, server)
    assert "s3cret" not in str(raised.value)
    answer = json.dumps(["Two and two make", "The sum of two and two is"])
    monkeypatch.setattr(Endpoint, "ask", lambda *_: answer)
    assert len(paraphrases("2 + 2 =", 2, server)) == 2
    kept = list(own_cache.rglob("*.json"))
    assert kept and all("s3cret" not in file.read_text() for file in kept)


@pytest.mark.parametrize("amiss", [{"fingerprint": 7}, {"fingerprint": {}}, {"method": {}}])
def test_the_record_of_a_session_has_texts_where_they_are_used(tmp_path, amiss):
    about = {"format": "knowedit-session/1", "fingerprint": "a", "method": {"kind": "memit"}}
    write_file(tmp_path / "session.safetensors", {}, about)
    assert Journal(tmp_path).fingerprint == "a"
    write_file(tmp_path / "session.safetensors", {}, about | amiss)
    with pytest.raises(EditError, match="session.safetensors is not the record of a session"):
        Journal(tmp_path)
