"""Sessions kept in a folder: a simulated year, undone to any day bit for bit; crashes, other
hands, and compaction (unit).
"""

import copy
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta, timezone

import pytest
import torch

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.journal import ABOUT, Journal, edits_in
from knowedit.errors import EditError, KnowEditError
from knowedit.facts.fact import Fact, FactError
from knowedit.methods import MEMIT
from knowedit.methods.base import Method
from knowedit.methods.locate.keys import group_by_subject
from knowedit.methods.locate.metrics import Covariance
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from tests.knowedit.methods.helpers import statistics_of, target_of
from tests.knowedit.methods.test_revision import CORRECTED, ONE_KEY
from tests.knowedit.methods.test_session import FACTS

MEMIT_1 = MEMIT(layers=(1,), target=target_of(ONE_KEY), metric=Covariance(weight=30.0))


@dataclass(frozen=True)
class Drawn(Method, abstract=True):
    """A stand-in that draws its change from the fact, so that a year takes seconds; and measures
    nothing.
    """

    name = "Drawn"

    def _compute(self, model, facts, statistics, history, progress):
        draw = torch.Generator().manual_seed(int(facts[0].subject.split()[1]))
        U, V = (torch.randn(n, 1, generator=draw) / 9 for n in (model.hidden, model.d_ff))
        changes = {model.layout.weight_name(1): LowRank(U, V)}
        return Edit(self.name, changes, facts, model.fingerprint, keys={1: V.T.clone()})

    def recorded(self, made, model, statistics):
        return made


WORKING_DAYS = 261  # of 2026


class Clock:
    """Noon of one working day after the other."""

    def __init__(self, start=date(2026, 1, 1)):
        self.now = datetime(start.year, start.month, start.day, 12)

    def __call__(self):
        now = self.now
        self.now += timedelta(days=3 if now.weekday() == 4 else 1)
        return now


def bits(model):
    return model.weight(1).detach().clone()


def a_fact(number):
    return Fact("{} is known for", f"Person {number}", f"work {number}")


def opened(folder, model, method=MEMIT_1, clock=None):
    return Session.open(folder, model, method, statistics_of(model, [1]), clock=clock)


def write(session, *batches):
    return [session.write(batch, force=True, progress=False) for batch in batches]


def test_a_year_is_undone_to_any_day_bit_for_bit(tiny_llama, tmp_path):
    days, before = {}, bits(tiny_llama)
    with opened(tmp_path / "year", tiny_llama, Drawn(), Clock()) as session:
        for number in range(WORKING_DAYS):
            (edit,) = write(session, [a_fact(number)])
            days[edit.written[:10]] = bits(tiny_llama)
    assert torch.equal(bits(tiny_llama), before) and len(days) == WORKING_DAYS
    with opened(tmp_path / "year", tiny_llama, Drawn()) as session:
        assert [s.written[:10] for s in session.standing()] == list(days)
        assert list(days)[-1] == "2026-12-31"
        for day in reversed(list(days)):  # every day, from the last to the first
            session.roll_back(day)
            assert torch.equal(bits(tiny_llama), days[day]), day
        assert len(session.roll_back(date(2025, 12, 31))) == 1 and not session.history
    assert len(list((tmp_path / "year" / "undone").iterdir())) == WORKING_DAYS


def test_corrections_are_kept_and_rolled_back(tiny_llama, tmp_path):
    with opened(tmp_path / "s", tiny_llama, clock=Clock()) as session:
        write(session, FACTS[:2], FACTS[2:4])
        second = bits(tiny_llama)
        session.correct([CORRECTED], force=True, progress=False)
        session.forget(FACTS[:1], force=True, progress=False)
        last = bits(tiny_llama)
    with opened(tmp_path / "s", tiny_llama) as session:
        assert torch.equal(bits(tiny_llama), last)
        standing = session.standing()
        assert [s.fact for s in standing] == [*FACTS[2:4], CORRECTED]
        assert [s.written[:10] for s in standing] == ["2026-01-02", "2026-01-02", "2026-01-05"]
        assert [e.replaces != {} for e in session.roll_back("2026-01-02")] == [True, True]
        assert torch.equal(bits(tiny_llama), second) and session.history.facts == FACTS[:4]
        with pytest.raises(FactError, match="repeats history, edit 0"):
            write(session, FACTS[:1])
    assert len(edits_in(tmp_path / "s")) == 2


