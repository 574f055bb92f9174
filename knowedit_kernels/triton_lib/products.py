"""Products a^T b on tensor cores, and their float64 fold: the shared inner parts of the Triton
kernels.
"""

import triton
import triton.language as tl


@triton.jit
def gram_product(a, b, acc, PRODUCTS: tl.constexpr):
    """acc + a^T b for a [K, M], b [K, N] of one 16-bit or float64 dtype. float32 operands, by
    PRODUCTS:

    1: rounded to bf16. 4: all products of bf16 high and low parts (16 bits); still a Gram matrix.
    3: the same without low^T low, which is not, and loses the small eigenvalues (a negative
    control).
    6: the products of three bf16 parts (24 bits) that are not below 2^-24.
    """
    if a.dtype != tl.float32:
        acc = tl.dot(a.T, b, acc, out_dtype=acc.dtype)
    elif PRODUCTS == 1:
        acc = tl.dot(a.to(tl.bfloat16).T, b.to(tl.bfloat16), acc)
    else:
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        a_rest = a - a_high.to(tl.float32)
        b_rest = b - b_high.to(tl.float32)
        a_mid = a_rest.to(tl.bfloat16)
        b_mid = b_rest.to(tl.bfloat16)
        if PRODUCTS == 6:  # smallest first
            acc = tl.dot((a_rest - a_mid.to(tl.float32)).to(tl.bfloat16).T, b_high, acc)
            acc = tl.dot(a_high.T, (b_rest - b_mid.to(tl.float32)).to(tl.bfloat16), acc)
        if PRODUCTS != 3:
            acc = tl.dot(a_mid.T, b_mid, acc)
        acc = tl.dot(a_mid.T, b_high, acc)
        acc = tl.dot(a_high.T, b_mid, acc)
        acc = tl.dot(a_high.T, b_high, acc)
    return acc


@triton.jit
def scaled_product(a, b, scale, acc):
    """acc + (scale a)^T b for a [K, M], b [K, N] bfloat16 and scale [K] float32.

    scale a has 32 bits, of which three bfloat16 parts keep 24; b is exact.
    """
    wide = a.to(tl.float32) * scale[:, None]
    high = wide.to(tl.bfloat16)
    rest = wide - high.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    low = (rest - mid.to(tl.float32)).to(tl.bfloat16)
    acc = tl.dot(low.T, b, acc)  # smallest first
    acc = tl.dot(mid.T, b, acc)
    return tl.dot(high.T, b, acc)


@triton.jit
def fold_packed(c, row, column, D, x, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """A packed lower triangle (row by row) of D rows += x [M, N] at (row, column), in float64.

    In PARTS column parts as `fold64`; what lies above the diagonal is left out.
    """
    if PARTS == 1:
        i = (row + tl.arange(0, M)).to(tl.int64)
        j = column + tl.arange(0, N)
        at = c + (i * (i + 1) // 2)[:, None] + j[None, :]
        inside = (i < D)[:, None] & (j[None, :] <= i[:, None])
        total = tl.load(at, mask=inside, other=0.0).to(tl.float64) + x.to(tl.float64)
        tl.store(at, total.to(c.dtype.element_ty), mask=inside)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
        fold_packed(c, row, column, D, left, M, N // 2, PARTS // 2)
        fold_packed(c, row, column + N // 2, D, right, M, N // 2, PARTS // 2)


@triton.jit
def fold64(
    c,
    ld,
    rows,
    columns,
    x,
    M: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """c [M, N] float64 (row stride ld) += x where inside [rows, columns] (EVEN: everywhere).

    In PARTS column parts, one after the other: the whole tile in float64 at once would spill.
    """
    if PARTS == 1:
        m = tl.arange(0, M)
        n = tl.arange(0, N)
        at = c + m.to(tl.int64)[:, None] * ld + n[None, :]
        if EVEN:
            tl.store(at, tl.load(at) + x.to(tl.float64))
        else:
            inside = (m < rows)[:, None] & (n < columns)[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) + x.to(tl.float64), mask=inside)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
        fold64(c, ld, rows, columns, left, M, N // 2, PARTS // 2, EVEN)
        fold64(c + N // 2, ld, rows, columns - N // 2, right, M, N // 2, PARTS // 2, EVEN)
