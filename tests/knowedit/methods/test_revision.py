"""Correcting and forgetting: held to the joint write, and what is refused (unit)."""

import copy
from dataclasses import replace

import pytest
import torch

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, FactError
from knowedit.methods import EMMET, FTL, MEMIT, AlphaEdit, RoSE
from knowedit.methods.locate.keys import group_by_subject
from knowedit.methods.locate.metrics import Covariance, NullSpace
from knowedit.methods.locate.removal import after_removal, removal
from knowedit.methods.locate.values import ValueSettings
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.methods.helpers import SAME, statistics_of, target_of
from tests.knowedit.methods.test_session import FACTS

VALUES = ValueSettings(steps=3, lr=2.0, clamp=20.0, contexts=("{}", "Well, {}"))
CORRECTED = replace(FACTS[1], target="drums")


ONE_KEY = replace(VALUES, contexts=("{}",))


def method(values=VALUES, **others):
    return MEMIT(layers=(1,), target=target_of(values), **others)


@pytest.fixture
def session(tiny_llama):
    with Session(method(), tiny_llama, statistics_of(tiny_llama, [1])) as session:
        yield session


def write(session, *batches):
    return [session.write(batch, force=True, progress=False) for batch in batches]


def total(history):
    return sum(edit.delta(1).double() for edit in history.edits)


@pytest.mark.parametrize("gone", [[0], [1, 2], [1, 4]])
@pytest.mark.parametrize("metric", [Covariance(weight=30.0), NullSpace(weight=30.0)], ids=str)
def test_a_removal_leaves_the_joint_write_without_the_stale(tiny_llama, metric, gone):
    """And with another value in its place, the joint write with that value. Fixed values, float64,
    as for the sequence itself; what float32 keys lose grows with the gain, here 0.6 to 0.85.
    """
    model = EditableModel(copy.deepcopy(tiny_llama.hf).double(), tiny_llama.tokenizer)
    editor = method(ONE_KEY, metric=metric)
    statistics, groups = statistics_of(model, [1]), group_by_subject([*FACTS, CORRECTED], False)
    *old, new = range(len(groups))
    whole = editor.prepare(model, groups, statistics, progress=False)
    targets = editor.target.values(whole)

    def joint(which):
        task = editor.prepare(model, [groups[i] for i in which], statistics, progress=False)
        return editor.finish(task, targets.select(which)).delta(1).double()

    def written(which, history):
        task = editor.prepare(model, [groups[i] for i in which], statistics, history, False)
        made = editor.finish(task, targets.select(which))
        made.config = editor.to_dict()
        return made

    kept = [i for i in old if i not in gone]
    without, corrected = joint(kept), joint([*kept, new])  # of the unedited model
    history = History(model.fingerprint)
    for start in range(0, len(old), 2):
        made = written(old[start : start + 2], history)
        made.apply(model)
        history.add(made)
    stale = history.find([FACTS[i] for i in gone])
    removed = removal(editor, model, stale, statistics, history)
    before = total(history)
    assert (before + removed.delta(1) - without).norm() <= 1e-6 * without.norm()
    assert (before - without).norm() >= 1e-2 * without.norm()
    with removed.applied_to(model):
        made = written([new], history.followed_by(removed))
    both = after_removal(made, removed, model)
    assert (before + both.delta(1) - corrected).norm() <= 1e-6 * corrected.norm()
    # and a correction of the correction finds the columns that are its own
    both.apply(model)
    history.add(both)
    last = [place for place in history.find([CORRECTED]) if place.fact == CORRECTED]
    again = removal(editor, model, last, statistics, history)
    assert (total(history) + again.delta(1) - without).norm() <= 1e-6 * without.norm()
    assert again.replaces == {both.key: (0,)}


def test_what_was_forgotten_was_never_there(tiny_llama, session):
    """One fact, written and forgotten: the weights are as before, but for rounding."""
    before = {n: p.clone() for n, p in tiny_llama.hf.named_parameters()}
    (made,) = write(session, FACTS[:1])
    gone = session.forget(FACTS[:1], force=True, progress=False)
    assert not session.history.facts
    assert (made.delta(1) + gone.delta(1)).norm() <= 1e-6 * made.delta(1).norm()
    name = tiny_llama.layout.weight_name(1)
    torch.testing.assert_close(tiny_llama.hf.get_parameter(name), before[name])
    assert session.history.keys(1) is None
    write(session, FACTS[:1])  # it may be written anew
    assert session.undo() and session.undo() is gone
    assert session.history.facts == FACTS[:1]


