"""What every method has in common: facts go in, an `Edit` comes out, and the model is as it was."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from knowedit.edits.changes import oversized
from knowedit.edits.edit import Edit
from knowedit.edits.history import History, Place
from knowedit.edits.measured import measure
from knowedit.errors import EditError, StatisticsError
from knowedit.facts.fact import Fact, as_facts, check_facts
from knowedit.io.config import Config, fields_of, paths_of
from knowedit.io.versions import software_versions
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.statistics.keys import KeyStatistics, layer_statistics

Self = TypeVar("Self", bound="Method")


class Method(Config):
    """A frozen dataclass whose fields are its settings, recorded in every edit that it makes.

    Attributes:
        kind: its name on the command line and in records.
        name: as reports say it.
        needs_statistics: whether `compute` must be given key statistics, of
            `statistics_layers(model)`.
    """

    family = "method"
    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False

    def __init_subclass__(cls, **others: Any) -> None:
        if "name" in vars(cls) and "kind" not in vars(cls):
            cls.kind = cls.name.lower()
        super().__init_subclass__(**others)

    def view(self, model: EditableModel) -> EditableModel:
        """The model with the parts that this method edits as its `layout`."""
        return model

    @accepts_model
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
            FactError: repeated or contradictory facts, earlier ones included.
            EditError: settings, or a model, with which the method cannot work.
        """
        check_kinds(statistics, history)
        model = self.view(model)
        facts = checked(facts, model, history)
        edit = self._compute(model, facts, statistics, history, progress)
        return self.recorded(edit, model, statistics)

    def check_together(self, model: EditableModel, facts: Sequence[Fact]) -> None:
        """Raise EditError where one edit of these facts would be refused for their number or their
        subjects: what can be known before anything is collected or optimised.
        """

    def read_ahead(self, model: EditableModel, progress: bool = True) -> None:
        """Have what the model samples for the method once, and keeps: it is no part of the time
        that an edit takes.
        """

    @abstractmethod
    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        """The edit of checked `facts`; `compute` adds the record of how it was made."""

    def removal(
        self,
        model: EditableModel,
        places: Sequence[Place],
        statistics: KeyStatistics | None,
        history: History,
    ) -> Edit:
        """The edit that takes single facts of the history out again (`methods.locate.removal`).

        Raises:
            EditError: the method cannot.
        """
        raise EditError(
            f"{self.name} cannot take single facts out again; undo the edits that have them: "
            f"{', '.join(sorted({place.edit.key for place in places}))}"
        )

    def recorded(self, made: Edit, model: EditableModel, statistics: KeyStatistics | None) -> Edit:
        """`made`, with what it does to the model, and all that it takes to make it again."""
        made.report.add_measured(measure(model, made, made.plan))
        made.report.warnings += oversized(made.changes)
        made.config, made.software = self.to_dict(), software_versions()
        made.setup = model.setup
        if statistics is not None:
            layers = {str(layer) for layer in self.statistics_layers(model)}
            known = statistics.identity.items()
            made.statistics = {k: v for k, v in known if k.partition(" ")[0] in layers}
        return made

    @accepts_model
    def compute_each(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        statistics: KeyStatistics | None = None,
        *,
        which: Sequence[int] | None = None,
        progress: bool = True,
    ) -> Iterable[Edit]:
        """One independent edit a fact, each computed when it is asked for (dense ones are as large
        as the model).

        Args:
            which: the numbers of the facts whose edits are wanted; None: all.

        Raises:
            FactError, EditError: as `compute`; facts may contradict each other.
        """
        check_kinds(statistics)
        facts = as_facts(facts)
        wanted = facts if which is None else [facts[i] for i in which]
        return (self.compute(model, [fact], statistics, progress=False) for fact in wanted)

    def with_corpus(self: Self, corpus: Any, tokens: int | None = None) -> Self:
        """The same, reading its ordinary text from `corpus`, and `tokens` of it, if it reads any
        itself (NeuronPatch) and they are given.
        """
        given = {"corpus": corpus, "tokens": tokens}
        takes = fields_of(type(self))
        return self.with_settings(
            {name: value for name, value in given.items() if value is not None and name in takes}
        )

    def seeds(self) -> list[str]:
        """The settings, here and in its parts, from which random numbers are drawn."""
        return [path for path in paths_of(self) if path.rpartition(".")[2] == "seed"]

    @accepts_model
    def statistics_layers(self, model: EditableModel) -> tuple[int, ...]:
        """The layers whose key statistics it uses; none for a method without statistics."""
        return ()


def check_kinds(statistics: Any, history: Any = None) -> None:
    """Raise EditError for statistics or a history that are none."""
    if not isinstance(statistics, (KeyStatistics, type(None))):
        raise EditError(
            f"statistics are what key_statistics returns, got {type(statistics).__name__}"
        )
    if not isinstance(history, (History, type(None))):
        raise EditError(f"history is a History of earlier edits, got {type(history).__name__}")


def checked(facts: Sequence[Fact], model: EditableModel, history: History | None) -> list[Fact]:
    """`facts`, when they can be written after those of the history. Raises FactError, EditError."""
    facts = history.check_new(facts) if history else check_facts(facts)
    if not facts:
        raise EditError("there are no facts to write; give at least one")
    if history is not None:
        history.check(model)
    return facts


def statistics_for(
    methods: Iterable[Method],
    model: EditableModel,
    corpus: Any,
    tokens: int | None,
    where: Path | None = None,
    seed: int = 0,
    pinned: Mapping[str, Any] | None = None,
) -> KeyStatistics | None:
    """The key statistics that the methods need together, as `layer_statistics`; None where none
    does.

    Raises:
        StatisticsError: some were named (`where`) and none is needed; or as `layer_statistics`.
    """
    used = {
        (layer, method.view(model).experts)
        for method in methods
        for layer in method.statistics_layers(model)
    }
    layers, experts = sorted({layer for layer, _ in used}), {which for _, which in used}
    if where is not None and not layers:
        raise StatisticsError(f"no method here reads statistics; leave {where} out")
    if len(experts) > 1:
        raise StatisticsError(
            f"these methods need statistics of different experts ({', '.join(sorted(experts))}), "
            "which one collection does not hold; run them apart"
        )
    model = model.editing(experts.pop()) if experts else model
    if not layers:
        return None
    return layer_statistics(layers, model, corpus, tokens, where, seed, pinned)