def test_compaction_is_recursive_least_squares_of_constant_size(tiny_llama):
    """Merged after every batch, the sum is still the joint edit, and neither the keys nor the
    change are larger than a matrix.
    """
    model = EditableModel(copy.deepcopy(tiny_llama.hf).double(), tiny_llama.tokenizer)
    facts = [replace(f, subject=f"{f.subject} {n}") for n in range(9) for f in FACTS]  # 54 > 48
    statistics, groups = statistics_of(model, [1]), group_by_subject(facts, True)
    whole = MEMIT_1.prepare(model, groups, statistics, progress=False)
    targets = MEMIT_1.target.values(whole)
    joint = MEMIT_1.finish(whole, targets).delta(1).double()
    history, sizes = History(model.fingerprint), []
    for start in range(0, len(groups), 9):
        batch = groups[start : start + 9]
        task = MEMIT_1.prepare(model, batch, statistics, history, progress=False)
        made = MEMIT_1.finish(task, targets.select(range(start, start + 9)))
        made.apply(model)
        history.add(made)
        history.compact(model)
        sizes.append(history.state[1].shape)
        assert len(history) == len(model.ledger.active) == 1 and not history.edits[0].keys
    assert (history.edits[0].delta(1) - joint).norm() <= 1e-6 * joint.norm()
    assert sizes[-1] == (48, 48) and len(history.facts) == 54
    assert "delta" in "".join(history.edits[0].tensors())


class TestCompacting:
    def test_what_is_merged_stays_and_cannot_be_told_apart(self, tiny_llama, tmp_path):
        with opened(tmp_path / "s", tiny_llama, clock=Clock()) as session:
            write(session, FACTS[:2], FACTS[2:3], FACTS[3:4])
            before, keys = bits(tiny_llama), session.history.keys(1)
            session.compact(keep=1)
            assert len(session.history) == 2
            torch.testing.assert_close(bits(tiny_llama), before, rtol=0, atol=1e-5)
            found = session.history.keys(1)
            torch.testing.assert_close(found @ found.T, keys @ keys.T)
            write(session, FACTS[4:5])
            merged, facts = bits(tiny_llama), session.history.facts
            for refused in (
                lambda: session.forget(FACTS[:1], progress=False),
                lambda: session.correct([CORRECTED], progress=False),
                lambda: session.roll_back("2026-01-01"),
            ):
                with pytest.raises(EditError, match="compact"):
                    refused()
        assert sorted(p.name for p in (tmp_path / "s").glob("0*")) == [
            "000001-000002.safetensors",
            "000003.safetensors",
            "000004.safetensors",
        ]
        with opened(tmp_path / "s", tiny_llama) as session:
            assert torch.equal(bits(tiny_llama), merged) and session.history.facts == facts
            session.roll_back("2026-01-02")
            with pytest.raises(EditError, match="was compacted"):
                session.undo()

    def test_a_correction_is_merged_with_what_it_corrects(self, tiny_llama, tmp_path):
        with opened(tmp_path / "s", tiny_llama) as session:
            write(session, FACTS[:2])
            session.correct([CORRECTED], force=True, progress=False)
            with pytest.raises(EditError, match="corrects or forgets facts of one that is to be"):
                session.compact(keep=1)
            session.compact()
            assert session.history.facts == [FACTS[0], CORRECTED]

    def test_leaving_takes_back_what_was_merged(self, tiny_llama):
        before = bits(tiny_llama)
        with Session(MEMIT_1, tiny_llama, statistics_of(tiny_llama, [1])) as session:
            write(session, FACTS[:1], FACTS[1:2])
            session.compact()
        assert torch.equal(bits(tiny_llama), before) and not session.history


