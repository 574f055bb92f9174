"""Writing facts into one model batch after batch."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.limits import Limits
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.base import Method
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

    def write(self, facts: Sequence[Fact], *, force: bool = False, progress: bool = True) -> Edit:
        """Compute one edit, apply it and commit it.

        Args:
            force: write also what passes the limits; the edit's warnings say that it does.

        Raises:
            FactError: a fact repeats or contradicts one that was written before.
            RuinousEditError: the edit, or all of them together, would pass the limits. And what the
                method raises; the model and the history are then as they were.
        """
        self.history.check_new(facts)
        history = self.history if self.protect else None
        edit = self.method.compute(
            self.model, facts, self.statistics, history=history, progress=progress
        )
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
