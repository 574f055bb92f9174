"""Second moments C += K^T K: ours, what torch composes, ROME's sum, numpy's product, and the SYRKs
of quack, cuBLAS and scipy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from knowedit_kernels import _dispatch, moments, testing
from knowedit_kernels.bench.problem import (
    DTYPES,
    Check,
    Operation,
    Parameter,
    Problem,
    Provider,
    generator,
)
from knowedit_kernels.moments import reference
from knowedit_kernels.moments.functional import mirror_
from knowedit_kernels.numerics import MOMENT, MOMENT_FP64

LAUNCH = 16384  # tokens of our launch on a GPU
FOLD = 8192  # tokens torch's composition adds in float32 before its float64 fold
ROME_BATCH = 3072
# Peers sum in float32 or truncate on the way: bias up to 1e-5 at 8192 tokens
# (numerics.truncation_bias)
_PEER, _SIXTEEN_BIT_RESULT = 1e3, 1e5


class Inputs(NamedTuple):
    keys: Tensor  # [tokens, d]
    precision: str


def gated_keys(tokens: int, d: int, device: torch.device) -> Tensor:
    """Keys like a gated MLP's: heavy tails, channels of different size, a mean; [tokens, d]
    float32.
    """
    random = generator(device)
    gate, up = (torch.randn(tokens, d, generator=random, device=device) for _ in range(2))
    scale = torch.rand(d, generator=random, device=device).add_(0.1).square_()
    return torch.nn.functional.silu(gate).mul_(up).mul_(scale).add_(0.01)


def make(values: dict[str, Any], device: torch.device) -> Problem:
    d, tokens, precision = values["d"], values["tokens"], values["precision"]
    keys = gated_keys(tokens, d, device).to(DTYPES[values["dtype"]])
    wide = keys.dtype == torch.float64 or precision == "fp64"
    budget = MOMENT_FP64 if wide else MOMENT
    expected = functools.cache(lambda: reference.second_moment(keys))

    def judge(result: Tensor | moments.SecondMoment) -> list[Check]:
        lower = (result if isinstance(result, Tensor) else result.sum()).double().tril()
        grade = testing.grade_moment(lower + lower.tril(-1).T, expected())
        return [
            Check(name, getattr(grade, name), getattr(budget, name))
            for name in ("normwise", "elementwise", "bias")
        ]

    return Problem(
        shape=values,
        dtype=torch.float64 if wide else keys.dtype,
        useful=tokens * d * (d + 1),
        nominal=2 * tokens * d * d,
        traffic=keys.numel() * keys.element_size() + d * (d + 1) // 2 * 16,
        inputs=Inputs(keys, precision),
        judge=judge,
    )


def _sum64(inputs: Inputs) -> Tensor:
    d = inputs.keys.shape[1]
    return torch.zeros(d, d, dtype=torch.float64, device=inputs.keys.device)


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    c = _sum64(inputs)

    def run() -> Tensor:
        for part in inputs.keys.split(LAUNCH):
            torch.ops.knowedit.second_moment_([c], [part], inputs.precision)
        return c

    return run


def _streaming(inputs: Inputs) -> Callable[[], moments.SecondMoment]:
    state = moments.SecondMoment(
        inputs.keys.shape[1], device=inputs.keys.device, precision=inputs.precision
    )
    return lambda: state.update(inputs.keys)


def _torch(inputs: Inputs) -> Callable[[], Tensor]:
    c, keys = _sum64(inputs), inputs.keys
    narrow_on_gpu = keys.device.type == "cuda" and keys.element_size() == 2

    def run() -> Tensor:
        for part in keys.split(FOLD):
            wide = part if narrow_on_gpu or keys.dtype == torch.float64 else part.float()
            c.add_(
                torch.mm(wide.T, wide, out_dtype=torch.float32)
                if narrow_on_gpu
                else torch.mm(wide.T, wide)
            )
        return c

    return run


def _rome(inputs: Inputs) -> Callable[[], Tensor]:
    c = _sum64(inputs).float()

    def run() -> Tensor:
        for part in inputs.keys.split(ROME_BATCH):
            wide = part.float()
            c.add_(wide.T.mm(wide))
        return c

    return run


def _missing_quack(inputs: Inputs) -> str | None:
    if importlib.util.find_spec("quack") is None:
        return "not installed"
    return (
        None
        if inputs.keys.is_cuda and inputs.keys.element_size() == 2
        else "needs 16-bit keys on a GPU"
    )


def _quack(inputs: Inputs) -> Callable[[], Tensor]:
    from quack.gemm_interface import gemm_symmetric

    keys = inputs.keys
    return lambda: gemm_symmetric(keys.T, keys)


def _cublas_library() -> ctypes.CDLL | None:
    for version in (13, 12):
        try:
            return ctypes.CDLL(f"libcublas.so.{version}")
        except OSError:
            continue
    return None


def _missing_cublas(inputs: Inputs) -> str | None:
    if _cublas_library() is None:
        return "not installed"
    return None if inputs.keys.is_cuda else "needs keys on a GPU"


def _cublas(inputs: Inputs) -> Callable[[], Tensor]:
    """cublasSsyrk on widened keys: cuBLAS has no 16-bit SYRK. The row-major keys are its
    column-major [d, tokens].
    """
    library, keys = _cublas_library(), inputs.keys.float()
    tokens, d = keys.shape
    c = torch.zeros(d, d, device=keys.device)
    one = ctypes.c_float(1.0)
    upper, not_transposed = 1, 0  # its column-major upper triangle is our lower one

    def run() -> Tensor:
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        status = library.cublasSsyrk_v2(  # type: ignore[union-attr]
            handle, upper, not_transposed, d, tokens, ctypes.byref(one),
            ctypes.c_void_p(keys.data_ptr()), d, ctypes.byref(one), ctypes.c_void_p(c.data_ptr()),
            d,
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(f"cublasSsyrk returned status {status}")
        return c

    return run


def _scipy(inputs: Inputs) -> Callable[[], Tensor]:
    """scipy's ssyrk, in place on float32 views that share memory with torch."""
    from scipy.linalg import blas

    keys = inputs.keys.float().numpy()
    c = torch.zeros(keys.shape[1], keys.shape[1])
    view = c.numpy().T  # Fortran order, so that BLAS writes in place

    def run() -> Tensor:
        blas.ssyrk(1.0, keys.T, beta=1.0, c=view, lower=0, overwrite_c=1)
        return c

    return run


