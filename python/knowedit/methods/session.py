"""Writing facts into one model batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date, datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.journal import ABOUT, Journal
from knowedit.edits.limits import Limits
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.files import locked
from knowedit.io.tensors import understood
from knowedit.methods.base import Method, check_kinds
from knowedit.methods.registry import make_method
from knowedit.methods.revision import check_standing, revise
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.statistics import KeyStatistics


class Standing(NamedTuple):
    """A fact that a session's model was told: when (ISO 8601; empty where nothing is kept), and the
    key of the edit.
    """

    written: str
    fact: Fact
    edit: str


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(tzinfo=None)


def _is_of(record: Mapping[str, Any], method: Method) -> bool:
    """Whether a record, perhaps of before there were some of the settings, is of this method."""
    own = method.to_dict()
    if record == own or record["kind"] != own["kind"]:
        return record == own
    return type(method).from_dict(record).to_dict() == own


def _moment(until: str | date) -> str:
    """A date or moment as histories write it. Raises EditError for text that is neither."""
    try:
        read = datetime.fromisoformat(until) if isinstance(until, str) else until
    except ValueError as error:
        raise EditError(f"{until!r} is not a date as in 2026-03-01 or 2026-03-01T12:00") from error
    if isinstance(until, str) and len(until) <= len("2026-03-01"):
        return f"{read:%Y-%m-%d}"  # ISO 8601 has other spellings of a day
    if isinstance(read, datetime) and read.tzinfo is not None:
        read = read.astimezone(timezone.utc).replace(tzinfo=None)
    return read.isoformat(timespec="seconds") if isinstance(read, datetime) else read.isoformat()


class Session:
    """Edits of one model, each computed on what the earlier ones left, and sparing the keys that
    they were written at.

        with Session(MEMIT(), model, statistics) as session:
            for batch in batches:
                session.write(batch)

    With one edited layer and fixed targets this is recursive least squares: the batches together
    are the joint edit. Leaving the block takes the session's edits out of the model and of the
    history: save the history inside, use no block, or keep the session in a folder (`open`).

    Args:
        statistics: of the unedited model.
        history: of an earlier session, to go on from; what of it is not applied to `model` is
            applied now.
        protect: False leaves the earlier keys out of the metric (a baseline; they may then be
            overwritten).
        limits: of what an edit may do to the model; `write` refuses one that passes them.

    Raises:
        EditError: the history belongs to another model; what is given is no method, no statistics
            or no history.
    """

    @accepts_model
    def __init__(
        self,
        method: Method,
        model: EditableModel,
        statistics: KeyStatistics | None = None,
        history: History | None = None,
        *,
        protect: bool = True,
        limits: Limits | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise EditError(
                f"method is a Method such as MEMIT(), got {method!r:.80}; make_method makes one of "
                "a name"
            )
        check_kinds(statistics, history)
        self.limits = limits or Limits()
        self.method, self.model = method, method.view(model)
        self.statistics, self.protect = statistics, protect
        self.history = history if history is not None else History(model.fingerprint)
        self.journal: Journal | None = None
        self.clock: Callable[[], datetime] = _now
        self._held = ExitStack()  # the lock of a folder
        self._before = self.history.copy()
        self.history.replay(model)
        self.history.check(self.model)

    @classmethod
    @accepts_model
    def open(
        cls,
        folder: str | Path,
        model: EditableModel,
        method: Method | None = None,
        statistics: KeyStatistics | None = None,
        *,
        protect: bool = True,
        limits: Limits | None = None,
        clock: Callable[[], datetime] | None = None,
    ) -> Session:
        """A session that is kept in a folder, for services: begun where there is none, else gone on
        with; its edits are applied to `model`. Every commit is one file, written whole or not at
        all. Until it is closed no other process can open it.

        Args:
            method: of a new session; None: the one that the folder was begun with.
            protect: as of the class; the folder does not record it.
            clock: says when an edit is committed; None: the time, in UTC.

        Raises:
            EditError: the folder is of another model or method, damaged, or incomplete.
            KnowEditError: another process has it open.
        """
        with ExitStack() as held:
            held.enter_context(locked(folder))
            if method is None:
                record = Journal(folder).method
                with understood(Path(folder) / ABOUT, "the record of a session"):
                    method = make_method(record)
            journal = Journal.begin(folder, model.fingerprint, method.to_dict())
            journal.check(model)
            if not _is_of(journal.method, method):
                raise EditError(
                    f"{folder} was begun with {journal.method}; leave the method out, or begin "
                    "another folder"
                )
            empty = History(model.fingerprint)
            session = cls(method, model, statistics, empty, protect=protect, limits=limits)
            session.journal, session.clock = journal, clock or _now
            session.history = journal.read()
            try:
                session.history.replay(model)
                session.history.check(model)
            except BaseException:
                session.close()
                raise
            session._held = held.pop_all()
        return session

    def write(
        self,
        facts: Sequence[Fact],
        *,
        correct: bool = False,
        force: bool = False,
        progress: bool = True,
    ) -> Edit:
        """Compute one edit, apply it and commit it.

        Args:
            correct: a fact that contradicts one written before takes its place (`correct`), instead
                of being refused.
            force: write also what passes the limits; the edit's warnings say that it does.

        Raises:
            FactError: a fact repeats or contradicts one that was written before.
            RuinousEditError: the edit, or all of them together, would pass the limits. And what the
                method raises; the model and the history are then as they were.
        """
        if correct and self.history.find(facts):
            return self._commit(self._revised(facts, forget=False, progress=progress), force)
        self.history.check_new(facts)
        history = self.history if self.protect else None
        edit = self.method.compute(
            self.model, facts, self.statistics, history=history, progress=progress
        )
        return self._commit(edit, force)

    def correct(self, facts: Sequence[Fact], *, force: bool = False, progress: bool = True) -> Edit:
        """Write facts in place of what was written before of the same prompts and subjects: the old
        keys and values are taken out exactly, and facts that shared a value with them are written
        again along with the new ones. One edit; `undo` brings back what was.

        Raises:
            FactError: nothing of it stands, or it says so already.
            EditError: an old fact was written by a method or metric that cannot take it out. And
                what `write` raises.
        """
        check_standing(self.history, facts)
        return self.write(facts, correct=True, force=force, progress=progress)

    def forget(
        self,
        facts: Sequence[Fact],
        answer: str | None = None,
        *,
        force: bool = False,
        progress: bool = True,
    ) -> Edit:
        """Take facts out as if they had never been written: the model answers what it would have
        answered without them.

        Args:
            facts: by their prompts and subjects; the targets are of no account.
            answer: what the model is to say instead, such as " unknown"; None: nothing is written.

        Raises:
            As `correct`.
        """
        check_standing(self.history, facts)
        if answer is not None:
            others = [replace(fact, target=answer) for fact in facts]
            return self.write(others, correct=True, force=force, progress=progress)
        return self._commit(self._revised(facts, forget=True, progress=progress), force)

    def _revised(self, facts: Sequence[Fact], *, forget: bool, progress: bool) -> Edit:
        if not self.protect:
            raise EditError(
                "a session with protect=False keeps no account of its keys, and cannot correct or "
                "forget; use one with protect=True"
            )
        return revise(
            self.method,
            self.model,
            facts,
            self.statistics,
            self.history,
            forget=forget,
            progress=progress,
        )

    def _commit(self, edit: Edit, force: bool) -> Edit:
        """Apply an edit within the limits and take it into the history."""
        if not force:
            self.limits.check(edit.report, [earlier.report for earlier in self.history.edits])
        if self.journal is not None:
            latest = self.history.edits[-1].written if self.history else ""
            edit.written = max(latest, self.clock().isoformat(timespec="seconds"))
        edit.apply(self.model)
        self.history.add(edit)
        if self.journal is not None:
            try:
                self.journal.append(self.history)
            except BaseException:
                self.history.remove(edit)
                edit.undo(self.model)
                raise
        return edit

    def undo(self) -> Edit:
        """Take the last edit back, from the model and from the history. Raises EditError when there
        is none, or it was compacted.
        """
        if not self.history:
            raise EditError("there is no edit to undo")
        edit = self.history.edits[-1]
        shorter = self.history.copy()
        shorter.remove(edit)
        edit.undo(self.model)
        try:
            if self.journal is not None:
                self.journal.take_back(edit.key)
        except BaseException:
            edit.apply(self.model)
            raise
        self.history.remove(edit)
        return edit

    def roll_back(self, until: str | date) -> list[Edit]:
        """Undo every edit that was committed after the end of a day, or after a moment: the weights
        are bit for bit what they were then.

        Args:
            until: a `date` or `datetime`, or either as ISO 8601 text, in UTC.

        Returns:
            The edits taken back, the last first.

        Raises:
            EditError: `until` is no date, the history has none (it is not kept on disk), or edits
                of before and after were merged; nothing is taken back then.
        """
        moment = _moment(until)
        later = [e for e in self.history.edits if e.written[: len(moment)] > moment]
        if any(not edit.written for edit in self.history.edits):
            raise EditError("edits of this history have no date; only a kept session dates them")
        if later and self.history.folded and later[0] is self.history.edits[0]:
            raise EditError(
                f"the edits up to {later[0].written} were merged by `compact`, and those after "
                f"{moment} cannot be told from them; roll back to a later day"
            )
        return [self.undo() for _ in later]

    def compact(self, keep: int = 0) -> None:
        """Merge all but the last `keep` edits into one (`History.compact`): undo, corrections and
        going back end there, and what the session costs no longer grows with what it has written.
        """
        before = len(self.history)
        self.history.compact(self.model, keep)
        if self.journal is not None and len(self.history) < before:
            self.journal.merge(self.history)
        elif self.journal is not None:
            self.journal.tidy()

    def standing(self) -> list[Standing]:
        """The list of the facts that stand, in the order they were written."""
        places = self.history.standing()
        return [Standing(place.edit.written, place.fact, place.edit.key) for place in places]

    def close(self) -> None:
        """Leave the model as the session found it. What is kept on disk stays there."""
        before = {edit.key for edit in self._before.edits}
        for edit in reversed(self.history.edits):
            if edit.key not in before and edit.is_applied(self.model):
                edit.undo(self.model)
        self._before.replay(self.model)
        self.history.edits, self.history.folded = self._before.edits, self._before.folded
        self.history.state = self._before.state
        if self.journal is not None:
            self.journal.open = False
        self._held.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take back what this session wrote."""
        self.close()
