"""The torch path: one pass over the vocabulary in chunks for losses and gradients, never all logits
at once.

The gradient of cross-entropy is attention over the vocabulary: E_p[W] - W_target. Like attention it
is accumulated with a running maximum, so the head is read (and widened) once, and nothing is
recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.target_loss.call import LossCall

_LOGITS = 1 << 18  # logits held at a time: with the part of the head they need, in the caches


def working(hidden: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(512, _LOGITS // max(rows, 1))
    return (slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Logits of some rows of the head in hidden's dtype; softcap 0: none."""
    z = hidden @ weight.mT
    if bias is not None:
        z += bias
    z *= scale
    return z if softcap == 0 else z.div_(softcap).tanh_().mul_(softcap)


class _Running:
    """exp(z - max) over chunks: its sum, and means weighted by it, rescaled whenever the maximum
    rises.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.top, self.mass = like.new_full((rows,), -torch.inf), like.new_zeros(rows)
        self.sums: dict[str, Tensor] = {}

    def weights(self, z: Tensor) -> Tensor:
        """exp(z - running maximum) of the next chunk [rows, tokens]."""
        top = torch.maximum(self.top, z.amax(-1))
        start = torch.where(top == -torch.inf, 0, top)  # nothing but impossible tokens so far
        keep, self.top = torch.exp(self.top - start), top
        e = torch.exp(z - start[:, None])
        self.mass = self.mass * keep + e.sum(-1)
        for total in self.sums.values():
            total *= keep if total.ndim == 1 else keep[:, None]
        return e

    def add(self, name: str, part: Tensor) -> None:
        self.sums[name] = self.sums[name] + part if name in self.sums else part.clone()

    def mean(self, name: str) -> Tensor:
        total = self.sums[name]
        return total / (self.mass if total.ndim == 1 else self.mass[:, None])

    @property
    def log(self) -> Tensor:
        return self.top + self.mass.log()


def _share(e: Tensor, gap: Tensor) -> Tensor:
    """e * gap, zero where a token's weight e is, also if its gap is infinite: 0 log 0 = 0."""
    return (e * gap).masked_fill_(e == 0, 0)


def losses(call: LossCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``target_losses`` of `_ops.py`."""
    hidden, weight, targets, bias, reference, ref_hidden = call.arguments[:6]
    scale, softcap, reverse, gradient = call.arguments[6:]
    rows, h = len(hidden), hidden.to(working(hidden))
    ce, kl, d_ce, d_kl = (
        h.new_zeros(rows),
        h.new_zeros(rows),
        torch.zeros_like(h),
        torch.zeros_like(h),
    )
    if rows == 0:
        return ce, kl, d_ce, d_kl
    both = h if ref_hidden is None else torch.cat([h, ref_hidden.to(h.dtype)])
    divergence = reference is not None or ref_hidden is not None
    p, r, picked = _Running(rows, h), _Running(rows, h), h.new_zeros(rows)
    under = p if reverse else r  # the distribution the divergence is a mean under
    for part in _chunks(len(both), len(weight)):
        w = weight[part].to(h.dtype)
        z = _logits(both, w, None if bias is None else bias[part], scale, softcap)
        z, z_ref = z[:rows], (z[rows:] if reference is None else reference[:, part].to(h.dtype))
        slope = scale * (1 - (z / softcap).square()) if softcap else scale  # of z in hidden W^T
        if targets is not None:
            inside, index = (targets >= part.start) & (targets < part.stop), targets - part.start
            picked += torch.where(
                inside, z.gather(1, index.clamp(0, z.shape[1] - 1)[:, None])[:, 0], 0
            )
        e = p.weights(z)
        factors = [e * slope]
        if divergence:
            e_ref, gap = r.weights(z_ref), z - z_ref
            shares = _share(e if reverse else e_ref, gap)
            under.add("gap", shares.sum(-1))
            factors.append((shares if reverse else e_ref) * slope)
        if gradient:
            products = (torch.cat(factors) @ w).split(rows)
            p.add("W", products[0])
            if divergence:
                under.add("gap W" if reverse else "W", products[1])
    if targets is not None:
        ce = torch.where(targets >= 0, p.log - picked, 0)
    if gradient and targets is not None:
        slope = scale * (1 - (picked / softcap).square())[:, None] if softcap else scale
        d_ce = (p.mean("W") - slope * weight[targets.clamp_min(0)].to(h.dtype)) * (targets >= 0)[
            :, None
        ]
    if divergence:
        gap = under.mean("gap")
        kl = gap - p.log + r.log if reverse else p.log - r.log - gap
    if gradient and divergence:
        d_kl = (
            p.mean("gap W") - gap[:, None] * p.mean("W") if reverse else p.mean("W") - r.mean("W")
        )
    return ce, kl, d_ce, d_kl


TORCH = Candidate("torch", losses)
