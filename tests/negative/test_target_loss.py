"""Deliberately wrong losses, which the gate must reject (unit)."""

from dataclasses import replace

import pytest
import torch

from knowedit_kernels.target_loss import gpu
from knowedit_kernels.target_loss.chunked import losses


def bf16_logits(call):
    """About what logits rounded to bfloat16 do, simulated on the hidden states."""
    return losses(replace(call, hidden=call.hidden.bfloat16().float() * (1 + 2.0**-9)))


def no_tail(call):
    weight = call.weight.clone()
    weight[-1] = 0
    return losses(replace(call, weight=weight))


def no_cap(call):
    return losses(replace(call, softcap=0.0))


def other_direction(call):
    return losses(replace(call, reverse=not call.reverse))


def ignored_rows_counted(call):
    return losses(replace(call, targets=call.targets.clamp_min(0)))


def rounded_gradient(call):
    ce, kl, d_ce, d_kl = losses(call)
    return ce, kl, d_ce.bfloat16().float(), d_kl


def gradient_without_scale(call):
    ce, kl, d_ce, d_kl = losses(call)
    return ce, kl, d_ce / call.scale, d_kl / call.scale


def no_divergence_gradient(call):
    ce, kl, d_ce, _ = losses(call)
    return ce, kl, d_ce, torch.zeros_like(d_ce)


WRONG = [
    bf16_logits,
    no_tail,
    no_cap,
    other_direction,
    ignored_rows_counted,
    rounded_gradient,
    gradient_without_scale,
    no_divergence_gradient,
]


@pytest.mark.parametrize("change", WRONG, ids=lambda f: f.__name__)
def test_wrong_losses_are_rejected(change, monkeypatch):
    monkeypatch.setattr(gpu, "losses", change)
    failure = gpu.gate(torch.device("cpu"))
    assert failure is not None and ("gradient" in failure) >= ("gradient" in change.__name__), (
        failure
    )


def test_the_right_one_passes_the_same_gate(monkeypatch):
    monkeypatch.setattr(gpu, "losses", losses)
    assert gpu.gate(torch.device("cpu")) is None
