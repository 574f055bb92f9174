"""The kernels of the tangents compile to what they should on every architecture (unit)."""

import pytest
import torch

from knowedit_kernels.jvp import gpu
from knowedit_kernels.jvp.triton import attention_kernel, rms_norm_kernel, swiglu_kernel
from tests.codegen.compiler import ARCHITECTURES, MMA, compile_for, on_each

STRIDES = (1 << 20, 1 << 16, 1 << 9, 1 << 24)  # of batch, head, row, tangent
HEADS = [
    *((torch.bfloat16, d) for d in (16, 64, 128, 256)),
    (torch.float16, 128),
    (torch.float32, 64),
    (torch.float32, 128),
]
# one for each of the tiles
FEWER_HEADS = [(torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256), *HEADS[-2:]]


def meta(dtype=torch.float32):
    return torch.empty(64, dtype=dtype, device="meta")


def attention(
    architecture,
    dtype,
    d,
    known,
    tq=True,
    tkv=True,
    sizes=(9, 3, 1000, 1000, 17),
    strides=STRIDES,
    plain=False,
):
    tile, one_pass = gpu.attention_tile(dtype, d)
    assert one_pass or known or not (tq or tkv), "never launched"
    x = meta(dtype)
    tangents = [x if tq else None, x if tkv else None, x if tkv else None]
    return compile_for(
        attention_kernel, architecture, x, x, x, *tangents, x, x, meta(),
        None if plain else meta(torch.int32), *[strides] * 6, *sizes, d, 0.125, KNOWN=known,
        WITH_TQ=tq, WITH_TKV=tkv, CAUSAL=not plain, SPANS=not plain, **tile,
    )  # fmt: skip


def mma(architecture, dtype, d):
    # the warp-group and tensor-memory instructions need 64 rows
    return MMA[architecture] if gpu.attention_tile(dtype, d)[0]["BM"] == 64 else "HMMA"


@pytest.mark.parametrize("architecture, head", on_each(HEADS, FEWER_HEADS), ids=str)
def test_attention(architecture, head):
    dtype, d = head
    ways = [("tangents", True, True, True), ("function", False, False, False)]
    if gpu.attention_tile(dtype, d)[1]:
        ways.append(("both", False, True, True))
    for name, *way in ways:
        built = attention(architecture, dtype, d, *way)
        print(architecture, dtype, d, name, built.registers, built.shared, built.spills)
        built.check(mma=mma(architecture, dtype, d))
        assert built.count("LDGSTS"), "keys are not copied asynchronously"


@pytest.mark.parametrize("dtype, d", [(torch.bfloat16, 128), (torch.float32, 64)], ids=str)
@pytest.mark.parametrize("architecture", [80, 100])
def test_attention_with_few_tangents(architecture, dtype, d):
    for tq in (True, False):
        attention(architecture, dtype, d, True, tq, not tq, plain=tq).check(
            mma=mma(architecture, dtype, d)
        )


def test_sizes_that_the_compiler_specialises():
    """Ones become constants: a single query, key, head, constant prefix."""
    attention(90, torch.bfloat16, 64, False, sizes=(1, 1, 1, 1, 1), strides=(1, 1, 1, 1)).check()
    attention(
        90, torch.bfloat16, 64, True, sizes=(16, 16, 16, 16, 16), strides=(16, 16, 16, 16)
    ).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_elementwise(architecture, dtype):
    x, rows = meta(dtype), 1024
    for d in (4096, gpu.WIDEST):
        norm = compile_for(
            rms_norm_kernel,
            architecture,
            x,
            x,
            x,
            x,
            x,
            20,
            d,
            1e-6,
            d,
            rows * d,
            d,
            **gpu.rms_tile(d),
        )
        print(architecture, dtype, d, norm.registers, norm.spills)
        norm.check()
    strides = (1536, 1536, rows * 1536, 1536, rows * 1536, 1536)
    unit = compile_for(
        swiglu_kernel, architecture, *[x] * 6, 20, rows, 1536, *strides, **gpu.SWIGLU_TILE
    )
    unit.check()
    for built in (norm, unit):  # 16 bytes at a time
        assert "LDG.E.128" in built.sass and "STG.E.128" in built.sass
