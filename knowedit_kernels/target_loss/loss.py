"""The public function and its autograd: gradients for the hidden states only, the head is
frozen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from knowedit_kernels import _ops
from knowedit_kernels._arguments import need_tensors


class TargetLoss(NamedTuple):
    """Per-row losses in nats, float32 (float64 for float64 hidden states)."""

    ce: Tensor
    kl: Tensor


def target_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    reverse: bool = True,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TargetLoss:
    """Cross-entropy and KL divergence of selected positions, without ever holding all their logits.

    With z = cap tanh(scale (hidden W^T + bias) / cap) (no cap: z = scale (...)) and p = softmax(z),
    per row

    * ``ce`` = -log p[target]; 0 where ``targets`` [rows] (int64) is negative or None;
    * ``kl`` = KL(p || ref) (``reverse``, as ROME and MEMIT compute it) or KL(ref || p); 0 without a
      reference. The reference is ``reference`` [rows, V], log-probabilities or logits, or
      ``ref_hidden`` [rows, d], states whose distribution under the same head is computed alongside.
      It is a constant.

    hidden: [rows, d], the states before the head at the scored positions only. head_weight: [V, d],
    may be tied to the embeddings. Both bfloat16, float16, float32 or float64; the arithmetic is
    float32 (float64 for float64 hidden). Differentiable once, in ``hidden`` (the gradient is found
    during the forward pass); deterministic.

    Raises ValueError naming the argument. Source: our derivation; cut-cross-entropy (arXiv
    2411.09009) has the idea of never storing logits.
    """
    _check(hidden, head_weight, targets, reference, ref_hidden, bias, softcap)
    constants = [None if x is None else x.detach() for x in (bias, reference, ref_hidden)]
    cap = 0.0 if softcap is None else float(softcap)
    gradient = hidden.requires_grad and torch.is_grad_enabled()
    settings = (float(logit_scale), cap, reverse, gradient)
    ce, kl, _, _ = torch.ops.knowedit.target_losses(
        hidden, head_weight.detach(), targets, *constants, *settings
    )
    return TargetLoss(ce, kl)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, d_ce, d_kl = output
    ctx.save_for_backward(d_ce, d_kl)
    ctx.dtype = inputs[0].dtype


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, g_ce: Tensor, g_kl: Tensor, *_: Any) -> tuple[Any, ...]:
    """Both losses are scalar per row, so their gradients are found in the forward pass and only
    scaled here.
    """
    d_ce, d_kl = ctx.saved_tensors
    return (g_ce[:, None] * d_ce + g_kl[:, None] * d_kl).to(ctx.dtype), *(None,) * 9


torch.library.register_autograd(
    "knowedit::target_losses", _backward, setup_context=_save, lib=_ops.LIBRARY
)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    reference: Tensor | None,
    ref_hidden: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    optional = {"targets": targets, "reference": reference, "ref_hidden": ref_hidden, "bias": bias}
    need_tensors(
        hidden=hidden,
        head_weight=weight,
        **{name: x for name, x in optional.items() if x is not None},
    )
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1] != weight.shape[1]
        or len(weight) == 0
    ):
        raise ValueError(
            f"hidden [rows, d] and head_weight [V, d] do not fit: {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"hidden and head_weight must be floating point, got {hidden.dtype} and {weight.dtype}"
        )
    for name, constant in (
        ("head_weight", weight),
        ("bias", bias),
        ("reference", reference),
        ("ref_hidden", ref_hidden),
    ):
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but target_loss has no gradient for it: pass "
                f"{name}.detach()"
            )
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    if targets is not None and (targets.shape != (rows,) or targets.dtype != torch.int64):
        raise ValueError(
            f"targets must be int64 [{rows}], got {targets.dtype} {list(targets.shape)}"
        )
    if targets is None and reference is None and ref_hidden is None:
        raise ValueError("nothing to compute: give targets, reference or ref_hidden")
    if reference is not None and ref_hidden is not None:
        raise ValueError("give reference (logits) or ref_hidden (states), not both")
    if reference is not None and reference.shape != (rows, vocabulary):
        raise ValueError(
            f"reference must be logits [{rows}, {vocabulary}], got {list(reference.shape)}"
        )
    if ref_hidden is not None and ref_hidden.shape != hidden.shape:
        raise ValueError(
            f"ref_hidden must be shaped like hidden {list(hidden.shape)}, got "
            f"{list(ref_hidden.shape)}"
        )
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias must have shape [{vocabulary}], got {list(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
