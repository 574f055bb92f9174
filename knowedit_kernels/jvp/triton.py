"""The kernels: a function and its tangents in one pass; what all tangents share is read and
computed once a group.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    X, W, TX, Y, TY, count, d, eps, stride, t_plane, t_stride,
    GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A row and GROUP of its tangents: Y [rows, d] (the first group's program), TY [count, rows,
    d].
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * GROUP
    column = tl.arange(0, BD)
    live = column < d
    x = tl.load(X + row * stride + column, mask=live, other=0.0).to(tl.float32)
    w = tl.load(W + column, mask=live, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x) / d + eps)
    x *= r
    if t == 0:
        tl.store(Y + row * d + column, x * w, mask=live)
    w *= r
    for i in range(0, tl.minimum(GROUP, count - t)):
        tx = tl.load(TX + (t + i) * t_plane + row * t_stride + column, mask=live, other=0.0).to(
            tl.float32
        )
        ty = (tx - x * (tl.sum(x * tx) / d)) * w
        tl.store(TY + ((t + i) * rows + row) * d + column, ty, mask=live)


@triton.jit
def swiglu_kernel(
    G, U, TG, TU, Y, TY, count, rows, d, g_stride, u_stride, tg_plane, tg_stride, tu_plane,
    tu_stride, GROUP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BD entries of a row and GROUP of their tangents."""
    blocks = tl.cdiv(d, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    t = tl.program_id(1).to(tl.int64) * GROUP
    live = column < d
    g = tl.load(G + row * g_stride + column, mask=live, other=0.0).to(tl.float32)
    u = tl.load(U + row * u_stride + column, mask=live, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    if t == 0:
        tl.store(Y + row * d + column, silu * u, mask=live)
    slope = (s + silu * (1 - s)) * u
    for i in range(0, tl.minimum(GROUP, count - t)):
        tg = tl.load(TG + (t + i) * tg_plane + row * tg_stride + column, mask=live, other=0.0).to(
            tl.float32
        )
        tu = tl.load(TU + (t + i) * tu_plane + row * tu_stride + column, mask=live, other=0.0).to(
            tl.float32
        )
        tl.store(TY + ((t + i) * rows + row) * d + column, slope * tg + silu * tu, mask=live)


@triton.jit
def _tile(base, strides, row, first, end, column, d):
    """Entries `column` of those rows of one head that lie in [first, end), zero elsewhere:
    [len(row), len(column)].
    """
    live = ((row >= first) & (row < end))[:, None] & (column < d)[None, :]
    return tl.load(
        base + row.to(tl.int64)[:, None] * strides[2] + column[None, :], mask=live, other=0.0
    )


@triton.jit
def _absorb(
    state, Q, TQ, K, V, TK, TV, q_strides, tq_strides, k_strides, v_strides, tk_strides, tv_strides,
    row, key, queries, begin, end, first, last, d, scale,
    KNOWN: tl.constexpr, WITH_TQ: tl.constexpr, WITH_TKV: tl.constexpr, CAUSAL: tl.constexpr,
    BD: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running (max, sum p, O, centre, sum p s', T), all relative to the
    running maximum.

    Online softmax, with T = sum p (s' v + v') beside O = sum p v; KNOWN: the maximum is final and O
    not wanted. The softmax does not feel a shift of a row's s', so s' is taken relative to its mean
    over the first block: what all keys share then need not cancel in mu O. Sums are of the rounded
    p and p s' that the tensor core multiplies, so that what all values share cancels exactly.
    """
    top, mass, o, centre, mu, to = state
    s = tl.zeros((row.shape[0], key.shape[0]), tl.float32)
    change = tl.zeros((row.shape[0], key.shape[0]), tl.float32)
    for c in range(0, BD, BC):  # in parts where whole rows of both operands would spill registers
        column = c + tl.arange(0, BC)
        q = _tile(Q, q_strides, row, 0, queries, column, d)
        k = _tile(K, k_strides, key, begin, end, column, d)
        s = tl.dot(q, k.T, s, input_precision=PRECISION)
        if WITH_TQ:
            tq = _tile(TQ, tq_strides, row, 0, queries, column, d)
            change = tl.dot(tq, k.T, change, input_precision=PRECISION)
        if WITH_TKV:
            tk = _tile(
                TK, tk_strides, key - first, tl.maximum(begin - first, 0), end - first, column, d
            )
            change = tl.dot(q, tk.T, change, input_precision=PRECISION)
    seen = ((key >= begin) & (key < end))[None, :] & (row < queries)[:, None]
    if CAUSAL:
        seen = seen & (key[None, :] <= last[:, None])
    s = tl.where(seen, s * (scale * 1.44269504), -float("inf"))
    if not KNOWN:
        higher = tl.maximum(top, tl.max(s, 1))
        keep = tl.exp2(top - higher)
        top = higher
        mass *= keep
        mu *= keep
        o *= keep[:, None]
        to *= keep[:, None]
    column = tl.arange(0, BD)
    v = _tile(V, v_strides, key, begin, end, column, d)
    weights = tl.exp2(s - top[:, None]).to(v.dtype)
    p = weights.to(tl.float32)
    added = tl.sum(p, 1)
    if not KNOWN:
        o = tl.dot(weights, v, o, input_precision=PRECISION)
    if WITH_TQ or WITH_TKV:
        change *= scale
        mean = tl.sum(p * change, 1) / tl.where(added > 0, added, 1.0)
        centre = tl.where(mass > 0, centre, mean)
        moved = (p * (change - centre[:, None])).to(v.dtype)
        to = tl.dot(moved, v, to, input_precision=PRECISION)
        mu += tl.sum(moved.to(tl.float32), 1)
        if WITH_TKV:
            tv = _tile(
                TV, tv_strides, key - first, tl.maximum(begin - first, 0), end - first, column, d
            )
            to = tl.dot(weights, tv, to, input_precision=PRECISION)
    return top, mass + added, o, centre, mu, to


@triton.jit
def attention_kernel(
    Q, K, V, TQ, TK, TV, O, TO, peaks, spans, q_strides, k_strides, v_strides, tq_strides,
    tk_strides, tv_strides, heads, group, queries, keys, first, d, scale,
    KNOWN: tl.constexpr, WITH_TQ: tl.constexpr, WITH_TKV: tl.constexpr, CAUSAL: tl.constexpr,
    SPANS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM queries of one head and one tangent (or none). Keys from `first` on have tangents TK, TV
    [count, batch, shared, keys - first, d]. O [batch, heads, queries, d] and peaks [batch, heads,
    queries] (the largest score such that its exponential is the softmax's sum, base 2) are read if
    KNOWN, else written by the first tangent's programs; TO [count,
    *O]. Strides are those of batch, head, row and tangent.
    """
    blocks = tl.cdiv(queries, BM)
    block = blocks - 1 - tl.program_id(0) % blocks  # long rows first
    place = tl.program_id(0) // blocks
    b = (place // heads).to(tl.int64)
    h = (place % heads).to(tl.int64)
    shared = h // group
    t = tl.program_id(1).to(tl.int64)
    row = block * BM + tl.arange(0, BM)
    Q += b * q_strides[0] + h * q_strides[1]
    K += b * k_strides[0] + shared * k_strides[1]
    V += b * v_strides[0] + shared * v_strides[1]
    if WITH_TQ:
        TQ += b * tq_strides[0] + h * tq_strides[1] + t * tq_strides[3]
    if WITH_TKV:
        TK += b * tk_strides[0] + shared * tk_strides[1] + t * tk_strides[3]
        TV += b * tv_strides[0] + shared * tv_strides[1] + t * tv_strides[3]
    begin = 0
    end = keys
    if SPANS:
        begin = tl.load(spans + b * 2)
        end = tl.load(spans + b * 2 + 1)
    last = row + (keys - queries)  # the last key a query sees
    stop = tl.minimum(end, keys - queries + (block + 1) * BM) if CAUSAL else end
    where = (b * heads + h) * queries + row
    top = tl.full((BM,), -1e30, tl.float32)
    if KNOWN:
        top = tl.load(peaks + where, mask=row < queries, other=0.0)
    zero = tl.zeros((BM,), tl.float32)
    state = (top, zero, tl.zeros((BM, BD), tl.float32), zero, zero, tl.zeros((BM, BD), tl.float32))
    # blocks of keys without tangents, then those with
    start = begin // BN * BN
    turn = (
        tl.maximum(tl.minimum(first // BN * BN, tl.cdiv(stop, BN) * BN), start)
        if WITH_TKV
        else stop
    )
    for at in range(start, turn, BN):
        key = at + tl.arange(0, BN)
        state = _absorb(
            state, Q, TQ, K, V, TK, TV, q_strides, tq_strides, k_strides, v_strides, tk_strides,
            tv_strides, row, key, queries, begin, end, first, last, d, scale, KNOWN, WITH_TQ, False,
            CAUSAL, BD, BC, PRECISION,
        )  # fmt: skip
    if WITH_TKV:
        for at in range(turn, stop, BN):
            key = at + tl.arange(0, BN)
            state = _absorb(
                state, Q, TQ, K, V, TK, TV, q_strides, tq_strides, k_strides, v_strides, tk_strides,
                tv_strides, row, key, queries, begin, end, first, last, d, scale, KNOWN, WITH_TQ,
                True, CAUSAL, BD, BC, PRECISION,
            )  # fmt: skip
    top, mass, o, _, mu, to = state
    mass = tl.where(mass > 0, mass, 1.0)  # a query that sees nothing gives zero
    column = tl.arange(0, BD)
    live = (row < queries)[:, None] & (column < d)[None, :]
    out = where[:, None] * d + column[None, :]
    if KNOWN:
        o = tl.load(O + out, mask=live, other=0.0).to(tl.float32)
    else:
        o = o / mass[:, None]
        if t == 0:
            tl.store(O + out, o, mask=live)
            tl.store(peaks + where, top + tl.log2(mass), mask=row < queries)
    if WITH_TQ or WITH_TKV:
        to = to / mass[:, None] - (mu / mass)[:, None] * o
        size = tl.num_programs(0).to(tl.int64) // blocks * queries * d
        tl.store(TO + t * size + out, to, mask=live)
