"""The compiled CPU kernels (csrc/cpu/lowrank*): the product stays in registers, W is read and
written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knowedit_kernels import _native
from knowedit_kernels._dispatch import Candidate

ROUNDING = {"nearest": 0, "stochastic": 1, "compensated": 2}
# as in csrc/cpu/isa.h
ISA = {"avx512": 2, "avx2": 1, "generic": 0}


def compiled(name: str) -> Candidate:
    """The candidate of one instruction set."""

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
        for i, weight in enumerate(w):
            torch.ops.knowedit.low_rank_cpu_(
                weight,
                base[i] if base else weight,
                u[i],
                v[i],
                ROUNDING[rounding],
                seed,
                i,
                residual[i] if residual else None,
                probe[i] if probe else None,
                write,
                sums[i],
                errors[i] if probe else None,
                ISA[name],
            )

    def verify(
        w: list[Tensor],
        base: list[Tensor],
        u: list[Tensor],
        v: list[Tensor],
        rounding: str,
        seed: int,
        residual: list[Tensor],
        *rest: object,
    ) -> str | None:
        if reason := _native.load().refusal(ISA[name]):
            return reason
        for tensor in (*w, *base, *residual):
            if tensor.dtype == torch.float64:
                return "float64 weights need float64 arithmetic"
            if tensor.shape[1] > 1 and tensor.stride(1) != 1:
                return "a weight, base or residual has strided rows"
        return None

    return Candidate(name, update_, verify, device="cpu")


COMPILED = tuple(compiled(name) for name in ISA)
