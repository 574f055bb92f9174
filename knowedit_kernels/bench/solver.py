"""The editing solve Delta = R K^T (M + K K^T)^-1: ours with and without the cached factor, and the
dense ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knowedit_kernels import _dispatch, solver
from knowedit_kernels.bench.moments import gated_keys
from knowedit_kernels.bench.problem import Check, Operation, Parameter, Problem, Provider, generator
from knowedit_kernels.moments.reference import second_moment
from knowedit_kernels.numerics import SOLVE_ERROR
from knowedit_kernels.solver.reference import refined_delta

# LAPACK's error is the condition number, some 1e4 here, times 1e-16, and differs from one library
# to the next
_PEER = 64.0


class Inputs(NamedTuple):
    M: Tensor  # [d, d] float64
    K: Tensor  # [d, edits] float64
    metric: solver.Metric


def make(values: dict[str, Any], device: torch.device) -> Problem:
    d, edits = values["d"], values["edits"]
    C = second_moment(gated_keys(2 * d, d, device)) / (2 * d)
    M = C + 0.1 * C.diagonal().mean() * torch.eye(d, dtype=torch.float64, device=device)
    random = generator(device, 1)
    K = gated_keys(edits, d, device).double().T.contiguous()
    # few rows: the judge multiplies in long double, which no BLAS has
    R = torch.randn(8, edits, generator=random, device=device, dtype=torch.float64)

    expected = functools.cache(lambda: refined_delta(R, K, M))

    def judge(A: Tensor) -> list[Check]:
        return [
            Check("relative", float((R @ A - expected()).norm() / expected().norm()), SOLVE_ERROR)
        ]

    return Problem(
        shape=values,
        dtype=torch.float64,
        useful=2 * d * d * edits,
        nominal=2 * d**3 // 3 + 2 * d * d * edits,
        traffic=8 * d * (d + 1) + 16 * d * edits,
        inputs=Inputs(M, K, solver.Covariance(M)),
        judge=judge,
    )


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: solver.EditSolver(inputs.metric, inputs.K).A


def _cold(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: solver.EditSolver(solver.Covariance(inputs.M), inputs.K).A


def _torch(inputs: Inputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        factor = torch.linalg.cholesky(torch.addmm(inputs.M, inputs.K, inputs.K.T))
        return torch.cholesky_solve(inputs.K, factor).T

    return run


def _rome(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: torch.linalg.solve(inputs.M + inputs.K @ inputs.K.T, inputs.K).T


def _decide(problem: Problem) -> _dispatch.Decision:
    return _dispatch.Decision("solver", f"torch.linalg in float64 on {problem.inputs.M.device}")


OPERATION = Operation(
    about="the editing solve for the read-in A [edits, d]",
    parameters={
        "d": Parameter((576,), (4096, 14336), "channels of a key"),
        "edits": Parameter((1, 8, 100), (1, 100), "columns of K"),
    },
    make=make,
    decide=_decide,
    providers={
        "ours": Provider("factor cached, as in every call but the first", _ours),
        "ours-cold": Provider("factorisation included", _cold),
        "torch": Provider("Cholesky of M + K K^T in every call", _torch, slack=_PEER),
        "rome": Provider("MEMIT: LU of M + K K^T in every call", _rome, slack=_PEER),
    },
)
