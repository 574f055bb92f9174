"""EMMET (Gupta et al. 2024): ROME's equality constraint for a batch,
`Delta = R (K^T C^-1 K)^-1 K^T C^-1`, so that `Delta K = R`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.metrics import Exact, Metric
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.spreads import OneLayer, Spread


@dataclass(frozen=True)
class EMMET(Recipe):
    """Exact covariance (`metric.ridge` for keys that depend on each other) x hidden state x one
    layer x mean keys.
    """

    metric: Metric = field(default_factory=Exact)
    spread: Spread = field(default_factory=OneLayer)
    keys: Keys = field(default_factory=lambda: ContextKeys(mean=True))

    name = "EMMET"
