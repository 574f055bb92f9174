"""Deliberately wrong losses, which the gate must reject."""

import pytest
import torch

from knowedit_kernels.target_loss import chunked, gpu


def bf16_logits(run, args):
    """About what logits rounded to bfloat16 do, simulated on the hidden states."""
    return run(args[0].bfloat16().float() * (1 + 2.0**-9), *args[1:])


def no_tail(run, args):
    weight = args[1].clone()
    weight[-1] = 0
    return run(args[0], weight, *args[2:])


def no_cap(run, args):
    return run(*args[:7], 0.0, *args[8:])


def other_direction(run, args):
    return run(*args[:8], not args[8], args[9])


def ignored_rows_counted(run, args):
    return run(*args[:2], args[2].clamp_min(0), *args[3:])


def rounded_gradient(run, args):
    ce, kl, d_ce, d_kl = run(*args)
    return ce, kl, d_ce.bfloat16().float(), d_kl


def gradient_without_scale(run, args):
    ce, kl, d_ce, d_kl = run(*args)
    return ce, kl, d_ce / args[6], d_kl / args[6]


def no_divergence_gradient(run, args):
    ce, kl, d_ce, _ = run(*args)
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
    monkeypatch.setattr(gpu, "losses", lambda *args: change(chunked.losses, args))
    failure = gpu.gate(torch.device("cpu"))
    assert failure is not None and ("gradient" in failure) >= ("gradient" in change.__name__), (
        failure
    )


def test_the_right_one_passes_the_same_gate(monkeypatch):
    monkeypatch.setattr(gpu, "losses", chunked.losses)
    assert gpu.gate(torch.device("cpu")) is None
