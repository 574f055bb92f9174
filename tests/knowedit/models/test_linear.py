"""Linear layers by oneDNN: values, gradients, and who is left alone (unit)."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from knowedit.models import linear


@pytest.fixture
def fast(monkeypatch):
    """oneDNN, whatever the CPU; and how often it is called."""
    calls = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(linear, "_helps", lambda: True)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *given: calls.append(1) or real(*given)
    )
    return calls


@pytest.mark.parametrize("shape", [(3, 5, 48), (7, 48), (1, 1, 48), (0, 48), (48,)])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_linear_layers_are_linear_layers(fast, shape, bias):
    layer, x = torch.nn.Linear(48, 33, bias=bias).requires_grad_(False), torch.randn(shape)
    wanted = layer.double()(x.double())
    with linear.fast_linear():
        found = layer.float()(x)
    assert found.shape == wanted.shape and found.dtype == torch.float32 and len(fast) == 1
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    layer(x)
    assert len(fast) == 1  # only inside


def test_other_linear_layers_are_left_alone(fast):
    with linear.fast_linear():
        for dtype in (torch.bfloat16, torch.float64):
            assert torch.nn.Linear(4, 3, dtype=dtype)(torch.ones(2, 4, dtype=dtype)).dtype == dtype
        assert F.linear(torch.ones(2, 4), weight=torch.ones(3, 4)).sum() == 24
        with pytest.raises(RuntimeError):
            F.linear(torch.ones(2, 4), torch.ones(3, 5, dtype=torch.float64))
    assert not fast


@pytest.mark.parametrize(
    "cpu, capability, helps",
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
    ],
)
def test_who_is_helped(monkeypatch, cpu, capability, helps):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(linear.Path, "read_text", lambda *_, **__: f"vendor_id : {cpu}")
    assert linear._helps.__wrapped__() is helps


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_inputs_are_those_of_linear_layers(fast, bias):
    """Also of gradients: an optimiser may look at a curvature."""
    layer, x = torch.nn.Linear(7, 5, bias=bias).requires_grad_(False), torch.randn(2, 3, 7)

    def slopes(mode, layer, x):
        x = x.clone().requires_grad_()
        with mode:
            (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        return first.detach(), second

    found = slopes(linear.fast_linear(), layer, x)
    assert len(fast) > 2
    for mine, wanted in zip(
        found, slopes(nullcontext(), copy.deepcopy(layer).double(), x.double())
    ):
        assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 7), (7,)])
def test_what_a_layer_returns_may_be_written_to(fast, shape):
    """As some models do: OLMo clips queries, keys and values where they stand."""
    layer, x = torch.nn.Linear(7, 5).requires_grad_(False), torch.randn(shape)

    def slope(mode):
        given = x.clone().requires_grad_()
        with mode:
            layer(given).clamp_(min=-0.2, max=0.2).pow(2).sum().backward()
        return given.grad

    torch.testing.assert_close(slope(linear.fast_linear()), slope(nullcontext()))
    assert fast


ENDS = torch.tensor([3, 3, 8, 9], dtype=torch.int32)  # of each expert's rows; the last two no one's


@pytest.mark.parametrize("transposed", [True, False])
def test_each_experts_part_of_a_grouped_product_is_a_linear_layer(fast, transposed):
    """One expert has no rows, and some rows no expert."""
    x, weight = torch.randn(11, 16), torch.randn(4, 16, 8)
    weight = weight.mT.contiguous().mT if transposed else weight
    with linear.fast_linear():
        found = F.grouped_mm(x, weight, offs=ENDS)
        other = torch._grouped_mm(x, weight, offs=ENDS)
    assert len(fast) == 6 and found.shape == (11, 8) and torch.equal(found, other)
    owner = [0] * 3 + [2] * 5 + [3]
    for row, expert in enumerate(owner):
        wanted = x[row].double() @ weight[expert].double()
        assert (found[row] - wanted).norm() <= 1e-6 * wanted.norm()
    assert not found[9:].any()
    with linear.fast_linear():
        assert F.grouped_mm(x[:0], weight, offs=torch.zeros_like(ENDS)).shape == (0, 8)


def test_gradients_of_a_grouped_products_rows(fast):
    x, weight, wanted = torch.randn(9, 16), torch.randn(4, 16, 8), torch.randn(9, 8)

    def slope(mode):
        given = x.clone().requires_grad_()
        with mode:
            (F.grouped_mm(given, weight, offs=ENDS) * wanted).sum().backward()
        return given.grad

    torch.testing.assert_close(slope(linear.fast_linear()), slope(nullcontext()))
    assert len(fast) == 6
    weight.requires_grad_()
    with linear.fast_linear():
        (F.grouped_mm(x, weight, offs=ENDS) * wanted).sum().backward()
    assert len(fast) == 6 and weight.grad is not None  # a trained one goes its usual way


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_layers_that_are_trained_get_their_gradients(fast, trained):
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7)
    layer.requires_grad_(False).get_parameter(trained).requires_grad_()
    with linear.fast_linear():
        layer(x).pow(2).sum().backward()
    found, layer.get_parameter(trained).grad = layer.get_parameter(trained).grad, None
    layer(x).pow(2).sum().backward()
    assert not fast and torch.equal(found, layer.get_parameter(trained).grad)


UNUSUAL = {
    "a vector for a weight": lambda: F.linear(torch.ones(4, 16), torch.ones(16)),
    "nothing in": lambda: F.linear(torch.ones(4, 0), torch.ones(8, 0)),
    "nothing out": lambda: F.linear(torch.ones(4, 16).requires_grad_(), torch.ones(0, 16)),
    "a bias for all": lambda: F.linear(torch.ones(4, 16), torch.ones(8, 16), torch.ones(1)),
    "a bias a row": lambda: F.linear(torch.ones(4, 16), torch.ones(8, 16), torch.ones(4, 8)),
    "sparse": lambda: F.linear(torch.ones(4, 16), torch.ones(8, 16).to_sparse()),
    "a tangent": lambda: torch.func.jvp(
        lambda x: F.linear(x, torch.ones(8, 16)), (torch.ones(4, 16),), (torch.ones(4, 16),)
    )[1],
    "a dual number": lambda: dual(F.linear, torch.ones(8, 16)),
    "a transform": lambda: torch.func.grad(lambda x: F.linear(x, torch.ones(8, 16)).sum())(
        torch.ones(4, 16)
    ),
}


def dual(function, weight):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(4, 16), torch.ones(4, 16))
        return forward_ad.unpack_dual(function(x, weight)).tangent


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_goes_its_usual_way(fast, name):
    """oneDNN would refuse it, or lose what hangs on it."""
    wanted = UNUSUAL[name]()
    with linear.fast_linear():
        found = UNUSUAL[name]()
    assert not fast and torch.equal(found, wanted)


def test_autocast_has_its_dtype(fast):
    layer = torch.nn.Linear(16, 8).requires_grad_(False)
    with linear.fast_linear(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 16)).dtype == torch.bfloat16
    assert not fast


def test_no_rows_have_a_gradient(fast):
    layer, x = torch.nn.Linear(16, 8).requires_grad_(False), torch.ones(2, 0, 16).requires_grad_()
    with linear.fast_linear():
        layer(x).sum().backward()
    assert fast and x.grad.shape == x.shape


@pytest.mark.parametrize("ends", [ENDS[:3], torch.cat([ENDS, ENDS[-1:]]), ENDS.long()], ids=len)
def test_a_grouped_product_with_the_wrong_ends_is_refused_as_torch_does(fast, ends):
    with linear.fast_linear(), pytest.raises(RuntimeError):
        F.grouped_mm(torch.ones(9, 16), torch.ones(4, 16, 8), offs=ends)
    assert not fast
