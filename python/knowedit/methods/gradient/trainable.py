"""What a gradient method trains: weights of the model, or an adapter beside them. The model itself
is never written to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from knowedit.models.editable import EditableModel
from knowedit_kernels.lowrank import Change


class Trainable(ABC):
    """Float32 leaves to be trained, and the model as they make it. Used in a `with` block, after
    which nothing is left of it.

    Attributes:
        leaves: `{name: tensor}`, each requiring a gradient.
    """

    leaves: dict[str, Tensor]

    def __init__(self, model: EditableModel) -> None:
        self.model, self.forward = model, Forward(model)

    @abstractmethod
    def logits(self, ids: Tensor, line: Tensor, place: Tensor) -> Tensor:
        """Logits `[n, vocab]` float32 at the tokens (`line`, `place`), each `[n]`, of right-padded
        `ids` `[B, T]`.
        """

    @abstractmethod
    def changes(self) -> dict[str, Change]:
        """What became of the weights, by the parameter's name: for `Edit.changes`."""

    def constrain_(self) -> None:
        """Put the leaves back where they may be, after a step."""
        return None

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.numel() for leaf in self.leaves.values())

    def __enter__(self) -> Trainable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class Forward(nn.Module):
    """The model's logits at chosen tokens, as a module whose weights can be exchanged for one
    call.
    """

    def __init__(self, model: EditableModel) -> None:
        super().__init__()
        self.hf, self.head = model.hf, model.head

    def hidden(self, ids: Tensor, line: Tensor, place: Tensor) -> Tensor:
        """Final hidden states `[n, hidden]`. Padding needs no mask: attention is causal."""
        return self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[line, place]

    def forward(self, ids: Tensor, line: Tensor, place: Tensor) -> Tensor:
        return at_least_float32(self.head(self.hidden(ids, line, place)))


class Weights(Trainable):
    """Whole parameters, trained in float32 copies that take the model's place for each call.

    Args:
        names: of parameters.
        bound: largest change of any single weight (L-infinity); None: no bound.
    """

    def __init__(
        self, model: EditableModel, names: Sequence[str], bound: float | None = None
    ) -> None:
        super().__init__(model)
        own = dict(model.hf.named_parameters())
        self.bound, self.start = bound, {name: own[name] for name in names}
        self.leaves = {
            name: at_least_float32(weight.detach()).clone().requires_grad_()
            for name, weight in self.start.items()
        }

    def logits(self, ids: Tensor, line: Tensor, place: Tensor) -> Tensor:
        inside = {
            f"hf.{name}": leaf.to(self.start[name].dtype) for name, leaf in self.leaves.items()
        }
        return functional_call(self.forward, inside, (ids, line, place))

    @torch.no_grad()
    def constrain_(self) -> None:
        if self.bound is not None:
            for name, delta in self.changes().items():
                self.leaves[name].copy_(self.start[name]).add_(delta)  # type: ignore[arg-type]

    @torch.no_grad()
    def changes(self) -> dict[str, Change]:
        found: dict[str, Change] = {}
        for name, leaf in self.leaves.items():
            delta = leaf - self.start[name]
            found[name] = delta if self.bound is None else delta.clamp_(-self.bound, self.bound)
        return found


class Adapter(Trainable):
    """A LoRA adapter of peft, `W + alpha / rank B A`: put into the model by `with`, taken out at
    its end whatever happens.

    Args:
        modules: names of the linear layers that get one.
        seed: of A's start; B starts at zero.
    """

    def __init__(
        self, model: EditableModel, modules: Sequence[str], rank: int, alpha: float, seed: int = 0
    ) -> None:
        super().__init__(model)
        self.modules = {name: model.hf.get_submodule(name) for name in modules}
        self.rank, self.alpha, self.seed = rank, alpha, seed

    def __enter__(self) -> Adapter:
        from peft import LoraConfig, LoraModel

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.modules),
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=self.model.layout.transposed,
        )
        self._before = vars(self.model.hf).get("peft_config")
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                LoraModel(self.model.hf, config, "default")
            self.layers: dict[str, Any] = {
                name: self.model.hf.get_submodule(name) for name in self.modules
            }
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self.leaves = {
            name: leaf for name, leaf in self.model.hf.named_parameters() if leaf.requires_grad
        }
        for leaf in self.leaves.values():
            leaf.data = at_least_float32(leaf.data)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        hf = self.model.hf
        for name, module in self.modules.items():
            hf.set_submodule(name, module)
        hf.requires_grad_(False)
        if self._before is None:
            vars(hf).pop("peft_config", None)
        else:
            hf.peft_config = self._before

    def logits(self, ids: Tensor, line: Tensor, place: Tensor) -> Tensor:
        return self.forward(ids, line, place)

    @torch.no_grad()
    def changes(self) -> dict[str, Change]:
        found: dict[str, Change] = {}
        for name, layer in self.layers.items():
            up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            found[f"{name}.weight"] = layer.scaling["default"] * up, down.T.contiguous()
        return found


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
