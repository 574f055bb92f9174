"""The arguments of the low-rank update, as every implementation takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit_kernels._dispatch import Call


@dataclass(frozen=True, eq=False)
class UpdateCall(Call):
    """``low_rank_update_``: every w [out, in] = round((base or w) + residual + u v^T).

    u [out, r], v [in, r] float32 (float64 if w is); rounding "nearest", "stochastic" (bits from
    seed) or "compensated". base, residual (bfloat16, receives what rounding cut off) and probe
    [in, p] are parallel to w or empty. Fills sums [weights, 5] float64 and, per probe, errors
    [out, p] float32 (see `_ops`); write False: only those.
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
    sums: Tensor
    errors: Sequence[Tensor]

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
