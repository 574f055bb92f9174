"""ROME (Meng et al. 2022, eq. 2): one fact, one layer, `Delta = r (C^-1 k)^T / (k^T C^-1 k)`."""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.metrics import Exact, Metric
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.spreads import OneSubject, Spread


@dataclass(frozen=True)
class ROME(Recipe):
    """Exact covariance x hidden state x one subject in one layer x mean key.

    Read-in and residual both use the mean key over contexts, so that `Delta k = r`; the published
    code divides by the bare prompt's key, which makes some edits blow up.
    """

    metric: Metric = field(default_factory=Exact)
    spread: Spread = field(default_factory=OneSubject)
    keys: Keys = field(default_factory=lambda: ContextKeys(mean=True))

    name = "ROME"
