"""Cross-entropy and KL at target positions with the gradient in the hidden states: ours, torch, and
plain 16-bit logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from knowedit_kernels import _dispatch
from knowedit_kernels.bench.problem import (
    DTYPES,
    Check,
    Operation,
    Parameter,
    Problem,
    Provider,
    generator,
)
from knowedit_kernels.numerics import GRADIENT_ERROR, LOSS_ERROR, UNIT_ROUNDOFF
from knowedit_kernels.target_loss import target_loss
from knowedit_kernels.target_loss.reference import target_loss as specification

KL_WEIGHT = 0.0625


class Inputs(NamedTuple):
    hidden: Tensor  # [rows, d]
    weight: Tensor  # [vocabulary, d]
    targets: Tensor  # [rows]
    reference: Tensor  # [rows, vocabulary] float32 log-probabilities


class Result(NamedTuple):
    ce: Tensor
    kl: Tensor
    gradient: Tensor


def make(values: dict[str, Any], device: torch.device) -> Problem:
    rows, d, vocabulary = values["rows"], values["d"], values["vocabulary"]
    random, dtype = generator(device), DTYPES[values["dtype"]]
    hidden, before = (
        torch.randn(rows, d, generator=random, device=device).to(dtype) for _ in range(2)
    )
    weight = torch.randn(vocabulary, d, generator=random, device=device).mul_(2 / d**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=random, device=device)
    known = torch.log_softmax(before.float() @ weight.float().T, -1)

    @functools.cache
    def expected() -> Result:
        exact = hidden.double().requires_grad_()
        ce, kl = specification(exact, weight, targets, known)
        (gradient,) = torch.autograd.grad((ce + KL_WEIGHT * kl).sum(), exact)
        return Result(ce.detach(), kl.detach(), gradient)

    def judge(result: Result) -> list[Check]:
        ce, kl, gradient = expected()
        error = (result.gradient.double() - gradient).norm() / gradient.norm()
        return [
            Check("ce", float((result.ce.double() - ce).abs().max()), LOSS_ERROR),
            Check("kl", float((result.kl.double() - kl).abs().max()), LOSS_ERROR),
            Check("gradient", float(error), GRADIENT_ERROR + 2 * UNIT_ROUNDOFF[dtype]),
        ]

    return Problem(
        shape=values,
        dtype=dtype,
        useful=4 * rows * vocabulary * d,
        nominal=4 * rows * vocabulary * d,
        traffic=weight.numel() * weight.element_size() + 4 * rows * vocabulary,
        inputs=Inputs(hidden, weight, targets, known),
        judge=judge,
    )


def _through(
    inputs: Inputs, losses: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Callable[[], Result]:
    def run() -> Result:
        leaf = inputs.hidden.detach().requires_grad_()
        ce, kl = losses(leaf)
        (gradient,) = torch.autograd.grad((ce + KL_WEIGHT * kl).sum(), leaf)
        return Result(ce.detach(), kl.detach(), gradient)

    return run


def _ours(inputs: Inputs) -> Callable[[], Result]:
    return _through(
        inputs,
        lambda hidden: target_loss(
            hidden, inputs.weight, inputs.targets, reference=inputs.reference
        ),
    )


def _composed(inputs: Inputs, weight: Tensor) -> Callable[[], Result]:
    known = inputs.reference.to(weight.dtype)

    def losses(hidden: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(F.linear(hidden.to(weight.dtype), weight), -1)
        ce = F.nll_loss(log_p, inputs.targets, reduction="none")
        return ce, F.kl_div(known, log_p, reduction="none", log_target=True).sum(
            -1
        )  # KL(p || known), as in ROME

    return _through(inputs, losses)


def _torch(inputs: Inputs) -> Callable[[], Result]:
    return _composed(
        inputs, inputs.weight if inputs.weight.dtype == torch.float64 else inputs.weight.float()
    )


def _rome(inputs: Inputs) -> Callable[[], Result]:
    return _composed(inputs, inputs.weight)


def _decide(problem: Problem) -> _dispatch.Decision:
    _ours(problem.inputs)()
    return _dispatch.explain("target_losses")


OPERATION = Operation(
    about="target loss, forward and backward (useful flops: the logits and one product for the "
    "gradient)",
    parameters={
        "rows": Parameter((16,), (200,), "target positions"),
        "d": Parameter((576,), (4096,), "channels of a hidden state"),
        "vocabulary": Parameter((49152,), (128256,), "rows of the head"),
        "dtype": Parameter(
            ("fp32",), ("bf16",), "of the hidden states and the head", tuple(DTYPES)
        ),
    },
    make=make,
    decide=_decide,
    providers={
        "ours": Provider("no full logits", _ours),
        "torch": Provider("float32 logits, head widened beforehand", _torch),
        # 16-bit logits of size 8 are off by 0.03
        "rome": Provider(
            "logits and losses in the model's dtype, target positions only", _rome, slack=5e3
        ),
    },
)
