"""How an MLP makes its keys of its inputs: `act(gate x)`, or `act(gate x) * up x`, whatever its
matrices are called and whether or not they stand in one; found by trying it on real inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knowedit.errors import EditError
from knowedit.models.editable import EditableModel
from knowedit.models.experts import slice_name
from knowedit.models.probing import is_linear
from knowedit.models.structure import is_transposed

Activation = Callable[[Tensor], Tensor]

#: Activations that a model's code may call without naming them anywhere, by transformers' names.
UNNAMED = ("silu", "relu", "gelu", "gelu_new", "relu2", "sigmoid", "tanh")

#: Relative difference between keys and what is made of the inputs, from which on they are not
#: theirs: rounding of bfloat16 stays below it.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Rows:
    """Those rows of a matrix that make one number a neuron.

    Attributes:
        name: of the parameter below the transformers model, or of one expert's matrix in it.
        matrix: `[outputs, hidden]`, in memory the model's own.
        offset: `[outputs]` what is added; None: nothing. offset_name: its name.
        first, count: which outputs.
    """

    name: str
    matrix: Tensor
    offset: Tensor | None
    offset_name: str
    first: int
    count: int

    @property
    def weight(self) -> Tensor:
        """`[count, hidden]` float32."""
        return self.matrix.detach().float()[self.first : self.first + self.count]

    @property
    def bias(self) -> Tensor | None:
        """`[count]` float32."""
        if self.offset is None:
            return None
        return self.offset.detach().float()[self.first : self.first + self.count]

    @property
    def outputs(self) -> int:
        """Of the whole matrix."""
        return len(self.matrix)

    def of(self, inputs: Tensor) -> Tensor:
        """`[n, count]` of inputs `[n, hidden]` float32."""
        found = inputs @ self.weight.T
        return found if self.bias is None else found + self.bias

    def embedded(self, part: Tensor) -> Tensor:
        """`[outputs, ..]` with `part` `[count, ..]` in these rows and zeros in the others."""
        whole = part.new_zeros(self.outputs, *part.shape[1:])
        whole[self.first : self.first + self.count] = part
        return whole


@dataclass(frozen=True)
class Wiring:
    """The first half of an MLP.

    Attributes:
        gate: what goes through the activation.
        up: what multiplies it; None: nothing does.
        act: the activation, as the model has it.
    """

    gate: Rows
    up: Rows | None
    act: Activation

    @property
    def reads(self) -> list[Rows]:
        return [self.gate] if self.up is None else [self.gate, self.up]

    @torch.no_grad()
    def keys(self, inputs: Tensor) -> Tensor:
        """`[n, d_ff]` of MLP inputs `[n, hidden]` float32."""
        fired = self.act(self.gate.of(inputs).to(self.gate.matrix.dtype)).float()
        return fired if self.up is None else fired * self.up.of(inputs)

    @classmethod
    def of(
        cls,
        model: EditableModel,
        layer: int,
        inputs: Tensor,
        keys: Tensor,
        expert: int | None = None,
    ) -> Wiring:
        """The one that makes `keys` `[n, d_ff]` of MLP inputs `[n, hidden]`, both float32: the
        layer's, or one of its routed experts'.

        Raises:
            EditError: none does: something else (a norm, a clamp) stands between the two, where a
                neuron that fires could change all the others.
        """
        rows = _rows(model, layer) if expert is None else _rows_of_expert(model, layer, expert)
        for wiring in _candidates(rows, list(_activations(model, layer))):
            made = wiring.keys(inputs)
            if made.shape == keys.shape and (made - keys).norm() <= TOLERANCE * keys.norm():
                return wiring
        whose = f"layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
        raise EditError(
            f"{model.name}: the keys of {whose} are neither act(gate x) nor act(gate x) * "
            "up x of its MLP's input (a norm in between?), so its neurons cannot be rewritten one "
            "by one; use MEMIT"
        )


def _candidates(rows: Sequence[Rows], activations: Sequence[Activation]) -> Iterator[Wiring]:
    """Every wiring that these rows and activations allow."""
    for gate, up in itertools.permutations(rows, 2):
        yield from (Wiring(gate, up, act) for act in activations)
    for gate in rows:
        yield from (Wiring(gate, None, act) for act in activations)


def _rows(model: EditableModel, layer: int) -> list[Rows]:
    """Every stretch of rows, of the key's size, of the linear modules that a dense MLP's key is
    made by.
    """
    found, width = [], model.layout.width(layer)
    for name in model.layout.part(layer).reads:
        module: Any = model.hf.get_submodule(name)
        weight = module.weight
        matrix = weight.T if is_transposed(model.hf, f"{name}.weight") else weight
        bias = getattr(module, "bias", None)
        found += [
            Rows(f"{name}.weight", matrix, bias, f"{name}.bias", first, width)
            for first in range(0, len(matrix), width)
        ]
    return found


def _rows_of_expert(model: EditableModel, layer: int, expert: int) -> list[Rows]:
    """The same of one expert: of its matrices `[outputs, hidden]` in the parameters that hold all
    experts', but for that of the keys themselves.
    """
    part = model.layout.part(layer)
    experts, home = part.experts, model.hf.get_submodule(part.projection)
    assert experts is not None
    parameters = dict(home.named_parameters(recurse=False))
    found: list[Rows] = []
    for leaf, parameter in parameters.items():
        outputs = parameter.shape[1] if parameter.dim() == 3 else 0
        if leaf == experts.weight or parameter.shape[2:] != (model.hidden,):
            continue
        biases = [n for n, p in parameters.items() if tuple(p.shape) == (experts.count, outputs)]
        bias = next((name for name in biases if name != experts.bias), None)
        found += [
            Rows(
                slice_name(f"{part.projection}.{leaf}", expert),
                parameter.detach()[expert],
                None if bias is None else parameters[bias].detach()[expert],
                slice_name(f"{part.projection}.{bias}", expert),
                first,
                experts.width,
            )
            for first in range(0, outputs - outputs % experts.width, experts.width)
        ]
    return found


def _activations(model: EditableModel, layer: int) -> Iterator[Activation]:
    """What may be an activation: whatever is called so in the layer, what the configuration names,
    and those that models call as functions.
    """
    from transformers.activations import ACT2FN

    for module in model.layers[layer].modules():
        for name, part in (*module.named_children(), *vars(module).items()):
            plain = not isinstance(part, nn.Module) or not any(map(is_linear, part.modules()))
            if ("act" in name or "gelu" in name or "silu" in name) and callable(part) and plain:
                yield part
    for name, value in model.hf.config.get_text_config().to_dict().items():
        if "act" in name and isinstance(value, str) and value in ACT2FN:
            yield ACT2FN[value]
    yield from (ACT2FN[name] for name in UNNAMED)
