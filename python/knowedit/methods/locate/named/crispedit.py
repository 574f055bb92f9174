"""CrispEdit (USC 2026): projected steps in the directions of low curvature of the loss on ordinary
text; our implementation of the idea.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.metrics import LowCurvature, Metric
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.trainings import ThroughSolver, Training


@dataclass(frozen=True)
class CrispEdit(Recipe):
    """Low curvature x hidden state x even spread x mean keys, trained through the edited model with
    every step projected.

    Derived from what is public of arXiv 2602.15823; it takes full gradients of the weight there,
    and here write-outs of a solver's read-ins, which lie in the same span.
    """

    metric: Metric = field(default_factory=LowCurvature)
    keys: Keys = field(default_factory=lambda: ContextKeys(mean=True))
    training: Training | None = field(default_factory=lambda: ThroughSolver(when="always"))

    name = "CrispEdit"
