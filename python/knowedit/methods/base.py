"""What every method has in common: facts go in, an `Edit` comes out, and the model is as it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, check_facts
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics


class Editor(ABC):
    """A method: a frozen dataclass whose fields are its settings.

    Attributes:
        name: as the reports and, in lower case, the command line say it.
        needs_statistics: whether `compute` must be given key statistics, of
            `statistics_layers(model)`.
    """

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False

    @abstractmethod
    def compute(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        statistics: KeyStatistics | None = None,
        *,
        history: History | None = None,
        progress: bool = True,
    ) -> Edit:
        """Compute the edit of the model as it is now; neither the model nor the history is touched.

        Args:
            statistics: key statistics of `statistics_layers(model)`, of the unedited model.
            history: earlier edits, applied to the model. Methods that write keys leave those of the
                history alone.

        Raises:
            FactError: repeated or contradictory facts, earlier ones included. EditError: settings,
                or a model, with which
            the method cannot work.
        """

    def compute_each(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        statistics: KeyStatistics | None = None,
        *,
        progress: bool = True,
    ) -> Iterable[Edit]:
        """One independent edit a fact, each computed when it is asked for (dense ones are as large
        as the model).
        """
        for fact in facts:
            yield self.compute(model, [fact], statistics, progress=False)

    def statistics_layers(self, model: EditableModel) -> tuple[int, ...]:
        """The layers whose key statistics it uses; none for a method without statistics."""
        return ()


def checked(facts: Sequence[Fact], model: EditableModel, history: History | None) -> list[Fact]:
    """`facts`, when they can be written after those of the history. Raises FactError, EditError."""
    facts = history.check_new(facts) if history else check_facts(list(facts))
    if not facts:
        raise EditError("there are no facts to write; give at least one")
    if history is not None:
        history.check(model)
    return facts
