"""MetaKE: targets that know what the solver can execute.

Our implementation of the idea, derived from the public abstract (arXiv 2603.12677; its body was not
available): bi-level optimisation whose lower level is the solver of MEMIT or AlphaEdit and whose
upper level trains the target through it. As `Delta = R A` is linear in the target, the
hyper-gradient has a closed form, the structural gradient proxy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.progress import bar
from knowedit.methods.locate.named.alphaedit import AlphaEdit
from knowedit.methods.locate.named.memit import MEMIT
from knowedit.methods.locate.objective import Lines
from knowedit.methods.locate.recipe import LocateThenEdit
from knowedit.methods.locate.refine import (
    CLOSE,
    adopt,
    answer_lines,
    closeness,
    frozen_layers,
    reasons,
    told,
)
from knowedit.methods.locate.task import Task, Written
from knowedit.methods.locate.training import Settings, look_ahead
from knowedit.methods.locate.values import Targets
from knowedit.statistics import KeyStatistics
from knowedit_kernels.jvp import compound_gain
from knowedit_kernels.solver import Metric


@dataclass(frozen=True)
class MetaKE(LocateThenEdit):
    """Metric: the lower-level editor's, plus history. Targets: trained through the solver. Spread:
    as MEMIT.

    Attributes:
        lower: whose metric and solver execute the targets (keys, layers and values are this
            editor's own); with its own gain where the look-ahead stays off.
        gain: of `lower` under the look-ahead. None: 0.7, small on purpose, as it keeps the drift
            down and the training makes up for it; 0.9 where most keys are close to another group's
            and must be told apart.
        ahead: of the training. `through="edit"` trains every layer's write-out through the edited
            weights at all tokens; "proxy" trains one target a group through `R G` (several layers:
            `R G_eff`), which `lower` then writes; "plan" is the control without a solver: as many
            steps with G = I.
        diagonal: ablation of the proxy: every group sees its own gain only.
        when: "auto" looks ahead only where it pays: keys that are close to each other, a crowded
            edit, or a history, be it empty yet.
        contexts: from half of the steps on, these texts around the prompt take half of the loss.
        rehearsed: so many facts of the history, drawn for this edit, are trained along, so that
            they are still said after it.
    """

    merge_subjects: bool = False
    lower: MEMIT | AlphaEdit = field(default_factory=lambda: MEMIT(mean_keys=True, gain=0.98))
    gain: float | None = None
    ahead: Settings = field(default_factory=Settings)
    diagonal: bool = False
    when: Literal["auto", "always", "never"] = "auto"
    contexts: tuple[str, ...] = ()
    rehearsed: int = 100

    name: ClassVar[str] = "MetaKE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.when not in ("auto", "always", "never"):
            raise EditError(f"when must be auto, always or never, got {self.when!r}")
        if self.rehearsed < 0:
            raise EditError(f"rehearsed must not be negative, got {self.rehearsed}")
        if self.gain is not None and self.lower.weight is not None:
            raise EditError("gain says nothing beside lower's weight; give one of them")

    def metric(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[Metric, dict[str, Any]]:
        return self.lower.metric(statistics, layer, keys)

    def write(self, task: Task, targets: Targets) -> Written:
        stock = super().write(task, targets)
        why = reasons(task, stock)
        if self.when == "never" or (self.when == "auto" and not why):
            stock.report["look_ahead"] = {"used": False, "reasons": why}
            return stock
        through, last = self.ahead.through, task.layers[-1]
        # the same recipe, with the gain of the look-ahead
        gain = self.gain if self.gain is not None else (0.9 if closeness(stock)[1] > CLOSE else 0.7)
        editor = self if through == "plan" else replace(self, lower=replace(self.lower, gain=gain))
        written = stock if through == "plan" else LocateThenEdit.write(editor, task, targets)
        layers, start = frozen_layers(task, written)
        if through != "edit":
            gains = [layers[layer].gain for layer in task.layers]
            realised = torch.eye(len(task.groups)) if through == "plan" else compound_gain(gains)
            layers, start = {last: replace(layers[last], gain=realised)}, {last: targets.delta}
        if self.diagonal:
            layers = {layer: frozen.diagonal() for layer, frozen in layers.items()}
        bare, plan, rehearsed = self.texts(task, min(layers))
        with bar(
            f"{self.name}: looking ahead", self.ahead.steps, "steps", show=task.progress
        ) as advance:
            found = look_ahead(layers, start, plan, self.ahead, progress=advance)
        used = self.lower.gain if through == "plan" else gain
        report = {
            **told(self.ahead, layers, start, found, bare),
            "reasons": why,
            "gain": used,
            "rehearsed": rehearsed,
        }
        if through == "edit":
            adopt(written, found)
        else:
            written = LocateThenEdit.write(editor, task, replace(targets, delta=found[last]))
        written.report["look_ahead"] = report
        return written

    def texts(
        self, task: Task, first: int
    ) -> tuple[Lines, Callable[[int], list[tuple[Lines, float]]], int]:
        """The answers after their bare prompts; what every step is trained on; how many earlier
        facts are among it.
        """
        draft = task.model.draft()

        def lines(groups: Sequence[Sequence[Fact]], contexts: Sequence[str] = ("{}",)) -> Lines:
            return answer_lines(draft, groups, first, contexts, self.ahead.budget)

        bare = lines(task.groups)
        early = late = [(bare, 1.0)]
        if self.contexts:
            late = [(bare, 0.5), (lines(task.groups, self.contexts), 0.5)]
        # only the edited weights reach other facts
        known = task.history.facts if task.history and self.ahead.through == "edit" else []
        earlier = random.Random(0).sample(known, min(self.rehearsed, len(known)))
        again = [(lines([[fact] for fact in earlier]), 1.0)] if earlier else []
        return (
            bare,
            lambda step: (late if 2 * step >= self.ahead.steps else early) + again,
            len(earlier),
        )
