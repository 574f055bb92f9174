"""What a model does before any edit: what every result is compared with, measured once for all
methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.evaluation.ability.ability import AbilityTasks, Marks
from knowedit.evaluation.definitions import check_definition, counted
from knowedit.evaluation.evaluation import Evaluation, compared
from knowedit.evaluation.generation import Figure, Generation, References, Writing, summary
from knowedit.evaluation.interview import Interview, Said
from knowedit.evaluation.measures.base import Answer, answered, ask, model_measures, questions
from knowedit.facts.fact import Fact
from knowedit.io.config import plain
from knowedit.models.editable import EditableModel
from knowedit.statistics.corpus.corpus import Corpus

HELD_OUT = 400  # documents for the perplexity


@dataclass(frozen=True)
class Scope:
    """What is measured beside the answers to the facts' prompts, as commands name it.

    Attributes:
        text: held-out text for the perplexity (as `Corpus.parse` takes it).
        seed: of the intervals (and of the statistics' corpus).
        generate: let the edited model write about the first so many facts.
        references: texts by object, for the consistency of what it writes.
        definition: whose figures stand beside the usual ones (`evaluation.definitions`).
        ability, ability_items: tasks of general ability, and at most so many items of each, as
            `AbilityTasks` takes them.

    Raises:
        KnowEditError: an unknown definition.
    """

    text: Any = None
    seed: int = 0
    generate: int = 0
    references: References | None = None
    definition: str = "memit"
    ability: Sequence[str] = ()
    ability_items: int | None = None

    def __post_init__(self) -> None:
        check_definition(self.definition)

    def tasks(self, whole: bool = True) -> AbilityTasks | None:
        """The tasks of general ability; None where none was named.

        Args:
            whole: one model with all facts in it is measured; else each fact has one of its own.

        Raises:
            KnowEditError: an unknown task, items without a task, or tasks without a whole model.
        """
        if self.ability:
            check_whole(whole)
            return AbilityTasks(self.ability, self.ability_items)
        if self.ability_items is not None:
            raise KnowEditError("items of general ability need tasks; give --ability all")
        return None

    def baseline(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        ability: AbilityTasks | None = None,
        *,
        whole: bool = True,
        progress: bool = True,
    ) -> Baseline:
        """What `model` does before any edit; `ability`: the `tasks`, which were made before it was
        loaded.
        """
        return Baseline(
            model,
            facts,
            texts=held_out(self.text),
            seed=self.seed,
            generate=self.generate,
            references=self.references,
            definition=self.definition,
            ability=ability,
            whole=whole,
            progress=progress,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: text and seed, and of the rest what was asked for."""
        return {
            **{"text": plain(self.text), "seed": self.seed},
            **self._asked("generate", "references", when=self.generate > 0),
            **self._asked("definition", when=self.definition != "memit"),
            **self._asked("ability", "ability_items", when=bool(self.ability)),
        }

    def _asked(self, *names: str, when: bool) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in names} if when else {}


#: The facts' prompts alone.
PLAIN = Scope()


def check_whole(whole: bool) -> None:
    """Raise KnowEditError where general ability would be that of many models."""
    if not whole:
        raise KnowEditError(
            "general ability is that of a model with all facts in it; measure it with the "
            "protocol batch or sequential"
        )


def held_out(text: Any) -> list[str]:
    """The documents of a corpus that the perplexity is measured on; none without one."""
    return list(islice(Corpus.parse(text).documents(), HELD_OUT)) if text else []


class Baseline:
    """The unedited model's answers, words and marks, and how an edited one compares with them.

    Args:
        model: unedited, or with the edits that all others come on top of.
        texts: held-out documents, for measures that need some.
        ability: tasks of general ability.
        whole: also measure the model as a whole, which is of no use where every fact has an edit
            of its own.
        seed, generate, references, definition: as of `Scope`.

    Raises:
        KnowEditError: no facts, an unknown definition, or general ability without `whole`.
    """

    def __init__(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        *,
        texts: Sequence[str] = (),
        seed: int = 0,
        generate: int = 0,
        references: References | None = None,
        definition: str = "memit",
        ability: AbilityTasks | None = None,
        whole: bool = True,
        progress: bool = True,
    ) -> None:
        if not facts:
            raise KnowEditError("there are no facts to measure; give at least one")
        check_definition(definition)
        if ability is not None:
            check_whole(whole)
        self.model, self.facts, self.texts, self.seed = model, list(facts), texts, seed
        self.generate, self.definition, self.ability = generate, definition, ability
        full = answered(model, facts)
        self.asked = [q for record, fact in enumerate(full) for q in questions(record, fact)]
        self.answers = ask(model, self.asked, title="answers before the edit", progress=progress)
        self._interview = Interview(model, facts, progress=progress)
        self._writing = Writing(model, facts[:generate], references)
        self._written = self._writing.read() if generate else []
        self._measures = model_measures(texts=bool(texts)) if whole else {}
        self._seen = {name: m.observe(model, texts) for name, m in self._measures.items()}
        self._marks: Marks | None = ability.marks(model) if ability else None

    def evaluation(self, answers: Sequence[Answer]) -> Evaluation:
        """The answers of edited models to all that was `asked`, compared."""
        return counted(compared(self.asked, self.answers, answers, self.seed), self.definition)

    def heard(self, model: EditableModel, record: int | None = None) -> list[Said]:
        """What `model`, as it is now, says of one fact (None: of all that are asked)."""
        return self._interview.hear(record, model)

    def read(self, model: EditableModel, record: int | None = None) -> list[Figure]:
        """What `model`, as it is now, writes about one fact (None: all that it is to write of)."""
        if not self.generate or (record or 0) >= self.generate:
            return []
        return self._writing.read(record, model)

    def generation(self, written: Sequence[Figure]) -> Generation | None:
        """What was `read`, compared; None where nothing was to be written."""
        return Generation(summary(self._written), summary(written)) if self.generate else None

    def whole(self, model: EditableModel) -> dict[str, Any]:
        """What `model`, as it is now, says, writes and can do: those fields of a `Result`."""
        effects = {
            name: measure.compare(self._seen[name], measure.observe(model, self.texts))
            for name, measure in self._measures.items()
        }
        return {
            "side_effects": effects,
            "said": self.heard(model),
            "generation": self.generation(self.read(model)),
            "ability": self.ability.compare(self._marks, self.ability.marks(model))
            if self.ability and self._marks is not None
            else None,
        }
