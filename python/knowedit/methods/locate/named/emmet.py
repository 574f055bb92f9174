"""EMMET (Gupta et al., 2024): ROME's equality constraint for a batch, `Delta = R (KᵀC⁻¹K)⁻¹KᵀC⁻¹`:
`Delta K = R`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from knowedit.edits.history import History
from knowedit.errors import EditError
from knowedit.methods.locate.named.memit import MEMIT
from knowedit.methods.locate.recipe import LocateThenEdit
from knowedit.statistics import KeyStatistics
from knowedit_kernels import EditSolver
from knowedit_kernels.solver import Metric
from knowedit_kernels.solver.edit_solver import Constraint


@dataclass(frozen=True)
class EMMET(LocateThenEdit):
    """Metric: the covariance with an equality constraint. Targets: one value per subject (or per
    fact). Spread: as MEMIT.

    Attributes:
        ridge: added to the diagonal of `Kᵀ C⁻¹ K`, which keys that depend on each other make
            singular (0.1 in the published code). With a ridge the constraint is soft: it is MEMIT
            with lambda = ridge.
    """

    ridge: float = 0.0

    name: ClassVar[str] = "EMMET"
    one_layer: ClassVar[bool] = True
    constraint: ClassVar[Constraint] = "equality"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ridge < 0:
            raise EditError(f"ridge must not be negative, got {self.ridge}")

    def metric(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[Metric, dict[str, Any]]:
        return statistics.metric(layer), {}

    def solve(
        self, statistics: KeyStatistics, layer: int, keys: Tensor, history: History | None = None
    ) -> tuple[EditSolver, dict[str, Any]]:
        if self.ridge:
            return MEMIT(weight=self.ridge).solve(statistics, layer, keys, history)
        try:
            return super().solve(statistics, layer, keys, history)
        except ValueError as error:
            raise EditError(
                f"EMMET at layer {layer}: {error}; here: merge_subjects=True, or a ridge such "
                f"as 0.1"
            ) from error
