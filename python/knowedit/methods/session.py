"""Writing facts into one model batch after batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.limits import Limits
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.base import Method
from knowedit.methods.revision import check_standing, revise
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.statistics import KeyStatistics


class Session:
    """Edits of one model, each computed on what the earlier ones left, and sparing the keys that
    they were written at.

        with Session(MEMIT(), model, statistics) as session:
            for batch in batches:
                session.write(batch)

    With one edited layer and fixed targets this is recursive least squares: the batches together
    are the joint edit. Leaving the block takes the session's edits out of the model and of the
    history: save the history inside, or use no block.

    Args:
        statistics: of the unedited model.
        history: of an earlier session, to go on from; what of it is not applied to `model` is
            applied now.
        protect: False leaves the earlier keys out of the metric (a baseline; they may then be
            overwritten).
        limits: of what an edit may do to the model; `write` refuses one that passes them.

    Raises:
        EditError: the history belongs to another model.
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
        self.limits = limits or Limits()
        self.method, self.model, self.statistics, self.protect = method, model, statistics, protect
        self.history = history if history is not None else History(model.fingerprint)
        self.history.replay(model)
        self.history.check(model)
        self._start = len(self.history)

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
        edit.apply(self.model)
        self.history.add(edit)
        return edit

    def undo(self) -> Edit:
        """Take the last edit back, from the model and from the history. Raises EditError when there
        is none.
        """
        if not self.history:
            raise EditError("there is no edit to undo")
        edit = self.history.edits[-1]
        edit.undo(self.model)
        self.history.remove(edit)
        return edit

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take back what this session wrote."""
        while len(self.history) > self._start:
            self.undo()
