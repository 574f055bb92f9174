"""Fine-tuning of the weights themselves.

| method | trained | losses | constraint |
|---|---|---|---|
| FT | every weight | answers | none |
| FT-L (Zhu et al., 2020) | the MLP output projection of one layer | answers | a largest change of any weight |
| KL-FT | every weight | answers, KL to the unedited model on context texts | none |
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.errors import EditError
from knowedit.methods.gradient.recipe import GradientEditor
from knowedit.methods.gradient.trainable import Weights
from knowedit.models.editable import EditableModel
from knowedit.models.families import preset_for


@dataclass(frozen=True)
class FineTuning(GradientEditor):
    """Every weight, or all those of `layers`."""

    lr: float = 3e-5

    name: ClassVar[str] = "FT"

    def part(self, model: EditableModel) -> Weights:
        names = [name for name, _ in model.hf.named_parameters()]
        if self.layers is not None:
            model.check_layers(self.layers)
            inside = tuple(f"{model.layout.layers}.{layer}." for layer in self.layers)
            names = [name for name in names if name.startswith(inside)]
        if not names:
            raise EditError("layers is empty; name at least one layer, or None for every weight")
        return Weights(model, names)


@dataclass(frozen=True)
class KLFineTuning(FineTuning):
    """As FT, held to the unedited model's distribution on context texts."""

    steps: int = 30
    kl: float = 5.0

    name: ClassVar[str] = "KL-FT"


@dataclass(frozen=True)
class FTL(GradientEditor):
    """One MLP output projection, each of whose weights may move by `bound` at most.

    Attributes:
        layers: one layer; None: the preset's.
        bound: L-infinity norm of the change, around the weights as they are when the edit is
            computed (published: 5e-5 for GPT-J). None: `share` of the weights' root mean square.
    """

    lr: float = 5e-4
    bound: float | None = None
    share: float = 0.1

    name: ClassVar[str] = "FT-L"

    def part(self, model: EditableModel) -> Weights:
        layers = self.layers if self.layers is not None else (preset_for(model).one_layer,)
        if len(layers) != 1:
            raise EditError(f"FT-L trains one layer, got {list(layers)}; use FT for several")
        weight = model.weight(layers[0])
        bound = (
            self.bound
            if self.bound is not None
            else self.share * float(weight.float().square().mean().sqrt())
        )
        if not bound > 0:
            raise EditError(f"bound and share must be positive, got {self.bound}, {self.share}")
        return Weights(model, [model.layout.weight_name(layers[0])], bound)
