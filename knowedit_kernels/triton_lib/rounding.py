"""Stochastic rounding on the device: the bits and the arithmetic of `lowrank.rounding`, element by
element.
"""

import triton
import triton.language as tl


@triton.jit
def random_halves(seed, row, column, stream, ROUNDS: tl.constexpr):
    """Sixteen random bits for each of [rows, 8 * groups] elements: row [rows, 1], column [1,
    groups] (column // 8).
    """
    zero = (row + column) * 0
    w0, w1, w2, w3 = tl.philox(seed, column + zero, row + zero, zero + stream, zero, ROUNDS)
    even = tl.interleave(
        tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF)
    )
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(even, odd)


@triton.jit
def round_stochastic(x, bits, dtype: tl.constexpr):
    """As `lowrank.rounding.round_stochastic`: x float32, bits uint32 below 2^16."""
    raw = x.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((raw + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        exponent = ((raw >> 23) & 0xFF).to(tl.int32) - 127
        exponent = tl.minimum(tl.maximum(exponent, -14), 15)
        place = ((exponent + 117) << 23).to(tl.float32, bitcast=True)
        inverse = ((137 - exponent) << 23).to(tl.float32, bitcast=True)
        rounded = tl.floor(x * inverse + (bits >> 3).to(tl.float32) * 0.0001220703125) * place
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, rounded, x).to(dtype)
