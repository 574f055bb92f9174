"""Histories and sessions: the identity with the joint batch, what a history refuses, and its
file (unit).
"""

import copy
from dataclasses import replace

import pytest
import torch

from knowedit.edits.history import History
from knowedit.errors import EditError, KnowEditError
from knowedit.evaluation import evaluate
from knowedit.evaluation.measures.perplexity import perplexity
from knowedit.evaluation.sequence import SequenceMonitor, trajectory_table, write_in_sequence
from knowedit.facts.fact import Fact, FactError, Probe
from knowedit.methods import MEMIT, AlphaEdit
from knowedit.methods.locate.keys import group_by_subject
from knowedit.methods.locate.metrics import Covariance, NullSpace
from knowedit.methods.locate.values import ValueSettings
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.edits.test_edit import an_edit
from tests.knowedit.methods.helpers import statistics_of, target_of

FACTS = [
    Fact(prompt=f"It is said that {{}} {verb} the", subject=subject, target=target)
    for subject, verb, target in (
        ("France", "likes", "sea"),
        ("Miles Davis", "plays", "violin"),
        ("Brazil", "speaks", "Norse"),
        ("Ada", "found", "Moon"),
        ("The Nile", "feeds", "Ruhr"),
        ("Fiji", "borders", "Alps"),
    )
]
VALUES = ValueSettings(steps=3, lr=2.0, clamp=20.0, contexts=("{}",))


def sequence(model, editor, statistics, targets, groups, history, size=2):
    """Write `groups` in batches towards fixed targets; returns the sum of the updates. The model is
    left as it was.
    """
    total, edits = torch.zeros(model.hidden, model.d_ff, dtype=torch.float64), []
    for start in range(0, len(groups), size):
        batch = editor.prepare(
            model, groups[start : start + size], statistics, history, progress=False
        )
        made = editor.finish(batch, targets.select(range(start, start + size)))
        made.apply(model)
        edits.append(made)
        total += made.delta(1)
        if history is not None:
            history.add(made)
    for edit in edits:
        edit.undo(model)
    return total


@pytest.mark.parametrize(
    "editor",
    [MEMIT(metric=Covariance(weight=3.0)), AlphaEdit(metric=NullSpace(weight=3.0))],
    ids=lambda editor: editor.name,
)
def test_in_sequence_with_a_history_is_the_joint_batch(tiny_llama, editor):
    """Recursive least squares: one layer, history, and targets that were optimised once, on the
    unedited model. In float64: float32 keys and weights alone are off by 1e-6, more or less by
    the CPU.
    """
    model = EditableModel(copy.deepcopy(tiny_llama.hf).double(), tiny_llama.tokenizer)
    editor = replace(editor, layers=(1,), target=target_of(VALUES))
    statistics, groups = statistics_of(model, [1]), group_by_subject(FACTS, True)
    whole = editor.prepare(model, groups, statistics, progress=False)
    targets = editor.target.values(whole)
    joint = editor.finish(whole, targets).delta(1).double()
    history = History(model.fingerprint)
    with_history = sequence(model, editor, statistics, targets, groups, history)
    assert (with_history - joint).norm() <= 1e-6 * joint.norm()
    without = sequence(model, editor, statistics, targets, groups, None)
    assert (without - joint).norm() >= 1e-3 * joint.norm()


def test_a_session_writes_protects_and_takes_back(tiny_llama):
    statistics, before = statistics_of(tiny_llama, [1, 2]), weights_fingerprint(tiny_llama.hf)
    editor = MEMIT(layers=(1, 2), target=target_of(VALUES))
    with Session(editor, tiny_llama, statistics) as session:
        first = session.write(FACTS[:2], force=True, progress=False)
        second = session.write(FACTS[2:4], force=True, progress=False)
        assert session.history.facts == FACTS[:4] and weights_fingerprint(tiny_llama.hf) != before
        # the keys are those of the edited model: layer 2 sees what layer 1 wrote
        rows = [tiny_llama.row(fact.text, fact.subject) for fact in FACTS[2:4]]
        torch.testing.assert_close(
            second.keys[2], tiny_llama.keys(rows, [2])[0][2], rtol=1e-4, atol=1e-5
        )
        assert session.undo() is second and session.history.edits == [first]
        session.write(FACTS[2:4], force=True, progress=False)
        unprotected = Session(editor, tiny_llama, statistics, session.history, protect=False)
        overwriting = unprotected.write(FACTS[4:], progress=False)
        assert (
            session.undo() is overwriting
            and session.write(FACTS[4:], force=True, progress=False).key != overwriting.key
        )
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active
    with pytest.raises(EditError, match="no edit to undo"):
        session.undo()


