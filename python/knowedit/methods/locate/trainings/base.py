"""What every training shares: from a write to frozen read-ins, and back to a write with a
report.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from knowedit.facts.fact import Fact
from knowedit.io.config import Config
from knowedit.methods.locate.metrics import Metric
from knowedit.methods.locate.objective import FrozenLayer, TrainedText, TrainedTexts, WriteOuts
from knowedit.methods.locate.task import Task, WrittenLayers
from knowedit.methods.locate.training import TrainingSettings, disconnect, state_norms
from knowedit.methods.locate.values import Problem, Targets, prompt_rows
from knowedit.models.editable import EditableModel

#: Writes targets under a metric, as the recipe does: what a training uses to write anew.
Write = Callable[[Metric, Targets], WrittenLayers]


class Training(Config):
    """How the write-outs of a write are trained on."""

    family = "training"

    @abstractmethod
    def trained(
        self, task: Task, metric: Metric, targets: Targets, written: WrittenLayers, write: Write
    ) -> WrittenLayers:
        """What becomes of `written`, the write of `targets` under `metric`."""


def frozen_layers(task: Task, written: WrittenLayers) -> tuple[dict[int, FrozenLayer], WriteOuts]:
    """What the solvers of a write fix at each layer, and its write-outs to start from."""
    norms = state_norms(task.model, task.groups, task.layers, task.problem)
    layers = {
        layer: FrozenLayer.of(*solved, norms[layer]).within(written.writable.get(layer))
        for layer, solved in written.solved.items()
    }
    return layers, {layer: left.T.contiguous() for layer, (left, _) in written.factors.items()}


def settings_for(settings: TrainingSettings, task: Task) -> TrainingSettings:
    """`settings`, with a step that follows from the values' length where these are no hidden
    states.
    """
    return replace(settings, lr=None) if task.problem is not Problem else settings


def execution_report(
    settings: TrainingSettings,
    layers: dict[int, FrozenLayer],
    start: WriteOuts,
    found: WriteOuts,
    bare: TrainedTexts,
) -> dict[str, Any]:
    """The training's part of the report: the semantic-execution disconnect before and after it."""
    before, after = (asdict(disconnect(layers, out, bare)) for out in (start, found))
    return {"used": True, "settings": asdict(settings), "before": before, "after": after}


def answer_texts(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    first: int,
    contexts: Sequence[str],
    budget: int,
) -> TrainedTexts:
    """Every fact's answer after its prompt in each context; the weights of a group add up to 1."""
    texts = []
    for number, group in enumerate(groups):
        for fact in group:
            rows = prompt_rows(model, fact, contexts, fact.new_answer)
            texts += [TrainedText(row, number, 1 / (len(group) * len(rows))) for row in rows]
    return TrainedTexts(model, texts, first, len(groups), budget=budget)
