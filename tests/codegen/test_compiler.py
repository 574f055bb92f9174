"""The checker itself: it reads real machine code, and it refuses what it must (unit)."""

import pytest
import torch
import triton
import triton.language as tl

from tests.codegen.compiler import ARCHITECTURES, MMA, compile_for


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(a + i[:, None] * N + i[None, :])
    y = tl.load(b + i[:, None] * N + i[None, :])
    tl.store(out + i[:, None] * N + i[None, :], tl.dot(x, y))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_a_tensor_core_product(architecture):
    a, out = _meta(64, 64), _meta(64, 64, dtype=torch.float32)
    compile_for(_product, architecture, a, a, out, N=64, num_warps=4).check(mma=MMA[architecture])


def test_sees_spills():
    a, out = _meta(128, 128), _meta(128, 128, dtype=torch.float32)
    compiled = compile_for(_product, 80, a, a, out, N=128, num_warps=1)
    with pytest.raises(AssertionError, match="spill"):
        compiled.check()


def test_sees_a_missing_tensor_core():
    a, out = _meta(16, 16, dtype=torch.float64), _meta(16, 16, dtype=torch.float64)
    compiled = compile_for(_product, 80, a, a, out, N=16, num_warps=1)
    with pytest.raises(AssertionError, match="HMMA"):
        compiled.check(mma="HMMA")
