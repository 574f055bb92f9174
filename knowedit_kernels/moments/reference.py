"""The specification of the second moment, in plain float64 torch."""

from __future__ import annotations

import torch


def second_moment(keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """K^T K [d, d] in float64 over the rows of `keys` [..., d] whose `mask` [...] is True."""
    rows = keys.reshape(-1, keys.shape[-1]) if mask is None else keys[mask]
    wide = rows.double()
    moment = wide.T @ wide
    return torch.tril(moment) + torch.tril(moment, -1).T


def grouped_moment(
    keys: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """sum of w^2 k k^T [groups, d, d] in float64 over the rows of `keys` [n, d] of each group.

    Group g has the rows offsets[g] to offsets[g + 1]; weights [n], None: 1.
    """
    wide = keys.double() if weights is None else keys.double() * weights.double()[:, None]
    return torch.stack([second_moment(rows) for rows in wide.tensor_split(offsets[1:-1].cpu())])


def two_parts(keys: torch.Tensor) -> torch.Tensor:
    """float32 keys rounded to the sum of two bf16 numbers (16 bits), in float64: what precision
    "fp32" multiplies.
    """
    high = keys.bfloat16().float()
    return high.double() + (keys - high).bfloat16().double()
