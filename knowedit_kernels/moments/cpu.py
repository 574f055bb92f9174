"""The CPU implementations of the second moment: the compiled kernels, and float64 panels in plain
torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from knowedit_kernels import _native
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.moments import triangle
from knowedit_kernels.moments.call import GroupedCall, MomentCall, PackCall, RowAuditCall

# as in csrc/cpu/isa.h
GENERIC, AVX2, AVX512, AVX512_BF16, AMX = range(5)
# as in csrc/cpu/syrk.h; float64 keys always take the last
EXACT, FAST, DOUBLE = range(3)
ARITHMETIC = {"exact": EXACT, "fp32": EXACT, "fast": FAST, "fp64": DOUBLE}
# What the instruction sets multiply that have products of 16 bits.
PRODUCTS = {AVX512_BF16: (torch.bfloat16,), AMX: (torch.bfloat16, torch.float16)}


def _arithmetic(key: torch.Tensor, precision: str) -> int:
    return DOUBLE if key.dtype == torch.float64 else ARITHMETIC[precision]


def _refusal(isa: int, keys: Sequence[torch.Tensor], precision: str) -> str | None:
    if reason := _native.load().refusal(isa):
        return reason
    if isa not in PRODUCTS:
        return None
    if any(_arithmetic(key, precision) == DOUBLE for key in keys):
        return "not for float64 arithmetic"
    if any(key.dtype not in PRODUCTS[isa] for key in keys):
        return f"for {' and '.join(str(d).removeprefix('torch.') for d in PRODUCTS[isa])} keys only"
    return None


def compiled(name: str, isa: int) -> Candidate:
    """The candidate that runs csrc/cpu's kernel of one instruction set.

    Exact: float32 chains of 16 tokens, eight of them added in float32, float64 beyond. Fast:
    float32 chains of 128 tokens, float64 beyond. fp64: float64 throughout. AMX: chains of 16 tokens
    in both, 32 of which are added in float32.
    """

    def run(call: MomentCall) -> None:
        for c, key in zip(call.cs, call.keys):
            torch.ops.knowedit.syrk_cpu_(c, key, _arithmetic(key, call.precision), isa)

    def verify(call: MomentCall) -> str | None:
        return _refusal(isa, call.keys, call.precision)

    return Candidate(name, run, verify, device="cpu")


def compiled_grouped(name: str, isa: int) -> Candidate:
    """The same for the groups of a mixture; with weights, 16-bit keys are multiplied in float32."""

    def run(call: GroupedCall) -> None:
        torch.ops.knowedit.grouped_syrk_cpu_(*call.arguments[:-1], ARITHMETIC[call.precision], isa)

    def verify(call: GroupedCall) -> str | None:
        if _arithmetic(call.keys, call.precision) == DOUBLE:
            return "groups are summed in float32 only"
        return _refusal(isa, [call.keys], call.precision)

    return Candidate(name, run, verify, device="cpu")


def panels_(call: MomentCall) -> None:
    """Float64 column panels on and below the diagonal: half the work of a full product, on any
    device.
    """
    for c, key in zip(call.cs, call.keys):
        for block in key.split(4096):
            wide = block.double()
            for j in range(0, key.shape[1], 256):
                c[j:, j : j + 256].addmm_(wide[:, j:].T, wide[:, j : j + 256])


def grouped_panels_(call: GroupedCall) -> None:
    """`panels_` group by group, on any device."""
    bounds = call.offsets.tolist()
    for group, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            continue
        rows = slice(start, stop) if call.order is None else call.order[start:stop]
        wide = call.keys[rows].double()
        if call.weights is not None:
            wide = wide * call.weights[rows].double()[:, None]
        square = wide.new_zeros(wide.shape[1], wide.shape[1])
        panels_(MomentCall([square], [wide], call.precision))
        triangle.add_lower_(call.c[group], square)


def _torch_row_audit_(call: RowAuditCall) -> None:
    if call.out is not None:
        call.out.copy_(call.keys)
    for sums, block in zip(call.sums.split(1024), call.keys.split(1024)):
        wide = block.double()
        sums[:, 0] = wide.square().sum(1)
        sums[:, 1:] = (wide @ call.signs.T).square()


def _compiled_pack_(call: PackCall) -> None:
    torch.ops.knowedit.pack_cpu_(*call.arguments, _native.load().isa)


def _torch_pack_(call: PackCall) -> None:
    keys, audit = call.keys, call.audit
    dense = keys if call.rows is None else keys.index_select(0, call.rows)
    if call.out is not None:
        call.out.copy_(dense)
    for block in dense.split(1024):
        wide = block.double()
        audit[0] += wide.square().sum()
        audit[1:] += (wide @ call.signs.T).square().sum(0)


_ISAS = (
    ("amx", AMX),
    ("avx512_bf16", AVX512_BF16),
    ("avx512", AVX512),
    ("avx2", AVX2),
    ("generic", GENERIC),
)
COMPILED = tuple(compiled(name, isa) for name, isa in _ISAS)
COMPILED_GROUPED = tuple(compiled_grouped(name, isa) for name, isa in _ISAS)
TORCH = Candidate("torch", panels_)
COMPILED_PACK = Candidate(
    "compiled",
    _compiled_pack_,
    lambda call: _native.load().refusal(GENERIC),
    "cpu",
)
TORCH_PACK = Candidate("torch", _torch_pack_)
COMPILED_ROW_AUDIT = Candidate(
    "compiled",
    lambda call: torch.ops.knowedit.row_audit_cpu_(*call.arguments, _native.load().isa),
    lambda call: _native.load().refusal(GENERIC),
    "cpu",
)
GROUPED_TORCH = Candidate("torch", grouped_panels_)
TORCH_ROW_AUDIT = Candidate("torch", _torch_row_audit_)
