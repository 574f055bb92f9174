"""The specification in float64: the functions themselves, and their tangents by torch's own forward
mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(gate) up."""
    return gate * torch.sigmoid(gate) * up


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, all scores at once; arguments as of `jvp.attention`."""
    group, key = q.shape[1] // k.shape[1], torch.arange(k.shape[2], device=q.device)
    if spans is not None:
        exists = (key >= spans[:, :1]) & (key < spans[:, 1:])
        k, v = (torch.where(exists[:, None, :, None], x, 0) for x in (k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        seen = key <= torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    if spans is not None:
        seen = seen & exists[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.where(seen, weights, 0.0) @ v  # a query that sees nothing gives zero


def tangents(
    function: Callable[..., Tensor], primals: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(function(*primals), its tangents [T, ...]) in float64 for directions [T, ...], one per
    primal.
    """
    exact = tuple(x.double() for x in primals)
    push = torch.func.vmap(lambda *one: torch.func.jvp(function, exact, one)[1])
    return function(*exact), push(*(x.double() for x in directions))
