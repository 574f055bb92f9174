"""The mended interpreter agrees bit for bit with torch; the other interpreter tests rest
on this (unit).
"""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _dot(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    x = tl.load(a + k[:, None] * M + m[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x.T, y, tl.zeros((M, N), tl.float32)))


@triton.jit
def _cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


@triton.jit
def _add(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def _runtime_loop(n, out):
    total = 0
    for i in range(0, n):
        total += i
    tl.store(out, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_matches_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 16, generator=generator).to(dtype)
    b = torch.randn(32, 16, generator=generator).to(dtype)
    out = torch.full((16, 16), float("nan"))
    _dot[(1,)](a, b, out, M=16, N=16, K=32)
    exact = a.double().T @ b.double()
    assert (out.double() - exact).abs().max() < 1e-5


def test_cast_rounds_to_nearest_even_and_keeps_specials():
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF], dtype=torch.int32).view(
        torch.float32
    )
    specials = torch.tensor(
        [float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, 1e-40, -1.00390625, 65504.0]
    )
    x = torch.cat([ties, specials, torch.randn(500, generator=torch.Generator().manual_seed(1))])
    out = torch.zeros(512, dtype=torch.bfloat16)
    _cast[(1,)](x, out, N=512)
    assert torch.equal(out.view(torch.int16), x.bfloat16().view(torch.int16))


def test_addition_matches_torch():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    out = torch.zeros(256, dtype=torch.bfloat16)
    _add[(1,)](x, y, out, N=256)
    assert torch.equal(out, x + y)


def test_runtime_loop_bound():
    out = torch.zeros(1, dtype=torch.int32)
    _runtime_loop[(1,)](7, out)
    assert out.item() == 21
