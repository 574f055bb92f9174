"""Stochastic rounding with counter-based random bits: a function of (seed, stream, row, column)
alone, on every device.

Philox 4x32 (Salmon et al., SC 2011; seven rounds pass BigCrush). One 128-bit draw at counter
(column // 8, row, stream, 0) serves eight neighbours, 16 bits each, low halves first.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, rounds: int = ROUNDS
) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64 tensors) per counter; ``seed`` is the 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(rounds):
        # int64 products wrap, but their low 64 bits are those of the unsigned product
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (b >> 32 & _WORD) ^ c1 ^ k0,
            b & _WORD,
            (a >> 32 & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def random_bits(
    rows: slice, columns: int, seed: int, stream: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Sixteen random bits for elements [rows, 0 : columns] of matrix number ``stream`` -> int32
    [rows, columns].
    """
    line = torch.arange(rows.start, rows.stop, device=device)[:, None]
    group = torch.arange(-(-columns // 8), device=device).expand(len(line), -1)
    zero = torch.zeros_like(group)
    words = torch.stack(philox((group, line, zero + stream, zero), seed), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.flatten(1)[:, :columns].to(torch.int32)


def round_stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 ``x`` to bfloat16 or float16, up with probability equal to the fraction cut
    off.

    ``bits`` (int32, 16 random bits per element, same shape) decide. The mean over bits is x
    exactly, for float16 up to the 2^-13 of a place that its thirteen bits resolve.
    """
    raw = x.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = (raw + bits) & -0x10000  # adds to the magnitude, then truncates
    elif dtype == torch.float16:
        # floor(x / place + u) * place, exact in float32; below 2^-14 the place is that of float16's
        # subnormals
        exponent = ((raw >> 23 & 0xFF) - 127).clamp_(-14, 15)
        place = ((exponent - 10 + 127) << 23).view(torch.float32)
        inverse = ((10 - exponent + 127) << 23).view(torch.float32)
        rounded = (torch.floor(x * inverse + (bits >> 3) * 2.0**-13) * place).view(torch.int32)
    else:
        raise ValueError(
            f"stochastic rounding is for bfloat16 and float16, got {dtype}: use rounding='nearest'"
        )
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x).to(dtype)