def _numpy(inputs: Inputs) -> Callable[[], Tensor]:
    """numpy's product on float32 keys (it takes a SYRK for x.T @ x), summed in float32."""
    keys, c = inputs.keys.float().numpy(), torch.zeros(inputs.keys.shape[1], inputs.keys.shape[1])
    view = c.numpy()

    def run() -> Tensor:
        np.add(view, keys.T @ keys, out=view)
        return c

    return run


def _missing_on_gpu(inputs: Inputs) -> str | None:
    return "needs keys on the CPU" if inputs.keys.is_cuda else None


def _missing_scipy(inputs: Inputs) -> str | None:
    if importlib.util.find_spec("scipy") is None:
        return "not installed"
    return _missing_on_gpu(inputs)


def _decide(problem: Problem) -> _dispatch.Decision:
    inputs = problem.inputs
    return _dispatch.explain(
        "second_moment_", [mirror_(_sum64(inputs))], [inputs.keys], inputs.precision
    )


OPERATION = Operation(
    about="second moments C += K^T K",
    parameters={
        "d": Parameter((576, 1536), (4096, 14336), "channels of a key"),
        "tokens": Parameter((4096,), (65536,), "keys"),
        "dtype": Parameter(("bf16",), ("bf16",), "of the keys", tuple(DTYPES)),
        "precision": Parameter(("exact",), ("exact",), "of our kernel", tuple(moments.PRECISIONS)),
    },
    make=make,
    decide=_decide,
    providers={
        "ours": Provider("the kernel, launches of 16384 tokens", _ours),
        "ours-stream": Provider(
            "SecondMoment: the kernel with packing, audit and NaN check", _streaming
        ),
        "torch": Provider(
            "mm to float32 (widened on a CPU) per 8192 tokens, float64 fold", _torch, slack=_PEER
        ),
        "rome": Provider("ROME: float32 product and sum per 3072 tokens", _rome, slack=_PEER),
        "quack": Provider(
            "quack's symmetric GEMM, 16-bit result", _quack, _missing_quack, _SIXTEEN_BIT_RESULT
        ),
        "cublas": Provider(
            "cublasSsyrk on float32 keys, widening not counted", _cublas, _missing_cublas, _PEER
        ),
        "scipy": Provider(
            "BLAS ssyrk on float32 keys, widening not counted",
            _scipy,
            _missing_scipy,
            _PEER,
        ),
        "numpy": Provider(
            "numpy's product of float32 keys, widening not counted", _numpy, _missing_on_gpu, _PEER
        ),
    },
)
