"""Low-rank adapters (LoRA, Hu et al. 2022) by peft, trained and then taken out of the model: the
edit is `alpha / rank B A`.

| method | trained | losses | constraint |
|---|---|---|---|
| LoRA | rank 4 beside every linear layer of attention and MLP | answers | the rank |
| Regularised-LoRA | the same | answers, mixed with texts that should stay | the rank |
| KL-LoRA | the same | answers, KL to the unedited model on context texts | the rank |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.errors import EditError
from knowedit.methods.gradient.recipe import GradientEditor
from knowedit.methods.gradient.trainable import Adapter
from knowedit.models.editable import EditableModel
from knowedit.models.structure import is_linear


@dataclass(frozen=True)
class LoRA(GradientEditor):
    """Attributes:
    modules: names of linear layers within a decoder layer ("q_proj", "mlp.down_proj"); None: all of
        them.
    rank, alpha: of the adapter; the update is `alpha / rank B A`.
    """

    lr: float = 5e-4
    modules: tuple[str, ...] | None = None
    rank: int = 4
    alpha: float = 16

    name: ClassVar[str] = "LoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.alpha <= 0:
            raise EditError(
                f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}"
            )

    def part(self, model: EditableModel) -> Adapter:
        return Adapter(model, self.targets(model), self.rank, self.alpha, self.seed)

    def targets(self, model: EditableModel) -> list[str]:
        """Full names of the linear layers that get an adapter. Raises EditError for a name that
        there is not.
        """
        layers = range(len(model.layers)) if self.layers is None else self.layers
        model.check_layers(layers)
        known = [
            f".{name}" for name, module in model.layers[0].named_modules() if is_linear(module)
        ]
        wanted = known if self.modules is None else [f".{name}" for name in self.modules]
        unknown = [name for name in wanted if not any(there.endswith(name) for there in known)]
        if unknown or not wanted or not layers:
            raise EditError(
                f"there are no linear layers "
                f"{', '.join(name[1:] for name in unknown) or 'chosen'}: name at least one layer, "
                f"and modules among {', '.join(name[1:] for name in known)}"
            )
        inside = [
            (layer, name) for layer in layers for name in known if name.endswith(tuple(wanted))
        ]
        return [f"{model.layout.layers}.{layer}{name}" for layer, name in inside]


@dataclass(frozen=True)
class RegularisedLoRA(LoRA):
    """As LoRA, with texts that should stay in every batch: the model's own continuations of other
    prompts.
    """

    steps: int = 30
    stability: float = 1.0

    name: ClassVar[str] = "Regularised-LoRA"


@dataclass(frozen=True)
class KLLoRA(LoRA):
    """As LoRA, held to the unedited model's distribution on context texts."""

    steps: int = 30
    kl: float = 5.0

    name: ClassVar[str] = "KL-LoRA"
