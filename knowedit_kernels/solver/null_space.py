"""AlphaEdit's metric: free on the low-energy eigenspace of C, infinite elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from knowedit_kernels._arguments import whole_number
from knowedit_kernels._modes import lasting
from knowedit_kernels.solver.cholesky import EquilibratedCholesky, check_symmetric
from knowedit_kernels.solver.metrics import ScaledMetric


class NullSpace(ScaledMetric):
    """beta * I on the low-energy eigenspace of C, infinite elsewhere (AlphaEdit): M^-1 = P / beta.

    Choose the eigenspace by exactly one of
      * threshold: eigenvalues below it (absolute, as published: 2e-2),
      * rank: that many smallest eigenvalues,
      * energy: as many smallest eigenvalues as together hold at most this share of tr C.
    Only a thin basis of the smaller side is kept (Q or its complement), never the [m, m] projector
    P.
    """

    @lasting
    def __init__(
        self,
        C: Tensor,
        beta: float = 1.0,
        threshold: float | None = None,
        rank: int | None = None,
        energy: float | None = None,
    ) -> None:
        check_symmetric(C, "covariance")
        if rank is not None:
            rank = whole_number("rank", rank)
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy is a share of the trace, in (0, 1], got {energy}")
        if sum(choice is not None for choice in (threshold, rank, energy)) != 1:
            raise ValueError("NullSpace needs exactly one of threshold=, rank= or energy=")
        eigenvalues, vectors = torch.linalg.eigh(C.double())
        m = C.shape[0]
        if threshold is not None:
            rank = int((eigenvalues < threshold).sum())
        elif energy is not None:
            held = eigenvalues.clamp_min(0).cumsum(0)
            rank = int((held <= energy * held[-1]).sum())  # of 1: all, however the sum is rounded
        assert rank is not None
        if not 0 < rank <= m:
            raise ValueError(
                f"the null space is empty or too large ({rank} of {m} directions; eigenvalues "
                f"run from {float(eigenvalues[0]):.3g} to {float(eigenvalues[-1]):.3g}): choose "
                "another one"
            )
        super().__init__(m, beta, C.device)
        self.rank = rank
        self.complement = rank > m // 2
        self.basis = (vectors[:, rank:] if self.complement else vectors[:, :rank]).contiguous()

    def eigenspace(self) -> Tensor:
        """An orthonormal basis [m, rank] of the free directions."""
        if not self.complement:
            return self.basis
        whole = torch.linalg.qr(self.basis, mode="complete").Q
        return whole[:, self.basis.shape[1] :].contiguous()

    # Keys multiply from the left, as rows: for few of them BLAS is two to twelve times as fast that
    # way round.
    def _whiten(self, X: Tensor) -> Tensor:
        Y = X.mT @ self.basis
        return (X.mT - Y @ self.basis.mT if self.complement else Y).mT

    def _unwhiten(self, Z: Tensor) -> Tensor:
        # Z of whitened keys is projected already, but only to 2^-53 |K|: that leaks where |P K| is
        # much smaller
        return self._whiten(Z) if self.complement else (Z.mT @ self.basis.mT).mT


class LeakyNullSpace(ScaledMetric):
    """weight * (I + leak * C) on a low-energy eigenspace, infinite elsewhere (BetaEdit):
    AlphaEdit's null space is only nearly one, and what leaks through it has a price.

    With an orthonormal basis Q [m, r] of ``space``: M^-1 = Q (I + leak Q^T C Q)^-1 Q^T / weight.
    ``C`` need not be the matrix whose eigenspace it is. O(m r) numbers, one factor of size r.
    """

    @lasting
    def __init__(self, C: Tensor, space: NullSpace, leak: float, weight: float = 1.0) -> None:
        if leak < 0:
            raise ValueError(f"leak must not be negative, got {leak}")
        super().__init__(space.dim, weight, C.device)
        self.rank = space.rank
        self.basis = space.eigenspace()
        inner = leak * (self.basis.mT @ C.double() @ self.basis)
        inner.diagonal().add_(1.0)
        self.factor = EquilibratedCholesky(inner, name="leak penalty")

    def _whiten(self, X: Tensor) -> Tensor:
        return self.factor.whiten(self.basis.mT @ X)

    def _unwhiten(self, Z: Tensor) -> Tensor:
        return self.basis @ self.factor.unwhiten(Z)