class TestTheFolder:
    @pytest.fixture
    def folder(self, tiny_llama, tmp_path):
        with opened(tmp_path / "s", tiny_llama, Drawn(), Clock()) as session:
            write(session, *([a_fact(n)] for n in range(3)))
        return tmp_path / "s"

    def test_an_interrupted_day_leaves_nothing(self, tiny_llama, folder, monkeypatch):
        with opened(folder, tiny_llama, Drawn()) as session:
            before, save = bits(tiny_llama), History.save

            def interrupted(self, path):
                save(self, path)
                raise KeyboardInterrupt

            monkeypatch.setattr(History, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write(session, [a_fact(3)])
            monkeypatch.undo()
            assert torch.equal(bits(tiny_llama), before) and len(session.history) == 3
            write(session, [a_fact(4)])
        assert [f.subject for f in Journal(folder).read().facts][2:] == ["Person 2", "Person 4"]

    def test_a_crash_while_merging_loses_and_doubles_nothing(self, tiny_llama, folder):
        third = (folder / "000002.safetensors").read_bytes()
        with opened(folder, tiny_llama, Drawn()) as session:
            session.compact()
        (folder / "000002.safetensors").write_bytes(third)  # was not deleted any more
        assert len(Journal(folder).read()) == 1 and len(Journal(folder).read().facts) == 3
        with opened(folder, tiny_llama, Drawn()) as session:
            session.compact()  # nothing is left to merge, and something to remove
        assert [path.name for path in folder.glob("0*")] == ["000001-000003.safetensors"]

    def test_one_process_writes_at_a_time(self, tiny_llama, folder, monkeypatch):
        monkeypatch.setattr("knowedit.io.files.PATIENCE", 0.1)
        session = opened(folder, tiny_llama, Drawn())
        with session, pytest.raises(KnowEditError, match="another run is writing to"):
            opened(folder, tiny_llama, Drawn())
        with pytest.raises(EditError, match="is closed; open it again"):
            write(session, [a_fact(9)])
        opened(folder, tiny_llama, Drawn()).close()

    def test_what_is_wrong_with_it_is_named(self, tiny_llama, tiny_gpt2, folder):
        with pytest.raises(EditError, match="was begun with .*'drawn'.*begin another folder"):
            opened(folder, tiny_llama)
        with pytest.raises(EditError, match="belongs to a model with fingerprint"):
            opened(folder, tiny_gpt2, Drawn())
        with pytest.raises(EditError, match="is not the folder of a session"):
            Session.open(folder / "none", tiny_llama)
        data = bytearray((folder / "000003.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "000003.safetensors").write_bytes(data)
        with pytest.raises(EditError, match="000003.safetensors is damaged"):
            opened(folder, tiny_llama, Drawn())
        (folder / "000002.safetensors").unlink()
        with pytest.raises(EditError, match="has edit 3 but none of number 2"):
            opened(folder, tiny_llama, Drawn())
        (folder / ABOUT).write_bytes(b"")
        with pytest.raises(EditError, match="truncated or damaged"):
            opened(folder, tiny_llama, Drawn())
        assert not tiny_llama.ledger.active

    def test_dates_are_read_as_they_are_given(self, tiny_llama, folder):
        with opened(folder, tiny_llama, Drawn()) as session:
            with pytest.raises(EditError, match="'soon' is not a date"):
                session.roll_back("soon")
            assert session.roll_back(datetime(2026, 1, 5, 13, tzinfo=timezone.utc)) == []
            (last,) = session.roll_back("2026-01-05T11:00")
            assert last.written == "2026-01-05T12:00:00"
            (made,) = write(session, [a_fact(8)])
            assert made.written > "2026-01-02"
            # other spellings of ISO 8601, of the second and the first
            assert made.key in [edit.key for edit in session.roll_back("20260102")]
            assert session.roll_back("2026-W01-4") and session.history
        with Session(Drawn(), tiny_llama) as session:
            write(session, [a_fact(1)])
            with pytest.raises(EditError, match="have no date"):
                session.roll_back("2026-01-01")


def test_the_method_of_the_folder_is_taken(tiny_llama, tmp_path):
    opened(tmp_path / "s", tiny_llama).close()
    with Session.open(tmp_path / "s", tiny_llama) as session:
        assert session.method == MEMIT_1


def test_a_folder_of_before_there_was_a_setting_goes_on(tiny_llama, tmp_path):
    record = MEMIT_1.to_dict()
    del record["experts"]
    Journal.begin(tmp_path / "s", tiny_llama.fingerprint, record)
    opened(tmp_path / "s", tiny_llama, MEMIT_1).close()
    other = replace(MEMIT_1, merge_subjects=not MEMIT_1.merge_subjects)
    with pytest.raises(EditError, match="begin another folder"):
        opened(tmp_path / "s", tiny_llama, other)
