"""What a gradient method trains: weights of the model, or an adapter beside them. The model itself
is never written to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from knowedit.edits.changes import changes_of
from knowedit.errors import EditError
from knowedit.models.editable import EditableModel, at_least_float32
from knowedit.models.partial import with_weights
from knowedit.models.structure import is_linear
from knowedit_kernels.lowrank import Change

NAME = "knowedit"  # of the adapter while it is in the model


class Trainable(ABC):
    """Float32 leaves to be trained, and the model as they make it. Used in a `with` block, after
    which nothing is left of it.

    Attributes:
        leaves: `{name: tensor}`, each requiring a gradient.
    """

    leaves: dict[str, Tensor]

    def __init__(self, model: EditableModel) -> None:
        self.model = model

    @abstractmethod
    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """What `function` gives with the model as the leaves make it; differentiable."""

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


class WholeWeights(Trainable):
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

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        inside = {name: leaf.to(self.start[name].dtype) for name, leaf in self.leaves.items()}
        return with_weights(self.model, inside, function)

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


class LoRAAdapter(Trainable):
    """A LoRA adapter of peft, `W + alpha / rank B A`: put into the model by `with`, taken out at
    its end whatever happens. (`LoraModel.unload` would take out the user's own adapters too.)

    Args:
        modules: names of the linear layers that get one.
        seed: of A's start; B starts at zero.
        experts: layers whose routed experts get a pair for the one wide layer that they are: each
            expert has its own A, and all have the same B. It is ours, beside peft's.
    """

    def __init__(
        self,
        model: EditableModel,
        modules: Sequence[str],
        rank: int,
        alpha: float,
        seed: int = 0,
        experts: Sequence[int] = (),
    ) -> None:
        super().__init__(model)
        self.modules = {name: model.hf.get_submodule(name) for name in modules}
        self.rank, self.alpha, self.seed = rank, alpha, seed
        self.wide = {layer: self._pair(layer) for layer in experts}

    def _pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """`B [hidden, rank]` and `A [E * d, rank]` of a layer's experts, to be trained."""
        experts, device = self.model.layout.experts(layer), self.model.device
        assert experts is not None
        generator = torch.Generator().manual_seed(self.seed + layer)
        down = torch.rand(experts.count * experts.width, self.rank, generator=generator)
        down = (2 * down - 1) / experts.width**0.5  # as an expert's own linear layer starts
        up = torch.zeros(self.model.hidden, self.rank)
        return up.to(device).requires_grad_(), down.to(device).requires_grad_()

    def _factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {at: (self.alpha / self.rank * up, down) for at, (up, down) in self.wide.items()}

    def __enter__(self) -> LoRAAdapter:
        self.layers: dict[str, Any] = {}
        self.leaves = {}
        if self.modules:
            self._enter()
        for layer, pair in self.wide.items():
            name = self.model.layout.weight_name(layer)
            self.leaves |= {f"{name}.lora_{part}": leaf for part, leaf in zip("BA", pair)}
        return self

    def _enter(self) -> None:
        """Put peft's layers into the model."""
        from peft import LoraConfig, LoraModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.modules),
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=self.model.layout.transposed,
        )
        hf = self.model.hf
        self._config = vars(hf).get("peft_config")
        self._trainable = {name for name, leaf in hf.named_parameters() if leaf.requires_grad}
        others = [
            (layer, layer.active_adapters)
            for layer in hf.modules()
            if isinstance(layer, BaseTunerLayer)
        ]
        self._evaluating = self.model.evaluating()
        # left in `__exit__`: what is trainable in between is the adapter's
        self._evaluating.__enter__()
        try:
            vars(hf).pop("peft_config", None)  # peft would add its own to it
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                LoraModel(hf, config, NAME)
            for layer, active in others:  # the user's adapters, which peft has switched off
                layer.set_adapter(active)
            self.layers = {name: hf.get_submodule(name) for name in self.modules}
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        own = {
            id(leaf)
            for layer in self.layers.values()
            for leaf in (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight)
        }
        self.leaves = {name: leaf for name, leaf in hf.named_parameters() if id(leaf) in own}
        for parameter in hf.parameters():
            parameter.requires_grad_(id(parameter) in own)
        for leaf in self.leaves.values():
            leaf.data = at_least_float32(leaf.data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.modules:
            return
        hf = self.model.hf
        for name, module in self.modules.items():
            hf.set_submodule(name, module)
        for name, parameter in hf.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        if self._config is None:
            vars(hf).pop("peft_config", None)
        else:
            hf.peft_config = self._config
        self._evaluating.__exit__(kind, error, trace)

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        with self.model.evaluating(), self.model.virtual(self._factors()):
            return function()

    @torch.no_grad()
    def changes(self) -> dict[str, Change]:
        found: dict[str, Change] = {}
        for name, layer in self.layers.items():
            up, down = layer.lora_B[NAME].weight, layer.lora_A[NAME].weight
            found[f"{name}.weight"] = layer.scaling[NAME] * up, down.T.contiguous()
        factors = {at: (u.detach(), v.detach()) for at, (u, v) in self._factors().items()}
        wide = changes_of(self.model, factors)
        return found | {name: change.raw for name, change in wide.items()}


def weight_names(model: EditableModel, layers: Sequence[int] | None) -> list[str]:
    """Every parameter's name, or those of `layers`. Raises EditError for none, ModelError for a
    layer that does not exist.
    """
    names = [name for name, _ in model.hf.named_parameters()]
    if layers is not None:
        model.check_layers(layers)
        inside = tuple(f"{model.layout.layers}.{layer}." for layer in layers)
        names = [name for name in names if name.startswith(inside)]
    if not names:
        raise EditError("layers is empty; name at least one layer, or None for every weight")
    return names


def linear_names(
    model: EditableModel, layers: Sequence[int] | None, modules: Sequence[str] | None
) -> list[str]:
    """Full names of linear layers: `modules` of `layers`, those that have them; None: all.

    Args:
        modules: names within a decoder layer, or their ends.

    Raises:
        EditError: a name that the decoder layers do not have, or nothing chosen.
        ModelError: a layer that does not exist.
    """
    layers = range(len(model.layers)) if layers is None else layers
    model.check_layers(layers)
    inside = {
        layer: [f".{name}" for name, m in model.layers[layer].named_modules() if is_linear(m)]
        for layer in range(len(model.layers))
    }
    known = list(dict.fromkeys(name for names in inside.values() for name in names))
    wanted = known if modules is None else [f".{name}" for name in modules]
    unknown = [name for name in wanted if not any(there.endswith(name) for there in known)]
    if unknown or not wanted or not layers:
        raise EditError(
            f"there are no linear layers {', '.join(name[1:] for name in unknown) or 'chosen'}: "
            f"name at least one layer, and modules among {', '.join(name[1:] for name in known)}"
        )
    return [
        f"{model.layout.layers}.{layer}{name}"
        for layer in layers
        for name in inside[layer]
        if name.endswith(tuple(wanted))
    ]


def expert_layers(
    model: EditableModel, layers: Sequence[int] | None, modules: Sequence[str] | None
) -> dict[str, list[int]]:
    """Of `modules` those that name what holds a layer's routed experts ("mlp.experts", or an end of
    it), with the layers of `layers` that have them.
    """
    paths = {
        layer: model.layout.projection(layer)
        for layer in (model.layout.editable if layers is None else layers)
        if layer in model.layout.editable and model.layout.experts(layer) is not None
    }
    found = {name: [at for at, path in paths.items() if f".{path}".endswith(f".{name}")]
             for name in modules or ()}  # fmt: skip
    return {name: at for name, at in found.items() if at}
