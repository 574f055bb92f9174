"""Each field of each header of each artefact that is read, replaced by what it must not be: it is
read all the same, or refused by an error of ours that names the file, with nothing touched (unit).

Files are written with right checksums, as another program or a hand would leave them.
"""

import copy
import json
import shutil
from contextlib import suppress

import pytest
import torch

from knowedit.cli.inspection import describe
from knowedit.edits.card import card, said_of
from knowedit.edits.edit import Edit
from knowedit.edits.export import folder as export
from knowedit.edits.history import History
from knowedit.edits.journal import ABOUT
from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact
from knowedit.io.tensors import opened, write_file
from knowedit.methods.learned.loop import Plan, train
from knowedit.methods.learned.mend.network import MendNetwork
from knowedit.methods.learned.named.mend import MEND
from knowedit.methods.learned.named.serac import SERAC
from knowedit.methods.learned.serac import network as serac_network
from knowedit.methods.registry import make_method
from knowedit.methods.session import Session
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.statistics.files.store import LayerStatistics
from tests.faults.test_damaged import LAYER, V1
from tests.knowedit.methods.trained import network_of

WRONG = (None, {}, [], "", -1, float("nan"), True)
FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon", true="Paris"),
    Fact(prompt="The capital of {} is", subject="Spain", target="Oslo", true="Madrid"),
]


def places(record, at=()):
    """Where the fields of a record are, at any depth; of a list, its first entry."""
    found = record.items() if isinstance(record, dict) else enumerate(record[:1])
    for name, value in found:
        yield (*at, name)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, name))


def replaced(record, place, value):
    """A copy of a record with another value at a place."""
    found = copy.deepcopy(record)
    inner = found
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return found


def refused(read, path):
    """What an error of ours says that reading a file raises; None: it is read."""
    try:
        read(path)
    except KnowEditError as error:
        return str(error)
    return None


def all_fields(path, read, names=None, untouched=()):
    """Put every wrong value into every field of the header of `path`; returns the places where one
    was refused.

    Args:
        names: of the file or folder, that errors may have; default: the file's.
        untouched: functions whose results no refusal may change.
    """
    with opened(path) as file:
        header, tensors = file.header, file.tensors()
    before = [look() for look in untouched]
    assert refused(read, path) is None
    found, escaped = set(), []
    for place in places(header):
        for value in WRONG:
            write_file(path, tensors, replaced(header, place, value))
            try:
                said = refused(read, path)
            except Exception as error:
                escaped.append(f"{place} = {value!r}: {type(error).__name__}: {error}"[:300])
                continue
            if said is not None:
                found.add(place)
                if not any(name in said for name in names or [path.name]):
                    escaped.append(f"{place} = {value!r}: names no file: {said}"[:300])
                assert [look() for look in untouched] == before, (place, value)
    write_file(path, tensors, header)
    assert not escaped, f"{len(escaped)}:\n" + "\n".join(escaped)
    return found


@pytest.fixture
def made(tiny_llama):
    """Edits of today, with all that is measured and recorded."""
    method = make_method({**make_method("ft").to_dict(), "layers": [1], "steps": 2})
    session = Session(method, tiny_llama)
    for fact in FACTS:
        session.write([fact], force=True, progress=False)
    edits = session.history.edits
    session.close()
    return edits


def used(model):
    """Whatever is done with an edit."""

    def use(edit):
        repr(edit), edit.key, edit.report.within_limits
        card("x", "base", "title", "opening", [said_of(edit)])
        if edit.fingerprint == model.fingerprint:
            with edit.applied_to(model):
                pass

    return use


def test_edits(tiny_llama, made, tmp_path):
    use, path = used(tiny_llama), made[0].save(tmp_path / "a.edit")

    def read(path):
        use(Edit.load(path))
        json.dumps(describe(path).to_dict())

    found = all_fields(path, read, untouched=[lambda: weights_fingerprint(tiny_llama.hf)])
    assert {("fingerprint",), ("facts", 0, "prompt"), ("report", "measured", "kl")} <= found


@pytest.mark.parametrize("name", ["memit", "neuron-patch", "ft-l", "serac"])
def test_edits_of_the_first_version(tiny_llama, tmp_path, monkeypatch, name):
    for size, value in (("HEADS", 2), ("WIDTH", 4), ("SIZE", 8)):  # the file is kept small
        monkeypatch.setattr(serac_network, size, value)
    path, use = shutil.copy(V1 / f"{name}-llama.safetensors", tmp_path / "a.edit"), used(tiny_llama)

    def read(path):
        use(Edit.load(path))
        json.dumps(describe(path).to_dict())

    assert ("facts", 0, "subject") in all_fields(tmp_path / path.name, read)


