"""ROME (Meng et al., 2022, eq. 2): one fact, one layer, `Delta = r (C⁻¹k)ᵀ / (kᵀC⁻¹k)`, so that
`Delta k = r` exactly.

Both read-in and residual use the mean key over contexts; the published code divides by the bare
prompt's key, which makes some edits blow up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.locate.recipe import LocateThenEdit
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics
from knowedit_kernels.solver import Metric
from knowedit_kernels.solver.edit_solver import Constraint


@dataclass(frozen=True)
class ROME(LocateThenEdit):
    """Metric: the covariance with an equality constraint. Targets: one value. Spread: none (one
    layer, one subject).
    """

    name: ClassVar[str] = "ROME"
    one_layer: ClassVar[bool] = True
    constraint: ClassVar[Constraint] = "equality"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != 1:
            raise EditError(f"ROME edits one layer, got {list(self.layers)}; use MEMIT for several")

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        """As `LocateThenEdit.compute`, for the facts of one subject.

        Raises:
            EditError: also for several subjects or several layers.
        """
        subjects = {fact.subject for fact in facts}
        if len(subjects) > 1 or (len(facts) > 1 and not self.merge_subjects):
            raise EditError(
                f"ROME writes one subject at a time, got {len(subjects)}; use MEMIT, or one "
                f"edit for each"
            )
        return super()._compute(model, facts, statistics, history, progress)

    def metric(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[Metric, dict[str, Any]]:
        return statistics.metric(layer), {}
