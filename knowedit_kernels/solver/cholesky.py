"""Cholesky factor of a symmetric positive definite matrix, equilibrated, computed once and used for
many solves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from knowedit_kernels._arguments import need_tensors
from knowedit_kernels._memory import fresh
from knowedit_kernels._modes import lasting

_PANEL = 1024  # rows converted to float64 at a time, so that no full float64 copy is ever made


class NotPositiveDefiniteError(ValueError):
    """The matrix cannot be factored; the message says why and what to do."""


def _panels(dim: int, step: int = _PANEL) -> Iterator[slice]:
    return (slice(start, min(start + step, dim)) for start in range(0, dim, step))


def check_symmetric(C: Tensor, name: str) -> None:
    """Raise unless ``C`` is a finite, real, symmetric [m, m] matrix (asymmetry up to 1e-5 of the
    largest entry).
    """
    need_tensors(**{name: C})
    if C.ndim != 2 or C.shape[0] != C.shape[1] or C.shape[0] == 0:
        raise ValueError(f"{name} must be a non-empty square matrix, got shape {tuple(C.shape)}")
    if C.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {C.dtype}: sums kept in fewer bits are "
            "unusable here"
        )
    largest = torch.zeros((), dtype=C.dtype, device=C.device)
    skew = largest.clone()
    # a tile and its mirror image: both stay in a processor's cache, which whole rows do not
    tiles = list(_panels(C.shape[0], 256 if C.device.type == "cpu" else 4096))
    for i, rows in enumerate(tiles):
        for columns in tiles[: i + 1]:
            tile = C[rows, columns]
            largest = torch.maximum(largest, tile.abs().amax())
            skew = torch.maximum(skew, (tile - C[columns, rows].mT).abs_().amax())
    if not torch.isfinite(largest + skew):
        raise ValueError(
            f"{name} contains NaN or infinity: recompute the statistics it was made from"
        )
    if skew > 1e-5 * largest:
        raise ValueError(
            f"{name} is not symmetric (largest difference {float(skew):.3g}): pass (C + C.T) / 2"
        )


class EquilibratedCholesky:
    """``scale * C + shift * I = D^-1 L L^T D^-1`` with ``D = diag^-1/2`` (Jacobi scaling).

    Jacobi scaling is within a factor ``m`` of the best diagonal preconditioner (van der Sluis,
    1969); MLP keys have coordinate variances that differ by orders of magnitude, so it buys several
    digits for one pass over the matrix.

    ``dtype`` is the precision of the factorisation (m^3/3 flops). With float32 (for devices slow in
    float64) the solves remain float64-accurate: writing ``M = F0^-1 (I + E) F0^-T`` with the
    rounded factor F0, E is small and ``(I + E)^-1/2`` is applied by its binomial series. That is
    iterative refinement in a form that stays symmetric.

    C: [m, m] float32 or float64. Raises ``NotPositiveDefiniteError`` when the matrix is singular to
    working precision.
    """

    @lasting
    def __init__(
        self,
        C: Tensor,
        scale: float = 1.0,
        shift: float = 0.0,
        dtype: torch.dtype = torch.float64,
        name: str = "C",
    ) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(
                f"dtype of the factor must be torch.float64 or torch.float32, got {dtype}"
            )
        check_symmetric(C, name)
        diagonal = scale * C.diagonal().double() + shift
        if not bool(diagonal.any()):
            raise NotPositiveDefiniteError(
                f"{name} is all zeros, so every key was: collect it from texts that reach "
                "this layer, or use Identity"
            )
        if not bool((diagonal > 0).all()):
            dead = torch.nonzero(diagonal <= 0).flatten().tolist()
            raise NotPositiveDefiniteError(
                f"{name} has {len(dead)} non-positive diagonal entries (first: {dead[:5]}): these "
                "units never fired "
                "in the statistics; collect more tokens, or pass ridge=1e-6"
            )
        self.scaling = diagonal.rsqrt()
        self.lower, info = _factored(C, scale, shift, self.scaling.to(dtype))
        pivot = float(self.lower.diagonal().amin() ** 2) if int(info) == 0 else 0.0
        if not pivot > 8 * C.shape[0] * torch.finfo(torch.float64).eps:
            raise NotPositiveDefiniteError(
                f"{name} is singular to working precision (smallest pivot {pivot:.1e} of 1"
                + (f", breakdown at row {int(info)}" if int(info) else "")
                + f"): it was probably collected from fewer than {C.shape[0]} independent tokens; "
                "collect more, pass "
                "ridge=1e-6, use ShrunkCovariance"
                + ("" if dtype == torch.float64 else ", or dtype=torch.float64")
            )
        self._matrix = (C, scale, shift) if dtype == torch.float32 else None
        self._terms = 0 if self._matrix is None else self._series_length()

    @property
    def dim(self) -> int:
        return self.lower.shape[0]

    @property
    def device(self) -> torch.device:
        return self.lower.device

    def whiten(self, X: Tensor) -> Tensor:
        """F X with F^T F = (scale C + shift I)^-1; [m, n] float64 -> [m, n]."""
        return self._correct(self._forward(X))

    def unwhiten(self, Z: Tensor) -> Tensor:
        """F^T Z; [m, n] float64 -> [m, n]."""
        return self._backward(self._correct(Z))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that rebuild the factor with ``from_state``. Only a float64 factor is complete
        without C.
        """
        if self._matrix is not None:
            raise ValueError(
                "a float32 factor also needs C for refinement: cache C, or use dtype=torch.float64"
            )
        return {"cholesky": self.lower, "scaling": self.scaling}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> EquilibratedCholesky:
        """Rebuild a factor from ``state_dict()``; raises ValueError when the tensors do not fit
        together.
        """
        missing = {"cholesky", "scaling"} - set(state)
        if missing:
            raise ValueError(
                f"factor state lacks {sorted(missing)}: recompute it from the covariance"
            )
        lower, scaling = state["cholesky"], state["scaling"]
        square = lower.ndim == 2 and lower.shape == (scaling.numel(),) * 2
        if not square or lower.dtype != torch.float64 or scaling.dtype != torch.float64:
            raise ValueError(
                "factor state is damaged (shapes or dtypes differ): recompute it from the "
                "covariance"
            )
        if not bool(
            (lower.diagonal() > 0).all() & torch.isfinite(lower).all() & (scaling > 0).all()
        ):
            raise ValueError(
                "factor state is damaged (not a Cholesky factor): recompute it from the covariance"
            )
        self = cls.__new__(cls)
        self.lower, self.scaling, self._matrix, self._terms = lower, scaling, None, 0
        return self

    def _forward(self, X: Tensor) -> Tensor:
        X = X * self.scaling[:, None]
        if self._matrix is None:
            return torch.linalg.solve_triangular(self.lower, X, upper=False)
        done: list[Tensor] = []
        for rows in _panels(self.dim):
            panel = self.lower[rows, : rows.stop].double()
            rest = X[rows] - panel[:, : rows.start] @ torch.cat(done) if done else X[rows]
            done.append(torch.linalg.solve_triangular(panel[:, rows.start :], rest, upper=False))
        return torch.cat(done)

    def _backward(self, Z: Tensor) -> Tensor:
        if self._matrix is None:
            return (
                torch.linalg.solve_triangular(self.lower.mT, Z, upper=True) * self.scaling[:, None]
            )
        done: list[Tensor] = []
        for rows in reversed(list(_panels(self.dim))):
            panel = self.lower[rows.start :, rows].double().mT
            rest = (
                Z[rows] - panel[:, rows.stop - rows.start :] @ torch.cat(done) if done else Z[rows]
            )
            done.insert(
                0,
                torch.linalg.solve_triangular(panel[:, : rows.stop - rows.start], rest, upper=True),
            )
        return torch.cat(done) * self.scaling[:, None]

    def _excess(self, Z: Tensor) -> Tensor:
        """E Z = F0 (scale C + shift I) F0^T Z - Z."""
        assert self._matrix is not None
        C, scale, shift = self._matrix
        X = self._backward(Z)
        product = torch.cat([C[rows].double() @ X for rows in _panels(self.dim)])
        return self._forward(scale * product + shift * X) - Z

    def _series_length(self) -> int:
        """Terms of the binomial series that reach float64, from a power estimate of ||E||_2 (fixed
        starting vector).
        """
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.dim, 1, generator=generator, dtype=torch.float64, device="cpu").to(
            self.device
        )
        norm = 0.0
        for _ in range(8):
            v = self._excess(v / v.norm())
            norm = float(v.norm())
        if not norm < 0.125:
            raise NotPositiveDefiniteError(
                "the matrix is too ill-conditioned for a float32 factor (relative error "
                f"{norm:.2g} after rounding): "
                "use dtype=torch.float64"
            )
        return (
            math.ceil(math.log(1e-17) / math.log(2 * norm)) if norm > 0 else 0
        )  # 2: slack of the estimate

    def _correct(self, Z: Tensor) -> Tensor:
        """(I + E)^-1/2 Z, where E is the relative error of a float32 factor; the identity for a
        float64 one.
        """
        total, term = Z, Z
        for k in range(1, self._terms + 1):
            term = self._excess(term) * (0.5 / k - 1)
            total = total + term
        return total


