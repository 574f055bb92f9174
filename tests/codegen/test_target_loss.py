"""The target loss kernels compile to what they should on every architecture (unit)."""

import itertools

import pytest
import torch

from knowedit_kernels.target_loss import gpu
from knowedit_kernels.target_loss.triton import hidden_grad_kernel, logit_grad_kernel, loss_kernel
from tests.codegen.compiler import ARCHITECTURES, MMA, compile_for, on_each

D, VOCABULARY, ROWS = 4096, 128256, 200
#: Type of the head, and the reference: none, given logits, a second head (the most registers).
LOGITS = on_each(
    itertools.product(gpu.DTYPES, (0, 1, 2)),
    [(torch.bfloat16, 0), (torch.bfloat16, 2), (torch.float16, 1), (torch.float32, 2)],
)


def meta(dtype=torch.float32):
    return torch.empty(64, dtype=dtype, device="meta")


def mma(architecture, dtype):
    # three-pass tf32 of 32-row tiles uses the older instruction everywhere
    return "HMMA" if dtype == torch.float32 else MMA[architecture]


@pytest.mark.parametrize("architecture, case", LOGITS, ids=str)
def test_logits(architecture, case):
    dtype, reference = case
    head = (
        meta(dtype),
        meta(dtype),
        meta(torch.int64),
        meta(dtype),
        meta(torch.float32 if reference == 1 else dtype),
    )
    sizes = ROWS, VOCABULARY, D, D, D, D
    constants = dict(
        CE=True,
        REF=reference,
        REVERSE=True,
        BIAS=True,
        CAP=True,
        **gpu.TILE[dtype.itemsize],
        PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
    )
    forward = compile_for(loss_kernel, architecture, *head, meta(), *sizes, 1.5, 3.0, **constants)
    state = [meta() for _ in range(5)]
    backward = compile_for(
        logit_grad_kernel,
        architecture,
        *head,
        *state,
        gpu.CHUNK,
        *sizes,
        gpu.CHUNK,
        1.5,
        3.0,
        **constants,
    )
    for built in (forward, backward):
        print(architecture, dtype, reference, built.registers, built.shared, built.spills)
        built.check(mma=mma(architecture, dtype))
        assert built.count("LDGSTS"), "the head is not copied asynchronously"


@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_gradient(architecture, dtype):
    built = compile_for(
        hidden_grad_kernel, architecture, meta(), meta(dtype), meta(), gpu.CHUNK, gpu.CHUNK, ROWS,
        D, gpu.CHUNK, D, D, 1.5, **gpu.TILE_GRADIENT[dtype.itemsize], SPLIT=dtype != torch.float32,
    )  # fmt: skip
    print(architecture, dtype, built.registers, built.shared, built.spills)
    built.check(mma=mma(architecture, dtype))
    assert built.count("LDGSTS"), "the head is not copied asynchronously"
