"""The grouped moment compiles to what it should on every architecture: weights, packed sums
(unit).
"""

import pytest
import torch
import triton.language as tl

from knowedit_kernels.moments import schedule
from knowedit_kernels.moments.triton import pack_kernel, second_moment_kernel
from tests.codegen.compiler import MMA, compile_for


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def build(architecture, dtype, config, dim=768, weighted=False, packed=tl.float64):
    table, tokens = meta(128, dtype=torch.int64), meta(128, dtype=torch.int32)
    args = (table, table, tokens, meta(2688, 4, dtype=torch.int32), dim, dim, dim)
    return compile_for(
        second_moment_kernel,
        architecture,
        *args,
        KEY=getattr(tl, str(dtype).removeprefix("torch.")),
        EVEN=dim % config.tile == 0,
        weight_table=table if weighted else None,
        PACKED=packed,
        **config.constants(),
    )


CASES = [  # architecture, keys, weighted, width, type of the sums
    (80, torch.bfloat16, True, 768, tl.float64),
    (80, torch.bfloat16, True, 2880, tl.float32),
    (90, torch.bfloat16, False, 768, tl.float64),
    (90, torch.bfloat16, True, 2880, tl.float64),
    (100, torch.bfloat16, True, 2880, tl.float64),
]


@pytest.mark.parametrize("architecture, dtype, weighted, dim, packed", CASES, ids=str)
def test_tensor_cores_and_no_spills(architecture, dtype, weighted, dim, packed):
    rows = schedule.FEW_TOKENS  # fewer differ in the length of their chains alone
    config = schedule.grouped_config(dtype, "exact", architecture, rows, weighted)
    built = build(architecture, dtype, config, dim, weighted, packed)
    built.check(mma=MMA[architecture])
    assert built.count("UTMALDG" if config.tma else "LDGSTS"), "keys are not copied asynchronously"


def test_float64_into_packed_sums():  # sm_100 takes float64 panels
    config = schedule.config(torch.float64, "exact", 80, 0)
    build(80, torch.float64, config).check(mma="DMMA")


@pytest.mark.parametrize("architecture", [80, 100])
def test_row_audit(architecture):
    keys, wide = meta(1000, 768, dtype=torch.bfloat16), meta(8, 768, dtype=torch.float64)
    args = (keys, wide, keys, wide, wide, 1000, 768, 768)
    options = dict(R=16, W=128, GATHER=False, STORE=True, EACH=True, num_warps=4)
    compile_for(pack_kernel, architecture, *args, **options).check()