def test_earlier_keys_move_less_under_protection(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    moved = {}
    for protect in (True, False):
        with Session(
            MEMIT(layers=(1,), target=target_of(VALUES), metric=Covariance(weight=1e-3)),
            tiny_llama,
            statistics,
            protect=protect,
        ) as session:
            first = session.write(FACTS[:3], force=True, progress=False)
            second = session.write(FACTS[3:], force=True, progress=False)
            moved[protect] = float((second.delta(1) @ first.keys[1].T).norm())
    assert moved[True] < 0.2 * moved[False]


def test_facts_written_before_cannot_be_repeated_or_contradicted(tiny_llama):
    with Session(
        MEMIT(layers=(1,), target=target_of(VALUES)), tiny_llama, statistics_of(tiny_llama, [1])
    ) as session:
        session.write(FACTS[:2], force=True, progress=False)
        with pytest.raises(FactError, match="facts\\[1\\].*repeats history, edit 0"):
            session.write([FACTS[2], FACTS[0]], force=True, progress=False)
        with pytest.raises(FactError, match="contradicts 'sea' of history, edit 0"):
            session.write([replace(FACTS[0], target="snow")], force=True, progress=False)
        assert len(session.history) == 1 and len(tiny_llama.ledger.active) == 1


class TestHistory:
    @pytest.fixture
    def written(self, tiny_llama):
        with Session(
            MEMIT(layers=(1,), target=target_of(VALUES)), tiny_llama, statistics_of(tiny_llama, [1])
        ) as session:
            for start in (0, 2):
                session.write(FACTS[start : start + 2], force=True, progress=False)
            yield session.history

    def test_its_keys_are_never_more_than_their_size(self, tiny_llama, written):
        many = torch.randn(3 * tiny_llama.d_ff, tiny_llama.d_ff, dtype=torch.float64)
        history = History(tiny_llama.fingerprint, [replace(written.edits[0], keys={1: many})])
        found = history.keys(1)
        assert found.shape == (tiny_llama.d_ff, tiny_llama.d_ff) and history.keys(2) is None
        torch.testing.assert_close(found @ found.T, many.T @ many)

    def test_a_file_holds_all_of_it(self, tiny_llama, written, tmp_path):
        read = History.load(written.save(tmp_path / "h.safetensors"))
        assert read.facts == written.facts and [e.key for e in read.edits] == [
            e.key for e in written.edits
        ]
        torch.testing.assert_close(read.keys(1), written.keys(1), rtol=0, atol=0)
        for edit in written.edits:
            edit.undo(tiny_llama)
        with pytest.raises(EditError, match="2 of the history's 2 edits are not applied"):
            read.check(tiny_llama)
        read.replay(tiny_llama)
        read.check(tiny_llama)
        editor, statistics = (
            MEMIT(layers=(1,), target=target_of(VALUES)),
            statistics_of(tiny_llama, [1]),
        )
        on = editor.compute(tiny_llama, FACTS[4:], statistics, history=read, progress=False)
        assert (
            on.key
            == editor.compute(
                tiny_llama, FACTS[4:], statistics, history=written, progress=False
            ).key
        )

    def test_it_belongs_to_one_model(self, tiny_llama, tiny_gpt2, written):
        with pytest.raises(EditError, match="start a new history for this model"):
            MEMIT(layers=(1,)).compute(
                tiny_gpt2, FACTS[4:], statistics_of(tiny_gpt2, [1]), history=written
            )
        with pytest.raises(EditError, match="is of model"):
            written.add(an_edit(tiny_gpt2))

    def test_it_refuses_what_it_has_or_cannot_use(self, tiny_llama, written, tmp_path):
        with pytest.raises(EditError, match="in the history already"):
            written.add(written.edits[0])
        with pytest.raises(EditError, match="without its keys"):
            written.add(an_edit(tiny_llama))
        with pytest.raises(EditError, match="not in the history"):
            written.remove(an_edit(tiny_llama))
        an_edit(tiny_llama).save(tmp_path / "edit.safetensors")
        with pytest.raises(EditError, match="is not a history of this version"):
            History.load(tmp_path / "edit.safetensors")


MEASURED = [
    replace(
        fact,
        true="old",
        paraphrases=(f"Now {fact.text}",),
        neighbours=(Probe("The sea is", "wet"),),
    )
    for fact in FACTS
]


class TestTheProtocol:
    def test_points_are_the_model_on_its_way(self, tiny_llama):
        statistics, before = statistics_of(tiny_llama, [1]), weights_fingerprint(tiny_llama.hf)
        texts = ["The moon goes around the earth, and a triangle has three sides."]
        monitor = SequenceMonitor(tiny_llama, MEASURED, texts, progress=False)
        seen = []
        with Session(
            MEMIT(layers=(1,), target=target_of(VALUES)), tiny_llama, statistics
        ) as session:
            for point in write_in_sequence(session, monitor, 2, 4, progress=False):
                found = evaluate(
                    tiny_llama, None, MEASURED[: point.edits] or MEASURED, progress=False
                )
                assert point.measures["efficacy"]["magnitude"].mean == pytest.approx(
                    found.after["efficacy"]["magnitude"].mean
                )
                delta = sum((edit.delta(1) for edit in session.history.edits), torch.zeros(32, 48))
                clean = tiny_llama.weight(1) - delta
                assert point.norm == pytest.approx(float(delta.norm() / clean.norm()), rel=1e-4)
                seen.append(point)
            whole = monitor.evaluation(progress=False)
        assert [point.edits for point in seen] == [0, 4, 6]
        assert (
            seen[0].drift.kl == 0
            and seen[0].norm == 0
            and seen[-1].drift.kl > 0
            and seen[-1].seconds > 0
        )
        assert (
            seen[0].perplexity
            == pytest.approx(perplexity(tiny_llama, texts))
            != seen[-1].perplexity
        )
        for kind, measures in whole.after.items():
            assert {m: e.mean for m, e in measures.items()} == {
                m: e.mean for m, e in seen[-1].measures[kind].items()
            }
        assert "unchanged" in whole.after["neighbourhood"]
        assert weights_fingerprint(tiny_llama.hf) == before
        assert len(trajectory_table(seen).rows) == 3 and seen[0].to_dict()["drift"]["same"] == 1.0

    def test_a_sample_is_spread_over_what_was_written(self, tiny_llama):
        monitor = SequenceMonitor(tiny_llama, MEASURED, sample=2, progress=False)
        assert monitor.measure([], 0, progress=False).measures["efficacy"]["success"].records == 2
        with pytest.raises(KnowEditError, match="must be positive"):
            next(write_in_sequence(Session(MEMIT(), tiny_llama), monitor, 0, 1))
        with Session(
            MEMIT(layers=(1,), target=target_of(VALUES)), tiny_llama, statistics_of(tiny_llama, [1])
        ) as session:
            session.write(MEASURED[1:2], force=True, progress=False)
            with pytest.raises(KnowEditError, match="holds other facts"):
                next(write_in_sequence(session, monitor, 2, 2))
        with (
            an_edit(tiny_llama).applied_to(tiny_llama),
            pytest.raises(KnowEditError, match="undo the active edits"),
        ):
            SequenceMonitor(tiny_llama, MEASURED)


def test_perplexity_is_the_definition(tiny_llama):
    text = "Water boils at a temperature of one hundred degrees."
    ids = torch.tensor([tiny_llama.tokenizer(text)["input_ids"]])
    logits = tiny_llama.hf(input_ids=ids).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp()
    assert perplexity(tiny_llama, [text]) == pytest.approx(float(wanted), rel=1e-5)
    first = torch.nn.functional.cross_entropy(logits[:5], ids[0, 1:6]).exp()
    assert perplexity(tiny_llama, [text], tokens=5) == pytest.approx(float(first), rel=1e-5)
    with pytest.raises(KnowEditError, match="two tokens"):
        perplexity(tiny_llama, ["a"])


def test_what_is_no_method_or_statistics_is_refused_at_once(tiny_llama):
    with pytest.raises(EditError, match="method is a Method.*make_method"):
        Session("memit", tiny_llama)
    with pytest.raises(EditError, match="statistics are what key_statistics returns, got str"):
        Session(MEMIT(), tiny_llama, "x")
    with pytest.raises(EditError, match="history is a History"):
        Session(MEMIT(), tiny_llama, None, [])
