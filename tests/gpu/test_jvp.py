"""The tangents on a real GPU: the accuracy gates, real sizes against float64, bit-repeatability,
torch.func, plain torch (gpu).
"""

import functools

import pytest
import torch
from torch.func import jvp, vmap

from knowedit_kernels import explain
from knowedit_kernels import jvp as ours
from knowedit_kernels.jvp import gpu, reference
from knowedit_kernels.numerics import tangent_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    "gate", [gpu.rms_norm_gate, gpu.swiglu_gate, gpu.attention_gate], ids=lambda gate: gate.__name__
)
def test_the_gates_pass(gate):
    assert gate(torch.device("cuda", 0)) is None


def draw(*shapes, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=g, device="cuda").to(dtype) for shape in shapes]


def error(value, truth):
    return float((value.double() - truth).norm() / truth.norm())


def plain_error(function, primals, tangents, exact):
    """Of the same formula in torch, in the tensors' dtype."""
    got = vmap(lambda *one: jvp(function, tuple(primals), one)[1])(*tangents)
    return error(got, exact)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_attention(dtype, d):
    q, k = (2, 8, 300, d), (2, 2, 1000, d)
    primals = draw(q, k, k, dtype=dtype)
    tangents = draw((3, *q), (3, *k), (3, *k), dtype=dtype)
    spans = torch.tensor([[0, 1000], [100, 900]], device="cuda")
    function = functools.partial(reference.attention, spans=spans)
    runs = [ours.attention_jvp(*primals, *tangents, spans=spans) for _ in range(2)]
    expected_kernel = "torch" if (dtype, d) == (torch.float32, 256) else "triton"
    assert explain("attention_jvp").chosen == expected_kernel
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    for value, truth in zip(runs[0], reference.tangents(function, primals, tangents)):
        assert error(value, truth) <= tangent_error("attention", dtype)
    exact = reference.tangents(function, primals, tangents)[1]
    assert error(runs[0].tangents, exact) <= 2 * plain_error(function, primals, tangents, exact)


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_elementwise(dtype):
    x, y, w, t, u = draw(
        (500, 4096), (500, 4096), (4096,), (20, 500, 4096), (20, 500, 4096), dtype=dtype
    )
    norm = reference.tangents(lambda x: reference.rms_norm(x, w.double()), [x], [t])
    unit = reference.tangents(reference.swiglu, [x, y], [t, u])
    for op, got, wanted in (
        ("rms_norm", ours.rms_norm_jvp(x, w, t), norm),
        ("swiglu", ours.swiglu_jvp(x, y, t, u), unit),
    ):
        assert explain(f"{op}_jvp").chosen == "triton"
        for value, truth in zip(got, wanted):
            assert error(value, truth) <= tangent_error(op, dtype)


def test_torch_func_reaches_the_kernel():
    q, k, v, t = draw(
        (1, 4, 50, 64), (1, 2, 50, 64), (1, 2, 50, 64), (9, 1, 4, 50, 64), dtype=torch.bfloat16
    )
    got = vmap(lambda t: jvp(lambda q: ours.attention(q, k, v), (q,), (t,))[1])(t)
    assert explain("attention_jvp").chosen == "triton"
    exact = reference.tangents(lambda q: reference.attention(q, k.double(), v.double()), [q], [t])[
        1
    ]
    assert error(got, exact) <= tangent_error("attention", torch.bfloat16)


def test_more_than_two_to_the_31_entries():
    """Every tangent is the same, so the last must be as the first."""
    x, w, t = draw((1100, 16384), (16384,), (1, 1100, 16384), dtype=torch.bfloat16)
    many = t.expand(128, -1, -1)
    assert many.numel() > 2**31
    dy = ours.rms_norm_jvp(x, w, many).tangents
    assert torch.equal(dy[127], dy[0]) and torch.equal(dy[119], dy[0])
