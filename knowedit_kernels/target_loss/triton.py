"""The kernels: partial sums per vocabulary tile, dL/dlogits of a vocabulary chunk, and its product
with the head.
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    H,
    W,
    row,
    token,
    rows,
    vocabulary,
    D,
    h_stride,
    w_stride,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden W^T of one tile: [row, token] float32."""
    d = tl.arange(0, BD)
    live_row, live_token = (row < rows)[:, None], (token < vocabulary)[:, None]
    z = tl.zeros((row.shape[0], token.shape[0]), tl.float32)
    for k in range(0, D, BD):
        live = ((k + d) < D)[None, :]
        h = tl.load(
            H + row.to(tl.int64)[:, None] * h_stride + (k + d)[None, :],
            mask=live_row & live,
            other=0.0,
        )
        w = tl.load(
            W + token.to(tl.int64)[:, None] * w_stride + (k + d)[None, :],
            mask=live_token & live,
            other=0.0,
        )
        z = tl.dot(h, w.T, z, input_precision=PRECISION)
    return z


@triton.jit
def _cap(z, bias, token, vocabulary, scale, softcap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits from products: bias, scale, soft cap."""
    if BIAS:
        z += tl.load(bias + token, mask=token < vocabulary, other=0.0).to(tl.float32)[None, :]
    z *= scale
    if CAP:
        a = z / softcap
        t = tl.exp(-2 * tl.abs(a))  # tanh without overflow
        z = softcap * tl.where(a < 0, t - 1, 1 - t) / (1 + t)
    return z


@triton.jit
def _reference(
    R,
    W,
    bias,
    row,
    token,
    rows,
    vocabulary,
    D,
    r_stride,
    w_stride,
    scale,
    softcap,
    REF: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of the reference in one tile; R holds them (REF 1) or hidden states (REF 2)."""
    if REF == 1:
        live = (row < rows)[:, None] & (token < vocabulary)[None, :]
        z = tl.load(
            R + row.to(tl.int64)[:, None] * r_stride + token[None, :], mask=live, other=0.0
        ).to(tl.float32)
    else:
        z = _product(R, W, row, token, rows, vocabulary, D, r_stride, w_stride, BD, PRECISION)
        z = _cap(z, bias, token, vocabulary, scale, softcap, BIAS, CAP)
    return z


@triton.jit
def _weights(z, inside, largest):
    """exp(z - largest) of a tile, also where every token is impossible."""
    start = tl.where(largest == -float("inf"), 0.0, largest)
    return tl.where(inside, tl.exp(z - start[:, None]), 0.0)


@triton.jit
def _share(e, gap):
    """e * gap, zero where e is, also if the gap is infinite: 0 log 0 = 0."""
    return tl.where(e == 0, 0.0, e * gap)


@triton.jit
def loss_kernel(
    H, W, targets, bias, R, partial, rows, vocabulary, D, h_stride, w_stride, r_stride, scale,
    softcap, CE: tl.constexpr, REF: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial [6, tiles, rows]: max, sum exp(z - max), the target's logit; the reference's max and
    sum; sum of gaps.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1) * BP + tl.arange(0, BP)
    token = tile * BV + tl.arange(0, BV)
    inside = (token < vocabulary)[None, :]
    if REF > 0:  # first, while few registers are taken
        z_ref = _reference(R, W, bias, row, token, rows, vocabulary, D, r_stride, w_stride, scale,
                           softcap, REF, BIAS, CAP, BD, PRECISION)  # fmt: skip
    z = _product(H, W, row, token, rows, vocabulary, D, h_stride, w_stride, BD, PRECISION)
    z = _cap(z, bias, token, vocabulary, scale, softcap, BIAS, CAP)
    largest = tl.max(tl.where(inside, z, -float("inf")), 1)
    e = _weights(z, inside, largest)
    out = partial + tile.to(tl.int64) * rows + row
    plane = tl.num_programs(0).to(tl.int64) * rows
    live = row < rows
    tl.store(out, largest, mask=live)
    tl.store(out + plane, tl.sum(e, 1), mask=live)
    if CE:
        target = tl.load(targets + row, mask=live, other=-1)
        tl.store(
            out + 2 * plane,
            tl.sum(tl.where(token[None, :] == target[:, None], z, 0.0), 1),
            mask=live,
        )
    if REF > 0:
        largest = tl.max(tl.where(inside, z_ref, -float("inf")), 1)
        e_ref = _weights(z_ref, inside, largest)
        tl.store(out + 3 * plane, largest, mask=live)
        tl.store(out + 4 * plane, tl.sum(e_ref, 1), mask=live)
        tl.store(out + 5 * plane, tl.sum(_share(e if REVERSE else e_ref, z - z_ref), 1), mask=live)


@triton.jit
def logit_grad_kernel(
    H, W, targets, bias, R, lse, ref_lse, gap, ce, kl, first, rows, vocabulary, D,
    h_stride, w_stride, r_stride, out_stride, scale, softcap,
    CE: tl.constexpr, REF: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ce, kl [rows, chunk] float32: gradients in hidden W^T of tokens first, first + 1, ...; 0 past
    the vocabulary.
    """
    row = tl.program_id(1) * BP + tl.arange(0, BP)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    token = first + column
    live = row < rows
    if REF > 0:  # first, while few registers are taken
        z_ref = _reference(R, W, bias, row, token, rows, vocabulary, D, r_stride, w_stride, scale,
                           softcap, REF, BIAS, CAP, BD, PRECISION)  # fmt: skip
    z = _product(H, W, row, token, rows, vocabulary, D, h_stride, w_stride, BD, PRECISION)
    z = _cap(z, bias, token, vocabulary, scale, softcap, BIAS, CAP)
    p = tl.exp(z - tl.load(lse + row, mask=live, other=0.0)[:, None])
    slope = tl.where((token < vocabulary)[None, :], scale, 0.0)
    if CAP:
        slope *= 1 - (z / softcap) * (z / softcap)
    where = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    if CE:
        target = tl.load(targets + row, mask=live, other=-1)
        hit = (token[None, :] == target[:, None]).to(tl.float32)
        tl.store(
            ce + where, tl.where((target >= 0)[:, None], slope * (p - hit), 0.0), mask=live[:, None]
        )
    if REF > 0:
        if REVERSE:
            mean = tl.load(gap + row, mask=live, other=0.0)[:, None]
            change = _share(p, z - z_ref - mean)
        else:
            change = p - tl.exp(z_ref - tl.load(ref_lse + row, mask=live, other=0.0)[:, None])
        tl.store(kl + where, slope * change, mask=live[:, None])


@triton.jit
def hidden_grad_kernel(
    dz, W, out, first, count, rows, D, dz_stride, w_stride, out_stride, lift,
    BP: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out [rows, D] float32 += dz W[first : first + count]; dz as two 16-bit parts where W is 16
    bits wide.
    """
    row = tl.program_id(1) * BP + tl.arange(0, BP)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    column = tl.arange(0, BV)
    live = (row < rows)[:, None] & (d < D)[None, :]
    where = out + row.to(tl.int64)[:, None] * out_stride + d[None, :]
    acc = tl.load(where, mask=live, other=0.0)
    for k in range(0, count, BV):
        g = tl.load(dz + row.to(tl.int64)[:, None] * dz_stride + (k + column)[None, :],
                    mask=(row < rows)[:, None], other=0.0)  # fmt: skip
        token = (first + k + column).to(tl.int64)
        w = tl.load(W + token[:, None] * w_stride + d[None, :],
                    mask=((k + column) < count)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        g *= lift
        if SPLIT:
            high = g.to(w.dtype)
            low = (g - high.to(tl.float32)).to(w.dtype)
            acc = tl.dot(low, w, acc)
            acc = tl.dot(high, w, acc)
        else:
            acc = tl.dot(g, w, acc, input_precision="tf32x3")
    tl.store(where, acc, mask=live)