def test_a_correction_is_one_edit_that_undo_takes_back(tiny_llama, session, caplog):
    write(session, FACTS[:3], FACTS[3:])
    before, keys = weights_fingerprint(tiny_llama.hf), session.history.keys(1)
    with pytest.raises(FactError, match="contradicts 'violin' of history, edit 0"):
        session.write([CORRECTED], progress=False)
    made = session.correct([CORRECTED], force=True, progress=False)
    assert "in force too" not in caplog.text  # the old value is taken out, and contradicts nothing
    assert session.history.facts == [FACTS[0], FACTS[2], *FACTS[3:], CORRECTED]
    assert made.facts == [CORRECTED] and len(session.history) == 3
    assert made.report.measured.gain[0] > 0.5
    with pytest.raises(EditError, match="corrects or forgets facts of this MEMIT edit; undo it"):
        session.history.remove(session.history.edits[0])
    back = session.correct([FACTS[1]], force=True, progress=False)  # a cycle
    assert back.replaces == {made.key: (0,)} and FACTS[1] in session.history.facts
    assert session.undo() is back and session.undo() is made
    assert weights_fingerprint(tiny_llama.hf) == before
    assert torch.equal(session.history.keys(1), keys)


def test_what_shared_a_value_is_written_again(tiny_llama, session):
    france = replace(SAME, prompt="It is cold and {} is", target="big")
    write(session, [FACTS[0], france], FACTS[3:])
    new = replace(FACTS[0], target="mountains")
    made = session.write([new, FACTS[1]], correct=True, force=True, progress=False)
    assert made.facts == [new, france, FACTS[1]] and made.groups == (0, 0, 1)
    unknown = session.forget([new], answer="unknown", force=True, progress=False)
    assert [fact.target for fact in unknown.facts] == ["unknown", "big"]


def test_a_file_remembers_what_was_replaced(tiny_llama, session, tmp_path):
    write(session, FACTS[:2], FACTS[2:4])
    session.correct([CORRECTED], force=True, progress=False)
    session.forget([FACTS[2]], force=True, progress=False)
    read = History.load(session.history.save(tmp_path / "h.safetensors"))
    assert read.facts == session.history.facts == [FACTS[0], FACTS[3], CORRECTED]
    assert torch.equal(read.keys(1), session.history.keys(1))
    edit = Edit.load(session.history.edits[2].save(tmp_path / "e.safetensors"))
    assert edit.replaces == session.history.edits[2].replaces and edit.owners


def test_what_cannot_be_taken_out_says_what_to_do(tiny_llama, session):
    write(session, FACTS[:2])
    with pytest.raises(FactError, match="nothing that stands in the history says .*`write`"):
        session.correct([replace(FACTS[2], target="x")])
    with pytest.raises(FactError, match="says 'violin' already; leave it out"):
        session.correct([FACTS[1]], progress=False)
    with pytest.raises(FactError, match="nothing that stands"):
        session.forget([Fact("{} is", "Nobody", "no")])
    statistics, history = session.statistics, session.history
    for other, error in {
        FTL(): "FT-L cannot take single facts out again; undo the edits that have them: MEMIT-",
        EMMET(layers=(1,)): "no joint solution to return to; undo the whole edit",
        AlphaEdit(layers=(1,)): "under the metric 'covariance', .* this one has 'null-space'",
        RoSE(layers=(1,)): "this one has 'blend'",
    }.items():
        with pytest.raises(EditError, match=error):
            Session(other, tiny_llama, statistics, history).correct([CORRECTED], progress=False)
    with pytest.raises(EditError, match="protect=False keeps no account"):
        Session(method(), tiny_llama, statistics, history, protect=False).forget(FACTS[:1])
    history.edits[0].owners = ()
    with pytest.raises(
        EditError, match="does not record the keys of each fact, or they were compacted; undo"
    ):
        session.forget(FACTS[:1], progress=False)
    assert history.facts == FACTS[:2] and len(tiny_llama.ledger.active) == 1
