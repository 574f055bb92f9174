"""The arguments of the low-rank update, as every implementation takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit_kernels._dispatch import Call
from knowedit_kernels._memory import meet
from knowedit_kernels.lowrank.fingerprint import sums_of


@dataclass(frozen=True, eq=False)
class UpdateCall(Call):
    """``low_rank_update_``: every w [out, in] = round((base or w) + residual + u v^T).

    u [out, r], v [in, r] float32 (float64 if w is); rounding "nearest", "stochastic" (bits from
    seed) or "compensated". base, residual (bfloat16, receives what rounding cut off) and probe
    [in, p] are parallel to w or empty. Fills, where given, sums [weights, 5] float64 and, per
    probe, which needs sums, errors [out, p] float32 (see `_ops`); write False: only those. prints
    [weights, 2] int64, where given, receives the fingerprints of what was written.
    """

    w: Sequence[Tensor]
    base: Sequence[Tensor]
    u: Sequence[Tensor]
    v: Sequence[Tensor]
    rounding: str
    seed: int
    residual: Sequence[Tensor]
    probe: Sequence[Tensor]
    write: bool
    sums: Tensor | None
    errors: Sequence[Tensor]
    prints: Tensor | None = None

    def __post_init__(self) -> None:
        """Copies first what is read of memory that is written: an implementation reads a row's
        factors again after its first columns, and a weight's after the one before. A base may be
        its own weight.

        Raises ValueError if two weights are the same memory: they may be written at once; and if
        what is written, or a base, is a view that negates: its memory holds other numbers.
        """
        for name in ("w", "base", "residual"):
            if any(x.is_neg() for x in getattr(self, name)):
                what = "W" if name == "w" else name
                raise ValueError(f"{what} is a view that negates: pass {what}.resolve_neg()")
        for name in ("u", "v", "probe"):
            object.__setattr__(self, name, [x.resolve_neg() for x in getattr(self, name)])
        if not self.write:
            return
        if len(self.w) > 1:
            places = [w.data_ptr() for w in self.w if w.numel()]
            if len(set(places)) < len(places):
                raise ValueError("the same weight occurs twice: update it in two calls")
        bases = (base for base, w in zip(self.base, self.w) if not _same(base, w))
        written, read = (*self.w, *self.residual), (*bases, *self.u, *self.v, *self.probe)
        if _storages(written).isdisjoint(_storages(read)):
            return
        for name in ("base", "u", "v", "probe"):
            apart = []
            for i, x in enumerate(getattr(self, name)):
                own = self.w[i] if name == "base" and _same(x, self.w[i]) else None
                near = any(meet(x, other) for other in written if other is not own)
                apart.append(x.clone() if near else x)
            object.__setattr__(self, name, apart)

    def take_prints(self) -> None:
        """Fills prints from the weights in memory, for an implementation that has not done so on
        the way.
        """
        if self.prints is not None:
            for i, w in enumerate(self.w):
                self.prints[i] = sums_of(w)

    def check_factors(self) -> None:
        """Raises ValueError for NaN or infinity in U or V, which every implementation refuses
        before it writes.
        """
        if not all(map(_finite, (*self.u, *self.v))):
            raise ValueError(
                "U, V or alpha contains NaN or infinity (or overflows float32): nothing was written"
            )


def _finite(x: Tensor) -> bool:
    flat = x.view(-1)  # one serial dot product; only when that overflows, the thorough look
    return math.isfinite(torch.dot(flat, flat)) or bool(torch.isfinite(x).all())


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether every entry of one is that of the other; they are alike in shape and dtype."""
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
