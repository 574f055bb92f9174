"""The shortest way to the CPU kernels: an update in plain arithmetic of plain tensors is one call
of an op that looks at its arguments itself. What it declines goes the long way, through `_ops.run`
and `_dispatch`, to the same kernels or others, or to an error that says what is wrong.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from knowedit_kernels import _dispatch
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.cpu import ROUNDING

# looked up once: a call of an op through its names takes a tenth longer, and a call is what counts
_ADD = torch.ops.knowedit.low_rank_add_cpu_.default._op
_ADD_AS = torch.ops.knowedit.low_rank_add_as_cpu_.default._op
_COUNT_WRITES = torch._C._increment_version
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def empty_sums() -> Tensor:
    """Where an update leaves what it measures: [5] float64."""
    return torch.empty(5, dtype=torch.float64, device="cpu")


def add_(
    W: Tensor,
    U: Tensor,
    V: Tensor,
    alpha: float,
    rounding: str,
    seed: int,
    residual: Tensor | None,
    sums: Tensor | None,
) -> bool:
    """W += alpha U V^T as `low_rank_update_` does, measured where ``sums`` is given. False, and
    nothing written, for anything out of the ordinary: another device than the CPU or layout than
    dense rows, factors that are not contiguous float32 of the right shape, or not finite, or in
    memory that is written, what is no tensor, somebody listening, KNOWEDIT_IMPL.
    """
    if (
        is_dynamo_compiling()
        or type(W) not in _PLAIN
        or type(U) not in _PLAIN
        or type(V) not in _PLAIN
    ):
        return False
    if alpha != 1:
        if U.dtype != torch.float32:
            return False
        U = U.detach() * alpha
    if sums is None and residual is None and rounding == "nearest":
        done = _ADD(W, U, V)
    elif rounding not in ROUNDING or type(residual) not in (type(None), Tensor):
        return False
    else:
        done = _ADD_AS(W, U, V, ROUNDING[rounding], seed, residual, sums)
    if not done:
        return False
    written = (W,) if residual is None else (W, residual)
    try:
        _COUNT_WRITES(written)
    except RuntimeError:  # nobody counts the writes to an inference tensor
        _COUNT_WRITES([x for x in written if not x.is_inference()])
    _dispatch.note("low_rank_update_", _decision())
    return True


@functools.cache
def _decision() -> _dispatch.Choice:
    """What `_dispatch` decides for every update that the op takes on: the best kernel there is."""
    W = torch.empty(1, 1, device="cpu")
    return _dispatch.decide(
        "low_rank_update_", UpdateCall([W], [], [W], [W], "nearest", 0, [], [], False, None, [])
    )
