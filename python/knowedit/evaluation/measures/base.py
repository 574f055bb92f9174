"""What a measure is, and the register of them.

A measure is one file of this folder, which says what it asks and what it makes of the answers, and
registers itself; nothing else has to know it. There are two kinds:

* a `FactMeasure` asks questions about each written fact, whose two answers the model rates;
* a `ModelMeasure` observes the whole model, before the edit and under it, and compares the two.
"""

from __future__ import annotations

import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from knowedit.errors import KnowEditError, ModelError
from knowedit.facts.fact import Fact, Probe
from knowedit.io.progress import bar
from knowedit.models.editable import EditableModel
from knowedit.models.generation import Score

SAID = 3  # tokens of the unedited model that stand for the answer of a neighbour without one


@dataclass(frozen=True)
class Question:
    """One prompt of one fact.

    Attributes:
        record: the fact's number; kind: the measure's name.
        right: the answer it should have after the edit; wrong: the one it should not have, None
            where nobody knows one.
    """

    record: int
    kind: str
    prompt: str
    right: str
    wrong: str | None


@dataclass(frozen=True)
class Answer:
    """The model's rating of a question's two answers."""

    right: Score
    wrong: Score | None

    @property
    def success(self) -> float:
        """1 where the right answer is likelier than the wrong one; NaN without a wrong one."""
        return math.nan if self.wrong is None else float(self.right.logprob > self.wrong.logprob)

    @property
    def magnitude(self) -> float:
        """p(right) - p(wrong), each the geometric mean over the answer's tokens."""
        return math.nan if self.wrong is None else self.right.probability - self.wrong.probability

    @property
    def exact(self) -> float:
        """1 where every token of the right answer is the model's first choice."""
        return float(self.right.exact)


#: What the figures of an answer say, for those who read a table of them.
FIGURES = {
    "success": "the right answer is likelier than the wrong one",
    "magnitude": "by how much: p(right) - p(wrong)",
    "exact": "every token of the right answer is the model's first choice",
    "unchanged": "the same of the two answers is likelier as before the edit",
    "accuracy": "the share of the right answer's tokens that are the first choice",
}


class Measure(ABC):
    """Attributes of every measure:

    Attributes:
        name: as tables and files call it.
        about: one line for a list of measures.
        place: where it stands in tables: the lowest first, then by name.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    place: ClassVar[int] = 100


class FactMeasure(Measure):
    """A measure of each fact, from how the model rates two answers.

    Attributes:
        shown: the figures that a table with one row a method has.
        shares: the figures that are yes (1) or no (0) for each question.
    """

    shown: ClassVar[tuple[str, ...]] = ("success",)
    shares: ClassVar[tuple[str, ...]] = ("success", "exact")

    @abstractmethod
    def questions(self, record: int, fact: Fact) -> list[Question]:
        """What is asked about the fact; nothing where the fact does not have it."""

    def values(self, answer: Answer, before: Answer | None) -> dict[str, float]:
        """The figures of one question by name; NaN where undefined.

        Args:
            answer: now. before: of the unedited model; None for the unedited model itself.
        """
        names = ("success", "magnitude", "exact")
        return {name: getattr(answer, name) for name in names}


class ModelMeasure(Measure):
    """A measure of the model as a whole.

    Attributes:
        shown: the figures that a table with one row a method has, and their formats.
        needs_text: whether `observe` must be given held-out text.
    """

    shown: ClassVar[dict[str, str]] = {}
    needs_text: ClassVar[bool] = False

    @abstractmethod
    def observe(self, model: EditableModel, texts: Sequence[str]) -> Any:
        """What the model, as it is now, makes of the measure's own prompts or of held-out text."""

    @abstractmethod
    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        """Two observations as figures by name, JSON-ready."""

    @abstractmethod
    def describe(self, found: dict[str, Any]) -> str:
        """`compare`'s figures in one line."""


_KNOWN: dict[str, Measure] = {}
M = TypeVar("M", bound=type[Measure])


