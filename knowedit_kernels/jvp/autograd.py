"""The layers as torch.autograd functions: forward mode is the fused operation, everything else
torch's own derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from knowedit_kernels import _ops
from knowedit_kernels._modes import without_autocast
from knowedit_kernels.jvp.formulas import (
    Attention,
    Layer,
    RMSNorm,
    SwiGLU,
    Tensors,
    in_torch,
    pushed,
)


class Primal(torch.autograd.Function):
    """(layer, *primals) -> output. Forward mode is `Tangent`, reverse mode torch's own of the plain
    formula.
    """

    @staticmethod
    def forward(layer: Layer, *primals: Tensor) -> Tensor:
        return layer.fused(primals, [None] * len(primals))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        primals = ctx.saved_tensors
        if grad is None:
            return (None,) * (1 + len(primals))
        return None, *_cotangents(in_torch(ctx.layer, primals[0].dtype), primals, grad)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor | None:
        if all(t is None for t in tangents):
            return None
        one = [None if t is None else t[None] for t in tangents]
        return Tangent.apply(ctx.layer, *ctx.saved_tensors, *one)[1][0]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], layer: Layer, *primals: Tensor
    ) -> tuple[Tensor, int]:
        dims, count = in_dims[1:], info.batch_size
        if any(same and dim is not None for same, dim in zip(layer.shared, dims)):
            return torch.stack(
                [Primal.apply(layer, *one) for one in _examples(primals, dims, count)]
            ), 0
        folded = [
            x if same else _fold(x, dim, count) for same, x, dim in zip(layer.shared, primals, dims)
        ]
        y = Primal.apply(layer.repeated(count), *folded)
        return y.view(count, len(y) // count, *y.shape[1:]), 0


class Tangent(torch.autograd.Function):
    """(layer, *primals, *tangents [T, ...] or None) -> (output, its tangents [T, ...])."""

    @staticmethod
    def forward(layer: Layer, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        half = len(inputs) // 2
        return layer.fused(inputs[:half], inputs[half:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.layer = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        function, given, places = _of_given(ctx.layer, ctx.saved_tensors)
        found = dict(zip(places, _cotangents(function, given, grads)))
        return None, *(found.get(place) for place in range(len(ctx.saved_tensors)))

    @staticmethod
    def jvp(ctx: Any, _: None, *moving: Tensor | None) -> tuple[Tensor, Tensor]:
        function, given, places = _of_given(ctx.layer, ctx.saved_tensors)
        along = tuple(
            torch.zeros_like(x) if (t := moving[place]) is None else t
            for x, place in zip(given, places)
        )
        with without_autocast(given[0].device.type):
            return torch.func.jvp(function, given, along)[1]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], layer: Layer, *inputs: Tensor | None) -> Any:
        dims, count, half = in_dims[1:], info.batch_size, len(inputs) // 2
        primals, tangents = inputs[:half], inputs[half:]
        if all(dim is None for dim in dims[:half]):  # more directions of the same layer
            more = [_fold(t, dim, count) for t, dim in zip(tangents, dims[half:])]
            y, dy = Tangent.apply(layer, *primals, *more)
            return (y, dy.view(count, len(dy) // count, *dy.shape[1:])), (None, 0)
        if any(same and dim is not None for same, dim in zip(layer.shared * 2, dims)):
            results = [Tangent.apply(layer, *one) for one in _examples(inputs, dims, count)]
            return tuple(torch.stack(parts) for parts in zip(*results)), (0, 0)
        axes = [0] * half + [1] * half  # of primals, and of tangents behind the direction
        shared = zip(layer.shared * 2, inputs, dims, axes)
        folded = [x if same else _fold(x, dim, count, axis) for same, x, dim, axis in shared]
        y, dy = Tangent.apply(layer.repeated(count), *folded)
        rows = len(y) // count
        return (y.view(count, rows, *y.shape[1:]), dy.view(len(dy), count, rows, *dy.shape[2:])), (
            0,
            1,
        )


def primal(layer: Layer, *primals: Tensor) -> Tensor:
    """The layer's output. torch.compile knows no forward mode and no functions of one's own with
    it: while it traces, the op is called, which has reverse mode (`_differentiable`).
    """
    if torch.compiler.is_compiling():
        return layer.fused(primals, [None] * len(primals))[0]
    return Primal.apply(layer, *primals)


def tangent(layer: Layer, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer's output and its tangents, for primals and as many tangents; as `primal`."""
    if torch.compiler.is_compiling():
        half = len(inputs) // 2
        return layer.fused(inputs[:half], inputs[half:])
    return Tangent.apply(layer, *inputs)


def _differentiable(op: str, split: Callable[..., tuple[Layer, Tensors]]) -> None:
    """Gives an op reverse mode; `split` turns its arguments into the layer, and primals and
    tangents.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.layer, tensors = split(*inputs)
        ctx.arguments = len(inputs)
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        function, given, places = _of_given(ctx.layer, ctx.saved_tensors)
        found = dict(zip(places, _cotangents(function, given, grads)))
        return tuple(found.get(place) for place in range(ctx.arguments))

    torch.library.register_autograd(
        f"knowedit::{op}", backward, setup_context=save, lib=_ops.LIBRARY
    )


_differentiable("rms_norm_jvp", lambda x, w, t, eps: (RMSNorm(eps), (x, w, t, None)))
_differentiable("swiglu_jvp", lambda *tensors: (SwiGLU(), tensors))
_differentiable(
    "attention_jvp",
    lambda *given: (Attention(causal=given[7], scale=given[8], spans=given[6]), given[:6]),
)


def _cotangents(
    function: Callable[..., Any], given: Sequence[Tensor], grads: Any
) -> tuple[Tensor, ...]:
    """Gradients in `given` of what the function returns, from those in that."""
    with without_autocast(given[0].device.type):
        return torch.func.vjp(function, *given)[1](grads)


def _of_given(
    layer: Layer, saved: Tensors
) -> tuple[Callable[..., Any], tuple[Tensor, ...], list[int]]:
    """`pushed` as a function of those inputs that are not None, these, and their places
    among all.
    """
    half, places = len(saved) // 2, [place for place, x in enumerate(saved) if x is not None]

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        found = dict(zip(places, given))
        inputs = [found.get(place) for place in range(len(saved))]
        return pushed(layer, inputs[:half], inputs[half:])  # type: ignore[arg-type]

    return function, tuple(x for x in saved if x is not None), places


def _examples(inputs: Tensors, dims: Sequence[int | None], count: int) -> list[list[Tensor | None]]:
    return [
        [x if dim is None or x is None else x.select(dim, i) for x, dim in zip(inputs, dims)]
        for i in range(count)
    ]


def _fold(x: Tensor | None, dim: int | None, count: int, into: int = 0) -> Tensor | None:
    """A vmapped dimension (or a repetition) of size `count` as the outer part of dimension
    `into`.
    """
    if x is None:
        return None
    x = (
        x.unsqueeze(into).expand(*x.shape[:into], count, *x.shape[into:])
        if dim is None
        else x.movedim(dim, into)
    )
    return x.flatten(into, into + 1)