def _factored(C: Tensor, scale: float, shift: float, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of D (scale C + shift I) D, D = diag(scaling) whose dtype it has,
    and the row of its breakdown (0: none); of C the lower triangle is read.

    The matrix is made, factored and kept in one place: with a key dimension of 14,336 each copy
    is 1.6 GB.
    """
    work = fresh(C.shape, scaling.dtype, C.device)
    small = _PANEL if C.device.type != "cpu" else max(1, (1 << 15) // len(C))  # stays in cache
    for rows in _panels(len(C), small):
        part, own = work[rows, : rows.stop], scaling[rows]
        torch.mul(C[rows, : rows.stop], scale * own[:, None], out=part).mul_(scaling[: rows.stop])
        part[:, rows.start :].diagonal().addcmul_(own, own, value=shift)
    upper = work.mT  # columns in a row, as LAPACK has them
    if C.device.type == "cpu":
        info = torch.empty((), dtype=torch.int32, device=C.device)
        torch.linalg.cholesky_ex(upper, upper=True, out=(upper, info))
    else:
        upper, info = torch.linalg.cholesky_ex(upper, upper=True)
    return upper.mT.contiguous(), info


def factor_of_cosines(cosines: Tensor, scale: int) -> Tensor:
    """The Cholesky factor of the cosines [n, n] between keys, refusing dependent ones.

    scale: terms of a cosine's sum, for the roundoff that a pivot must exceed. Raises ValueError
    naming the closest pair of keys and the remedy.
    """
    L, info = torch.linalg.cholesky_ex(cosines)
    if int(info) or float(L.diagonal().amin() ** 2) <= 8 * scale * torch.finfo(L.dtype).eps:
        n = len(cosines)
        cosines = cosines.clone().fill_diagonal_(0)
        i, j = divmod(int(cosines.abs().argmax()), n)
        raise ValueError(
            f"exact writing: keys are dependent (closest: {i} and {j}, cosine "
            f"{float(cosines[i, j]):.6f}); merge edits that share a subject, or use "
            "constraint='soft' without compensation"
        )
    return L
