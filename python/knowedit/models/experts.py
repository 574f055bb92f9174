"""Routed experts as the one wide linear layer that they are.

A mixture's output at a token is `sum_j g_j W_j k_j` over the experts that its router chose: one
linear layer with the weight `[W_0 .. W_E]`, whose key is `[g_0 k_0 .. g_E k_E]`, zero where an
expert was not chosen. `WideProjection` is that layer, and stands wherever a dense model has its
MLP's output projection.

No name of a model is known here. The experts' module is run once more with its output matrices
exchanged for rows of the identity, which makes its own code say what the keys are: whatever gates,
activations, clamps and biases it has. `recognise` believes that only where keys, gates and weights
give the module's own output again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from knowedit.errors import ModelError
from knowedit.models.probing import first_of, rounding

#: Relative difference of a layer's output, computed again from keys, gates and weights.
REPLAY = {torch.float32: 1e-5, torch.float64: 1e-5}


@dataclass(frozen=True)
class Experts:
    """How a module holds its routed experts.

    Attributes:
        weight: its parameter with every expert's output matrix, `[E, hidden, d]`.
        transposed: that parameter is `[E, d, hidden]` instead.
        bias: its parameter `[E, hidden]` that an expert's output has added; "" for none.
        count: E. width: d, the size of one expert's key. top_k: experts a token.
        states, index, gates: names of its arguments: the tokens `[n, hidden]`, the experts chosen
            for each `[n, top_k]`, and their gates `[n, top_k]`.
    """

    weight: str
    transposed: bool
    bias: str
    count: int
    width: int
    top_k: int
    states: str
    index: str
    gates: str

    def by_expert(self, wide: Tensor) -> Tensor:
        """`[.., E, d]` of wide keys `[.., E * d]`."""
        return wide.unflatten(-1, (self.count, self.width))


class WideProjection(nn.Module):
    """The routed experts' output matrices as one linear layer `[E * d] -> [hidden]`.

    Attributes:
        module: the model's module that holds them; its output is this layer's, and its bias.
        experts: how it holds them.
    """

    def __init__(self, module: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.module, self.experts = module, experts

    @property
    def weight(self) -> Tensor:
        """All output matrices, as the model stores them."""
        return getattr(self.module, self.experts.weight)

    def forward(self, keys: Tensor) -> Tensor:
        """`[.., hidden]` of wide keys `[.., E * d]`; without biases."""
        return self.times(keys, self.weight)

    def times(self, keys: Tensor, weight: Tensor) -> Tensor:
        """The same with another weight, stored as the parameter is."""
        how = "...ed,edh->...h" if self.experts.transposed else "...ed,ehd->...h"
        return torch.einsum(how, self.experts.by_expert(keys), weight)

    def stored(self, change: Tensor) -> Tensor:
        """A matrix `[hidden, E * d]` of this layer as the parameter holds it."""
        slices = self.experts.by_expert(change).transpose(0, 1)
        return slices.transpose(1, 2) if self.experts.transposed else slices

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routed:
        """What a call of the module has as arguments."""
        names = self.experts.states, self.experts.index, self.experts.gates
        found = inspect.signature(self.module.forward).bind(*args, **kwargs).arguments
        return Routed(self, *(found[name] for name in names))


@dataclass(frozen=True)
class Routed:
    """Tokens on their way into the experts, any number of dimensions in front.

    Attributes:
        states: `[.., hidden]`.
        index: `[.., top_k]` the experts chosen for each.
        gates: `[.., top_k]` what their outputs are multiplied by.
    """

    projection: WideProjection
    states: Tensor
    index: Tensor
    gates: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Routed:
        """The same with every tensor passed through `change`."""
        return Routed(self.projection, change(self.states), change(self.index), change(self.gates))

    def __getitem__(self, at: Any) -> Routed:
        """Some of the tokens."""
        return self.each(lambda tensor: tensor[at])

    def reshape(self, *shape: int) -> Routed:
        """The tokens in another shape, such as (texts, tokens)."""
        return self.each(lambda tensor: tensor.reshape(*shape, tensor.shape[-1]))

    def keys(self) -> Tensor:
        """`[.., top_k, d]` each chosen expert's own key, without its gate; differentiable."""
        module, experts = self.projection.module, self.projection.experts
        rows = self.states.reshape(-1, self.states.shape[-1])
        index = self.index.reshape(-1, 1)
        rows = rows.repeat_interleave(self.index.shape[-1], 0)
        given = rows, index, torch.ones_like(index, dtype=rows.dtype)
        found = _seen(module, experts, given)
        if found is None:
            parts = [_run(module, experts, each, given) for each in _identity(experts, rows)]
            found = torch.cat(parts, -1)[:, : experts.width]
        return found.reshape(*self.index.shape, experts.width)

    def wide(self) -> Tensor:
        """`[.., E * d]` the keys of the wide layer, in the tokens' dtype; differentiable."""
        experts, keys = self.projection.experts, self.keys()
        gated = (keys * self.gates[..., None]).to(self.states.dtype)
        empty = gated.new_zeros(*gated.shape[:-2], experts.count, experts.width)
        return empty.scatter_add(-2, self.index[..., None].expand_as(gated), gated).flatten(-2)


