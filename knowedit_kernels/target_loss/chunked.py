"""The torch path: the vocabulary in chunks, a running log-sum-exp, never all logits at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from knowedit_kernels._dispatch import Candidate

_LOGITS = 1 << 20  # logits held at a time


def working(hidden: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """float32 (float64) logits of some vocabulary rows; softcap 0: none."""
    z = hidden @ weight.to(hidden.dtype).mT
    if bias is not None:
        z += bias
    z *= scale
    return z if softcap == 0 else z.div_(softcap).tanh_().mul_(softcap)


def _chunks(rows: int, weight: Tensor) -> Iterator[slice]:
    step = max(1024, _LOGITS // max(rows, 1))
    return (slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step))


def _log_sum_exp(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    total = hidden.new_full((len(hidden),), -torch.inf)
    for part in _chunks(len(hidden), weight):
        z = _logits(hidden, weight[part], None if bias is None else bias[part], scale, softcap)
        total = torch.logaddexp(total, z.logsumexp(-1))
    return total


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    reference: Tensor | None,
    ref_hidden: Tensor | None,
    scale: float,
    softcap: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``target_loss_forward`` of `_ops.py`."""
    rows, h = len(hidden), hidden.to(working(hidden))
    lse, picked, kl, mass = h.new_full((rows,), -torch.inf), h.new_zeros(rows), h.new_zeros(rows), h.new_zeros(rows)
    old = None if ref_hidden is None else ref_hidden.to(h.dtype)
    ref_lse = h.new_empty(0) if old is None else _log_sum_exp(old, weight, bias, scale, softcap)
    for part in _chunks(rows, weight):
        b = None if bias is None else bias[part]
        z = _logits(h, weight[part], b, scale, softcap)
        if targets is not None:
            inside = (targets >= part.start) & (targets < part.stop)
            picked += torch.where(inside, z.gather(1, (targets - part.start).clamp(0, z.shape[1] - 1)[:, None])[:, 0], 0)
        before, lse = lse, torch.logaddexp(lse, z.logsumexp(-1))
        if reference is not None or old is not None:
            log_r = _log_reference(part, weight[part], b, reference, old, ref_lse, scale, softcap).to(h.dtype)
            if reverse:
                p, keep = torch.exp(z - lse[:, None]), torch.exp(before - lse)
                kl, mass = kl * keep + (p * (z - log_r)).sum(-1), mass * keep + p.sum(-1)
            else:
                kl += (log_r.exp() * (log_r - z)).sum(-1)
    if reference is not None or old is not None:
        # E_p[z - log r] - lse: the division removes what rounding lse did to every p alike
        kl = kl / mass - lse if reverse else kl + lse
    ce = torch.where(targets >= 0, lse - picked, 0) if targets is not None else torch.zeros_like(lse)
    return ce, kl, lse, ref_lse


def backward(
    g_ce: Tensor,
    g_kl: Tensor,
    kl: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    reference: Tensor | None,
    ref_hidden: Tensor | None,
    scale: float,
    softcap: float,
    reverse: bool,
) -> Tensor:
    """``target_loss_backward`` of `_ops.py`: sum over the vocabulary of dL/dz W."""
    rows, h = len(hidden), hidden.to(working(hidden))
    old = None if ref_hidden is None else ref_hidden.to(h.dtype)
    g_ce = torch.zeros_like(g_ce) if targets is None else torch.where(targets >= 0, g_ce, 0)
    grad = torch.zeros_like(h)
    for part in _chunks(rows, weight):
        b = None if bias is None else bias[part]
        z = _logits(h, weight[part], b, scale, softcap)
        p = torch.exp(z - lse[:, None])
        dz = g_ce[:, None] * p
        if targets is not None:
            row = torch.nonzero((targets >= part.start) & (targets < part.stop))[:, 0]
            dz[row, targets[row] - part.start] -= g_ce[row]
        if reference is not None or old is not None:
            log_r = _log_reference(part, weight[part], b, reference, old, ref_lse, scale, softcap).to(h.dtype)
            inner = p * (z - log_r - (lse + kl)[:, None]) if reverse else p - log_r.exp()
            dz += g_kl[:, None] * inner
        if softcap != 0:
            dz *= 1 - (z / softcap) ** 2
        grad += dz @ weight[part].to(h.dtype)
    return grad * scale


def _log_reference(
    part: slice,
    weight: Tensor,
    bias: Tensor | None,
    reference: Tensor | None,
    ref_hidden: Tensor | None,
    ref_lse: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    if ref_hidden is not None:
        return _logits(ref_hidden, weight, bias, scale, softcap) - ref_lse[:, None]
    assert reference is not None
    return reference[:, part]


FORWARD, BACKWARD = Candidate("torch", forward), Candidate("torch", backward)
