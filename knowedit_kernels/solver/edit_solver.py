"""The editing normal equation: Delta = R A, A = (I + K^T M^-1 K)^-1 K^T M^-1, with its
derivatives.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from knowedit_kernels._arguments import need_tensors
from knowedit_kernels.solver.cholesky import factor_of_cosines
from knowedit_kernels.solver.metrics import Metric

Constraint = Literal["soft", "equality"]


class EditSolver:
    """Write residuals R [d, n] at keys K [m, n] while preserving what ``metric`` measures.

    ``constraint="soft"`` minimises ``||Delta K - R||^2 + tr(Delta M Delta^T)`` (MEMIT, AlphaEdit,
    isotropic); ``"equality"`` minimises ``tr(Delta M Delta^T)`` subject to ``Delta K = R`` (ROME,
    EMMET). Either way ``Delta = R A`` with A independent of R, so a target can be trained through
    the write.

    Attributes, all float64 and differentiable with respect to K (autograd, torch.func, higher
    orders):
      A [n, m]   read-in: the edit adds ``R (A x)`` to the layer's output at key x; with R it is a
      rank-n LoRA pair. B [n, n]   (I + S)^-1, or S^-1 under equality.
      S [n, n]   K^T M^-1 K.
      G [n, n]   A K, symmetric, eigenvalues in [0, 1): realised shift at the edited keys is R G. I
      under equality. gain [n]   diag G.

    n = 0, n > m (soft), duplicate and zero keys (soft) are ordinary cases. Under equality keys must
    be independent.
    Raises ValueError naming the keys at fault and the remedy.
    """

    def __init__(self, metric: Metric, K: Tensor, constraint: Constraint = "soft") -> None:
        if constraint not in ("soft", "equality"):
            raise ValueError(f"constraint must be 'soft' or 'equality', got {constraint!r}")
        if not isinstance(metric, Metric):
            raise TypeError(
                f"metric must say what to preserve, as Covariance(C), NullSpace(C, ...) or "
                f"Identity(dim) do, not {type(metric).__name__}"
            )
        self.metric, self.constraint = metric, constraint
        self.K = metric.columns(K)
        self.A, self._B = _ReadIn.apply(self.K, metric, constraint)

    @property
    def edits(self) -> int:
        return self.K.shape[1]

    @cached_property
    def B(self) -> Tensor:
        return _whole(self.K, self.A, self._B)

    @cached_property
    def S(self) -> Tensor:
        Z = self.metric.whiten(self.K)
        return Z.mT @ Z

    @cached_property
    def G(self) -> Tensor:
        G = self.A @ self.K
        return 0.5 * (G + G.mT)

    @property
    def gain(self) -> Tensor:
        return (self.A * self.K.mT).sum(1)

    def apply(self, R: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The edit as factors (R [d, n], A [n, m]) with Delta = R A, cast to ``dtype`` (default
        float64).
        """
        R = self._residual(R)
        return (R, self.A) if dtype is None else (R.to(dtype), self.A.to(dtype))

    def delta(self, R: Tensor) -> Tensor:
        """Dense Delta [d, m] (d m entries: prefer the factors)."""
        return self._residual(R) @ self.A

    def realised(self, R: Tensor, X: Tensor | None = None) -> Tensor:
        """Shift of the layer's output at keys X [m, t]: R (A X) -> [d, t]; at the edited keys (R A)
        K = R G if X is None.
        """
        R = self._residual(R)
        return (R @ self.A) @ self.K if X is None else R @ (self.A @ self.metric.columns(X, "X"))

    def jvp(self, dR: Tensor, X: Tensor | None = None) -> Tensor:
        """Tangent of Delta, dR A [d, m]; with keys X [m, t], the tangent of the output there, dR (A
        X) [d, t].
        """
        return self.delta(dR) if X is None else self.realised(dR, X)

    def vjp(self, cotangent: Tensor, X: Tensor | None = None) -> Tensor:
        """dL/dR [d, n].

        From a dense cotangent of Delta, Gamma [d, m]: Gamma A^T. From output gradients g [d, t] at
        keys X [m, t], where Gamma would be g X^T: g (A X)^T, never forming Gamma. At the edited
        keys, ``vjp(g, K)`` is g G.
        """
        width = self.metric.dim if X is None else X.shape[1]
        if cotangent.ndim != 2 or cotangent.shape[1] != width:
            raise ValueError(
                f"cotangent must have shape [d, {width}], got {tuple(cotangent.shape)}"
            )
        cotangent = cotangent.to(self.A)
        return cotangent @ (self.A if X is None else self.A @ self.metric.columns(X, "X")).mT

    def price(self, R: Tensor) -> Tensor:
        """Preservation cost tr(Delta M Delta^T) = tr(R (G - G^2) R^T) (soft) or tr(R S^-1 R^T)
        (equality); scalar.

        Both are <R B, R G>. Costs O(d n^2): M is never multiplied. Non-negative up to rounding.
        """
        R = self._residual(R)
        moved = self.realised(R) if self.constraint == "soft" else R
        return (_times(R, self.K, self.A, self._B) * moved).sum()

    def compensated(self, U: Tensor) -> Tensor:
        """Residuals that realise exactly U [d, n] at the keys, U G^-1 = U + U S^-1: turns MEMIT
        into EMMET.
        """
        U = self._residual(U)
        return (
            U
            if self.constraint == "equality"
            else U + U @ _independent(self.metric.whiten(self.K))[1]
        )

    def key_jvp(self, dK: Tensor) -> Tensor:
        """Tangent of A for a change dK [m, n] of the keys -> [n, m] (`solver/README.md`)."""
        return _tangents(self.metric, self.K, self.A, self._B, self.metric.columns(dK, "dK"))[0]

    def key_vjp(self, A_bar: Tensor) -> Tensor:
        """Cotangent of K [m, n] from the cotangent A_bar [n, m] of A."""
        return _cotangent(self.metric, self.K, self.A, self._B, A_bar.to(self.A), None)

    def log_weight_jvp(self) -> Tensor:
        """dA / d log(weight) [n, m] = -(I - G) A, the weight scaling all of M (so: no history)."""
        return self.G @ self.A - self.A

    def __repr__(self) -> str:
        return f"EditSolver({self.metric!r}, edits={self.edits}, constraint={self.constraint!r})"

    def _residual(self, R: Tensor) -> Tensor:
        need_tensors(residuals=R)
        if R.ndim != 2 or R.shape[1] != self.edits:
            raise ValueError(
                f"residuals must have shape [d, {self.edits}], one column per edit, got "
                f"{tuple(R.shape)}"
            )
        return R.to(self.A)


