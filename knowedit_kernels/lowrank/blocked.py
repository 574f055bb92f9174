"""The torch path: one pass over W in row blocks that stay in cache, no full-size float32
temporary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.rounding import random_bits, round_stochastic

_BLOCK = 1 << 18  # elements; 1 MiB of float32


def update_(call: UpdateCall) -> None:
    """Runs ``low_rank_update_`` of `_ops.py` weight by weight."""
    call.check_factors()
    for i in range(len(call.w)):
        _one(call, i)
    call.take_prints()


def _one(call: UpdateCall, i: int) -> None:
    """The update of weight `i`."""
    w, u, v = call.w[i], call.u[i], call.v[i]
    source = call.base[i] if call.base else w
    plane = call.residual[i] if call.residual else None
    probe = call.probe[i].to(u) if call.probe else None
    rows, columns = w.shape
    work = u.dtype
    totals = None if call.sums is None else torch.zeros_like(call.sums[i])
    step = max(1, _BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        old = source[block].to(work)
        ideal = u[block] @ v.mT
        exact = old + ideal
        if plane is not None:
            exact = exact + plane[block]
        if call.rounding == "stochastic":
            bits = random_bits(block, columns, call.seed, i, w.device)
            new = round_stochastic(exact, bits, w.dtype)
        else:
            new = exact.to(w.dtype)
        if plane is not None and call.write:
            plane[block] = (exact - new.to(work)).to(plane.dtype)
        if totals is not None:
            applied = new.to(work) - old
            totals += _measured(ideal, applied)
            if probe is not None:
                call.errors[i][block] = (applied - ideal) @ probe
        if call.write:
            w[block] = new
    if call.sums is not None and totals is not None:
        call.sums[i].copy_(totals)


def _measured(ideal: Tensor, applied: Tensor) -> Tensor:
    """What a block adds to the sums: [5]."""
    squared = _square(applied)
    broken = squared.new_zeros(())
    if not torch.isfinite(squared):
        broken = (~torch.isfinite(applied)).sum()
    sums = (_square(ideal), squared, _square(applied - ideal), torch.count_nonzero(applied), broken)
    return torch.stack([x.to(torch.float64) for x in sums])


def _square(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.dot(flat, flat)  # several times the speed of square().sum()


TORCH = Candidate("torch", update_)
