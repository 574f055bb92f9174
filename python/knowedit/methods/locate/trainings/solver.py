"""Training through the solver: targets that know what it can execute (MetaKE).

Bi-level optimisation whose lower level is the recipe's solver and whose upper level trains the
target through it. As `Delta = R A` is linear in the target, the hyper-gradient has a closed form,
the structural gradient proxy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from knowedit.edits.changes import relative_norms
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.progress import bar
from knowedit.io.ranges import Share, Whole
from knowedit.methods.locate.metrics import Metric, Weighed
from knowedit.methods.locate.objective import TrainedTexts
from knowedit.methods.locate.task import Task, WrittenLayers
from knowedit.methods.locate.training import TrainingSettings, train_write_outs
from knowedit.methods.locate.trainings.base import (
    Training,
    Write,
    answer_texts,
    execution_report,
    frozen_layers,
    settings_for,
)
from knowedit.methods.locate.values import Targets
from knowedit_kernels.jvp import compound_gain

CLOSE = 0.5  # whitened cosine of two keys from which one edit disturbs the other
CROWDED = 0.8  # relative norm from which edits disturb each other at other tokens


@dataclass(frozen=True)
class ThroughSolver(Training):
    """The answers' NLL through what the solver realises, with the preservation price.

    Attributes:
        gain: of the metric under the training. None: 0.7, small on purpose, as it keeps the drift
            down and the training makes up for it; 0.9 where most keys are close to another group's
            and must be told apart.
        when: "auto" trains only where it pays: keys that are close to each other, a crowded edit,
            or a history, be it empty yet.
        diagonal: ablation of the proxy: every group sees its own gain only.
        contexts: from half of the steps on, these texts around the prompt take half of the loss.
        rehearsed: so many facts of the history, drawn for this edit, are trained along, so that
            they are still said after it.
        settings: of the loop. `through="edit"` trains every layer's write-out through the edited
            weights at all tokens; "proxy" trains one target a group through `R G` (several layers:
            `R G_eff`), which is then written; "plan" is the control without a solver: as many
            steps with G = I.
    """

    gain: Share | None = None
    when: Literal["auto", "always", "never"] = "auto"
    diagonal: bool = False
    contexts: tuple[str, ...] = ()
    rehearsed: Whole = 100
    settings: TrainingSettings = field(default_factory=TrainingSettings)

    def trained(
        self, task: Task, metric: Metric, targets: Targets, written: WrittenLayers, write: Write
    ) -> WrittenLayers:
        if self.gain is not None and getattr(metric, "weight", None) is not None:
            raise EditError("training.gain says nothing beside metric.weight; give one of them")
        why = reasons(task, written)
        if self.when == "never" or (self.when == "auto" and not why):
            written.report["look_ahead"] = {"used": False, "reasons": why}
            return written
        through, last = self.settings.through, task.layers[-1]
        used = getattr(metric, "gain", None)
        if through != "plan" and isinstance(metric, Weighed):
            # the same recipe, with the gain of the training
            close = closeness(written)[1] > CLOSE
            used = self.gain if self.gain is not None else (0.9 if close else 0.7)
            metric = metric.with_gain(used)
            written = write(metric, targets)
        layers, start = frozen_layers(task, written)
        settings = settings_for(self.settings, task)
        if through != "edit" and targets.lower is not None:
            raise EditError(
                f"{task.model.name}: every layer has a target of its own there; take one layer, or "
                'training.settings.through="edit"'
            )
        if through != "edit":
            gains = [layers[layer].gain for layer in task.layers]
            plan_only = through == "plan"
            realised = torch.eye(len(task.groups)) if plan_only else compound_gain(gains)
            layers, start = {last: replace(layers[last], gain=realised)}, {last: targets.delta}
        if self.diagonal:
            layers = {layer: frozen.diagonal() for layer, frozen in layers.items()}
        bare, plan, rehearsed = self._texts(task, min(layers))
        with bar(
            f"{task.name}: looking ahead", settings.steps, "steps", show=task.progress
        ) as advance:
            found = train_write_outs(layers, start, plan, settings, progress=advance)
        report = execution_report(settings, layers, start, found, bare)
        report |= {"reasons": why, "gain": used, "rehearsed": rehearsed}
        if through == "edit":
            written = written.with_write_outs(found)
        else:
            written = write(metric, replace(targets, delta=found[last]))
        written.report["look_ahead"] = report
        return written

    def _texts(
        self, task: Task, first: int
    ) -> tuple[TrainedTexts, Callable[[int], list[tuple[TrainedTexts, float]]], int]:
        """The answers after their bare prompts; what every step is trained on; how many earlier
        facts are among it.
        """
        draft = task.model.draft()

        def together(
            groups: Sequence[Sequence[Fact]], contexts: Sequence[str] = ("{}",)
        ) -> TrainedTexts:
            return answer_texts(draft, groups, first, contexts, task.runtime.budget)

        bare = together(task.groups)
        early = late = [(bare, 1.0)]
        if self.contexts:
            late = [(bare, 0.5), (together(task.groups, self.contexts), 0.5)]
        # only the edited weights reach other facts
        known = task.history.facts if task.history and self.settings.through == "edit" else []
        seed = task.material.seed
        earlier = random.Random(seed).sample(known, min(self.rehearsed, len(known)))
        again = [(together([[fact] for fact in earlier]), 1.0)] if earlier else []

        def plan(step: int) -> list[tuple[TrainedTexts, float]]:
            return (late if 2 * step >= self.settings.steps else early) + again

        return bare, plan, len(earlier)


def closeness(written: WrittenLayers) -> tuple[float, float]:
    """Whitened cosine of each key with the closest key of another group: the largest, and the mean
    (0 for one group).
    """
    largest, mean = 0.0, 0.0
    for solver, keys in written.solved.values():
        length = solver.S.diagonal().clamp(min=1e-30).sqrt()
        other = (keys.owner[:, None] != keys.owner[None]).to(solver.S.device)
        if bool(other.any()):
            closest = (solver.S / length.outer(length)).masked_fill(~other, -1).amax(1)
            largest, mean = max(largest, float(closest.max())), max(mean, float(closest.mean()))
    return largest, mean


def reasons(task: Task, written: WrittenLayers) -> list[str]:
    """Why to train; empty where the plain targets do as well."""
    found = []
    if task.history is not None:
        earlier = "earlier edits to leave alone"
        first = "the first of a sequence, which others will follow"
        found.append(earlier if task.history else first)
    cosine = closeness(written)[0]
    if cosine > CLOSE:
        found.append(f"keys of different groups are close (whitened cosine {cosine:.2f})")
    norm = max(relative_norms(task.model, written.factors).values())
    if norm > CROWDED:
        found.append(f"a crowded edit (|delta| / |W| {norm:.2f})")
    return found
