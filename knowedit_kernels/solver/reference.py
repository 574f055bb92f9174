"""The specification: dense float64 formulas, m x m solves and all, as the published methods state
them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from knowedit_kernels.solver.routed_keys import RoutedKeys


def dense_delta(R: Tensor, K: Tensor, M: Tensor) -> Tensor:
    """R K^T (M + K K^T)^-1: R [d, n], K [m, n], M [m, m] -> [d, m] (MEMIT, with M = weight * C)."""
    R, K, M = R.double(), K.double(), M.double()
    return R @ torch.linalg.solve(M + K @ K.mT, K).mT


def refined_delta(R: Tensor, K: Tensor, M: Tensor, steps: int = 4) -> Tensor:
    """`dense_delta` for a symmetric M, in long double: what a solve is judged by.

    A float64 factorisation is itself off by the condition of M + K K^T times 1e-16, which on some
    LAPACKs is more than our budget. Its solution is mended by the residual in long double (80 bits
    on x86), until nothing changes any more.
    """
    R, K, M = R.double(), K.double(), M.double()
    factor = torch.linalg.cholesky(M + K @ K.mT)
    wide_K, wide_M = (x.cpu().numpy().astype(np.longdouble) for x in (K, M))
    right = wide_K @ R.cpu().numpy().astype(np.longdouble).T
    solution = np.zeros_like(right)
    for _ in range(steps):
        missing = right - wide_M @ solution - wide_K @ (wide_K.T @ solution)
        step = torch.from_numpy(missing.astype(np.float64)).to(factor)
        solution += torch.cholesky_solve(step, factor).cpu().numpy()
    return torch.from_numpy(solution.astype(np.float64)).to(M.device).mT


def dense_equality(R: Tensor, K: Tensor, M: Tensor) -> Tensor:
    """R (K^T M^-1 K)^-1 K^T M^-1 (EMMET; ROME for one column)."""
    R, K, M = R.double(), K.double(), M.double()
    X = torch.linalg.solve(M, K)
    return R @ torch.linalg.solve(K.mT @ X, X.mT)


def dense_null_space(R: Tensor, K: Tensor, K_previous: Tensor, P: Tensor, beta: float) -> Tensor:
    """AlphaEdit as released: solve(P (K K^T + Kp Kp^T) + beta I, P K R^T)^T with the [m, m]
    projector P.
    """
    R, K, Kp, P = R.double(), K.double(), K_previous.double(), P.double()
    left = P @ (K @ K.mT + Kp @ Kp.mT) + beta * torch.eye(len(P), dtype=P.dtype, device=P.device)
    return torch.linalg.solve(left, P @ K @ R.mT).mT


def wide_moment(keys: RoutedKeys, experts: Iterable[int]) -> Tensor:
    """sum of k k^T over the wide keys of a mixture's tokens, [sum of m, sum of m]: with the cross
    terms between experts that a block metric leaves out.

    For small layers, to measure what those terms are worth: `dense_delta` takes it as M.
    """
    wide = keys.stacked(experts)
    return wide @ wide.mT
