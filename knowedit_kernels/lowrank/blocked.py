"""The torch path: one pass over W in row blocks that stay in cache, no full-size float32
temporary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.lowrank.rounding import random_bits, round_stochastic

_BLOCK = 1 << 18  # elements; 1 MiB of float32


def update_(
    w: list[Tensor],
    base: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    rounding: str,
    seed: int,
    residual: list[Tensor],
    probe: list[Tensor],
    write: bool,
    sums: Tensor,
    errors: list[Tensor],
) -> None:
    """Runs ``low_rank_update_`` of `_ops.py` weight by weight."""
    for i, weight in enumerate(w):
        plane = residual[i] if residual else None
        seen = (probe[i].to(u[i]), errors[i]) if probe else None
        _one(
            weight,
            base[i] if base else weight,
            u[i],
            v[i],
            rounding,
            (seed, i),
            plane,
            seen,
            write,
            sums[i],
        )


def _one(
    w: Tensor,
    source: Tensor,
    u: Tensor,
    v: Tensor,
    rounding: str,
    seed: tuple[int, int],
    plane: Tensor | None,
    seen: tuple[Tensor, Tensor] | None,
    write: bool,
    sums: Tensor,
) -> None:
    rows, columns = w.shape
    work = u.dtype
    totals = torch.zeros_like(sums)
    step = max(1, _BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        old = source[block].to(work)
        ideal = u[block] @ v.mT
        exact = old + ideal
        if plane is not None:
            exact = exact + plane[block]
        if rounding == "stochastic":
            bits = random_bits(block, columns, *seed, w.device)
            new = round_stochastic(exact, bits, w.dtype)
        else:
            new = exact.to(w.dtype)
        if plane is not None and write:
            plane[block] = (exact - new.to(work)).to(plane.dtype)
        applied = new.to(work) - old
        totals[0] += _square(ideal)
        squared = _square(applied)
        totals[1] += squared
        totals[3] += torch.count_nonzero(applied)
        if not torch.isfinite(squared):
            totals[4] += (~torch.isfinite(applied)).sum()
        applied -= ideal
        totals[2] += _square(applied)
        if seen is not None:
            seen[1][block] = applied @ seen[0]
        if write:
            w[block] = new
    sums.copy_(totals)


def _square(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.dot(flat, flat)  # several times the speed of square().sum()


TORCH = Candidate("torch", update_)
