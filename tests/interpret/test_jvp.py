"""The kernels of the tangents, run on the CPU: ragged sizes, strides, padding, options, poisoned
buffers (unit).
"""

import functools

import pytest
import torch
from torch.nn import functional as F

from knowedit_kernels import testing
from knowedit_kernels.jvp import gpu, reference
from knowedit_kernels.jvp.call import AttentionCall, RmsNormCall, SwigluCall
from knowedit_kernels.numerics import UNIT_ROUNDOFF, tangent_error

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "gate", [gpu.rms_norm_gate, gpu.swiglu_gate, gpu.attention_gate], ids=lambda gate: gate.__name__
)
def test_the_gates_pass(gate, monkeypatch):
    # float16 takes the tiles of bfloat16, and has tests below
    monkeypatch.setattr(gpu, "DTYPES", (torch.bfloat16, torch.float32))
    assert gate(CPU) is None


def draw(*shapes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def check(op, run, call, wanted):
    """In poisoned memory, twice, against float64."""
    with testing.poisoned_allocations():
        got, again = run(call), run(call)
    for value, second, truth in zip(got, again, wanted, strict=True):
        assert value.shape == truth.shape and torch.equal(value, second)
        few = (
            UNIT_ROUNDOFF[value.dtype] if truth.count_nonzero() < 100 else 0
        )  # all of few may be rounded badly
        assert float((value.double() - truth).norm()) <= (
            tangent_error(op, value.dtype) + few
        ) * float(truth.norm())
    return got


@pytest.mark.parametrize(
    "rows, d, count",
    [(0, 8, 2), (3, 1, 1), (2, 130, 0), (4, 576, gpu.GROUP), (3, 70, gpu.GROUP + 1)],
)
@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_elementwise(dtype, rows, d, count):
    x, y, w, t, u = draw(
        (rows, d), (rows, d), (d,), (count, rows, d), (count, rows, d), dtype=dtype
    )
    if rows and count:
        norm = reference.tangents(lambda x: reference.rms_norm(x, w.double(), 0.1), [x], [t])
        unit = reference.tangents(reference.swiglu, [x, y], [t, u])
    else:
        norm = reference.rms_norm(x.double(), w.double(), 0.1), t.double()
        unit = reference.swiglu(x.double(), y.double()), t.double()
    first = check("rms_norm", gpu.rms_norm, RmsNormCall(x, w, t, 0.1), norm)
    second = check("swiglu", gpu.swiglu, SwigluCall(x, y, t, u), unit)
    padded = [testing.guarded(z, row_margin=5) for z in (x, y, t, u)]
    px, py, pt, pu = (guard.tensor for guard in padded)
    assert all(torch.equal(a, b) for a, b in zip(first, gpu.rms_norm(RmsNormCall(px, w, pt, 0.1))))
    assert all(torch.equal(a, b) for a, b in zip(second, gpu.swiglu(SwigluCall(px, py, pt, pu))))
    for guard in padded:
        guard.check()


def problem(queries, keys, d, count, dtype, batch=1, heads=2, shared=1, seed=0):
    q, k = (batch, heads, queries, d), (batch, shared, keys, d)
    primals = draw(q, k, k, dtype=dtype, seed=seed)
    return primals, draw(*((count, *x.shape) for x in primals), dtype=dtype, seed=seed + 1)


def expected(primals, tangents, causal, scale, spans=None):
    moved = [
        torch.zeros(len(tangents[0]), *x.shape, dtype=x.dtype) if t is None else t
        for x, t in zip(primals, tangents)
    ]
    moved = [F.pad(t, (0, 0, x.shape[2] - t.shape[3], 0)) for x, t in zip(primals, moved)]
    return reference.tangents(
        functools.partial(reference.attention, causal=causal, scale=scale, spans=spans),
        primals,
        moved,
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "queries, keys, d, causal", [(1, 1, 1, 1), (5, 40, 24, 0), (40, 40, 64, 1), (3, 65, 70, 1)]
)
def test_ragged_sizes(queries, keys, d, causal, count):
    primals, tangents = problem(queries, keys, d, count, torch.bfloat16)
    check(
        "attention",
        gpu.attention,
        AttentionCall(*primals, *tangents, None, bool(causal), 0.3),
        expected(primals, tangents, causal, 0.3),
    )


@pytest.mark.parametrize("last", [0, 1, 33, 50])
@pytest.mark.parametrize("given", ["q", "k", "v", "qv", "qkv"])
def test_tangents_of_few_arguments_and_of_the_last_keys_only(given, last):
    primals, tangents = problem(20, 50, 16, 2, torch.float16)
    short = [t if name == "q" else t[..., 50 - last :, :] for name, t in zip("qkv", tangents)]
    moved = [t if name in given else None for name, t in zip("qkv", short)]
    zero = [torch.zeros_like(t) if m is None else m for m, t in zip(moved, short)]
    args = AttentionCall(*primals, *moved, None, True, 0.3)
    wanted = expected(primals, zero, True, 0.3)
    if not wanted[1].any():
        assert not gpu.attention(args)[1].any()
    else:
        check("attention", gpu.attention, args, wanted)


def test_padding_is_never_read():
    primals, tangents = problem(6, 70, 16, 2, torch.bfloat16, batch=4, shared=2)
    spans = torch.tensor([[0, 70], [40, 70], [3, 66], [9, 9]])
    key = torch.arange(70)
    exists = ((key >= spans[:, :1]) & (key < spans[:, 1:]))[:, None, :, None]
    wanted = expected(primals, tangents, True, 0.3, spans)
    got = check(
        "attention", gpu.attention, AttentionCall(*primals, *tangents, spans, True, 0.3), wanted
    )
    k, v, tk, tv = (torch.where(exists, x, torch.nan) for x in (*primals[1:], *tangents[1:]))
    spoilt = gpu.attention(AttentionCall(primals[0], k, v, tangents[0], tk, tv, spans, True, 0.3))
    assert all(torch.equal(a, b) for a, b in zip(got, spoilt))
    assert not got[0][3].any() and not got[1][:, 3].any()


def test_strides_and_several_programs():
    """Heads taken out of one projection [batch, tokens, heads, d]; padded rows; nothing outside is
    written.
    """
    primals, tangents = problem(70, 70, 16, 2, torch.bfloat16, batch=2, heads=4, shared=2)
    wanted = expected(primals, tangents, True, 0.3)
    plain = check(
        "attention", gpu.attention, AttentionCall(*primals, *tangents, None, True, 0.3), wanted
    )
    guards = [
        testing.guarded(x.transpose(-3, -2).contiguous(), row_margin=8)
        for x in (*primals, *tangents)
    ]
    views = [guard.tensor.transpose(-3, -2) for guard in guards]
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain, gpu.attention(AttentionCall(*views, None, True, 0.3)))
    )
    for guard in guards:
        guard.check()


