"""The low-rank update kernel compiles to what it should on every architecture (unit)."""

import pytest
import torch
import triton.language as tl

from knowedit_kernels.lowrank import gpu
from knowedit_kernels.lowrank.triton import update_kernel
from tests.codegen.compiler import MMA, compile_for, on_each

CASES = [
    (torch.bfloat16, "nearest", 0),
    (torch.bfloat16, "stochastic", 64),
    (torch.bfloat16, "compensated", 64),
    (torch.float16, "nearest", 64),
    (torch.float16, "stochastic", 64),
    (torch.float16, "compensated", 0),
    (torch.float32, "nearest", 0),
    (torch.float32, "nearest", 64),
    (torch.bfloat16, "nearest", None),  # without a report
    (torch.float32, "nearest", None),
]


# every type and rounding once, with the most registers: probes, and compensation
FEWER = [CASES[1], CASES[2], CASES[3], CASES[5], CASES[7], CASES[8]]


@pytest.mark.parametrize("architecture, case", on_each(CASES, FEWER), ids=str)
def test_update(architecture, case):
    dtype, rounding, probes = case

    def meta(dtype):
        return torch.empty(64, dtype=dtype, device="meta")

    tables = meta(torch.int64), meta(torch.int32), meta(torch.int32), meta(torch.float64)
    built = compile_for(
        update_kernel, architecture, *tables, 7, DT=getattr(tl, str(dtype).removeprefix("torch.")),
        ROUNDING=rounding, COMPENSATED=rounding == "compensated", WRITE=True,
        MEASURE=probes is not None, BP=probes or 0,
        ALIGNED=True, ROUNDS=gpu.ROUNDS, FIELDS=7, BM=gpu.BM, BN=gpu.BN, BR=gpu.BR, TILES=gpu.TILES,
        num_warps=gpu.WARPS, num_stages=gpu.STAGES,
    )  # fmt: skip
    print(architecture, dtype, rounding, probes, built.registers, built.shared, built.spills)
    built.check(mma=MMA[architecture])
    assert built.count("LDGSTS"), "the factors are not copied asynchronously"
    for access in ("LDG", "STG"):  # the weight moves 16 bytes at a time
        assert f"{access}.E.128" in built.sass, f"no 16-byte {access}"
