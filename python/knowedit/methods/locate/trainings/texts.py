"""Training through texts: the facts' wordings, and texts on which nothing should change."""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.facts.wordings.ordinary import openings, sentences
from knowedit.io.progress import bar
from knowedit.io.ranges import Count, NotNegative
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
    answer_texts,
    execution_report,
    frozen_layers,
    settings_for,
)
from knowedit.methods.locate.values import Targets
from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class ThroughTexts(Training):
    """The answers' NLL, and KL(unedited || edited) on the recipe's `material.preserve` and shipped
    texts (our own).

    Attributes:
        keep: weight of the KL against the answers' NLL.
        last: share of a text's last token in its KL.
        parts: a step sees one of so many shares of the wordings and of the texts, in turn.
        settings: of the loop.
    """

    keep: NotNegative = 8.0
    last: NotNegative = 0.6
    parts: Count = 4
    settings: TrainingSettings = field(default_factory=lambda: over_many_texts(clamp=1.0))

    def trained(
        self, task: Task, metric: Metric, targets: Targets, written: WrittenLayers, write: Write
    ) -> WrittenLayers:
        layers, start = frozen_layers(task, written)
        settings = settings_for(self.settings, task)
        draft, first, budget = task.model.draft(), task.layers[0], task.runtime.budget
        bare = answer_texts(draft, task.groups, first, ("{}",), budget)
        answers = [
            answer_texts(
                draft,
                [group[part :: self.parts] or group[:1] for group in task.groups],
                first,
                ("{}",),
                budget,
            )
            for part in range(self.parts)
        ]
        material = task.material
        texts = [
            *material.preserve,
            *sentences(),
            *openings(task.facts, seed=material.seed),
        ]
        kept = [self._kept(task, draft, texts[part :: self.parts]) for part in range(self.parts)]

        def plan(step: int) -> list[tuple[TrainedTexts, float]]:
            part = step // 2 % self.parts
            return [(answers[step % self.parts], 1.0), (kept[part], self.keep)]

        with bar(f"{task.name}: training", settings.steps, "steps", show=task.progress) as advance:
            found = train_write_outs(layers, start, plan, settings, progress=advance)
        written.report["look_ahead"] = execution_report(settings, layers, start, found, bare)
        return written.with_write_outs(found)

    def _kept(self, task: Task, draft: EditableModel, texts: list[str]) -> TrainedTexts:
        groups = len(task.groups)
        rows = [draft.row(text) for text in texts]
        kept = [
            TrainedText(row, i % groups, groups / len(rows), self.last)
            for i, row in enumerate(rows)
            if len(row.ids) > 1
        ]
        return TrainedTexts(draft, kept, task.layers[0], groups, budget=task.runtime.budget)