def slice_name(parameter: str, expert: int) -> str:
    """Name of one expert's matrix in the parameter that holds all of them."""
    return f"{parameter}[{expert}]"


def split_name(name: str) -> tuple[str, int | None]:
    """The parameter, and the expert whose matrix is meant; None for all of the parameter."""
    parameter, bracket, rest = name.partition("[")
    return parameter, int(rest.removesuffix("]")) if bracket else None


def as_keys(found: Tensor | Routed) -> Tensor:
    """The keys `[.., width]` of what a projection is given."""
    return found.wide() if isinstance(found, Routed) else found


def _identity(experts: Experts, like: Tensor) -> list[Tensor]:
    """Output matrices `[E, hidden, d]` (or transposed) whose outputs are a key's entries, as many
    at once as fit into an output.
    """
    hidden = like.shape[-1]
    found = []
    for start in range(0, experts.width, hidden):
        matrix = like.new_zeros(hidden, experts.width)
        size = min(hidden, experts.width - start)
        matrix[range(size), range(start, start + size)] = 1
        matrix = matrix.T if experts.transposed else matrix
        found.append(matrix.expand(experts.count, *matrix.shape))
    return found


class _Sight(TorchFunctionMode):
    """Sees what is multiplied by an output matrix. The product that it gives instead is the row's
    number, counted over all products, in digits: so the module's output says which rows are whose.

    Args:
        matrix: what stands for all of them; a product is known by its storage.

    Attributes:
        rows: what was multiplied, product by product `[n, d]`.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix, self.rows = matrix.untyped_storage().data_ptr(), list[Tensor]()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in PRODUCTS or kwargs or not self._is_one(args[1]) or args[0].dim() != 2:
            return func(*args, **(kwargs or {}))
        seen = args[0]
        place = sum(map(len, self.rows)) + torch.arange(len(seen), device=seen.device)
        self.rows.append(seen)
        out = args[1].shape[0 if func is F.linear else 1]
        number = seen.new_zeros(len(seen), out)
        for digit in range(min(DIGITS, out)):
            number[:, digit] = place % BASE
            place = place // BASE
        return number

    def _is_one(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() == self.matrix


#: Products of rows with a matrix, which is `[out, in]` in the first one.
PRODUCTS = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
#: A row's number in digits that every dtype holds exactly.
BASE, DIGITS = 128, 4


def _seen(
    module: nn.Module, experts: Experts, given: tuple[Tensor, Tensor, Tensor]
) -> Tensor | None:
    """`[n, d]` the keys of tokens that are each given one expert and a gate of 1, from one run in
    which nothing is multiplied by output matrices; None where the module's own code does not show
    them.
    """
    matrix = given[0].new_zeros(given[0].shape[-1], experts.width)
    matrix = matrix.T if experts.transposed else matrix
    matrix = matrix.expand(experts.count, *matrix.shape)
    with _Sight(matrix) as sight:
        output = _run(module, experts, matrix, given).detach()
    if not sight.rows:
        return None
    rows, base = torch.cat(sight.rows), BASE ** torch.arange(DIGITS, device=output.device)
    digits = output[:, :DIGITS].double()
    place = (digits * base[: digits.shape[1]]).sum(-1).long()
    own = torch.arange(len(rows), device=place.device)
    if len(place) != len(own) or not torch.equal(place.sort().values, own):
        return None  # the output is not one product as it was
    return rows.index_select(0, place)


class _Plain(nn.Module):
    """A module run by its own code, not by a kernel that takes its place: those want weights that
    lie in memory in one piece.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **arguments: Any) -> Any:
        return inspect.unwrap(type(self.module).forward)(self.module, **arguments)


