"""The kernel: every weight read once, all layers in one launch, sums left per program (no
atomics).
"""

import triton
import triton.language as tl

from knowedit_kernels.triton_lib.rounding import random_halves, round_stochastic


@triton.jit
def _pointer(table, entry, FIELD: tl.constexpr, dtype: tl.constexpr, FIELDS: tl.constexpr):
    # without the hint neither vector loads nor pipelining survive a pointer that was itself loaded
    return tl.multiple_of(tl.load(table + entry * FIELDS + FIELD).to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["seed"])
def update_kernel(
    pointers, shapes, programs, sums, seed,
    DT: tl.constexpr, ROUNDING: tl.constexpr, COMPENSATED: tl.constexpr, WRITE: tl.constexpr,
    MEASURE: tl.constexpr,
    BP: tl.constexpr, ALIGNED: tl.constexpr, ROUNDS: tl.constexpr, FIELDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: rows [i BM, ...) and column tiles [j TILES, ...) of one weight. Without MEASURE
    neither sums nor the probe, which BP > 0 adds.
    """
    pid = tl.program_id(0)
    entry = tl.load(programs + pid * 3)
    i = tl.load(programs + pid * 3 + 1)
    j = tl.load(programs + pid * 3 + 2)
    shape = shapes + entry * 8
    M = tl.load(shape)
    N = tl.load(shape + 1)
    R = tl.multiple_of(tl.load(shape + 2), BR)
    P = tl.load(shape + 3)
    stream = tl.load(shape + 4)
    stride = tl.load(shape + 5)
    base_stride = tl.load(shape + 6)
    plane_stride = tl.load(shape + 7)
    if ALIGNED:
        N = tl.multiple_of(N, 16)
        stride = tl.multiple_of(stride, 16)
        base_stride = tl.multiple_of(base_stride, 16)
        plane_stride = tl.multiple_of(plane_stride, 16)
    w = _pointer(pointers, entry, 0, DT, FIELDS)
    base = _pointer(pointers, entry, 1, DT, FIELDS)
    plane = _pointer(pointers, entry, 2, tl.bfloat16, FIELDS)
    u = _pointer(pointers, entry, 3, tl.bfloat16, FIELDS)
    v = _pointer(pointers, entry, 4, tl.bfloat16, FIELDS)
    row = i * BM + tl.arange(0, BM)
    live_row = (row < M)[:, None]
    long_row = row.to(tl.int64)[:, None]
    rank = tl.arange(0, BR)
    if BP > 0:
        probe = _pointer(pointers, entry, 5, tl.float32, FIELDS)
        key = tl.arange(0, BP)
        at_keys = tl.zeros((BM, BP), tl.float32)
    ideal2 = tl.full((), 0.0, tl.float64)
    applied2 = tl.full((), 0.0, tl.float64)
    error2 = tl.full((), 0.0, tl.float64)
    changed = 0
    finite = 0  # minus the number of entries that are not
    for tile in range(j * TILES, tl.minimum((j + 1) * TILES, tl.cdiv(N, BN))):
        column = tile * BN + tl.arange(0, BN)
        live = live_row & (column < N)[None, :]
        long_column = column.to(tl.int64)[:, None]
        # asked for first, so that it arrives while the product runs
        old = tl.load(base + long_row * base_stride + column[None, :], mask=live, other=0.0).to(
            tl.float32
        )
        ideal = tl.zeros((BM, BN), tl.float32)
        for r in range(0, R, BR):
            a = tl.load(u + long_row * R + (r + rank)[None, :], mask=live_row, other=0.0)
            b = tl.load(
                v + long_column * R + (r + rank)[None, :], mask=(column < N)[:, None], other=0.0
            )
            ideal = tl.dot(a, b.T, ideal)
        exact = old + ideal
        if COMPENSATED:
            carried = plane + long_row * plane_stride + column[None, :]
            exact += tl.load(carried, mask=live, other=0.0).to(tl.float32)
        if ROUNDING == "stochastic":
            group = tile * (BN // 8) + tl.arange(0, BN // 8)
            bits = random_halves(seed, row[:, None], group[None, :], stream, ROUNDS)
            new = round_stochastic(exact, bits, DT)
        else:
            new = exact.to(DT)
        rounded = new.to(tl.float32)
        if WRITE:
            tl.store(w + long_row * stride + column[None, :], new, mask=live)
            if COMPENSATED:
                tl.store(carried, (exact - rounded).to(tl.bfloat16), mask=live)
        if MEASURE:
            applied = rounded - old  # outside the weight all four are zero
            error = applied - ideal
            ideal2 += tl.sum(ideal * ideal).to(tl.float64)
            applied2 += tl.sum(applied * applied).to(tl.float64)
            error2 += tl.sum(error * error).to(tl.float64)
            changed += tl.sum((rounded != old).to(tl.int32))
            finite += tl.sum((tl.abs(applied) < float("inf")).to(tl.int32)) - BM * BN
            if BP > 0:
                k = tl.load(
                    probe + key.to(tl.int64)[:, None] * N + column[None, :],
                    mask=(key < P)[:, None] & (column < N)[None, :],
                    other=0.0,
                )
                at_keys = tl.dot(error, k.T, at_keys, input_precision="tf32")
    if MEASURE:
        out = sums + pid.to(tl.int64) * 5
        tl.store(out, ideal2)
        tl.store(out + 1, applied2)
        tl.store(out + 2, error2)
        tl.store(out + 3, changed)
        tl.store(out + 4, -finite)
    if BP > 0:
        partial = _pointer(pointers, entry, 6, tl.float32, FIELDS)  # [column chunks, M, P]
        where = (j.to(tl.int64) * M + long_row) * P + key[None, :]
        tl.store(partial + where, at_keys, mask=live_row & (key < P)[None, :])
