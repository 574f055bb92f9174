"""Layers and their tangents against float64: every option, dtypes, pieces, torch.func, a Llama
block, refusals (unit).
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

from knowedit_kernels import explain
from knowedit_kernels import jvp as ours
from knowedit_kernels.jvp import batched, reference
from knowedit_kernels.numerics import tangent_error

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
T = 3


def draw(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def error(value, truth):
    """Normwise and relative; 0 for nothing."""
    return (
        float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300))
        if truth.numel()
        else 0.0
    )


def check(op, got, wanted):
    for value, truth in zip(got, wanted, strict=True):
        assert value.shape == truth.shape
        assert error(value, truth) <= tangent_error(op, value.dtype)


def heads(queries=5, keys=9, count=T, dtype=torch.float64, batch=3, group=3, shared=2, d=8, seed=0):
    """(q, k, v), (tq, tk, tv)"""
    q, k = (batch, group * shared, queries, d), (batch, shared, keys, d)
    primals = draw(q, k, k, dtype=dtype, seed=seed)
    return primals, draw(*((count, *x.shape) for x in primals), dtype=dtype, seed=seed + 1)


@pytest.fixture(params=[None, 64, 1000])
def pieces(request, monkeypatch):
    """The usual pieces, or many small ones."""
    if request.param:
        monkeypatch.setattr(batched, "SCORES", request.param)
        monkeypatch.setattr(batched, "ELEMENTS", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype):
    x, w, t = draw((2, 7, 33), (33,), (T, 2, 7, 33), dtype=dtype)
    wanted = reference.tangents(lambda x: reference.rms_norm(x, w.double(), 0.1), [x], [t])
    check("rms_norm", ours.rms_norm_jvp(x, w, t, 0.1), wanted)
    assert explain("rms_norm_jvp").chosen == "torch"


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    gate, up, *moved = draw((2, 7, 33), (2, 7, 33), (T, 2, 7, 33), (T, 2, 7, 33), dtype=dtype)
    check(
        "swiglu",
        ours.swiglu_jvp(gate, up, *moved),
        reference.tangents(reference.swiglu, [gate, up], moved),
    )


SPANS = torch.tensor([[0, 9], [3, 7], [2, 2]])  # all, padding on both sides, nothing


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("spans", [None, SPANS], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, causal, spans):
    primals, tangents = heads(dtype=dtype)
    function = functools.partial(reference.attention, causal=causal, scale=0.3, spans=spans)
    got = ours.attention_jvp(*primals, *tangents, causal=causal, scale=0.3, spans=spans)
    check("attention", got, reference.tangents(function, primals, tangents))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("given", ["q", "k", "v", "kv", "qk"])
@pytest.mark.parametrize("last", [0, 3, 9])
def test_tangents_of_few_arguments_and_of_the_last_keys_only(given, last):
    primals, tangents = heads()
    short = [t if name == "q" else t[..., 9 - last :, :] for name, t in zip("qkv", tangents)]
    got = ours.attention_jvp(
        *primals, *(t if name in given else None for name, t in zip("qkv", short))
    )
    padded = [F.pad(t, (0, 0, x.shape[2] - t.shape[3], 0)) for x, t in zip(primals, short)]
    whole = [t if name in given else torch.zeros_like(t) for name, t in zip("qkv", padded)]
    check("attention", got, reference.tangents(reference.attention, primals, whole))


def test_padding_may_hold_anything():
    primals, tangents = heads()
    exists = ((torch.arange(9) >= SPANS[:, :1]) & (torch.arange(9) < SPANS[:, 1:]))[
        :, None, :, None
    ]
    clean = ours.attention_jvp(*primals, *tangents, spans=SPANS)
    spoilt = [torch.where(exists, x, torch.nan) for x in (*primals[1:], *tangents[1:])]
    dirty = ours.attention_jvp(primals[0], *spoilt[:2], tangents[0], *spoilt[2:], spans=SPANS)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    assert not clean.primal[2].any() and not clean.tangents[:, 2].any()  # a row without keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_not_worse_than_plain_torch(dtype):
    """The same formulas in torch, in the same dtype, with keys and values that share a direction,
    as in real models.
    """
    primals, tangents = heads(40, 50, dtype=dtype)
    primals[1:] = [
        (x.double() + 3 * draw((8,), seed=i)[0]).to(dtype) for i, x in enumerate(primals[1:])
    ]
    x, w, t = draw((40, 64), (64,), (T, 40, 64), dtype=dtype)
    g, u, tg, tu = draw((40, 64), (40, 64), (T, 40, 64), (T, 40, 64), dtype=dtype)
    cases = [
        (ours.attention_jvp(*primals, *tangents), reference.attention, primals, tangents),
        (ours.rms_norm_jvp(x, w, t), lambda x: reference.rms_norm(x, w.to(x.dtype)), [x], [t]),
        (ours.swiglu_jvp(g, u, tg, tu), reference.swiglu, [g, u], [tg, tu]),
    ]
    for got, function, args, moved in cases:
        exact = reference.tangents(function, args, moved)[1]
        plain = vmap(lambda *one, f=function, a=args: jvp(f, tuple(a), one)[1])(*moved)
        assert error(got.tangents, exact) <= 1.1 * error(plain, exact)


def test_memory_is_bounded(monkeypatch):
    """Peak score memory stays at a few pieces while the full scores would be a hundred."""
    monkeypatch.setattr(batched, "SCORES", 1 << 16)
    largest, attend = 0, batched._attend

    def watched(q, k, *rest):
        nonlocal largest
        largest = max(largest, (1 + rest[-2]) * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return attend(q, k, *rest)

    monkeypatch.setattr(batched, "_attend", watched)
    primals, tangents = heads(256, 256, 20, torch.float32, batch=2)
    ours.attention_jvp(*primals, *tangents)
    assert 0 < largest <= 1 << 16 and 100 * largest < 21 * 2 * 6 * 256 * 256


def cases():
    """name, ours, the formula, float64 arguments"""
    x, w, y = draw((2, 3, 8), (8,), (2, 3, 8))
    q, k, v = heads(3, 4, batch=2, group=2, shared=1, d=3)[0]
    spans = torch.tensor([[0, 4], [1, 3]])
    padded = (
        functools.partial(ours.attention, spans=spans),
        functools.partial(reference.attention, spans=spans),
    )
    return [
        pytest.param(ours.rms_norm, reference.rms_norm, (x, w), id="rms_norm"),
        pytest.param(ours.swiglu, reference.swiglu, (x, y), id="swiglu"),
        pytest.param(ours.attention, reference.attention, (q, k, v), id="attention"),
        pytest.param(*padded, (q, k, v), id="padded attention"),
    ]


def same(transform, mine, formula):
    got, wanted = transform(mine), transform(formula)
    for value, truth in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True
    ):
        assert error(value, truth) <= 1e-12


@pytest.mark.parametrize("mine, formula, args", cases())
def test_torch_func_composes(mine, formula, args):
    every, first = tuple(range(len(args))), args[1:]
    one = tuple(draw(*(x.shape for x in args), seed=7))
    many = tuple(draw(*((5, *x.shape) for x in args), seed=8))
    same(lambda f: jvp(f, args, one), mine, formula)
    same(lambda f: jvp(lambda x: f(x, *first), args[:1], one[:1])[1], mine, formula)
    same(lambda f: vmap(lambda *t: jvp(f, args, t)[1])(*many), mine, formula)
    same(
        lambda f: vmap(lambda *t: jvp(f, args, t)[1], in_dims=1, out_dims=2)(
            *(t.movedim(0, 1) for t in many)
        ),
        mine,
        formula,
    )
    same(lambda f: vmap(lambda *x: jvp(f, x, one)[1])(*many), mine, formula)
    same(
        lambda f: vmap(lambda x, t: jvp(lambda x: f(x, *first), (x,), (t,))[1])(
            many[0], many[0].flip(0)
        ),
        mine,
        formula,
    )
    same(lambda f: vmap(f)(*many), mine, formula)
    same(lambda f: vmap(lambda x: f(x, *first))(many[0]), mine, formula)
    same(lambda f: jacfwd(f, every)(*args), mine, formula)
    same(lambda f: jacrev(f, every)(*args), mine, formula)
    same(lambda f: jvp(lambda *x: jvp(f, x, one)[1], args, one)[1], mine, formula)
    same(lambda f: hessian(lambda *x: (f(*x) ** 3).sum())(*args), mine, formula)
    same(lambda f: jvp(grad(lambda *x: (f(*x) ** 3).sum()), args, one)[1], mine, formula)
    same(
        lambda f: grad(lambda *x: jvp(lambda *x: (f(*x) ** 3).sum(), x, one)[1])(*args),
        mine,
        formula,
    )


@pytest.mark.parametrize("mine, formula, args", cases())
def test_every_choice_of_what_is_mapped_over(mine, formula, args):
    """Any subset of primals and of tangents may carry the mapped dimension."""
    every = (*args, *draw(*(x.shape for x in args), seed=7))
    mapped = (
        *draw(*((2, *x.shape) for x in args), seed=8),
        *draw(*((2, *x.shape) for x in args), seed=9),
    )
    for chosen in range(1, 1 << len(every)):
        flags = [bool(chosen >> i & 1) for i in range(len(every))]
        inputs = tuple(m if flag else x for flag, m, x in zip(flags, mapped, every))
        dims = tuple(0 if flag else None for flag in flags)

        def pushed(f, inputs=inputs, dims=dims):
            return vmap(lambda *both: jvp(f, both[: len(args)], both[len(args) :]), in_dims=dims)(
                *inputs
            )

        same(pushed, mine, formula)


@pytest.mark.parametrize("mine, formula, args", cases())
def test_gradcheck(mine, formula, args):
    leaves = tuple(x.clone().requires_grad_() for x in args)
    options = {
        "check_forward_ad": True,
        "check_batched_forward_grad": True,
        "check_batched_grad": True,
    }
    assert torch.autograd.gradcheck(mine, leaves, **options) and torch.autograd.gradgradcheck(
        mine, leaves
    )


def test_forward_mode_runs_the_fused_operation_once_for_all_directions(monkeypatch):
    q, k, v = heads()[0]
    seen = []
    original = torch.ops.knowedit.attention_jvp

    def watched(*args):
        seen.append([x if x is None else len(x) for x in args[3:6]])
        return original(*args)

    monkeypatch.setattr(torch.ops.knowedit, "attention_jvp", watched)
    vmap(lambda t: jvp(lambda q: ours.attention(q, k, v), (q,), (t,))[1])(
        torch.randn(7, *q.shape, dtype=q.dtype)
    )
    assert seen == [[None] * 3, [7, None, None]]


class Block:
    """A layer of a Llama in plain functions; `attention` and the others are handed in."""

    def __init__(self, dtype):
        shapes = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]
        self.wq, self.wk, self.wv, self.wo, self.gate, self.up, self.down = (
            w / 4 for w in draw(*shapes, dtype=dtype)
        )
        self.norms = [1 + w / 4 for w in draw((16,), (16,), dtype=dtype, seed=3)]
        angle = torch.arange(6.0, dtype=torch.float64)[:, None] * torch.tensor(
            [1.0, 0.1], dtype=torch.float64
        ).repeat(2)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def rotate(self, x):
        return x * self.cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * self.sin

    def __call__(self, h, down, attention, rms_norm, swiglu):
        x = rms_norm(h, self.norms[0])
        q, k, v = (
            F.linear(x, w).unflatten(-1, (-1, 4)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        h = h + F.linear(
            attention(self.rotate(q), self.rotate(k), v).transpose(1, 2).flatten(2), self.wo
        )
        x = rms_norm(h, self.norms[1])
        return h + F.linear(swiglu(F.linear(x, self.gate), F.linear(x, self.up)), down)


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_mode_through_a_llama_block_where_torchs_attention_has_none(dtype):
    """Against double backward through plain formulas in float64; the edit's own weight
    moves along.
    """
    block, exact = Block(dtype), Block(torch.float64)
    h, down = *draw((2, 6, 16), dtype=dtype), block.down
    t, t_down = draw((T, *h.shape), (T, *down.shape), dtype=dtype, seed=5)

    def mine(h, down):
        return block(h, down, ours.attention, ours.rms_norm, ours.swiglu)

    got = vmap(lambda *one: jvp(mine, (h, down), one)[1])(t, t_down)
    for name in ("wq", "wk", "wv", "wo", "gate", "up"):
        setattr(exact, name, getattr(block, name).double())
    exact.norms, exact.cos, exact.sin = (
        [w.double() for w in block.norms],
        block.cos.double(),
        block.sin.double(),
    )
    leaves = tuple(x.double().requires_grad_() for x in (h, down))
    out = exact(*leaves, reference.attention, reference.rms_norm, reference.swiglu)
    u = torch.zeros_like(out, requires_grad=True)
    pulled = torch.autograd.grad(out, leaves, u, create_graph=True)
    for i in range(T):
        (wanted,) = torch.autograd.grad(
            pulled, u, (t[i].double(), t_down[i].double()), retain_graph=True
        )
        assert (
            error(got[i], wanted)
            <= {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.03}[dtype]
        )
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    with (
        flash,
        pytest.raises(
            (NotImplementedError, RuntimeError), match="forward AD|forward-mode|not implement"
        ),
    ):
        jvp(lambda h: block(h, down, fused, ours.rms_norm, ours.swiglu), (h,), (t[0],))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2), shared=st.integers(1, 2), group=st.integers(1, 3),
    queries=st.integers(0, 5), before=st.integers(0, 4), d=st.integers(1, 9),
    count=st.integers(0, 3), causal=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_properties_of_attention(batch, shared, group, queries, before, d, count, causal, seed):
    primals, tangents = heads(
        queries, queries + before, count, batch=batch, group=group, shared=shared, d=d, seed=seed
    )
    other = heads(
        queries,
        queries + before,
        count,
        batch=batch,
        group=group,
        shared=shared,
        d=d,
        seed=seed + 9,
    )[1]
    go = functools.partial(ours.attention_jvp, *primals, causal=causal)
    o, do = go(*tangents)
    assert o.shape == primals[0].shape and do.shape == (count, *o.shape)
    both = go(*(2 * a - b for a, b in zip(tangents, other))).tangents
    assert torch.allclose(both, 2 * do - go(*other).tangents, atol=1e-12)  # linear
    assert not go(*(torch.zeros_like(t) for t in tangents)).tangents.any()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(go(*(t[order] for t in tangents)).tangents, do[order], atol=1e-14)
    shift = torch.ones_like(tangents[1])  # all keys moved alike change every score of a query alike
    assert torch.allclose(
        go(tangents[0], tangents[1] + shift, tangents[2]).tangents, do, atol=1e-12
    )
    if queries + before:  # values moved alike move the output
        moved = go(tangents[0], tangents[1], tangents[2] + shift).tangents
        assert torch.allclose(moved, do + 1, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 5), d=st.integers(1, 9), count=st.integers(0, 4), seed=st.integers(0, 10**6)
)
def test_properties_of_the_elementwise_layers(rows, d, count, seed):
    x, y, w, a, b = draw((rows, d), (rows, d), (d,), (count, rows, d), (count, rows, d), seed=seed)
    for go in (
        lambda t: ours.rms_norm_jvp(x, w, t, 1e-3),
        lambda t: ours.swiglu_jvp(x, y, t, t.flip(0)),
    ):
        assert torch.allclose(
            go(2 * a - b).tangents, 2 * go(a).tangents - go(b).tangents, atol=1e-12
        )
        assert not go(torch.zeros_like(a)).tangents.any() and go(a).tangents.shape == a.shape
    along = ours.rms_norm_jvp(x, w, x[None], 0.0).tangents
    assert torch.allclose(along, torch.zeros_like(along), atol=1e-12)  # the scale of a row is lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    ops = torch.ops.knowedit
    x, w, t, u = draw((4, 6), (6,), (2, 4, 6), (2, 4, 6), dtype=dtype)
    torch.library.opcheck(ops.rms_norm_jvp.default, (x, w, t, 1e-6))
    torch.library.opcheck(ops.swiglu_jvp.default, (x, x * 2, t, u))
    primals, tangents = heads(dtype=dtype)
    torch.library.opcheck(ops.attention_jvp.default, (*primals, *tangents, SPANS, True, 0.3))
    torch.library.opcheck(
        ops.attention_jvp.default, (*primals, None, tangents[1], None, None, False, 0.3)
    )
    torch.library.opcheck(ops.attention_jvp.default, (*primals, None, None, None, None, True, 0.3))


X, W, TX = draw((4, 6), (6,), (2, 4, 6))
(Q, K, V), (TQ, TK, TV) = heads()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ours.rms_norm(X, W[:3]), r"weight must have shape \[6\]"),
        (lambda: ours.rms_norm(X, W.float()), "weight must be torch.float64"),
        (lambda: ours.rms_norm(X.long(), W), "x must be floating"),
        (lambda: ours.rms_norm_jvp(X, W, TX[0]), r"tangents must have shape \[any, 4, 6\]"),
        (lambda: ours.swiglu(X, X[:3]), "up must have shape"),
        (lambda: ours.swiglu_jvp(X, X, TX, TX[:1]), r"up_tangents must have shape \[2, 4, 6\]"),
        (lambda: ours.attention(Q[0], K, V), "q must be floating point"),
        (lambda: ours.attention(Q[:, :5], K, V), "must be a multiple"),
        (lambda: ours.attention(Q, K, V[:, :, :3]), "v must have shape"),
        (lambda: ours.attention(Q, K[:2], V), "k must have shape"),
        (
            lambda: ours.attention(Q, K[:, :, :3], V[:, :, :3]),
            "causal attention of 5 queries to 3 keys",
        ),
        (lambda: ours.attention(Q, K, V, spans=SPANS.float()), "spans must be integer"),
        (lambda: ours.attention(Q, K, V, spans=SPANS[:2]), r"integer \[3, 2\]"),
        (lambda: ours.attention_jvp(Q, K, V, None, None, None), "nothing to differentiate along"),
        (lambda: ours.attention_jvp(Q, K, V, TQ, TK[:2], None), "tk must have shape"),
        (lambda: ours.attention_jvp(Q, K, V, None, TK, TV[..., 1:, :]), "tv must have shape"),
        (
            lambda: ours.attention_jvp(Q, K, V, None, F.pad(TK, (0, 0, 1, 0)), None),
            "10 keys, but there are 9",
        ),
        (lambda: ours.attention_jvp(Q, K, V, TQ.float(), None, None), "tq must be torch.float64"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
