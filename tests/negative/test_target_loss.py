"""Deliberately wrong losses, which the gate must reject."""

import pytest
import torch

from knowedit_kernels.target_loss import chunked, gpu


def forward_with(change):
    def forward(*args):
        return change(chunked.forward, list(args))

    return forward


def bf16_logits(run, args):
    """Logits rounded to bfloat16, as a bfloat16 head gives them: simulated on the hidden states."""
    args[0] = args[0].bfloat16().float() * (1 + 2.0**-9)
    return run(*args)


def no_tail(run, args):
    args[1] = args[1].clone()
    args[1][-1] = 0
    return run(*args)


def no_cap(run, args):
    return run(*args[:7], 0.0, args[8])


def other_direction(run, args):
    return run(*args[:8], not args[8])


def ignores_counted(run, args):
    args[2] = args[2].clamp_min(0)
    return run(*args)


FORWARD = [bf16_logits, no_tail, no_cap, other_direction, ignores_counted]


@pytest.mark.parametrize("change", FORWARD, ids=lambda f: f.__name__)
def test_wrong_forwards_are_rejected(change, monkeypatch):
    monkeypatch.setattr(gpu, "forward", forward_with(change))
    monkeypatch.setattr(gpu, "backward", chunked.backward)
    assert "off by" in gpu.gate(torch.device("cpu"))


@pytest.mark.parametrize("wrong", ["dropped cotangent", "rounded", "without the scale"])
def test_wrong_gradients_are_rejected(wrong, monkeypatch):
    def backward(*args):
        if wrong == "dropped cotangent":
            return chunked.backward(args[0], torch.zeros_like(args[1]), *args[2:])
        grad = chunked.backward(*args)
        return grad.bfloat16().float() if wrong == "rounded" else grad / args[11]

    monkeypatch.setattr(gpu, "forward", chunked.forward)
    monkeypatch.setattr(gpu, "backward", backward)
    assert "gradient off by" in gpu.gate(torch.device("cpu"))


def test_the_right_one_passes_the_same_gate(monkeypatch):
    monkeypatch.setattr(gpu, "forward", chunked.forward)
    monkeypatch.setattr(gpu, "backward", chunked.backward)
    assert gpu.gate(torch.device("cpu")) is None
