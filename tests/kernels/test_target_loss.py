"""Target losses against full float64 logits: every option, gradients, chunks, refusals (unit)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_kernels import numerics
from knowedit_kernels.target_loss import chunked, target_loss
from knowedit_kernels.target_loss.reference import logits
from knowedit_kernels.target_loss.reference import target_loss as specification

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPTIONS = [
    {},
    {"logit_scale": 0.25},
    {"softcap": 2.0},
    {"bias": True, "softcap": 3.0, "logit_scale": 1.5},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def problem(rows=7, d=12, vocabulary=50, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, old = (
        torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    weight = torch.randn(vocabulary, d, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(-1, vocabulary, (rows,), generator=g), old


def resolve(options, vocabulary):
    """Options of target_loss, and the same for the specification."""
    bias = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours = {**options, "bias": bias if "bias" in options else None}
    return ours, (ours["bias"], options.get("logit_scale", 1.0), options.get("softcap"))


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("kind", ["none", "logs", "hidden"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_option
def test_agrees_with_the_specification(options, dtype, kind, reverse, monkeypatch):
    monkeypatch.setattr(chunked, "_LOGITS", 1)  # chunks of 1024 tokens
    hidden, weight, targets, old = problem(vocabulary=2500, dtype=dtype)
    ours, (bias, scale, cap) = resolve(options, 2500)
    log_r = logits(old, weight, bias, scale, cap).log_softmax(-1)
    reference = {"none": {}, "logs": {"reference": log_r}, "hidden": {"ref_hidden": old}}[kind]
    leaf, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = target_loss(leaf, weight, targets, reverse=reverse, **reference, **ours)
    expected = specification(
        exact, weight, targets, None if kind == "none" else log_r, reverse, bias, scale, cap
    )
    tolerance = 1e-12 if dtype == torch.float64 else numerics.LOSS_ERROR
    for value, wanted in zip(got, expected):
        assert float((value.detach().double() - wanted.detach()).abs().max()) <= tolerance
    g = torch.randn(2, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (grad,) = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, got)), leaf)
    (wanted,) = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, expected)), exact)
    assert grad.dtype == dtype
    error = (
        numerics.GRADIENT_ERROR + 2 * numerics.UNIT_ROUNDOFF[dtype]
    )  # cast to the hidden states' dtype at the end
    assert float((grad.double() - wanted).norm()) <= (
        1e-12 if dtype == torch.float64 else error
    ) * float(wanted.norm())


@pytest.mark.parametrize("reverse", [True, False])
@each_option
def test_gradcheck(options, reverse):
    hidden, weight, targets, old = problem(rows=4, vocabulary=23)
    ours, _ = resolve(options, 23)

    def both(hidden):
        return target_loss(hidden, weight, targets, ref_hidden=old, reverse=reverse, **ours)

    assert torch.autograd.gradcheck(both, hidden.requires_grad_())


def test_identical_distributions_have_no_divergence():
    hidden, weight, _, _ = problem(dtype=torch.float32)
    leaf = hidden.clone().requires_grad_()
    for reverse in (True, False):
        kl = target_loss(leaf, weight, ref_hidden=hidden, reverse=reverse).kl
        assert float(kl.detach().abs().max()) <= numerics.LOSS_ERROR
        (grad,) = torch.autograd.grad(kl.sum(), leaf)
        assert float(grad.abs().max()) <= 1e-5


def test_memory_is_a_chunk_not_the_logits(monkeypatch):
    largest = 0
    original = chunked._logits

    def watched(*args):
        nonlocal largest
        z = original(*args)
        largest = max(largest, z.numel())
        return z

    monkeypatch.setattr(chunked, "_logits", watched)
    hidden, weight, targets, old = problem(rows=200, d=4, vocabulary=40_000, dtype=torch.float32)
    loss = target_loss(hidden.requires_grad_(), weight, targets, ref_hidden=old)
    (loss.ce + loss.kl).sum().backward()
    assert 0 < largest <= chunked._LOGITS < 200 * 40_000


def test_large_logits_and_impossible_tokens():
    hidden, weight, targets, _ = problem(dtype=torch.float32)
    loss = target_loss(hidden * 1e4, weight, targets)
    assert bool(torch.isfinite(loss.ce).all())
    expected, _ = specification(hidden * 1e4, weight, targets)
    assert torch.allclose(loss.ce.double(), expected, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9), d=st.integers(1, 9), vocabulary=st.integers(1, 3000),
    seed=st.integers(0, 10**6), reverse=st.booleans(),
)  # fmt: skip
def test_properties(rows, d, vocabulary, seed, reverse):
    hidden, weight, targets, old = problem(rows, d, vocabulary, torch.float32, seed)
    leaf = hidden.clone().requires_grad_()
    loss = target_loss(leaf, weight, targets, ref_hidden=old, reverse=reverse)
    assert loss.ce.shape == loss.kl.shape == (rows,)
    tiny = numerics.LOSS_ERROR
    assert bool(
        (loss.ce >= -tiny).all() and (loss.kl >= -tiny).all() and (loss.ce[targets < 0] == 0).all()
    )
    (grad,) = torch.autograd.grad(loss.ce.sum(), leaf)
    assert not grad[targets < 0].any()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    again = target_loss(
        hidden[order], weight, targets[order], ref_hidden=old[order], reverse=reverse
    )
    assert torch.allclose(again.ce, loss.ce[order], atol=tiny) and torch.allclose(
        again.kl, loss.kl[order], atol=tiny
    )


@pytest.mark.parametrize("kind", ["none", "logits", "hidden"])
def test_opcheck(kind):
    hidden, weight, targets, old = problem(dtype=torch.float32)
    reference, states = (
        (torch.randn(7, 50) if kind == "logits" else None),
        (old if kind == "hidden" else None),
    )
    args = (hidden, weight, targets, torch.randn(50), reference, states, 1.5, 3.0, True, True)
    torch.library.opcheck(torch.ops.knowedit.target_losses.default, args)


def test_reference_logits_are_normalised():
    hidden, weight, _, old = problem()
    raw = logits(old, weight, None, 1.0, None)
    shifted = raw + torch.linspace(-30, 30, 7, dtype=torch.float64)[:, None]
    for reference in (raw.log_softmax(-1), raw, shifted):
        for reverse in (True, False):
            expected = target_loss(hidden, weight, ref_hidden=old, reverse=reverse).kl
            assert torch.allclose(
                target_loss(hidden, weight, reference=reference, reverse=reverse).kl, expected
            )


def test_no_gradient_is_computed_when_none_is_wanted(monkeypatch):
    hidden, weight, targets, _ = problem()
    wanted = []
    original = torch.ops.knowedit.target_losses
    monkeypatch.setattr(
        torch.ops.knowedit, "target_losses", lambda *a: wanted.append(a[-1]) or original(*a)
    )
    target_loss(hidden, weight, targets)
    leaf = hidden.clone().requires_grad_()
    with torch.no_grad():
        target_loss(leaf, weight, targets)
    target_loss(leaf, weight, targets)
    assert wanted == [False, False, True]


H, W, T, OLD = problem()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: target_loss(H, W[:, :3], T), "do not fit"),
        (lambda: target_loss(H[0], W, T), "do not fit"),
        (lambda: target_loss(H.long(), W, T), "floating"),
        (lambda: target_loss(H, W.clone().requires_grad_(), T), r"head_weight\.detach"),
        (lambda: target_loss(H, W, T[:2]), "targets"),
        (lambda: target_loss(H, W, T.int()), "int64"),
        (lambda: target_loss(H, W, T + 50), "outside the vocabulary"),
        (lambda: target_loss(H, W), "nothing to compute"),
        (lambda: target_loss(H, W, T, reference=H, ref_hidden=H), "not both"),
        (lambda: target_loss(H, W, T, reference=H), r"\[7, 50\]"),
        (lambda: target_loss(H, W, T, ref_hidden=H[:2]), "ref_hidden"),
        (lambda: target_loss(H, W, T, bias=torch.zeros(3)), "bias"),
        (lambda: target_loss(H, W, T, softcap=0.0), "softcap"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("reverse", [True, False])
def test_impossible_tokens_have_no_share(reverse, monkeypatch):
    """Minus infinity in logits of the reference, in the bias over the whole first chunk: 0 log 0
    is 0, and the gradients are those of the distribution over what is possible.
    """
    monkeypatch.setattr(chunked, "_LOGITS", 1)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(3000, 8, generator=g, dtype=torch.float64)
    reference = torch.randn(3, 3000, generator=g, dtype=torch.float64)
    bias = torch.zeros(3000, dtype=torch.float64)
    bias[:1500] = -torch.inf
    reference[:, :1500] = -torch.inf
    if not reverse:  # the reference may rule out more, or the divergence is infinite
        reference[:, 2000] = -torch.inf
    targets = torch.tensor([1600, 2999, -1])

    def grads(possible):
        h = hidden.clone().requires_grad_()
        loss = target_loss(
            h,
            weight[possible],
            torch.where(targets < 0, -1, targets - possible.start),
            reference=reference[:, possible],
            bias=bias[possible],
            reverse=reverse,
        )
        return *loss, torch.autograd.grad(loss.ce.sum() + loss.kl.sum(), h)[0]

    for got, wanted in zip(grads(slice(0, 3000)), grads(slice(1500, 3000))):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
