"""LoRA (Hu et al. 2022): train low-rank adapters beside the linear layers on the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.errors import EditError
from knowedit.io.ranges import Count, Positive
from knowedit.methods.gradient.method import GradientMethod
from knowedit.methods.gradient.trainable import LoRAAdapter, expert_layers, linear_names
from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class LoRA(GradientMethod):
    """Adapters of peft, trained and then taken out of the model: the edit is `alpha / rank B A`.

    Attributes:
        modules: names of linear layers within a decoder layer ("q_proj", "mlp.down_proj"); None:
            all of them. "experts", or what their module is called, adds a pair for the routed ones'
            output matrices.
        rank, alpha: of the adapter; the update is `alpha / rank B A`.
    """

    lr: float = 5e-4
    modules: tuple[str, ...] | None = None
    rank: Count = 4
    alpha: Positive = 16

    name: ClassVar[str] = "LoRA"

    def part(self, model: EditableModel) -> LoRAAdapter:
        if self.rank > (most := max(model.hidden, model.d_ff)):
            raise EditError(
                f"a rank of {self.rank} is more than the widest matrix of {model.name} has "
                f"({most}); 4 to 64 are usual"
            )
        experts = expert_layers(model, self.layers, self.modules)
        others = self.modules and tuple(name for name in self.modules if name not in experts)
        names = [] if experts and not others else linear_names(model, self.layers, others)
        wide = sorted({layer for layers in experts.values() for layer in layers})
        return LoRAAdapter(model, names, self.rank, self.alpha, self.seed, wide)
