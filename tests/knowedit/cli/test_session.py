"""`knowedit session` as a service types it, on a tiny model (unit)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from knowedit.edits.journal import Journal
from knowedit.evaluation.interview import Interview
from knowedit.io.files import locked
from tests.knowedit.cli.examples import FACTS

OTHER = {**FACTS[0], "target": "Nice"}
OPEN = ("--corpus", "corpus.txt", "--tokens", "500", "--layer", "1")
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def session(place, knowedit):
    """`session(command, *words)` on a folder that is begun; what --json printed."""
    for name, facts in (("a", FACTS[:1]), ("b", FACTS[1:]), ("other", [OTHER])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    steps = ("--set", "target.steps=2")
    knowedit("session", "open", "kept", "model", *OPEN, *steps)

    def run(command, *words, code=0):
        forced = ("--force",) * (command in ("apply", "correct", "forget") and not code)
        told = ("--json",) * (not code)
        said = knowedit("session", command, "kept", *words, *forced, *told, code=code)
        return said if code else json.loads(said)

    return run


def weight(place, knowedit, name):
    """Of the model with the session's edits."""
    knowedit("apply", "model", "kept", "-o", name)
    return load_file(place / name / "model.safetensors")[WEIGHT]


def test_days_of_writing_correcting_and_forgetting(place, knowedit, session, monkeypatch):
    first = session("apply", "a.jsonl")
    assert [fact["target"] for fact in first["facts"]] == ["Lyon"] and first["standing"] == 1
    one = weight(place, knowedit, "one")
    assert "repeats history, edit 0" in session("apply", "a.jsonl", code=1)
    assert "contradicts 'Lyon' of history, edit 0" in session("apply", "other.jsonl", code=1)
    assert "nothing that stands in the history says" in session("forget", "b.jsonl", code=1)
    session("apply", "b.jsonl")
    there = session("correct", "other.jsonl")
    assert [fact["target"] for fact in there["taken_out"]] == ["Lyon"]
    assert "says 'Nice' already" in session("correct", "other.jsonl", code=1)
    session("apply", "a.jsonl", "--correct")  # and back again: a cycle of corrections
    assert [fact["target"] for fact in session("list")["facts"]] == ["Norse", "Lyon"]
    monkeypatch.chdir(place / "model")  # what it was begun with holds in any folder
    assert session_of(knowedit, "../kept", "forget", "../b.jsonl")["standing"] == 1
    monkeypatch.chdir(place)
    told = session("list")
    assert [fact["target"] for fact in told["facts"]] == ["Lyon"] and len(told["edits"]) == 5
    assert told["facts"][0]["written"] >= first["written"]
    assert "1 fact stands, of 5 edits of memit" in knowedit("session", "list", "kept")
    assert not torch.equal(weight(place, knowedit, "last"), one)
    corrected = "an edit that is to stay corrects or forgets"
    assert corrected in session("compact", "--keep", "1", code=1)
    assert session("compact") == {"folder": "kept", "edits": 1, "standing": 1}
    assert len(session("list")["facts"]) == 1


def session_of(knowedit, folder, command, *words):
    return json.loads(knowedit("session", command, folder, *words, "--force", "--json"))


def test_a_day_is_rolled_back_to(place, knowedit, session):
    session("apply", "facts.jsonl")
    assert "'soon' is not a date" in session("rollback", "soon", code=1)
    assert session("rollback", "2999-01-01")["undone"] == []
    assert len(session("rollback", "2000-01-01")["undone"]) == 1
    assert session("list")["facts"] == [] and len(list((place / "kept/undone").iterdir())) == 1


def test_an_interrupted_day_leaves_the_session_as_it_was(session, place, monkeypatch):
    session("apply", "a.jsonl")
    before = sorted(path.name for path in (place / "kept").iterdir())

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Interview, "__init__", stop)
        said = session("apply", "b.jsonl", code=130)
    assert "interrupted: kept is as it was; run the same command again" in said
    assert sorted(path.name for path in (place / "kept").iterdir()) == before
    assert session("apply", "b.jsonl")["standing"] == 2


def test_what_is_wrong_is_said(place, knowedit, session, monkeypatch):
    assert "kept exists" in knowedit("session", "open", "kept", "model", *OPEN, code=1)
    two = ("--method", "memit", "--method", "rome")
    assert "give --method once" in knowedit("session", "open", "x", "model", *two, code=1)
    assert "is not the folder of a session" in knowedit("session", "list", "model", code=1)
    both = json.dumps(FACTS[0]) + "\n" + json.dumps(OTHER)
    (place / "both.jsonl").write_text(both)
    assert "contradicts" in session("apply", "both.jsonl", code=1)
    monkeypatch.setattr("knowedit.io.files.PATIENCE", 0.1)
    with locked(place / "kept"):
        assert "another run is writing to kept" in session("compact", code=1)
    journal = Journal(place / "kept")
    Journal.begin(place / "python", journal.fingerprint, journal.method)
    words = ("session", "apply", "python", "a.jsonl")
    assert "does not say on which model; give --model" in knowedit(*words, code=1)
    shutil.copytree(place / "model", place / "changed")
    file = place / "changed" / "model.safetensors"
    save_file({n: t + 1 for n, t in load_file(file).items()}, file, {"format": "pt"})
    assert "belongs to a model with fingerprint" in session(
        "apply", "a.jsonl", "--model", "changed", code=1
    )


def test_what_it_was_begun_with_is_pinned(place, knowedit, session, monkeypatch):
    """Begun without --corpus and without the hub: the statistics that were at hand, ever after."""

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    stats = ("stats", "model", "--corpus", "corpus.txt", "--layer", "1")
    knowedit(*stats, "--tokens", "600")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    words = ("--layer", "1", "--set", "target.steps=2")
    knowedit("session", "open", "offline", "model", *words)
    (pinned,) = Journal(place / "offline").run["pinned"].values()
    assert pinned["tokens"] == 600
    knowedit(*stats, "--tokens", "800")  # what is at hand from now on
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", None)  # is not asked again
    session_of(knowedit, "offline", "apply", "a.jsonl")
    (made,) = Journal(place / "offline").read().edits
    assert made.statistics["1"] == pinned
    folder = next((place / "cache" / "statistics").glob("*/corpus.txt-600-*"))
    shutil.rmtree(folder)
    said = knowedit("session", "apply", "offline", "b.jsonl", code=1)
    assert "pinned (600 tokens of corpus.txt) are not in the cache any more" in said
