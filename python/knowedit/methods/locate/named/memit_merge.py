"""MEMIT-Merge (Dong et al. 2025, arXiv 2502.07322): facts of one subject share their key, so they
share one value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.errors import EditError
from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.metrics import Covariance, Metric
from knowedit.methods.locate.recipe import Recipe


@dataclass(frozen=True)
class MEMITMerge(Recipe):
    """Covariance x one joint value a subject x even spread x mean keys, as published.

    Raises:
        EditError: `merge_subjects=False`.
    """

    metric: Metric = field(default_factory=lambda: Covariance(gain=0.98))
    keys: Keys = field(default_factory=lambda: ContextKeys(mean=True))

    name = "MEMIT-Merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.merge_subjects:
            raise EditError(
                "MEMIT-Merge merges the facts of a subject; for separate values use "
                "MEMIT(merge_subjects=False)"
            )
