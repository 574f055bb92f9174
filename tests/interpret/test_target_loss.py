"""The target loss kernels, run on the CPU: ragged sizes, strides, several chunks, poisoned
buffers (unit).
"""

import pytest
import torch

from knowedit_kernels import testing
from knowedit_kernels.numerics import GRADIENT_ERROR, LOSS_ERROR
from knowedit_kernels.target_loss import chunked, gpu
from knowedit_kernels.target_loss.call import LossCall
from knowedit_kernels.target_loss.reference import logits


def test_the_gate_passes(monkeypatch):
    monkeypatch.setattr(
        gpu, "CHUNK", 256
    )  # a chunk and a part, as on a GPU, in a tenth of the time
    # float16 takes the tiles of bfloat16, and has tests below
    monkeypatch.setattr(gpu, "DTYPES", (torch.bfloat16, torch.float32))
    assert gpu.gate(torch.device("cpu")) is None


def problem(rows, d, vocabulary, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, old = (torch.randn(rows, d, generator=g).to(dtype) for _ in range(2))
    weight = (torch.randn(vocabulary, d, generator=g) / d**0.5).to(dtype)
    return hidden, weight, torch.randint(-1, vocabulary, (rows,), generator=g), old


def compare(hidden, weight, targets, bias, reference, old, settings):
    """Kernels in poisoned memory against the float64 path; returns (ce, kl, d_ce, d_kl)."""
    tensors = (hidden, weight, targets, bias, reference, old)
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    expected = chunked.losses(LossCall(*exact, *settings))
    with testing.poisoned_allocations():
        got = gpu.losses(LossCall(*tensors, *settings))
    for value, truth in zip(got, expected):
        assert value.shape == truth.shape and value.dtype == torch.float32
        error = value.double() - truth
        if value.ndim == 1:
            assert not error.numel() or float(error.abs().max()) <= LOSS_ERROR
        else:
            assert float(error.norm()) <= GRADIENT_ERROR * float(truth.norm())
    return got


@pytest.mark.parametrize(
    "shape", [(0, 8, 10), (1, 3, 1), (3, 7, 129), (65, 70, 257), (130, 64, 128)], ids=str
)
@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_ragged_sizes(dtype, shape):
    hidden, weight, targets, old = problem(*shape, dtype)
    if shape[2] == 1:
        old = None  # a vocabulary of one: every loss and gradient is zero, and must be so exactly
    compare(hidden, weight, targets, None, None, old, (1.0, 0.0, True, True))


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["targets", "logits", "hidden"])
def test_options(kind, softcap, reverse):
    hidden, weight, targets, old = problem(20, 40, 300, torch.bfloat16)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(3))
    given = logits(old, weight, bias, 1.5, softcap or None).float() if kind == "logits" else None
    states = old if kind == "hidden" else None
    settings = (1.5, softcap, reverse, True)
    full = compare(
        hidden, weight, targets if kind == "targets" else None, bias, given, states, settings
    )
    both = compare(hidden, weight, targets, bias, given, states, settings)
    assert kind == "targets" or (torch.equal(full[1], both[1]) and torch.equal(full[3], both[3]))
    bare = compare(hidden, weight, targets, bias, given, states, (*settings[:3], True))
    assert all(torch.equal(a, b) for a, b in zip(bare, both))
    losses_only = gpu.losses(
        LossCall(hidden, weight, targets, bias, given, states, *settings[:3], False)
    )
    assert torch.equal(losses_only[0], both[0]) and torch.equal(losses_only[1], both[1])
    assert not losses_only[2].any() and not losses_only[3].any()


def test_many_chunks_and_padded_rows(monkeypatch):
    monkeypatch.setattr(gpu, "CHUNK", 128)
    hidden, weight, targets, old = problem(10, 24, 700, torch.float16)
    padded = [testing.guarded(x, row_margin=5) for x in (hidden, weight, old)]
    views = [guard.tensor for guard in padded]
    first = compare(views[0], views[1], targets, None, None, views[2], (1.0, 0.0, True, True))
    again = compare(hidden, weight, targets, None, None, old, (1.0, 0.0, True, True))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for guard in padded:
        guard.check()


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_small_gradients_of_a_confident_model(dtype):
    """Targets with nearly all the probability, logits near 100: float32 knows p - 1 to 1e-5."""
    hidden, weight, _, _ = problem(6, 32, 400, dtype)
    hidden = hidden * 20
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    _, _, d_ce, _ = gpu.losses(
        LossCall(hidden, weight, targets, None, None, None, 1.0, 0.0, True, True)
    )
    _, _, wanted, _ = chunked.losses(
        LossCall(hidden.double(), weight.double(), targets, None, None, None, 1.0, 0.0, True, True)
    )
    assert float(wanted.norm(dim=1).min()) < 1e-2
    assert bool(
        ((d_ce.double() - wanted).norm(dim=1) <= GRADIENT_ERROR * wanted.norm(dim=1) + 1e-5).all()
    )