def test_no_tangents_and_nothing_at_all():
    primals, _ = problem(5, 40, 16, 1, torch.bfloat16)
    o, do = gpu.attention(AttentionCall(*primals, None, None, None, None, True, 0.3))
    assert do.shape == (0, *o.shape)
    still = (torch.zeros(1, *x.shape, dtype=x.dtype) for x in primals)
    fused = gpu.attention(AttentionCall(*primals, *still, None, True, 0.3))
    assert torch.equal(o, fused[0]) and not fused[1].any()
    for queries, keys, batch in ((0, 3, 1), (0, 0, 1), (2, 2, 0)):
        primals, tangents = problem(queries, keys, 16, 2, torch.bfloat16, batch=batch)
        o, do = gpu.attention(AttentionCall(*primals, *tangents, None, True, 0.3))
        assert o.shape == primals[0].shape and do.shape == tangents[0].shape


@pytest.mark.parametrize("count", [1, 2])
def test_what_all_keys_or_values_share_costs_no_accuracy(count):
    """Scores' tangents around 100 and values around 100, both with a spread of 1: sums about their
    mean lose nothing.
    """
    primals, tangents = problem(8, 64, 16, count, torch.bfloat16)
    tangents[0] += 1
    primals[1] = (primals[1].float() + 20).bfloat16()
    primals[0] *= 0.1
    apart = [primals[0], primals[1], (primals[2].float() + 128).bfloat16()]
    for values in (primals, apart):
        wanted = expected(values, tangents, False, 0.3)
        check(
            "attention", gpu.attention, AttentionCall(*values, *tangents, None, False, 0.3), wanted
        )
