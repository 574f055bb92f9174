"""Training through forms: a fact in all the ways in which it is asked for (RoSE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from knowedit.facts.fact import Fact
from knowedit.facts.wordings.relations import identity_prompts, unrelated_prompts
from knowedit.io.config import Config
from knowedit.io.progress import bar
from knowedit.io.ranges import NotNegative, Whole
from knowedit.methods.locate.forms import asked_forms
from knowedit.methods.locate.metrics import Metric
from knowedit.methods.locate.objective import TrainedText, TrainedTexts
from knowedit.methods.locate.task import Task, WrittenLayers
from knowedit.methods.locate.training import (
    TrainingSettings,
    over_many_texts,
    train_write_outs,
)
from knowedit.methods.locate.trainings.base import (
    Training,
    Write,
    execution_report,
    frozen_layers,
    settings_for,
)
from knowedit.methods.locate.values import ESSENCE, Targets
from knowedit.models.editable import EditableModel

#: Weights of the forms other than the bare prompt's 1, by name (`facts.wordings.forms`).
FORMS = {"pre1": 0.0, "qa2": 0.5, "gq": 0.5, "ch1": 0.6, "ch2": 0.5, "gc": 0.6, "sent": 0.4}


@dataclass(frozen=True)
class FormWeights(Config):
    """Of the parts of the objective, relative to the bare prompts' NLL.

    Attributes:
        forms: of each form, as a factor of its own weight (`FORMS`).
        identity: KL on who the subject is and on unrelated matters of it; its last token has the
            share `last`.
        neighbours: KL at the last token of prompts on other subjects of the same relations.
        pools: neighbour prompts a fact, one a step in turn.
    """

    forms: NotNegative = 1.0
    identity: NotNegative = 2.0
    last: NotNegative = 0.6
    neighbours: NotNegative = 8.0
    pools: Whole = 10


@dataclass(frozen=True)
class ThroughForms(Training):
    """The answers' NLL over forms, KL on the subject's identity and on its neighbours.

    Attributes:
        weights: of the objective.
        settings: of the loop.
    """

    weights: FormWeights = field(default_factory=FormWeights)
    settings: TrainingSettings = field(default_factory=lambda: over_many_texts(clamp=0.7))

    def trained(
        self, task: Task, metric: Metric, targets: Targets, written: WrittenLayers, write: Write
    ) -> WrittenLayers:
        layers, start = frozen_layers(task, written)
        settings = settings_for(self.settings, task)
        with bar(
            f"{task.name}: refining over forms", settings.steps, "steps", show=task.progress
        ) as advance:
            objective = Objective(self.weights, task)
            found = train_write_outs(layers, start, objective.plan, settings, progress=advance)
        report = execution_report(settings, layers, start, found, objective.bare)
        written.report["look_ahead"] = report | {"weights": asdict(self.weights)}
        return written.with_write_outs(found)


class Objective:
    """All texts of one edit; `plan` says which of them a step sees: the bare prompts and one other
    form, in turn, and either what the subject is or what the neighbours are: some three texts a
    fact.
    """

    def __init__(self, weights: FormWeights, task: Task) -> None:
        self.weights, groups, draft = weights, task.groups, task.model.draft()
        found: dict[str, list[TrainedText]] = {}
        for number, group in enumerate(groups):
            for fact in group:
                for form in asked_forms(draft, fact, task.material.questions):
                    if form.name == "bare" or FORMS[form.name]:
                        text = TrainedText(
                            form.row(
                                draft, fact.new_answer if form.name == "bare" else fact.target
                            ),
                            number,
                            1 / len(group),
                        )
                        found.setdefault(form.name, []).append(text)

        def together(which: Sequence[TrainedText]) -> TrainedTexts:
            budget = task.runtime.budget
            return TrainedTexts(
                draft, which, task.layers[0], len(groups), whole=False, budget=budget
            )

        self.bare = together(found.pop("bare"))
        self.forms = [(together(which), FORMS[name]) for name, which in found.items()]
        self.identity = together(
            [
                text
                for number, group in enumerate(groups)
                for text in self._identity(draft, number, group)
            ]
        )
        owner = [number for number, group in enumerate(groups) for _ in group]
        share = [1 / len(group) for group in groups for _ in group]
        others = task.neighbour_prompts(weights.pools)
        pools = [
            [
                TrainedText(draft.row(texts[pool]), owner[i], share[i])
                for i, texts in enumerate(others)
                if pool < len(texts)
            ]
            for pool in range(weights.pools)
        ]
        self.pools = [together(pool) for pool in pools if pool]

    def _identity(
        self, draft: EditableModel, number: int, group: Sequence[Fact]
    ) -> list[TrainedText]:
        """Who the group's subject is, and what has nothing to do with the facts."""
        subject = group[0].subject
        prompts = [
            ESSENCE.format(subject),
            *identity_prompts(group, "train"),
            *unrelated_prompts(group, "train"),
        ]
        share, last = 1 / len(prompts), self.weights.last
        return [TrainedText(draft.row(text, subject), number, share, last) for text in prompts]

    def plan(self, step: int) -> list[tuple[TrainedTexts, float]]:
        """What a step is trained on, with the factors that make up for what it leaves out."""
        parts = [(self.bare, 1.0)]
        if self.forms and self.weights.forms:
            texts, weight = self.forms[step % len(self.forms)]
            parts.append((texts, self.weights.forms * weight * len(self.forms)))
        if step % 2 == 0 and self.weights.identity:
            parts.append((self.identity, 2 * self.weights.identity))
        elif step % 2 and self.pools and self.weights.neighbours:
            pool = self.pools[step // 2 % len(self.pools)]
            parts.append((pool, 2 * self.weights.neighbours))
        return parts
