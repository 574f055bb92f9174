"""What an edit must preserve: positive (semi)definite metrics M on key space, factored once, shared
by many edits.

A metric exposes one factor F [r, m] with ``F^T F = M^-1``. Every quantity of an edit is then a Gram
matrix of whitened keys ``Z = F K``, so the Woodbury identity never subtracts two large numbers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from knowedit_kernels._arguments import need_tensors, open_device, whole_number
from knowedit_kernels._modes import lasting
from knowedit_kernels.solver.cholesky import EquilibratedCholesky

_M = TypeVar("_M", bound="ScaledMetric")


class Metric(ABC):
    """Base class. All arithmetic is float64; arguments are columns ``[m, n]`` of any floating
    dtype.
    """

    dim: int
    device: torch.device

    def __repr__(self) -> str:
        weight = f", weight={self.weight:.4g}" if isinstance(self, ScaledMetric) else ""
        return f"{type(self).__name__}(dim={self.dim}{weight}, device={str(self.device)!r})"

    @abstractmethod
    def whiten(self, X: Tensor) -> Tensor:
        """F X: [m, n] -> [r, n]."""

    @abstractmethod
    def unwhiten(self, Z: Tensor) -> Tensor:
        """F^T Z: [r, n] -> [m, n]."""

    def inverse(self, X: Tensor) -> Tensor:
        """M^-1 X: [m, n] -> [m, n] (the pseudo-inverse for a null-space metric)."""
        return self.unwhiten(self.whiten(X))

    def quadratic(self, X: Tensor) -> Tensor:
        """k^T M^-1 k of every column: [m, n] -> [n]. The gain of one edit written alone is s / (1 +
        s).
        """
        return self.whiten(X).square().sum(0)

    def with_weight(self, weight: float) -> Metric:
        """The same metric with another weight, sharing the factor."""
        raise ValueError(
            f"{type(self).__name__} has no single weight: set the weight before with_history"
        )

    def with_history(self, K: Tensor) -> Metric:
        """M + K K^T: the metric after edits at keys K [m, n] were committed (sequential
        editing).
        """
        return WithHistory(self, K)

    def columns(self, X: Tensor, name: str = "keys") -> Tensor:
        """``X`` as float64 columns on this metric's device; raises ValueError with the remedy on a
        wrong shape.
        """
        need_tensors(**{name: X})
        if X.ndim != 2 or X.shape[0] != self.dim:
            hint = (
                " (one column per edit: transpose it)"
                if X.ndim == 2 and X.shape[1] == self.dim
                else ""
            )
            raise ValueError(f"{name} must have shape [{self.dim}, n], got {tuple(X.shape)}{hint}")
        if not X.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {X.dtype}")
        return X.to(device=self.device, dtype=torch.float64)


class ScaledMetric(Metric):
    """M = weight * M1; the weight scales whitened keys, so changing it never refactors."""

    def __init__(self, dim: int, weight: float, device: torch.device | str | None = None) -> None:
        self.dim = dim
        self.device = open_device(device if device is not None else "cpu")
        self.weight = _positive(weight, "weight")

    def with_weight(self: _M, weight: float) -> _M:
        clone = copy.copy(self)
        clone.weight = _positive(weight, "weight")
        return clone

    def whiten(self, X: Tensor) -> Tensor:
        return self._whiten(self.columns(X)) * self.weight**-0.5

    def unwhiten(self, Z: Tensor) -> Tensor:
        return self._unwhiten(Z) * self.weight**-0.5

    @abstractmethod
    def _whiten(self, X: Tensor) -> Tensor: ...

    @abstractmethod
    def _unwhiten(self, Z: Tensor) -> Tensor: ...


class Identity(ScaledMetric):
    """M = weight * I (isotropic: needs no statistics)."""

    def __init__(
        self, dim: int, weight: float = 1.0, device: torch.device | str | None = None
    ) -> None:
        super().__init__(whole_number("dim", dim), weight, device)

    def _whiten(self, X: Tensor) -> Tensor:
        return X

    def _unwhiten(self, Z: Tensor) -> Tensor:
        return Z


class Covariance(ScaledMetric):
    """M = weight * (C + ridge * mean(diag C) * I): what MEMIT, ROME, EMMET and PMET preserve.

    C: [m, m] second moment of keys, float32 or float64. ``ridge`` is relative to the mean diagonal.
    ``dtype`` is the precision of the factorisation only (see ``EquilibratedCholesky``).
    """

    def __init__(
        self, C: Tensor, weight: float = 1.0, ridge: float = 0.0, dtype: torch.dtype = torch.float64
    ) -> None:
        if ridge < 0:
            raise ValueError(f"ridge must not be negative, got {ridge}")
        shift = ridge * _mean_diagonal(C) if ridge else 0.0
        self._set(EquilibratedCholesky(C, shift=shift, dtype=dtype, name="covariance"), weight)

    def _set(self, factor: EquilibratedCholesky, weight: float) -> None:
        ScaledMetric.__init__(self, factor.dim, weight, factor.device)
        self.factor = factor

    def state_dict(self) -> dict[str, Tensor]:
        """The factor's tensors (not the weight), to be cached beside the statistics."""
        return self.factor.state_dict()

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], weight: float = 1.0) -> Covariance:
        """A metric from ``state_dict()`` without factoring again."""
        self = Covariance.__new__(Covariance)
        self._set(EquilibratedCholesky.from_state(state), weight)
        return self

    def _whiten(self, X: Tensor) -> Tensor:
        return self.factor.whiten(X)

    def _unwhiten(self, Z: Tensor) -> Tensor:
        return self.factor.unwhiten(Z)