def read_in(metric: Metric, K: Tensor, constraint: Constraint = "soft") -> tuple[Tensor, Tensor]:
    """(A [n, m], B [n, n]) of keys K [m, n]; differentiable in K by closed forms, composes with
    torch.func.
    """
    K = metric.columns(K)
    A, B = _ReadIn.apply(K, metric, constraint)
    return A, _whole(K, A, B)


def _whole(K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B `[n, n]`, also where it was left out (`_solve`)."""
    n = K.shape[1]
    return B if len(B) == n else torch.eye(n, dtype=A.dtype, device=A.device) - A @ K


def _times(X: Tensor, K: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """X B `[k, n]`, in memory of the order of X and K."""
    return X @ B if len(B) == K.shape[1] else X - (X @ A) @ K


def _solve(metric: Metric, K: Tensor, constraint: Constraint) -> tuple[Tensor, Tensor]:
    """(A, B). With more keys than dimensions B is left out, `[0, 0]`: it is I - A K, and ten
    thousand facts in three contexts would pay 7 GB for it.
    """
    Z = metric.whiten(K)
    if not bool(torch.isfinite(Z).all()):
        bad = torch.nonzero(~torch.isfinite(Z).all(0)).flatten().tolist()
        raise ValueError(f"keys of edits {bad[:10]} contain NaN or infinity")
    r, n = Z.shape
    eye = torch.eye(min(n, r), dtype=Z.dtype, device=Z.device)
    if constraint == "equality":
        P, B = _independent(Z)
    elif n <= r:
        L = torch.linalg.cholesky(eye + Z.mT @ Z)
        B = torch.cholesky_inverse(L)
        P = torch.cholesky_solve(Z.mT, L).mT
    else:  # push-through: (I_r + Z Z^T)^-1 Z = Z (I_n + Z^T Z)^-1, the smaller system
        P = torch.cholesky_solve(Z, torch.linalg.cholesky(eye + Z @ Z.mT))
        B = Z.new_zeros(0, 0)
    return metric.unwhiten(
        P
    ).mT.contiguous(), B.contiguous()  # forward AD wants tangents laid out alike


def _independent(Z: Tensor) -> tuple[Tensor, Tensor]:
    """Z S^-1 and S^-1 for S = Z^T Z, refusing dependent columns."""
    r, n = Z.shape
    norm = Z.norm(dim=0)
    remedy = "merge edits that share a subject, or use constraint='soft' without compensation"
    if n > r or not bool((norm > 0).all()):
        zero = torch.nonzero(norm == 0).flatten().tolist()
        fault = (
            f"keys {zero[:10]} are zero in the metric"
            if zero
            else f"{n} keys in {r} dimensions are dependent"
        )
        raise ValueError(f"exact writing: {fault}; {remedy}")
    if n == 0:
        return Z, Z.new_zeros(0, 0)
    unit = Z / norm
    L = factor_of_cosines(unit.mT @ unit, r)
    return torch.cholesky_solve(unit.mT, L).mT / norm, torch.cholesky_inverse(L) / (
        norm[:, None] * norm
    )


def _h_inverse(metric: Metric, K: Tensor, A: Tensor, X: Tensor) -> Tensor:
    """H^-1 X = M^-1 (X - K A X), H = M + K K^T; under equality its limit, which annihilates K."""
    return metric.inverse(X - K @ (A @ X))


def _tangents(metric: Metric, K: Tensor, A: Tensor, B: Tensor, dK: Tensor) -> tuple[Tensor, Tensor]:
    dA = _times(_h_inverse(metric, K, A, dK), K, A, B).mT - A @ dK @ A
    if len(B) < K.shape[1]:
        return dA.contiguous(), torch.zeros_like(B)
    half = A @ dK @ B
    return dA.contiguous(), -(half + half.mT).contiguous()


def _cotangent(
    metric: Metric, K: Tensor, A: Tensor, B: Tensor, A_bar: Tensor | None, B_bar: Tensor | None
) -> Tensor:
    K_bar = torch.zeros_like(K)
    if A_bar is not None:
        reached = _times(A_bar.mT, K, A, B)
        K_bar = K_bar + _h_inverse(metric, K, A, reached) - A.mT @ A_bar @ A.mT
    if B_bar is not None and len(B) == K.shape[1]:
        K_bar = K_bar - A.mT @ (B_bar + B_bar.mT) @ B
    return K_bar


class _ReadIn(torch.autograd.Function):
    """K -> (A, B). The derivatives are written in K, A, B and M^-1 alone, so they can be
    differentiated again.
    """

    @staticmethod
    def forward(K: Tensor, metric: Metric, constraint: Constraint) -> tuple[Tensor, Tensor]:
        return _solve(metric, K, constraint)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Metric, Constraint], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.metric = inputs[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(
        ctx: Any, A_bar: Tensor | None, B_bar: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        K, A, B = ctx.saved_tensors
        return _cotangent(ctx.metric, K, A, B, A_bar, B_bar), None, None

    @staticmethod
    def jvp(ctx: Any, dK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        K, A, B = ctx.saved_tensors
        return _tangents(ctx.metric, K, A, B, dK)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int, None, None],
        K: Tensor,
        metric: Metric,
        constraint: Constraint,
    ) -> Any:
        results = [_ReadIn.apply(k, metric, constraint) for k in K.unbind(in_dims[0])]
        return tuple(torch.stack(parts) for parts in zip(*results)), (0, 0)
