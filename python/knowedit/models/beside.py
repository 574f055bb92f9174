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
from knowedit.models.partial import hooked
from knowedit.models.probing import rounding
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
            gates = _gates(model, rows, layer, budget)
            found[layer] = torch.cat([found[layer], gates[:, None] * own], 1)
    return found, out


def _gates(model: EditableModel, rows: Sequence[Row], layer: int, budget: int) -> Tensor:
    """`[n]` what a shared expert's output is multiplied by on its way to where the routed experts'
    is added, at the rows' subject tokens. Raises ModelError when that is no number.
    """
    part, routed = model.layout.part(layer), model.editing("routed")
    assert part.beside is not None
    factor = part.stream.factor  # of the routed ones on the way to the layer's output; NaN: unknown
    if part.stream.kind == part.beside.stream.kind == "identity":
        return torch.ones(len(rows), device=model.device)
    module = model.hf.get_submodule(part.beside.projection)
    written = model.editing("shared").keys(rows, [layer], outputs="projection", budget=budget)[1]
    plain = routed.keys(rows, [layer], outputs=True, budget=budget)[1]
    with hooked({module: lambda _, output: 2 * output}):
        doubled = routed.keys(rows, [layer], outputs=True, budget=budget)[1]
    assert written is not None and plain is not None and doubled is not None
    moved = (doubled - plain).double() / factor
    gates = (moved * written).sum(1) / written.double().square().sum(1).clamp(min=1e-30)
    missed = (moved - gates[:, None] * written).norm() / moved.norm().clamp(min=1e-30)
    if not float(missed) <= rounding(model.dtype):
        raise ModelError(
            f"{model.name}: what layer {layer} does with its shared expert's output is not a gate "
            f"beside its routed experts ({float(missed):.1e} of it is something else), so they "
            "are no one projection; edit experts='routed', or 'shared'"
        )
    return gates.float()
