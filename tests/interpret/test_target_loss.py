"""The target loss kernels, run on the CPU: ragged sizes, strides, several chunks, poisoned buffers."""

import pytest
import torch

from knowedit_kernels import testing
from knowedit_kernels.numerics import GRADIENT_ERROR, LOSS_ERROR
from knowedit_kernels.target_loss import chunked, gpu
from knowedit_kernels.target_loss.reference import logits


def test_the_gate_passes():
    assert gpu.gate(torch.device("cpu")) is None


def problem(rows, d, vocabulary, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, old = (torch.randn(rows, d, generator=g).to(dtype) for _ in range(2))
    weight = (torch.randn(vocabulary, d, generator=g) / d**0.5).to(dtype)
    return hidden, weight, torch.randint(-1, vocabulary, (rows,), generator=g), old, torch.randn(2, rows, generator=g)


def compare(hidden, weight, targets, bias, reference, old, settings, g):
    """Kernels in poisoned memory against the float64 path."""
    tensors = (hidden, weight, targets, bias, reference, old)
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    expected = chunked.forward(*exact, *settings)
    wanted = chunked.backward(*g.double(), *expected[1:], *exact, *settings)
    with testing.poisoned_allocations():
        got = gpu.forward(*tensors, *settings)
        grad = gpu.backward(*g, *got[1:], *tensors, *settings)
    for value, truth in zip(got, expected):
        assert value.shape == truth.shape
        assert value.numel() == 0 or float((value.double() - truth).abs().max()) <= LOSS_ERROR
    assert float((grad.double() - wanted).norm()) <= GRADIENT_ERROR * float(wanted.norm())
    return got, grad


@pytest.mark.parametrize("shape", [(0, 8, 10), (1, 1, 1), (3, 7, 129), (65, 70, 257), (130, 64, 128)], ids=str)
@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_ragged_sizes(dtype, shape):
    hidden, weight, targets, old, g = problem(*shape, dtype)
    compare(hidden, weight, targets, None, None, old, (1.0, 0.0, True), g)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["targets", "logs", "hidden"])
def test_options(kind, softcap, reverse):
    hidden, weight, targets, old, g = problem(20, 40, 300, torch.bfloat16)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(3))
    logs = logits(old, weight, bias, 1.5, softcap or None).log_softmax(-1).float() if kind == "logs" else None
    given = targets if kind == "targets" else None
    compare(hidden, weight, given, bias, logs, old if kind == "hidden" else None, (1.5, softcap, reverse), g)


def test_many_chunks_and_padded_rows(monkeypatch):
    monkeypatch.setattr(gpu, "CHUNK", 128)
    hidden, weight, targets, old, g = problem(10, 24, 700, torch.float16)
    padded = [testing.guarded(x, row_margin=5) for x in (hidden, weight, old)]
    views = [guard.tensor for guard in padded]
    first = compare(views[0], views[1], targets, None, None, views[2], (1.0, 0.0, True), g)
    again = compare(hidden, weight, targets, None, None, old, (1.0, 0.0, True), g)
    assert torch.equal(first[1], again[1]) and all(torch.equal(a, b) for a, b in zip(first[0], again[0]))
    for guard in padded:
        guard.check()


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_small_losses_keep_their_gradient(dtype):
    hidden, weight, targets, _, g = problem(6, 32, 400, dtype)
    g = g * torch.logspace(-20, 3, 6)
    compare(hidden, weight, targets, None, None, None, (1.0, 0.0, True), g)
    settings = (hidden, weight, targets, None, None, None, 1.0, 0.0, True)
    state = gpu.forward(*settings)
    rows = gpu.backward(*g, *state[1:], *settings)
    alone = chunked.backward(*g, *state[1:], *settings)
    live = targets >= 0
    assert bool((rows - alone).norm(dim=1)[live].lt(GRADIENT_ERROR * alone.norm(dim=1)[live]).all())
