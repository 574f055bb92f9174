"""LookAhead: MEMIT's write, trained on through the edited model with everything in the loss that
should stay.

The plain form of what RoSE and MetaKE share (`lookahead.py`), for facts with many wordings and
texts to spare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from knowedit.facts.wordings.ordinary import openings, sentences
from knowedit.io.progress import bar
from knowedit.methods.locate.objective import Line, Lines
from knowedit.methods.locate.recipe import LocateThenEdit
from knowedit.methods.locate.refine import adopt, answer_lines, frozen_layers, told
from knowedit.methods.locate.task import Task, Written
from knowedit.methods.locate.training import Settings, look_ahead
from knowedit.methods.locate.values import Targets
from knowedit.statistics import KeyStatistics
from knowedit_kernels import weight_for_gain
from knowedit_kernels.solver import Metric


@dataclass(frozen=True)
class LookAhead(LocateThenEdit):
    """Metric: the covariance. Targets: trained through the edited model. Spread: layers share the
    norm.

    Attributes:
        preserve: texts after, and within, which the model should go on as before; shipped ones are
            added.
        keep: weight of KL(unedited || edited) on them, against the answers' NLL. last: its last
            token's share.
        gain: lambda is set so that an edit alone would realise this share of its planned change.
        ahead: of the training; a step sees a share of the wordings and of the texts, in turn.
        parts: how many shares.
    """

    preserve: tuple[str, ...] = ()
    keep: float = 8.0
    last: float = 0.6
    gain: float = 0.9
    ahead: Settings = field(
        default_factory=lambda: Settings(
            steps=36,
            betas=(0.9, 0.98),
            decay=0.2,
            clamp=1.0,
            clamp_realised=False,
            price=0,
            norm=0.2,
        )
    )
    parts: int = 4
    seed: int = 0

    name: ClassVar[str] = "Look-Ahead"
    shared_layers: ClassVar[bool] = True

    def metric(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[Metric, dict[str, Any]]:
        covariance = statistics.metric(layer)
        weight = weight_for_gain(covariance, keys, self.gain)
        return covariance.with_weight(weight), {"lambda": weight}

    def write(self, task: Task, targets: Targets) -> Written:
        written = super().write(task, targets)
        layers, start = frozen_layers(task, written)
        draft, first, budget = task.model.draft(), task.layers[0], self.ahead.budget
        bare = answer_lines(draft, task.groups, first, ("{}",), budget)
        said = [
            answer_lines(
                draft,
                [group[part :: self.parts] or group[:1] for group in task.groups],
                first,
                ("{}",),
                budget,
            )
            for part in range(self.parts)
        ]
        texts = [*self.preserve, *sentences(), *openings(task.facts, seed=self.seed)]
        kept = [self._kept(task, draft, texts[part :: self.parts]) for part in range(self.parts)]
        with bar(
            f"{self.name}: training", self.ahead.steps, "steps", show=task.progress
        ) as advance:
            found = look_ahead(
                layers,
                start,
                lambda step: [
                    (said[step % self.parts], 1.0),
                    (kept[step // 2 % self.parts], self.keep),
                ],
                self.ahead,
                progress=advance,
            )
        written.report["look_ahead"] = told(self.ahead, layers, start, found, bare)
        adopt(written, found)
        return written

    def _kept(self, task: Task, draft, texts: list[str]) -> Lines:
        groups = len(task.groups)
        rows = [draft.row(text) for text in texts]
        lines = [
            Line(row, i % groups, groups / len(rows), self.last)
            for i, row in enumerate(rows)
            if len(row.ids) > 1
        ]
        return Lines(draft, lines, task.layers[0], groups, budget=self.ahead.budget)
