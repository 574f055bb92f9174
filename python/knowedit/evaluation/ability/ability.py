"""General ability: what a model can do beside the facts that are written into it, before an edit
and under it.

Tasks are those of `knowedit.evaluation.ability.items`, which come with the package, and any of
lm-eval where that is installed (`knowedit.evaluation.ability.harness`). Each is a number of items
with figures between 0 and 1; the change is the mean of each item's own difference, whose interval
is far narrower than those of the two means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation import intervals
from knowedit.evaluation.ability.harness import Harness
from knowedit.evaluation.ability.items import bundled, chance, marks
from knowedit.evaluation.evaluation import Estimates, plain
from knowedit.evaluation.intervals import Estimate
from knowedit.io.names import nearest
from knowedit.io.tables import Column, Table
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model

#: All bundled tasks, as a name; in results, the items of all of them together.
ALL = "all"
#: What the name of a task of lm-eval begins with.
FOREIGN = "lm-eval:"
#: Figures that are yes or no for each item.
SHARES = ("accuracy", "acc", "acc_norm", "exact_match")
#: The figures of every item: `{task: {measure: [items]}}`.
Marks = dict[str, dict[str, NDArray[np.float64]]]


class AbilityTasks:
    """The tasks to be measured.

    Args:
        names: bundled tasks, "all" of them, or "lm-eval:" and the name of one of its tasks or the
            path of its YAML file.
        limit: at most so many items of each task, from the start; None: all.

    Raises:
        KnowEditError: an unknown task, or lm-eval is not installed.
    """

    def __init__(self, names: Iterable[str], limit: int | None = None) -> None:
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        known = bundled()
        foreign = [name.removeprefix(FOREIGN) for name in names if name.startswith(FOREIGN)]
        own = [name for name in names if not name.startswith(FOREIGN)]
        if unknown := [name for name in own if name not in known and name != ALL]:
            raise KnowEditError(
                f"unknown task {unknown[0]!r}; {nearest(unknown[0], [ALL, *known])}; those of "
                f"lm-eval are {FOREIGN}NAME"
            )
        self.items = {task: known[task][:limit] for task in known if ALL in own or task in own}
        self.harness = Harness(foreign, limit) if foreign else None
        self.chance = {task: chance(items) for task, items in self.items.items()}
        if len(self.items) > 1:
            self.chance[ALL] = chance([item for items in self.items.values() for item in items])

    def bundled_marks(self, model: EditableModel) -> Marks:
        """The figures of the bundled tasks, of the model as it is now; of several also `ALL`."""
        found = {task: marks(model, items) for task, items in self.items.items()}
        if len(found) > 1:
            names = next(iter(found.values()))
            found[ALL] = {n: np.concatenate([m[n] for m in found.values()]) for n in names}
        return found

    def marks(self, model: EditableModel) -> Marks:
        """The figures of all tasks, of the model as it is now.

        Raises:
            KnowEditError: lm-eval cannot run a task, or it has no figure that is a mean over items.
        """
        found = self.bundled_marks(model)
        if self.harness is not None:
            for task, (figures, by_chance) in self.harness.marks(model).items():
                found[FOREIGN + task] = figures
                if by_chance is not None:
                    self.chance[FOREIGN + task] = by_chance
        return found

    def compare(self, before: Marks, after: Marks) -> Ability:
        """Two results of `marks`."""
        change = {
            task: {name: _change(after[task][name] - values, name) for name, values in row.items()}
            for task, row in before.items()
        }
        return Ability(summary(before), summary(after), change, self.chance)


def summary(found: Marks) -> Estimates:
    """The means over items with their intervals."""
    return {
        task: {n: intervals.mean(v, share=n in SHARES) for n, v in row.items()}
        for task, row in found.items()
    }


def overall(found: Marks) -> Estimates:
    """`summary` of the figures of all bundled tasks together, as one kind, "ability"; nothing where
    there are none.
    """
    chosen = found.get(ALL) or next(iter(found.values()), {})
    return summary({"ability": chosen}) if chosen else {}


def headline(record: Mapping[str, Any] | None, when: str) -> Estimate | None:
    """Of `Ability.to_dict` the one figure that a table with a row a method has: the accuracy of all
    bundled tasks, or else of the first task; None where nothing was measured.

    Args:
        when: "before", "after" or "change".
    """
    if record is None:
        return None
    tasks = record[when]
    row = tasks.get(ALL) or next(iter(tasks.values()))
    return Estimate(**next(iter(row.values())))


def _change(differences: NDArray[np.float64], measure: str) -> Estimate:
    """The mean difference; where none of n items changed its yes or no, the interval of a share
    that is 0 in n trials, to both sides.
    """
    if measure in SHARES and not differences.any():
        end = intervals.unanimous(False, len(differences), len(differences)).high
        return Estimate(0.0, -end, end, len(differences))
    return intervals.mean(differences)


@dataclass(frozen=True)
class Ability:
    """What a model could do before an edit and can do under it.

    Attributes:
        before, after, change: `{task: {measure: Estimate}}`; `change` of the same items.
        chance: the accuracy of a random choice, by task, where one chooses.
    """

    before: Estimates
    after: Estimates
    change: Estimates
    chance: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        parts = {name: plain(getattr(self, name)) for name in ("before", "after", "change")}
        return {**parts, "chance": dict(self.chance)}

    def table(self) -> Table:
        """A row a task and measure."""
        rows = [
            [
                task,
                measure,
                now.records,
                self.chance.get(task),
                self.before[task][measure],
                now,
                self.change[task][measure],
            ]
            for task, row in self.after.items()
            for measure, now in row.items()
        ]
        numbers = [Column(name, ".3f") for name in ("chance", "before", "after")]
        names = [Column(name) for name in ("task", "measure", "items")]
        columns = [*names, *numbers, Column("change", "+.3f")]
        return Table(columns, rows, "general ability").without_empty_columns()

    def __str__(self) -> str:
        return str(self.table())


@accepts_model
def evaluate_ability(
    model: EditableModel,
    edit: Edit,
    tasks: Sequence[str] = (ALL,),
    *,
    limit: int | None = None,
) -> Ability:
    """What the model can do before `edit` and under it; the model is left as it was found.

    Args:
        tasks, limit: as of `AbilityTasks`.

    Raises:
        KnowEditError: as `AbilityTasks`.
    """
    asked = AbilityTasks(tasks, limit)
    before = asked.marks(model)
    with edit.applied_to(model):
        return asked.compare(before, asked.marks(model))
