"""The specification in float64, with full logits."""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """cap tanh(scale (hidden weight^T + bias) / cap) -> [rows, V] float64; without the cap if
    ``softcap`` is None.
    """
    z = scale * (hidden.double() @ weight.double().mT + (0 if bias is None else bias.double()))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def target_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    reference: Tensor | None = None,
    reverse: bool = True,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(cross-entropy [rows], KL [rows]) against targets [rows] (negative: 0) and log-probabilities
    [rows, V].
    """
    log_p = logits(hidden, weight, bias, scale, softcap).log_softmax(-1)
    ce, kl = log_p.new_zeros(len(log_p)), log_p.new_zeros(len(log_p))
    if targets is not None:
        picked = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
        ce = torch.where(targets >= 0, -picked, 0.0)
    if reference is not None:
        log_r = reference.double()
        kl = (
            (log_p.exp() * (log_p - log_r)).sum(-1)
            if reverse
            else (log_r.exp() * (log_r - log_p)).sum(-1)
        )
    return ce, kl
