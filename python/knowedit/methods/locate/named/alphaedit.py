"""AlphaEdit (Fang et al., 2025): write into the null space of C only, `Delta = R Kᵀ P (Kp Kpᵀ P + K
Kᵀ P + beta I)⁻¹`.

Kp are the keys of earlier edits (the history). The published threshold calls every eigenvalue below
0.02 zero, whatever the scale of the keys; here the threshold is relative to the mean eigenvalue,
and beta follows from the gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from knowedit.errors import EditError
from knowedit.methods.locate.recipe import LocateThenEdit
from knowedit.statistics import KeyStatistics
from knowedit_kernels import weight_for_gain
from knowedit_kernels.solver import Metric


@dataclass(frozen=True)
class AlphaEdit(LocateThenEdit):
    """Metric: the null space of the covariance. Targets: one value per subject (or per fact).
    Spread: as MEMIT.

    Attributes:
        relative: eigenvalues of C below this multiple of their mean count as zero.
        threshold: the same as an absolute number (published: 0.02); wins over `relative`.
        gain: beta is set so that an edit alone would realise this share of its planned change.
        weight: beta itself (`L2` of the published code: 10); wins over `gain`.
    """

    mean_keys: bool = False
    relative: float = 1.0
    threshold: float | None = None
    gain: float = 0.9
    weight: float | None = None

    name: ClassVar[str] = "AlphaEdit"

    def metric(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[Metric, dict[str, Any]]:
        found = statistics[layer]
        mean = float(found.total.diagonal().mean()) / found.count
        threshold = self.threshold if self.threshold is not None else self.relative * mean
        space = statistics.null_space(layer, threshold)
        try:
            weight = (
                self.weight if self.weight is not None else weight_for_gain(space, keys, self.gain)
            )
        except ValueError as error:
            raise EditError(f"AlphaEdit at layer {layer}: {error}; raise the threshold") from error
        return space.with_weight(weight), {
            "beta": weight,
            "threshold": threshold,
            "null_directions": space.rank,
        }
