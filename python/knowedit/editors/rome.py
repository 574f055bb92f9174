"""ROME (Meng et al., 2022, eq. 2): one fact, one layer, `Delta = r (C⁻¹k)ᵀ / (kᵀC⁻¹k)`, so that `Delta k = r` exactly.

Both read-in and residual use the mean key over contexts; the published code divides by the bare prompt's key, which makes
some edits blow up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from knowedit_kernels import EditSolver

from ..edit import Edit
from ..errors import EditError
from ..facts import Fact
from ..model import EditableModel
from ..statistics import KeyStatistics
from .recipe import LocateThenEdit


@dataclass(frozen=True)
class ROME(LocateThenEdit):
    """Metric: the covariance with an equality constraint. Targets: one value. Spread: none (one layer, one subject)."""

    name: ClassVar[str] = "ROME"

    def compute(
        self, model: EditableModel, facts: Sequence[Fact], statistics: KeyStatistics | None = None, *, progress: bool = True
    ) -> Edit:
        """As `LocateThenEdit.compute`, for the facts of one subject.

        Raises:
            EditError: also for several subjects or several layers.
        """
        subjects = {fact.subject for fact in facts}
        if len(subjects) > 1 or (len(facts) > 1 and not self.merge_subjects):
            raise EditError(f"ROME writes one subject at a time, got {len(subjects)}; use MEMIT, or one edit for each")
        if self.layers is not None and len(self.layers) != 1:
            raise EditError(f"ROME edits one layer, got {list(self.layers)}; use MEMIT for several")
        return super().compute(model, facts, statistics, progress=progress)

    def solve(self, statistics: KeyStatistics | None, layer: int, keys: Tensor) -> tuple[EditSolver, dict[str, Any]]:
        if statistics is None:
            raise EditError("ROME needs key statistics")
        return EditSolver(statistics.metric(layer), keys, constraint="equality"), {}
