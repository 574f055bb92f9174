"""What RoSE's refinement is trained on: the facts in many forms, and what should stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..datasets.relations import identity_prompts, unrelated_prompts
from ..objective import Line, Lines
from ..targets import ESSENCE

if TYPE_CHECKING:
    from .rose import RoSE
    from .task import Task

#: Weights of the forms other than the bare prompt's 1, by name (`datasets.forms`).
FORMS = {"pre1": 0.0, "qa2": 0.5, "gq": 0.5, "ch1": 0.6, "ch2": 0.5, "gc": 0.6, "sent": 0.4}


@dataclass(frozen=True)
class Weights:
    """Of the parts of the objective, relative to the bare prompts' NLL.

    Attributes:
        forms: of each form, as a factor of its own weight (`FORMS`).
        identity: KL on who the subject is and on unrelated matters of it; its last token has the share `last`.
        neighbours: KL at the last token of prompts on other subjects of the same relations.
        pools: neighbour prompts a fact, one a step in turn.
    """

    forms: float = 1.0
    identity: float = 2.0
    last: float = 0.6
    neighbours: float = 8.0
    pools: int = 10


class Objective:
    """All texts of one edit; `plan` says which of them a step sees: the bare prompts and one other form, in turn, and
    either what the subject is or what the neighbours (`others`, prompts for each fact) are: some three texts a fact."""

    def __init__(self, editor: RoSE, task: Task, others: Sequence[Sequence[str]], budget: int) -> None:
        self.weights, groups, draft = editor.weights, task.groups, task.model.draft()
        found: dict[str, list[Line]] = {}
        for number, group in enumerate(groups):
            for fact in group:
                for form in editor.forms(draft, fact):
                    if form.name == "bare" or FORMS[form.name]:
                        line = Line(form.row(draft, fact.target), number, 1 / len(group))
                        found.setdefault(form.name, []).append(line)

        def lines(which: Sequence[Line]) -> Lines:
            return Lines(draft, which, task.layers[0], len(groups), whole=False, budget=budget)

        self.bare = lines(found.pop("bare"))
        self.forms = [(lines(which), FORMS[name]) for name, which in found.items()]
        self.identity = lines([line for number, group in enumerate(groups) for line in self._about(draft, number, group)])
        owner = [number for number, group in enumerate(groups) for _ in group]
        share = [1 / len(group) for group in groups for _ in group]
        pools = [
            [Line(draft.row(texts[p]), owner[i], share[i]) for i, texts in enumerate(others) if p < len(texts)]
            for p in range(self.weights.pools)
        ]
        self.pools = [lines(pool) for pool in pools if pool]

    def _about(self, draft, number, group) -> list[Line]:
        subject = group[0].subject
        prompts = [ESSENCE.format(subject), *identity_prompts(group, "train"), *unrelated_prompts(group, "train")]
        return [Line(draft.row(text, subject), number, 1 / len(prompts), self.weights.last) for text in prompts]

    def plan(self, step: int) -> list[tuple[Lines, float]]:
        """What a step is trained on, with the factors that make up for what it leaves out."""
        parts = [(self.bare, 1.0)]
        if self.forms and self.weights.forms:
            lines, weight = self.forms[step % len(self.forms)]
            parts.append((lines, self.weights.forms * weight * len(self.forms)))
        if step % 2 == 0 and self.weights.identity:
            parts.append((self.identity, 2 * self.weights.identity))
        elif step % 2 and self.pools and self.weights.neighbours:
            parts.append((self.pools[step // 2 % len(self.pools)], 2 * self.weights.neighbours))
        return parts
