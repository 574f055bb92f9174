"""MetaKE: targets that know what the solver can execute; our implementation of the idea."""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.metrics import Covariance, Metric
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.trainings import ThroughSolver, Training


@dataclass(frozen=True)
class MetaKE(Recipe):
    """Covariance x hidden state x even spread x mean keys, trained through the solver.

    Derived from the public abstract (arXiv 2603.12677; its body was not available). The lower level
    is the recipe's metric: `MetaKE(metric=NullSpace())` trains through AlphaEdit's.
    """

    metric: Metric = field(default_factory=lambda: Covariance(gain=0.98))
    keys: Keys = field(default_factory=lambda: ContextKeys(mean=True))
    training: Training | None = field(default_factory=ThroughSolver)
    merge_subjects: bool = False

    name = "MetaKE"
