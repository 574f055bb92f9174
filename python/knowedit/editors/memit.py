"""MEMIT (Meng et al., 2023, eq. 14): many facts at once, `Delta = R Kᵀ (lambda C + K Kᵀ)⁻¹`, spread over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from knowedit_kernels import EditSolver, weight_for_gain

from ..errors import EditError
from ..statistics import KeyStatistics
from .recipe import LocateThenEdit


@dataclass(frozen=True)
class MEMIT(LocateThenEdit):
    """Metric: the covariance. Targets: one value per subject (or per fact). Spread: residual / remaining layers.

    Attributes:
        gain: lambda is set so that an edit alone would realise this share of its planned change.
        weight: lambda itself (`mom2_update_weight` of the published code); wins over `gain`.
    """

    gain: float = 0.98
    weight: float | None = None

    name: ClassVar[str] = "MEMIT"

    def solve(self, statistics: KeyStatistics | None, layer: int, keys: Tensor) -> tuple[EditSolver, dict[str, Any]]:
        if statistics is None:
            raise EditError("MEMIT needs key statistics")
        metric = statistics.metric(layer)
        weight = self.weight if self.weight is not None else weight_for_gain(metric, keys, self.gain)
        return EditSolver(metric.with_weight(weight), keys), {"lambda": weight}
