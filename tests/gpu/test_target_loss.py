"""The target loss on a real GPU: the accuracy gate, a large vocabulary, bit-repeatability (gpu)."""

import pytest
import torch

from knowedit_kernels import explain, numerics
from knowedit_kernels.target_loss import chunked, gpu, target_loss
from knowedit_kernels.target_loss.call import LossCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_gate_passes():
    assert gpu.gate(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
def test_a_large_vocabulary(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, old = (torch.randn(100, 1024, generator=g).to(dtype) for _ in range(2))
    weight = (torch.randn(128_256, 1024, generator=g) / 32).to(dtype)
    targets = torch.randint(128_256, (100,), generator=g)
    expected = chunked.losses(
        LossCall(
            hidden.double(), weight.double(), targets, None, None, old.double(), 1, 0, True, True
        )
    )
    results = []
    for _ in range(2):
        leaf = hidden.cuda().requires_grad_()
        loss = target_loss(leaf, weight.cuda(), targets.cuda(), ref_hidden=old.cuda())
        (grad,) = torch.autograd.grad(loss.ce.sum() + loss.kl.sum(), leaf)
        assert explain("target_losses").chosen == "triton"
        results.append([x.detach().cpu() for x in (*loss, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    ce, kl, grad = results[0]
    assert float((ce - expected[0]).abs().max()) <= numerics.LOSS_ERROR
    assert float((kl - expected[1]).abs().max()) <= numerics.LOSS_ERROR
    wanted = expected[2] + expected[3]
    tolerance = numerics.GRADIENT_ERROR + 2 * numerics.UNIT_ROUNDOFF[dtype]
    assert float((grad.double() - wanted).norm()) <= tolerance * float(wanted.norm())
