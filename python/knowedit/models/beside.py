"""A shared expert edited together with the routed ones: one projection, whose key is their wide key
and then the shared expert's own, times the gate that stands behind it.

No name of a gate is known here. It is what the layer's output says: doubling what the shared expert
writes moves it by the gate times that, at every token by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knowedit.errors import ModelError
from knowedit.models.gates import gates
from knowedit.models.tokens import Row

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel, Outputs


def keys(
    model: EditableModel,
    rows: Sequence[Row],
    layers: Sequence[int],
    *,
    outputs: Outputs,
    budget: int,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """`EditableModel.keys` of a model seen with both kinds of experts."""
    routed, shared = model.editing("routed"), model.editing("shared")
    found, out = routed.keys(rows, layers, outputs=outputs, budget=budget)
    for layer in found:
        if model.layout.beside(layer) is not None:
            own = shared.keys(rows, [layer], budget=budget)[0][layer]
            beside = _gates(model, rows, layer, budget)
            found[layer] = torch.cat([found[layer], beside[:, None] * own], 1)
    return found, out


def _gates(model: EditableModel, rows: Sequence[Row], layer: int, budget: int) -> Tensor:
    """`[n]` what a shared expert's output is multiplied by on its way to where the routed experts'
    is added, at the rows' subject tokens. Raises ModelError when that is no number.
    """
    part = model.layout.part(layer)
    assert part.beside is not None
    factor = part.stream.factor  # of the routed ones on the way to the layer's output; NaN: unknown
    if part.stream.kind == part.beside.stream.kind == "identity":
        return torch.ones(len(rows), device=model.device)
    found, missed = gates(model.editing("shared"), rows, layer, budget=budget)
    found /= factor
    if not (missed <= model.rounding and bool(found.isfinite().all())):
        raise ModelError(
            f"{model.name}: what layer {layer} does with its shared expert's output is not a gate "
            f"beside its routed experts ({missed:.1e} of it is something else), so they "
            "are no one projection; edit experts='routed', or 'shared'"
        )
    return found.float()