def register(measure: M) -> M:
    """Class decorator: make the measure known by its name. Raises ValueError for a name that is
    taken.
    """
    if measure.name in _KNOWN:
        raise ValueError(f"there is a measure {measure.name!r} already")
    _KNOWN[measure.name] = measure()
    return measure


@cache
def _load() -> None:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def measures() -> dict[str, Measure]:
    """Every registered measure by name, in the order of tables."""
    _load()
    found = sorted(_KNOWN.values(), key=lambda measure: (measure.place, measure.name))
    return {measure.name: measure for measure in found}


def fact_measures() -> dict[str, FactMeasure]:
    """Those of facts."""
    return {n: m for n, m in measures().items() if isinstance(m, FactMeasure)}


def model_measures(texts: bool = True) -> dict[str, ModelMeasure]:
    """Those of whole models; `texts`: whether there is held-out text."""
    found = {n: m for n, m in measures().items() if isinstance(m, ModelMeasure)}
    return {n: m for n, m in found.items() if texts or not m.needs_text}


def chosen(names: Iterable[str] | None) -> dict[str, Measure]:
    """The measures of those names (None: all). Raises KnowEditError for an unknown one."""
    known = measures()
    if names is None:
        return known
    wanted = list(names)
    if unknown := [name for name in wanted if name not in known]:
        raise KnowEditError(f"unknown measure {unknown[0]!r}; known: {', '.join(known)}")
    return {name: known[name] for name in known if name in wanted}


def questions(record: int, fact: Fact, kinds: Iterable[str] | None = None) -> list[Question]:
    """What the measures of facts (or those named `kinds`) ask about a fact, in their order."""
    wanted = fact_measures() if kinds is None else chosen(kinds)
    return [
        question
        for measure in wanted.values()
        if isinstance(measure, FactMeasure)
        for question in measure.questions(record, fact)
    ]


def answered(model: EditableModel, facts: Iterable[Fact]) -> list[Fact]:
    """The facts, where neighbours without an answer of their own have what the model, which is to
    be the unedited one, says to them: its `SAID` most likely tokens. One that it says nothing to
    stays without, and is not asked.
    """
    facts = list(facts)
    silent = {probe.prompt for fact in facts for probe in fact.neighbours if probe.answer is None}
    prompts = sorted(silent)
    said = dict(zip(prompts, model.generate(prompts, SAID))) if prompts else {}

    def own(probe: Probe) -> Probe:
        text = "" if probe.answer else said[probe.prompt].strip()
        return replace(probe, answer=text) if text else probe

    return [
        replace(fact, neighbours=tuple(map(own, fact.neighbours))) if fact.neighbours else fact
        for fact in facts
    ]


def ask(
    model: EditableModel, asked: Sequence[Question], *, title: str = "asking", progress: bool = True
) -> list[Answer]:
    """Both answers of every question, in as few rows as possible.

    Raises:
        ModelError: the model's probabilities are no numbers.
    """
    with bar(title, len(asked), "prompts", show=progress) as advance:
        pairs = [(q.prompt, text) for q in asked for text in (q.right, q.wrong) if text is not None]
        if not pairs:
            return []
        found = rate(model, *zip(*pairs), progress=lambda n: advance(n / 2))
        scored = iter(found)
        return [Answer(next(scored), next(scored) if q.wrong is not None else None) for q in asked]


def rate(
    model: EditableModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    progress: Callable[[float], None] | None = None,
) -> list[Score]:
    """`EditableModel.score` of a model that gives numbers.

    Raises:
        ModelError: the model's probabilities are no numbers.
    """
    found = model.score(prompts, answers, progress=progress)
    if lost := sum(math.isnan(score.logprob) for score in found):
        raise ModelError(
            f"{model.name} gives no numbers (NaN) for {lost} of {len(found)} answers: its "
            "weights, or those of an edit in force, hold NaN or overflow "
            f"{str(model.dtype).removeprefix('torch.')}; load it in float32, or take the "
            "original model again"
        )
    return found