class ShrunkCovariance(Covariance):
    """M = weight * ((1 - gamma) C + gamma * tr(C)/m * I); gamma = 0 is MEMIT, 1 the trace-matched
    identity.

    It is the optimum of robust least squares under isotropic key drift (our derivation).
    """

    def __init__(
        self, C: Tensor, weight: float = 1.0, gamma: float = 0.1, dtype: torch.dtype = torch.float64
    ) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
        factor = EquilibratedCholesky(
            C, 1 - gamma, gamma * _mean_diagonal(C), dtype, name="covariance"
        )
        self._set(factor, weight)


def combined(
    terms: Sequence[tuple[float, Tensor]],
    isotropic: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Covariance:
    """M = sum_i w_i C_i + isotropic * I, for example RoSE's ``20 C + 50 C_entity + 1 I``.

    terms: pairs (weight >= 0, [m, m] matrix). Returns a ``Covariance`` of weight 1.
    """
    if not terms:
        raise ValueError(
            "combined needs at least one (weight, matrix) pair; for a bare identity use Identity"
        )
    if isotropic < 0 or any(w < 0 for w, _ in terms):
        raise ValueError("weights of a combined metric must not be negative")
    shapes = {tuple(C.shape) for _, C in terms}
    if len(shapes) > 1:
        raise ValueError(f"the matrices of a combined metric differ in shape: {sorted(shapes)}")
    total = torch.zeros_like(terms[0][1], dtype=torch.float64)
    for w, C in terms:
        total.add_(C.to(total), alpha=w)
    total.diagonal().add_(isotropic)
    return Covariance(total, dtype=dtype)


class WithHistory(Metric):
    """M + Kp Kp^T by an exact symmetric down-date of the factor: ``F' = (I + Zp Zp^T)^-1/2 F`` with
    ``Zp = F Kp``.

    With the thin SVD ``Zp = W diag(z) V^T`` the root is ``I - W diag(1 - (1 + z^2)^-1/2) W^T``;
    subtracting in M^-1 instead (the textbook down-date) would lose twice the digits. For a
    null-space metric this is AlphaEdit's projected cache. A chain (edits in sequence, in any order)
    keeps the product of its roots as one ``Q = I - left^T right``, as Schreiber and Van Loan (1989)
    do for reflections: 4 r n_p flops per column whitened, n_p over the whole chain.
    """

    base: Metric  # before any history
    left: Tensor  # [n_p, r]
    right: Tensor  # [n_p, r]

    @lasting
    def __init__(self, base: Metric, K: Tensor) -> None:
        Z = base.whiten(K.detach())
        if not bool(torch.isfinite(Z).all()):
            raise ValueError("history keys contain NaN or infinity")
        self.dim, self.device = base.dim, base.device
        basis, z, _ = torch.linalg.svd(Z, full_matrices=False)
        root = torch.sqrt(1 + z * z)
        shrink = z * z / (root * (1 + root))  # = 1 - 1/root without cancellation
        left, right = basis.mT, shrink[:, None] * basis.mT
        if isinstance(
            base, WithHistory
        ):  # (I - W D W^T) Q = Q - W D (Q^T W)^T: rows below those of the chain
            right = torch.cat([base.right, shrink[:, None] * base._transposed(basis).mT])
            left, base = torch.cat([base.left, left]), base.base
        self.base, self.left, self.right = base, left.contiguous(), right.contiguous()

    def whiten(self, X: Tensor) -> Tensor:
        Z = self.base.whiten(X).mT
        return (Z - (Z @ self.right.mT) @ self.left).mT

    def unwhiten(self, Z: Tensor) -> Tensor:
        return self.base.unwhiten(self._transposed(Z))

    def _transposed(self, Z: Tensor) -> Tensor:
        """Q^T Z: [r, n] -> [r, n]."""
        return (Z.mT - (Z.mT @ self.left.mT) @ self.right).mT


def weight_for_gain(metric: Metric, K: Tensor, gain: float = 0.98) -> float:
    """The weight at which an edit written alone realises the share ``gain`` of its residual, on
    average over K [m, n].

    One edit's gain is ``g = s / (1 + s)`` with ``s = k^T M^-1 k``; hence ``weight = mean(k^T M1^-1
    k) (1 - g) / g``. Published weights do not transfer between models; this does. ``metric``'s own
    weight is irrelevant.
    """
    if not 0 < gain < 1:
        raise ValueError(
            f"gain must lie strictly between 0 and 1, got {gain} (for 1: constraint='equality')"
        )
    need_tensors(keys=K)
    if K.ndim == 2 and K.shape[1] == 0:
        raise ValueError("weight_for_gain needs at least one key")
    s = float(metric.with_weight(1.0).quadratic(K).mean())
    if not 0 < s < float("inf"):
        raise ValueError(
            f"mean(k^T M^-1 k) is {s}: the keys are zero, not finite, or lie outside the null space"
        )
    return s * (1 - gain) / gain


def _positive(value: float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def _mean_diagonal(C: Tensor) -> float:
    need_tensors(covariance=C)
    if C.ndim != 2:
        raise ValueError(f"covariance must be a square matrix, got shape {tuple(C.shape)}")
    return float(C.diagonal().double().mean())
