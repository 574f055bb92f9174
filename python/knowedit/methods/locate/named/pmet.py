"""PMET (Li et al. 2024): deltas of the attention's and of the MLP's output are optimised together,
the MLP's is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.metrics import Covariance, Metric
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.spreads import Spread, SquareRoot
from knowedit.methods.locate.targets import AttentionAndMLP, Target


@dataclass(frozen=True)
class PMET(Recipe):
    """Covariance x attention and MLP x square-root spread x mean keys."""

    metric: Metric = field(default_factory=lambda: Covariance(gain=0.98))
    target: Target = field(default_factory=AttentionAndMLP)
    spread: Spread = field(default_factory=SquareRoot)
    keys: Keys = field(default_factory=lambda: ContextKeys(mean=True))

    name = "PMET"
