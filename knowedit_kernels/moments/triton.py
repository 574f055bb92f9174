"""Triton kernels: the self-centred second moment over a tile table, and packing with the audit.

Tensor cores truncate when they accumulate, which biases a long sum (numerics.truncation_bias). Here
the accumulator is re-centred before every chain of CHAIN tokens: it is moved to minus half of what
the chain is predicted to add, so it walks from -x/2 to +x/2, truncation towards zero cancels
between the two halves, and magnitudes halve. The amounts moved are rounded to bf16: so few bits
that both the move and their sum, kept in a second float32 tile, are exact. The prediction is the
mean so far; the first chains grow from FIRST to CHAIN tokens while it settles. One float64 fold per
launch.
"""

import triton
import triton.language as tl

from knowedit_kernels.triton_lib.products import (
    fold64,
    fold_packed,
    gram_product,
    scaled_product,
)


@triton.jit
def second_moment_kernel(
    key_table,  # int64 [layers]: addresses of keys [tokens, D], row stride `stride`, type KEY
    c_table,  # int64 [layers]: addresses of C [D, D] float64, row stride `ld`
    token_table,  # int32 [layers]
    tiles,  # int32 [programs, 4]: layer, tile row, tile column, unused
    D,
    stride,
    ld,
    KEY: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHAIN: tl.constexpr,  # tokens per chain; 0: a single uncentred chain
    FIRST: tl.constexpr,
    DOUBLINGS: tl.constexpr,  # CHAIN = FIRST << DOUBLINGS
    PRODUCTS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,  # D is a multiple of M and N
    PARTS: tl.constexpr,
    weight_table=None,  # int64 [layers]: addresses of float32 [tokens], for bfloat16 keys
    PACKED: tl.constexpr = None,  # C is a packed lower triangle of this type
):
    """C[tile] += keys^T keys for one tile of one layer per program. CHAIN and FIRST are multiples
    of K. With a weight table every key is multiplied by its weight first.
    """
    entry = tiles + tl.program_id(0) * 4
    layer = tl.load(entry)
    row = tl.load(entry + 1) * M
    column = tl.load(entry + 2) * N
    # without the alignment hint, loads through a table are neither vectorised nor pipelined
    keys = tl.multiple_of(tl.load(key_table + layer).to(tl.pointer_type(KEY)), 16)
    if PACKED is None:
        c = tl.multiple_of(tl.load(c_table + layer).to(tl.pointer_type(tl.float64)), 16)
    else:
        c = tl.load(c_table + layer).to(tl.pointer_type(PACKED))
    tokens = tl.load(token_table + layer)
    i = tl.multiple_of(row, 16) + tl.arange(0, M)
    j = tl.multiple_of(column, 16) + tl.arange(0, N)
    if TMA:
        left = tl.make_tensor_descriptor(
            keys, shape=[tokens, D], strides=[stride, 1], block_shape=[K, M]
        )
        right = tl.make_tensor_descriptor(
            keys, shape=[tokens, D], strides=[stride, 1], block_shape=[K, N]
        )
    ACC: tl.constexpr = tl.float64 if tl.float64 == KEY else tl.float32
    if weight_table is not None:
        weights = tl.load(weight_table + layer).to(tl.pointer_type(tl.float32))
    acc = tl.zeros((M, N), ACC)
    moved = tl.zeros((M, N), ACC)
    chains = 1
    if CHAIN:
        chains = DOUBLINGS + tl.cdiv(tokens, CHAIN)
    for chain in tl.range(0, chains):
        begin = 0
        end = tokens
        if CHAIN:
            # lengths FIRST, FIRST, 2 FIRST, 4 FIRST, ... CHAIN, CHAIN, ...
            settled = chain - DOUBLINGS
            growing = FIRST << tl.minimum(chain, DOUBLINGS)
            begin = tl.where(chain == 0, 0, tl.where(settled <= 0, growing >> 1, CHAIN * settled))
            end = tl.where(settled < 0, growing, CHAIN * (settled + 1))
            begin = tl.minimum(begin, tokens)
            end = tl.minimum(end, tokens)
            half = (moved + acc) * (
                0.5 * (end - begin).to(tl.float32) / tl.maximum(begin, 1).to(tl.float32)
            )
            move = (acc + half).to(tl.bfloat16).to(tl.float32)
            moved += move
            acc -= move
        for k in tl.range(begin, end, K):
            if TMA:
                a = left.load([k, row])
                b = right.load([k, column])
            else:
                token = k + tl.arange(0, K)
                live = (token < tokens)[:, None]
                base = keys + token.to(tl.int64)[:, None] * stride
                in_a = live
                in_b = live
                if not EVEN:
                    in_a = live & (i < D)[None, :]
                    in_b = live & (j < D)[None, :]
                a = tl.load(base + i[None, :], mask=in_a, other=0.0)
                b = tl.load(base + j[None, :], mask=in_b, other=0.0)
            if weight_table is None:
                acc = gram_product(a, b, acc, PRODUCTS)
            else:
                at = k + tl.arange(0, K)
                weight = tl.load(weights + at, mask=at < tokens, other=0.0)
                acc = scaled_product(a, b, weight * weight, acc)
    # one float32 rounding per launch; folding the two tiles apart would spare it and spill
    if PACKED is None:
        corner = c + row.to(tl.int64) * ld + column
        fold64(corner, ld, D - row, D - column, moved + acc, M, N, PARTS, EVEN)
    else:
        fold_packed(c, row, column, D, moved + acc, M, N, PARTS)


