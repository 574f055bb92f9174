"""The layers as values: the plain formula of each, and forward mode through it, fused or in torch's
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from knowedit_kernels._modes import without_autocast
from knowedit_kernels.jvp import reference

Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class RMSNorm:
    eps: float
    shared: ClassVar[tuple[bool, ...]] = (False, True)  # primals that all rows share

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(x, weight, self.eps)

    def fused(self, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
        (x, weight), (tx, t_weight) = primals, tangents
        assert x is not None and weight is not None
        if tx is None:
            tx = x.new_zeros(0 if t_weight is None else len(t_weight), *x.shape)
        y, dy = torch.ops.knowedit.rms_norm_jvp(x, weight, tx, self.eps)
        if t_weight is not None:  # linear in the weight
            dy = dy + in_torch(self, x.dtype)(x, t_weight[:, None])
        return y, dy

    def repeated(self, times: int) -> RMSNorm:
        return self


@dataclass(frozen=True)
class SwiGLU:
    shared: ClassVar[tuple[bool, ...]] = (False, False)

    def plain(self, gate: Tensor, up: Tensor) -> Tensor:
        return reference.swiglu(gate, up)

    def fused(self, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
        gate, up = primals
        assert gate is not None and up is not None
        count = next((len(t) for t in tangents if t is not None), 0)
        moved = [gate.new_zeros(count, *gate.shape) if t is None else t for t in tangents]
        return torch.ops.knowedit.swiglu_jvp(gate, up, *moved)

    def repeated(self, times: int) -> SwiGLU:
        return self


@dataclass(frozen=True)
class Attention:
    causal: bool
    scale: float
    spans: Tensor | None
    shared: ClassVar[tuple[bool, ...]] = (False, False, False)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, self.causal, self.scale, self.spans)

    def fused(self, primals: Tensors, tangents: Tensors) -> tuple[Tensor, Tensor]:
        return torch.ops.knowedit.attention_jvp(
            *primals, *tangents, self.spans, self.causal, self.scale
        )

    def repeated(self, times: int) -> Attention:
        return self if self.spans is None else replace(self, spans=self.spans.repeat(times, 1))


Layer = RMSNorm | SwiGLU | Attention


def in_torch(layer: Layer, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The layer in torch's operations, in float32 or float64 inside: what derivatives beyond the
    fused ones use.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def function(*primals: Tensor) -> Tensor:
        with without_autocast(primals[0].device.type):
            return layer.plain(*(x.to(wide) for x in primals)).to(dtype)

    return function


def pushed(layer: Layer, primals: Sequence[Tensor], tangents: Tensors) -> tuple[Tensor, Tensor]:
    """As `layer.fused`, in torch's operations."""
    function, count = (
        in_torch(layer, primals[0].dtype),
        next((len(t) for t in tangents if t is not None), 0),
    )
    y = function(*primals)
    if count == 0:
        return y, y.new_zeros(0, *y.shape)
    whole = [
        x.new_zeros(count, *x.shape)
        if t is None
        else F.pad(t, (0, 0, x.shape[-2] - t.shape[-2], 0))
        if x.ndim > 1
        else t
        for x, t in zip(primals, tangents)
    ]
    return y, torch.func.vmap(lambda *one: torch.func.jvp(function, tuple(primals), one)[1])(*whole)
