"""The compiled CPU kernels (csrc/cpu/lowrank*): the product stays in registers, W is read and
written once.
"""

from __future__ import annotations

import torch

from knowedit_kernels import _native
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.fingerprint import keys_of

ROUNDING = {"nearest": 0, "stochastic": 1, "compensated": 2}
# as in csrc/cpu/isa.h
ISA = {"avx512": 2, "avx2": 1, "generic": 0}


def compiled(name: str) -> Candidate:
    """The candidate of one instruction set."""

    isa = ISA[name]

    def update_(call: UpdateCall) -> None:
        # the kernel refuses what is broken, but sees one weight
        if len(call.w) > 1 and not torch.ops.knowedit.all_finite_cpu([*call.u, *call.v]):
            call.check_factors()
        for i, weight in enumerate(call.w):
            try:
                torch.ops.knowedit.low_rank_cpu_.default(
                    weight, call.base[i] if call.base else weight, call.u[i], call.v[i],
                    ROUNDING[call.rounding], call.seed, i,
                    call.residual[i] if call.residual else None,
                    call.probe[i] if call.probe else None, call.write, call.sums,
                    call.errors[i] if call.probe else None, call.prints,
                    None if call.prints is None else keys_of(weight), isa,
                )  # fmt: skip
            except RuntimeError:
                call.check_factors()
                raise

    def verify(call: UpdateCall) -> str | None:
        if reason := _native.load().refusal(isa):
            return reason
        for tensor in (*call.w, *call.base, *call.residual):
            if tensor.dtype == torch.float64:
                return "float64 weights need float64 arithmetic"
            if tensor.shape[1] > 1 and tensor.stride(1) != 1:
                return "a weight, base or residual has strided rows"
        return None

    return Candidate(name, update_, verify, device="cpu")


COMPILED = tuple(compiled(name) for name in ISA)
