"""FT-L (Zhu et al. 2020): fine-tune one MLP output projection under a bound on every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.errors import EditError
from knowedit.io.ranges import Bound, Positive
from knowedit.methods.gradient.method import GradientMethod
from knowedit.methods.gradient.trainable import WholeWeights
from knowedit.models.editable import EditableModel
from knowedit.models.presets import preset_for


@dataclass(frozen=True)
class FTL(GradientMethod):
    """One MLP output projection, each of whose weights may move by `bound` at most.

    Attributes:
        layers: one layer; None: the preset's.
        bound: L-infinity norm of the change, around the weights as they are when the edit is
            computed (published: 5e-5 for GPT-J). None: `share` of the weights' root mean square.
    """

    lr: Positive = 5e-4
    bound: Bound | None = None
    share: Positive = 0.1

    name: ClassVar[str] = "FT-L"

    def part(self, model: EditableModel) -> WholeWeights:
        layers = self.layers if self.layers is not None else (preset_for(model).one_layer,)
        if len(layers) != 1:
            raise EditError(f"FT-L trains one layer, got {list(layers)}; use FT for several")
        rms = float(model.weight(layers[0]).float().square().mean().sqrt())
        bound = self.share * rms if self.bound is None else self.bound
        return WholeWeights(model, [model.layout.weight_name(layers[0])], bound)
