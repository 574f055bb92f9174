"""FT: fine-tune every weight, or all weights of some layers, on the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.methods.gradient.method import GradientMethod
from knowedit.methods.gradient.trainable import WholeWeights, weight_names
from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class FineTuning(GradientMethod):
    """Every weight, or all those of `layers`."""

    lr: float = 3e-5

    name: ClassVar[str] = "FT"

    def part(self, model: EditableModel) -> WholeWeights:
        return WholeWeights(model, weight_names(model, self.layers))
