"""The error model and the budgets that kernels, tests, benchmarks and documents all quote.

Errors are against float64 on the same (already rounded) inputs. For a second moment C = K^T K:

* normwise:    ||C' - C||_F / ||C||_F
* elementwise: max |c'_ij - c_ij| / sqrt(c_ii c_jj)      (the scale in which every entry is at most
  1)
* bias:        |mean_i (c'_ii - c_ii) / c_ii|            (signed: truncation shows here first)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budget:
    """Upper limits on the three error measures of this module."""

    normwise: float
    elementwise: float
    bias: float


# What a second moment must keep for bf16, fp16 ("exact") and fp32 keys: better than a plain fp32
# sum.
MOMENT = Budget(normwise=1e-7, elementwise=5e-7, bias=1e-7)
# What "fast" keeps on a CPU, where it sums 128 tokens in float32: below what a plain float32 sum of
# thousands loses (measured on bf16 keys: 3e-7, 1.1e-6, 3.8e-7). A channel that never changes makes
# the same error every time: 129 / 2 * 2^-25.
MOMENT_FAST = Budget(normwise=1e-6, elementwise=2e-6, bias=2.5e-7)
# The float64 paths.
MOMENT_FP64 = Budget(normwise=1e-14, elementwise=1e-13, bias=1e-14)


def float32_storage(launches: int) -> Budget:
    """What a moment keeps whose sums are stored in float32 and were added to `launches` times.

    Each addition rounds by at most 2^-24 of the sum so far, 0.58 of that as a root mean square; of
    a sum that grows steadily the roundings add up to sqrt(launches / 3) of the last one. The limits
    are twice that beyond `MOMENT`'s.
    """
    scatter = 2 * 0.58 * 2.0**-24 * (launches / 3 + 1) ** 0.5
    return Budget(
        MOMENT.normwise + scatter, MOMENT.elementwise + 5 * scatter, MOMENT.bias + scatter
    )


UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Tokens one tensor-core instruction adds exactly before the accumulator is aligned and truncated.
MMA_TOKENS = 16


def truncation_bias(chain: int) -> float:
    """Predicted relative bias (negative) of a zero-started tensor-core chain of `chain` tokens.

    Each of the chain/16 steps truncates to 24 bits and so loses half a last place on average; over
    a sum that grows steadily from zero the mean last place is 0.36 * 2^-23 of the final value.
    Emulated: -1.4e-6 at 1024, -1.1e-5 at 8192.
    """
    return -(chain / MMA_TOKENS) * 0.5 * 0.36 * 2.0**-23


@dataclass(frozen=True)
class UpdateBudget:
    """Upper limits on the error of a weight update in last places of the result: largest, and
    |mean| (bias).
    """

    largest: float
    bias: float


# W + U V^T rounded to nearest: half a place, and the arithmetic before it (the Triton kernel's
# split products: 2^-16 of the update for bf16, 2^-24 else). A float32 result adds the places of its
# own arithmetic (rank up to 100). The bias limit holds from 10^4 entries up (standard error 0.003).
UPDATE_NEAREST = {
    torch.bfloat16: UpdateBudget(0.52, 0.02),
    torch.float16: UpdateBudget(0.51, 0.02),
    torch.float32: UpdateBudget(2.0, 0.02),
    torch.float64: UpdateBudget(2.0, 0.02),
}
# Stochastic rounding: one of the two neighbours, unbiased.
UPDATE_STOCHASTIC = UpdateBudget(1.02, 0.02)

# Target loss: nats of a row's cross-entropy or divergence (float32 logits of size 20 carry 2e-6
# each), and the normwise relative error of the gradient in the hidden states.
LOSS_ERROR = 2e-5
GRADIENT_ERROR = 1e-4

# Editing solve: normwise relative error of Delta against the dense float64 formula
# (well-conditioned metrics).
SOLVE_ERROR = 1e-12

# Layers and their tangents (`jvp`): normwise relative error in units of the dtype's roundoff,
# (16-bit, wider). Rounding the result alone costs 0.4 to 0.5; tensor cores also multiply rounded
# weights of attention, and float32 in three passes.
TANGENT_ERROR = {"rms_norm": (0.6, 4.0), "swiglu": (0.6, 4.0), "attention": (2.0, 64.0)}


def tangent_error(op: str, dtype: torch.dtype) -> float:
    """The budget of a layer of `jvp` ("rms_norm", "swiglu", "attention") and of its tangents in
    `dtype`.
    """
    return TANGENT_ERROR[op][dtype.itemsize > 2] * UNIT_ROUNDOFF[dtype]
