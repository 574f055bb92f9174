"""RoSE's parts: the forms of a fact, the merge of its values, and what the refinement is trained
on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import Form, training_forms
from knowedit.facts.wordings.relations import identity_prompts, unrelated_prompts
from knowedit.io.config import Config
from knowedit.methods.locate.objective import Line, Lines
from knowedit.methods.locate.values import ESSENCE, Targets
from knowedit.models.editable import EditableModel

if TYPE_CHECKING:
    from knowedit.methods.locate.named.rose import RoSE
    from knowedit.methods.locate.task import Task

#: Weights of the forms other than the bare prompt's 1, by name (`datasets.forms`).
FORMS = {"pre1": 0.0, "qa2": 0.5, "gq": 0.5, "ch1": 0.6, "ch2": 0.5, "gc": 0.6, "sent": 0.4}


#: Wordings by fact id, prompt or relation; or "generic"; None: the shipped ones.
Questions = Mapping[str, Sequence[str]] | Literal["generic"] | None


@dataclass(frozen=True)
class Weights(Config):
    """Of the parts of the objective, relative to the bare prompts' NLL.

    Attributes:
        forms: of each form, as a factor of its own weight (`FORMS`).
        identity: KL on who the subject is and on unrelated matters of it; its last token has the
            share `last`.
        neighbours: KL at the last token of prompts on other subjects of the same relations.
        pools: neighbour prompts a fact, one a step in turn.
    """

    forms: float = 1.0
    identity: float = 2.0
    last: float = 0.6
    neighbours: float = 8.0
    pools: int = 10


class Objective:
    """All texts of one edit; `plan` says which of them a step sees: the bare prompts and one other
    form, in turn, and either what the subject is or what the neighbours (`others`, prompts for each
    fact) are: some three texts a fact."""

    def __init__(
        self, editor: RoSE, task: Task, others: Sequence[Sequence[str]], budget: int
    ) -> None:
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
        self.identity = lines(
            [
                line
                for number, group in enumerate(groups)
                for line in self._about(draft, number, group)
            ]
        )
        owner = [number for number, group in enumerate(groups) for _ in group]
        share = [1 / len(group) for group in groups for _ in group]
        pools = [
            [
                Line(draft.row(texts[p]), owner[i], share[i])
                for i, texts in enumerate(others)
                if p < len(texts)
            ]
            for p in range(self.weights.pools)
        ]
        self.pools = [lines(pool) for pool in pools if pool]

    def _about(self, draft, number, group) -> list[Line]:
        subject = group[0].subject
        prompts = [
            ESSENCE.format(subject),
            *identity_prompts(group, "train"),
            *unrelated_prompts(group, "train"),
        ]
        return [
            Line(draft.row(text, subject), number, 1 / len(prompts), self.weights.last)
            for text in prompts
        ]

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


def asked_forms(model: EditableModel, fact: Fact, questions: Questions) -> list[Form]:
    """A fact's training forms with the wordings asked for; no chats for a model without a chat
    template.
    """
    if questions == "generic":
        found = training_forms(replace(fact, relation=None))
    else:
        given, names = questions or {}, (fact.id, fact.prompt, fact.relation)
        found = training_forms(
            fact, next((given[name] for name in names if name and name in given), ())
        )
    return [form for form in found if model.tokenizer.chat_template or not form.chat]


def merge(leaves: Targets, task: Task) -> Targets:
    """The smallest delta a subject that reaches as far as each fact's own in its direction, `delta
    . d_t = |d_t|^2`, then within the clamp. (Constraining the facts' gains instead does not help:
    at optimised values their gradients are noise.)"""
    owner = torch.tensor([number for number, group in enumerate(task.groups) for _ in group])
    parts = []
    for number in range(len(task.groups)):
        rows = leaves.delta[owner == number].double()
        length = rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        unit = rows / length
        gram = unit @ unit.T + 1e-3 * torch.eye(len(unit), dtype=unit.dtype)
        parts.append((unit.T @ torch.linalg.solve(gram, length))[:, 0])

    def mean(x: Tensor) -> Tensor:
        return torch.stack(
            [x[owner == number].float().mean(0) for number in range(len(task.groups))]
        )

    value, delta = mean(leaves.value), torch.stack(parts).float()
    delta = (
        delta
        * (task.values.clamp * value.norm(dim=1) / delta.norm(dim=1).clamp(min=1e-30)).clamp(max=1)[
            :, None
        ]
    )
    return Targets(delta, value, mean(leaves.loss), mean(leaves.nll), mean(leaves.steps))
