"""The specification: dense float64 formulas, m x m solves and all, as the published methods state them."""

from __future__ import annotations

import torch
from torch import Tensor

# Of at least 18 bits each up to 2^17 columns: float64's 53 bits, and small entries beside large ones.
SLICES = 5


def dense_delta(R: Tensor, K: Tensor, M: Tensor) -> Tensor:
    """R K^T (M + K K^T)^-1: R [d, n], K [m, n], M [m, m] -> [d, m] (MEMIT, with M = weight * C)."""
    R, K, M = R.double(), K.double(), M.double()
    return R @ torch.linalg.solve(M + K @ K.mT, K).mT


def dense_equality(R: Tensor, K: Tensor, M: Tensor) -> Tensor:
    """R (K^T M^-1 K)^-1 K^T M^-1 (EMMET; ROME for one column)."""
    R, K, M = R.double(), K.double(), M.double()
    X = torch.linalg.solve(M, K)
    return R @ torch.linalg.solve(K.mT @ X, X.mT)


def dense_null_space(R: Tensor, K: Tensor, K_previous: Tensor, P: Tensor, beta: float) -> Tensor:
    """AlphaEdit as released: solve(P (K K^T + Kp Kp^T) + beta I, P K R^T)^T with the [m, m] projector P."""
    R, K, Kp, P = R.double(), K.double(), K_previous.double(), P.double()
    left = P @ (K @ K.mT + Kp @ Kp.mT) + beta * torch.eye(len(P), dtype=P.dtype, device=P.device)
    return torch.linalg.solve(left, P @ K @ R.mT).mT

def refined_read_in(K: Tensor, M: Tensor) -> Tensor:
    """The read-in ``((M + K K^T)^-1 K)^T`` [n, m], right to about the roundoff of float64: the judge of other solvers.

    K [m, n], M [m, m] symmetric. LU in float64 and iterative refinement on residuals whose products are summed without
    rounding, so the answer does not depend on the LAPACK of a machine. Raises ArithmeticError if it does not converge
    (a condition number near 1e16).
    """
    K, M = K.double(), M.double()
    *factors, singular = torch.linalg.lu_factor_ex(M + K @ K.mT)
    X = torch.linalg.lu_solve(*factors, K)
    for _ in range(0 if singular else 10):
        inner, inner_low = _sum_of_products((K.mT, X))
        high, low = _sum_of_products((M, X), (K, inner))
        step = torch.linalg.lu_solve(*factors, K - high - (low + K @ inner_low))
        X = X + step
        if float(step.norm()) <= 2.0**-51 * float(X.norm()):
            return X.mT
    raise ArithmeticError("the refinement of the solve does not converge: M + K K^T is singular to float64")


def _sum_of_products(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of A @ B over the pairs as high + low in float64, by the splitting of Ozaki, Ogita, Oishi and Rump (2012).

    Slices of a row of A and of a column of B hold so few bits that any order of summation gives their product exactly.
    """
    high = low = torch.zeros(len(pairs[0][0]), pairs[0][1].shape[1], dtype=torch.float64, device=pairs[0][0].device)
    for A, B in pairs:
        bits = (53 - (A.shape[1] - 1).bit_length()) // 2
        right = _slices(B, 0, bits)
        for i, a in enumerate(_slices(A, 1, bits)):
            for b in right[: SLICES - i]:  # what follows is below 2^-90 of the largest product
                term = a @ b
                total = high + term
                back = total - high
                low = low + ((high - (total - back)) + (term - back))
                high = total
    return high, low


def _slices(A: Tensor, dim: int, bits: int) -> list[Tensor]:
    """Addends of A from the high bits to the low, each of at most `bits` bits below the largest entry along `dim`."""
    slices: list[Tensor] = []
    while len(slices) < SLICES and A.any():
        largest = A.abs().amax(dim, keepdim=True)
        power = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)  # exactly 2^e > largest
        shift = power * 2.0 ** (53 - bits)
        slices.append((A + shift) - shift)
        A = A - slices[-1]
    return slices