def test_histories(tiny_llama, made, tmp_path):
    use, path = used(tiny_llama), History(tiny_llama.fingerprint, made).save(tmp_path / "h")

    def read(path):
        history = History.load(path)
        repr(history), history.facts, history.find(FACTS)
        for edit in history.edits:
            use(edit)
        describe(path)

    assert {("fingerprint",), ("edits",)} <= all_fields(path, read)


@pytest.mark.parametrize("file", [ABOUT, "000001.safetensors"])
def test_sessions(tiny_llama, tmp_path, file):
    folder = tmp_path / "kept"
    method = make_method({**make_method("ft").to_dict(), "layers": [1], "steps": 2})
    with Session.open(folder, tiny_llama, method) as session:
        session.write(FACTS[:1], force=True, progress=False)

    def read(path):
        session = Session.open(folder, tiny_llama)
        assert len(session.history.facts) < 3
        session.close()
        assert not tiny_llama.ledger.active

    all_fields(folder / file, read, ["kept", file], [lambda: weights_fingerprint(tiny_llama.hf)])


def test_statistics(tmp_path):
    path = tmp_path / LAYER.name
    shutil.copy(LAYER, path)

    def read(path):
        found = LayerStatistics.load(path)
        repr(found.recipe), found.energy, found.first_ratio, found.identity, found.recipe.slug
        json.dumps(describe(path).to_dict())

    all_fields(path, read)


REPORT = {
    "trainable_parameters": 1,
    "facts": {"training": 1},
    "seconds": 1.0,
    "validation": {},
}


def network(model, name):
    """A network that counts as trained, and its method."""
    if name == "serac":
        return network_of(model), SERAC
    made = MendNetwork.new(model, (2,), 2)
    made.report = REPORT
    return made, MEND


@pytest.mark.parametrize("name", ["mend", "serac"])
def test_networks(tiny_llama, tmp_path, monkeypatch, name):
    for size, value in (("HEADS", 2), ("WIDTH", 4), ("SIZE", 8)):  # the file is kept small
        monkeypatch.setattr(serac_network, size, value)
    made, method = network(tiny_llama, name)

    def read(path):
        json.dumps(describe(path).to_dict())
        edit = method(path).compute(tiny_llama, FACTS[:1], progress=False)
        with edit.applied_to(tiny_llama):
            said = tiny_llama.score([FACTS[0].text], [FACTS[0].target])
        assert said == wanted

    path = made.save(tmp_path / "a.network")
    with method(path).compute(tiny_llama, FACTS[:1], progress=False).applied_to(tiny_llama):
        wanted = tiny_llama.score([FACTS[0].text], [FACTS[0].target])
    found = all_fields(path, read, untouched=[lambda: weights_fingerprint(tiny_llama.hf)])
    assert {("fingerprint",), ("report", "seconds")} <= found
    assert ({"mend": ("layers", 0), "serac": ("threshold",)}[name]) in found


def test_checkpoints_of_a_training(tmp_path):
    path, plan = tmp_path / "a.training", Plan(steps=4, lr=0.1, validate=2)

    def go_on(path, steps=4):
        weight = torch.nn.Parameter(torch.ones(3))
        stopped = iter(range(steps))

        def loss(step):
            if next(stopped, None) is None:
                raise KeyboardInterrupt
            return (weight * (step + 1)).square().sum()

        def validate():
            return float(weight.detach().square().sum())

        with suppress(KeyboardInterrupt):
            train({"w": weight}, loss, validate, plan, path, "s", keep=True, progress=False)
        return weight.detach().tolist()

    def read(path):
        before = path.read_bytes()
        assert go_on(path) == wanted
        path.write_bytes(before)

    wanted = go_on(tmp_path / "whole")
    assert go_on(path, 3) != wanted
    found = all_fields(path, read)
    assert {("stamp",), ("course", "steps"), ("course", "best")} <= found


@pytest.mark.parametrize("one", [False, True], ids=["all", "one"])
def test_undo_records(tiny_llama, made, tmp_path, monkeypatch, one):
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    folder = export.save_edited(tiny_llama, made, tmp_path / "edited")
    monkeypatch.setattr(export, "fingerprint_of", lambda *_: tiny_llama.fingerprint)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    record = folder / export.RECORD

    def weights():
        return {n: (folder / n).read_bytes() == before[n] for n in before if n != record.name}

    def undo(path):
        describe(folder)
        export.facts_in(folder)
        export.restore(folder, [made[0].key] if one else [])
        for name, data in before.items():
            (folder / name).write_bytes(data)

    assert ("weights",) in all_fields(record, undo, ["edited"], [weights])
