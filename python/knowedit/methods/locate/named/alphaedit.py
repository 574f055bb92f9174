"""AlphaEdit (Fang et al. 2025): write into the null space of C only."""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.metrics import Metric, NullSpace
from knowedit.methods.locate.recipe import Recipe


@dataclass(frozen=True)
class AlphaEdit(Recipe):
    """Null space x hidden state x even spread x every context's own key."""

    metric: Metric = field(default_factory=NullSpace)

    name = "AlphaEdit"
