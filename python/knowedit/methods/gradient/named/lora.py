"""LoRA (Hu et al. 2022): train low-rank adapters beside the linear layers on the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.io.ranges import Count, Positive
from knowedit.methods.gradient.method import GradientMethod
from knowedit.methods.gradient.trainable import LoRAAdapter, linear_names
from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class LoRA(GradientMethod):
    """Adapters of peft, trained and then taken out of the model: the edit is `alpha / rank B A`.

    Attributes:
        modules: names of linear layers within a decoder layer ("q_proj", "mlp.down_proj"); None:
            all of them.
        rank, alpha: of the adapter; the update is `alpha / rank B A`.
    """

    lr: float = 5e-4
    modules: tuple[str, ...] | None = None
    rank: Count = 4
    alpha: Positive = 16

    name: ClassVar[str] = "LoRA"

    def part(self, model: EditableModel) -> LoRAAdapter:
        names = linear_names(model, self.layers, self.modules)
        return LoRAAdapter(model, names, self.rank, self.alpha, self.seed)