@triton.jit
def pack_kernel(
    out,  # [rows, D] dense, or unused
    partial,  # float64 [programs, 5]
    keys,
    rows,  # int64 [count], or unused
    signs,  # float64 [4, D]
    count,
    D,
    stride,
    R: tl.constexpr,
    W: tl.constexpr,
    GATHER: tl.constexpr,
    STORE: tl.constexpr,
    EACH: tl.constexpr = False,
):
    """Copies R kept rows to their dense place and writes their audit: sum |k|^2 and, per probe, sum
    (k . z)^2. EACH: of every row for itself, partial is [count, 5].
    """
    r = tl.program_id(0) * R + tl.arange(0, R)
    live = r < count
    source = r.to(tl.int64)
    if GATHER:
        source = tl.load(rows + r, mask=live, other=0)
    square = tl.zeros((R,), tl.float64)
    dot0 = tl.zeros((R,), tl.float64)
    dot1 = tl.zeros((R,), tl.float64)
    dot2 = tl.zeros((R,), tl.float64)
    dot3 = tl.zeros((R,), tl.float64)
    for w in range(0, D, W):
        n = w + tl.arange(0, W)
        inside = live[:, None] & (n < D)[None, :]
        x = tl.load(keys + source[:, None] * stride + n[None, :], mask=inside, other=0.0)
        if STORE:
            tl.store(out + r.to(tl.int64)[:, None] * D + n[None, :], x, mask=inside)
        wide = x.to(tl.float32).to(tl.float64) if x.dtype != tl.float64 else x
        square += tl.sum(wide * wide, 1)
        dot0 += tl.sum(wide * tl.load(signs + n, mask=n < D, other=0.0)[None, :], 1)
        dot1 += tl.sum(wide * tl.load(signs + D + n, mask=n < D, other=0.0)[None, :], 1)
        dot2 += tl.sum(wide * tl.load(signs + 2 * D + n, mask=n < D, other=0.0)[None, :], 1)
        dot3 += tl.sum(wide * tl.load(signs + 3 * D + n, mask=n < D, other=0.0)[None, :], 1)
    if EACH:
        each = partial + r.to(tl.int64) * 5
        tl.store(each, square, mask=live)
        tl.store(each + 1, dot0 * dot0, mask=live)
        tl.store(each + 2, dot1 * dot1, mask=live)
        tl.store(each + 3, dot2 * dot2, mask=live)
        tl.store(each + 4, dot3 * dot3, mask=live)
    else:
        at = partial + tl.program_id(0) * 5
        tl.store(at, tl.sum(square, 0))
        tl.store(at + 1, tl.sum(dot0 * dot0, 0))
        tl.store(at + 2, tl.sum(dot1 * dot1, 0))
        tl.store(at + 3, tl.sum(dot2 * dot2, 0))
        tl.store(at + 4, tl.sum(dot3 * dot3, 0))
