"""The specification of the second moment, in plain float64 torch."""

from __future__ import annotations

import torch


def second_moment(keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """K^T K [d, d] in float64 over the rows of `keys` [..., d] whose `mask` [...] is True."""
    rows = keys.reshape(-1, keys.shape[-1]) if mask is None else keys[mask]
    wide = rows.double()
    moment = wide.T @ wide
    return torch.tril(moment) + torch.tril(moment, -1).T


def two_parts(keys: torch.Tensor) -> torch.Tensor:
    """float32 keys rounded to the sum of two bf16 numbers (16 bits), in float64: what precision
    "fp32" multiplies.
    """
    high = keys.bfloat16().float()
    return high.double() + (keys - high).bfloat16().double()
