"""The kernels: partial sums per vocabulary tile, dL/dlogits of a vocabulary chunk, and its product with the head."""

import triton
import triton.language as tl


@triton.jit
def _product(H, W, row, token, rows, vocabulary, D, h_stride, w_stride, BD: tl.constexpr, PRECISION: tl.constexpr):
    """hidden W^T of one tile: [row, token] float32."""
    d = tl.arange(0, BD)
    live_row, live_token = (row < rows)[:, None], (token < vocabulary)[:, None]
    z = tl.zeros((row.shape[0], token.shape[0]), tl.float32)
    for k in range(0, D, BD):
        live = ((k + d) < D)[None, :]
        h = tl.load(H + row.to(tl.int64)[:, None] * h_stride + (k + d)[None, :], mask=live_row & live, other=0.0)
        w = tl.load(W + token.to(tl.int64)[:, None] * w_stride + (k + d)[None, :], mask=live_token & live, other=0.0)
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
def _log_reference(R, ref_lse, W, bias, row, token, rows, vocabulary, D, r_stride, w_stride, scale, softcap,
                   REF: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, BD: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """log-probabilities of the reference in one tile; R holds them (REF 1) or hidden states (REF 2)."""
    if REF == 1:
        live = (row < rows)[:, None] & (token < vocabulary)[None, :]
        out = tl.load(R + row.to(tl.int64)[:, None] * r_stride + token[None, :], mask=live, other=0.0).to(tl.float32)
    else:
        z = _product(R, W, row, token, rows, vocabulary, D, r_stride, w_stride, BD, PRECISION)
        z = _cap(z, bias, token, vocabulary, scale, softcap, BIAS, CAP)
        out = z - tl.load(ref_lse + row, mask=row < rows, other=0.0)[:, None]
    return out


@triton.jit
def forward_kernel(
    H, W, targets, bias, R, ref_lse, partial, rows, vocabulary, D, h_stride, w_stride, r_stride, scale, softcap,
    CE: tl.constexpr, REF: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    BP: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial [4, tiles, rows]: max, sum exp(z - max), target's logit, and the divergence's sum."""
    tile = tl.program_id(0)
    row = tl.program_id(1) * BP + tl.arange(0, BP)
    token = tile * BV + tl.arange(0, BV)
    inside = (token < vocabulary)[None, :]
    z = _product(H, W, row, token, rows, vocabulary, D, h_stride, w_stride, BD, PRECISION)
    z = _cap(z, bias, token, vocabulary, scale, softcap, BIAS, CAP)
    largest = tl.max(tl.where(inside, z, -float("inf")), 1)
    e = tl.where(inside, tl.exp(z - largest[:, None]), 0.0)
    tiles = tl.num_programs(0)
    out = partial + tile.to(tl.int64) * rows + row
    plane = tiles.to(tl.int64) * rows
    live = row < rows
    tl.store(out, largest, mask=live)
    tl.store(out + plane, tl.sum(e, 1), mask=live)
    if CE:
        target = tl.load(targets + row, mask=live, other=-1)
        tl.store(out + 2 * plane, tl.sum(tl.where(token[None, :] == target[:, None], z, 0.0), 1), mask=live)
    if REF > 0:
        log_r = _log_reference(R, ref_lse, W, bias, row, token, rows, vocabulary, D, r_stride, w_stride, scale, softcap,
                               REF, BIAS, CAP, BD, PRECISION)  # fmt: skip
        weight = e if REVERSE else tl.exp(log_r)
        gap = (z - log_r) if REVERSE else (log_r - z)
        tl.store(out + 3 * plane, tl.sum(tl.where(inside, weight * gap, 0.0), 1), mask=live)


@triton.jit
def logit_grad_kernel(
    H, W, targets, bias, R, ref_lse, lse, kl, g_ce, g_kl, dz, first, rows, vocabulary, D,
    h_stride, w_stride, r_stride, dz_stride, scale, softcap,
    CE: tl.constexpr, REF: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    BP: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz [rows, chunk] float32: the gradient before scale and cap, for tokens first, first + 1, ..."""
    row = tl.program_id(1) * BP + tl.arange(0, BP)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    token = first + column
    live = row < rows
    z = _product(H, W, row, token, rows, vocabulary, D, h_stride, w_stride, BD, PRECISION)
    z = _cap(z, bias, token, vocabulary, scale, softcap, BIAS, CAP)
    total = tl.load(lse + row, mask=live, other=0.0)
    p = tl.exp(z - total[:, None])
    grad = tl.zeros((BP, BV), tl.float32)
    if CE:
        target = tl.load(targets + row, mask=live, other=-1)
        weight = tl.where(target >= 0, tl.load(g_ce + row, mask=live, other=0.0), 0.0)
        grad += weight[:, None] * (p - (token[None, :] == target[:, None]).to(tl.float32))
    if REF > 0:
        log_r = _log_reference(R, ref_lse, W, bias, row, token, rows, vocabulary, D, r_stride, w_stride, scale, softcap,
                               REF, BIAS, CAP, BD, PRECISION)  # fmt: skip
        weight = tl.load(g_kl + row, mask=live, other=0.0)
        if REVERSE:
            mean = total + tl.load(kl + row, mask=live, other=0.0)
            grad += weight[:, None] * p * (z - log_r - mean[:, None])
        else:
            grad += weight[:, None] * (p - tl.exp(log_r))
    if CAP:
        grad *= 1 - (z / softcap) * (z / softcap)
    grad *= scale
    where = dz + row.to(tl.int64)[:, None] * dz_stride + column[None, :]
    tl.store(where, tl.where((token < vocabulary)[None, :], grad, 0.0), mask=live[:, None])


@triton.jit
def hidden_grad_kernel(
    dz, W, out, first, count, rows, D, dz_stride, w_stride, out_stride,
    BP: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out [rows, D] float32 += dz W[first : first + count]; dz as two bfloat16-like parts where W is 16 bits wide."""
    row = tl.program_id(1) * BP + tl.arange(0, BP)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    column = tl.arange(0, BV)
    live = (row < rows)[:, None] & (d < D)[None, :]
    where = out + row.to(tl.int64)[:, None] * out_stride + d[None, :]
    acc = tl.load(where, mask=live, other=0.0)
    for k in range(0, count, BV):
        g = tl.load(dz + row.to(tl.int64)[:, None] * dz_stride + (k + column)[None, :], mask=(row < rows)[:, None],
                    other=0.0)  # fmt: skip
        token = (first + k + column).to(tl.int64)
        w = tl.load(W + token[:, None] * w_stride + d[None, :], mask=((k + column) < count)[:, None] & (d < D)[None, :],
                    other=0.0)  # fmt: skip
        if SPLIT:
            high = g.to(w.dtype)
            low = (g - high.to(tl.float32)).to(w.dtype)
            acc = tl.dot(low, w, acc)
            acc = tl.dot(high, w, acc)
        else:
            acc = tl.dot(g, w, acc, input_precision="tf32x3")
    tl.store(where, acc, mask=live)
