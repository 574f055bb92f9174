"""The moment kernels compile to what they should on every architecture (unit)."""

import itertools
import re

import pytest
import torch
import triton.language as tl

from knowedit_kernels.moments import schedule
from knowedit_kernels.moments.triton import pack_kernel, second_moment_kernel
from tests.codegen.compiler import ARCHITECTURES, FULL, MMA, compile_for, on_each

NARROW = [torch.bfloat16, torch.float16, torch.float32]
LOADS = [
    (architecture, tma)
    for architecture in ARCHITECTURES
    for tma in (False, True)
    if architecture >= 90 or not tma
]
#: Type of the keys, and their width: divided by the tile, or not.
KEYS = list(itertools.product(NARROW, (4096, 4112)))
FEWER_KEYS = [(torch.bfloat16, 4096), (torch.bfloat16, 4112), (torch.float16, 4112)]
FEWER_KEYS.append((torch.float32, 4096))  # its tiles are the architecture's own
TENSOR_CORES = [
    (architecture, tma, *case)
    for architecture, tma in LOADS
    for case in (KEYS if (architecture, tma) == (FULL, True) else FEWER_KEYS)
]


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def build(architecture, dtype, precision="exact", tma=True, dim=4096):
    config = schedule.config(dtype, precision, architecture, schedule.MANY_TOKENS, tma)
    table, tokens = meta(8, dtype=torch.int64), meta(8, dtype=torch.int32)
    args = (table, table, tokens, meta(528, 4, dtype=torch.int32), dim, dim, dim)
    key = getattr(tl, str(dtype).removeprefix("torch."))
    constants = config.constants()
    return compile_for(
        second_moment_kernel, architecture, *args, KEY=key, EVEN=dim % config.tile == 0, **constants
    )


@pytest.mark.parametrize("architecture, tma, dtype, dim", TENSOR_CORES, ids=str)
def test_tensor_cores_asynchronous_copies_no_spills(architecture, tma, dtype, dim):
    built = build(architecture, dtype, tma=tma, dim=dim)
    built.check(mma=MMA[architecture])
    uses_tma = schedule.config(dtype, "exact", architecture, schedule.MANY_TOKENS, tma).tma
    assert built.count("UTMALDG" if uses_tma else "LDGSTS"), "keys are not copied asynchronously"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_operands_come_from_shared_memory_untransposed(architecture):
    built = build(architecture, torch.bfloat16)
    # a transposition through registers would show as shared stores inside the loop: far more than
    # the epilogue's
    assert built.count("STS") <= 128 and built.count("PRMT") <= 64, (
        built.count("STS"),
        built.count("PRMT"),
    )


@pytest.mark.parametrize("architecture, tma", LOADS)
def test_four_products(architecture, tma):
    build(architecture, torch.float32, "fp32", tma=tma).check(mma=MMA[architecture])


@pytest.mark.parametrize(
    "architecture, dtype", on_each(NARROW, [torch.bfloat16, torch.float32]), ids=str
)
def test_fast(architecture, dtype):
    build(architecture, dtype, "fast").check(mma=MMA[architecture])


@pytest.mark.parametrize(
    "architecture", [80, 90]
)  # sm_100 takes float64 panels: see gpu.accumulate_
def test_float64(architecture):
    build(architecture, torch.float64).check(mma="DMMA")


#: Type of the keys, and whether only some rows are taken.
PACKS = on_each(
    itertools.product([*NARROW, torch.float64], (False, True)),
    [(torch.bfloat16, False), (torch.float16, True), (torch.float32, True), (torch.float64, False)],
)


@pytest.mark.parametrize("architecture, case", PACKS, ids=str)
def test_pack(architecture, case):
    dtype, gather = case
    keys, wide = meta(1000, 4096, dtype=dtype), meta(8, 4096, dtype=torch.float64)
    rows = meta(1000, dtype=torch.int64)
    args = (keys, wide, keys, rows, wide, 1000, 4096, 4096)
    built = compile_for(
        pack_kernel, architecture, *args, R=16, W=128, GATHER=gather, STORE=True, num_warps=4
    )
    built.check()
    assert re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", built.ptx), (
        "rows are not read in 16-byte pieces"
    )