def _run(
    module: nn.Module, experts: Experts, matrix: Tensor, given: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """The module's output with `matrix` for its output matrices and no bias."""
    changed = {f"module.{experts.weight}": matrix}
    if experts.bias:
        bias = getattr(module, experts.bias)
        changed[f"module.{experts.bias}"] = torch.zeros_like(bias)
    names = experts.states, experts.index, experts.gates
    out = functional_call(_Plain(module), changed, (), dict(zip(names, given, strict=True)))
    return first_of(out)


@contextmanager
def one_by_one(hf: nn.Module) -> Iterator[None]:
    """Within the block experts on a CPU run one after the other, and what one makes stays in its
    caches; in the grouped product that transformers prefers, all of them stand in one matrix.
    """
    held = {
        id(config): config
        for module in hf.modules()
        if holds_experts(module)
        and next(module.parameters()).device.type == "cpu"
        and getattr(config := getattr(module, "config", None), IMPLEMENTATION, "") == "grouped_mm"
    }
    try:
        for config in held.values():
            setattr(config, IMPLEMENTATION, "eager")
        yield
    finally:
        for config in held.values():
            setattr(config, IMPLEMENTATION, "grouped_mm")


#: Where a model's configuration says how its experts run.
IMPLEMENTATION = "_experts_implementation"


# -- finding them
# -------------------------------------------------------------------------------------------------


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has a parameter with a matrix for each of several experts."""
    return any(p.dim() == 3 and len(p) > 1 for p in module.parameters(recurse=False)) and not (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    )


@torch.no_grad()
def recognise(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> Experts:
    """How a module holds its experts, from one of its calls.

    Raises:
        ModelError: it is called with something else than tokens, experts and gates, or its output
            is not what these make of it, with the relative difference.
    """
    whole = first_of(output)
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        states, index, gates = _arguments(bound)
    except (TypeError, StopIteration):
        raise ModelError(
            f"{type(module).__name__} is not called with tokens, the experts chosen for each, and "
            "their gates"
        ) from None
    tokens, chosen = bound[states], bound[index]
    hidden, errors = tokens.shape[-1], [float("inf")]
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() != 3:
            continue
        for transposed in (False, True):
            out, width = parameter.shape[1:][:: -1 if transposed else 1]
            if out != hidden:
                continue
            for bias in ("", *_biases(module, parameter, hidden)):
                experts = Experts(
                    name,
                    transposed,
                    bias,
                    len(parameter),
                    width,
                    chosen.shape[-1],
                    states,
                    index,
                    gates,
                )
                errors.append(_off(module, experts, bound, whole))
                if errors[-1] <= REPLAY.get(tokens.dtype, rounding(tokens.dtype)):
                    return experts
    raise ModelError(
        f"the output of {type(module).__name__} differs by {min(errors):.1e} (relative) from what "
        "its keys, gates and weights give: what else it does is not known"
    )


def _arguments(bound: Mapping[str, Any]) -> tuple[str, str, str]:
    """Names of the tokens, the experts' numbers and the gates among a call's arguments. Raises
    StopIteration when one is missing.
    """
    tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
    index = next(n for n, v in tensors.items() if v.dim() == 2 and not v.is_floating_point())
    floats = {n: v for n, v in tensors.items() if v.is_floating_point() and v.dim() == 2}
    gates = next(n for n, v in floats.items() if v.shape == tensors[index].shape)
    states = next(n for n, v in floats.items() if len(v) == len(tensors[index]) and n != gates)
    return states, index, gates


def _biases(module: nn.Module, weight: Tensor, hidden: int) -> list[str]:
    """Parameters that may be a bias of every expert's output."""
    shape = (len(weight), hidden)
    return [name for name, p in module.named_parameters(recurse=False) if tuple(p.shape) == shape]


def _off(module: nn.Module, experts: Experts, bound: Mapping[str, Any], whole: Tensor) -> float:
    """The relative difference of the module's output and what keys, gates and weights give;
    infinite when these cannot be had.
    """
    routed = Routed(
        WideProjection(module, experts),
        *(bound[name] for name in (experts.states, experts.index, experts.gates)),
    )
    try:
        made = routed.projection(routed.wide()).double()
    except Exception:  # whatever a module says to matrices that are not its own
        return float("inf")
    if experts.bias:
        biases = getattr(module, experts.bias).double()[routed.index]
        made = made + (biases * routed.gates.double()[..., None]).sum(-2)
    if made.shape != whole.shape:
        return float("inf")
    difference = (made - whole.double()).norm() / whole.double().norm().clamp(min=1e-30)
    return float(difference) if bool(difference.isfinite()) else float("inf")
