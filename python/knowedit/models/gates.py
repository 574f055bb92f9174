"""What an MLP's output is multiplied by on its way to the layer's output.

No name of a gate is known here. It is what the layer's output says: doubling what the projection
writes adds its part once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from knowedit.models.partial import hooked
from knowedit.models.tokens import Row

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


def gates(
    model: EditableModel, rows: Sequence[Row], layer: int, *, budget: int = 4096
) -> tuple[Tensor, float]:
    """`[n]` float64, by what number the projection's output reaches the layer's at each row's
    subject token; and how much of its way is something else than a number, relatively (NaN where
    nothing arrives).

    Args:
        budget: padded tokens a batch.
    """
    written = model.keys(rows, [layer], outputs="projection", budget=budget)[1]
    plain = model.keys(rows, [layer], outputs=True, budget=budget)[1]
    with hooked({model.projection(layer): lambda _, output: 2 * output}):
        doubled = model.keys(rows, [layer], outputs=True, budget=budget)[1]
    assert written is not None and plain is not None and doubled is not None
    written, moved = written.double(), (doubled - plain).double()
    found = (moved * written).sum(1) / written.square().sum(1).clamp(min=1e-30)
    missed = (moved - found[:, None] * written).norm() / moved.norm()
    return found, float(missed)
