"""Edits of a mixture of experts: one wide linear layer, solved exactly as one n x n system.

A mixture's output is ``sum_j g_j W_j k_j`` over the experts j that fire, so it is one linear layer
whose key is the concatenation of ``g_j k_j``. With the block-diagonal metric ``M = diag_j(M_j)``,

    S = sum_j K_j^T M_j^-1 K_j   [n, n],     Delta_j = R (S + I)^-1 K_j^T M_j^-1,

where K_j has the gate-weighted keys of the rows that expert j receives and zeros elsewhere. The
rank of Delta_j is the number of those rows, and an expert without rows costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from knowedit_kernels.solver.block_metric import BlockMetric
from knowedit_kernels.solver.cholesky import factor_of_cosines
from knowedit_kernels.solver.edit_solver import Constraint
from knowedit_kernels.solver.routed_keys import RoutedKeys


class BlockSolver:
    """`EditSolver` of a mixture: residuals R [d, n] written at `keys`, all experts together.

    The same minimum (`constraint` "soft" or "equality", see there) under ``M + Kp Kp^T``, where M
    is a `BlockMetric` and Kp the `history`, keys of edits that stay in force. History keys are rows
    of the same system whose residual is zero; they join experts, so that an edit may change experts
    that only a history key shares with it.

    Attributes, all float64:
      B [n, n]   (I + S)^-1, or S^-1 under equality.
      S [n, n]   K^T (M + Kp Kp^T)^-1 K.
      G [n, n]   realised shift at the edited keys is R G. gain [n]   diag G.
      experts    those that the edit changes.

    Raises ValueError naming the experts without a metric, or the keys at fault.
    """

    def __init__(
        self,
        metric: BlockMetric,
        keys: RoutedKeys,
        constraint: Constraint = "soft",
        history: RoutedKeys | None = None,
    ) -> None:
        if constraint not in ("soft", "equality"):
            raise ValueError(f"constraint must be 'soft' or 'equality', got {constraint!r}")
        self.keys, self.constraint = keys, constraint
        every = keys if history is None else keys.joined(history)
        self.experts = every.experts
        self.metric = metric.restricted(self.experts) if self.experts else metric
        self._rows = {j: every.rows[j].to(metric.device) for j in self.experts}
        self._inverse: dict[int, Tensor] = {}  # M_j^-1 K_j, [m, n_j]
        size = every.edits
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=metric.device)
        for j in self.experts:
            whitened = self.metric.whiten_block(j, every.keys[j])
            if not bool(torch.isfinite(whitened).all()):
                bad = self._rows[j][~torch.isfinite(whitened).all(0)].tolist()
                raise ValueError(f"expert {j}: keys of edits {bad[:10]} contain NaN or infinity")
            rows = self._rows[j]
            self._gram[rows[:, None], rows] += whitened.mT @ whitened
            self._inverse[j] = self.metric.unwhiten_block(j, whitened)
        noise = torch.ones(size, dtype=torch.float64, device=metric.device)
        if constraint == "equality":
            noise[: self.edits] = 0
            _check_independent(self._gram[: self.edits, : self.edits])
        self._solved = _inverse_of(self._gram + noise.diag())[: self.edits]  # [n, n + history]

    @property
    def edits(self) -> int:
        return self.keys.edits

    @property
    def B(self) -> Tensor:
        return self._solved[:, : self.edits]

    @cached_property
    def S(self) -> Tensor:
        n = self.edits
        own, shared, past = self._gram[:n, :n], self._gram[:n, n:], self._gram[n:, n:]
        eye = torch.eye(len(past), dtype=past.dtype, device=past.device)
        factor = torch.linalg.cholesky(past + eye)
        seen = torch.linalg.solve_triangular(factor, shared.mT, upper=False)
        return own - seen.mT @ seen

    @cached_property
    def G(self) -> Tensor:
        G = self._solved @ self._gram[:, : self.edits]
        return 0.5 * (G + G.mT)

    @property
    def gain(self) -> Tensor:
        return self.G.diagonal()

    def apply(
        self, R: Tensor, dtype: torch.dtype | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """expert -> factors (U [d, n_j], A_j [n_j, m]) with Delta_j = U A_j, cast to ``dtype``
        (default float64).
        """
        spread = self._residual(R) @ self._solved
        factors = {j: (spread[:, self._rows[j]], self._inverse[j].mT) for j in self.experts}
        if dtype is None:
            return factors
        return {j: (U.to(dtype), A.to(dtype)) for j, (U, A) in factors.items()}

    def delta(self, R: Tensor) -> dict[int, Tensor]:
        """expert -> dense Delta_j [d, m] (d m entries each: prefer the factors)."""
        return {j: U @ A for j, (U, A) in self.apply(R).items()}

    def read(self, X: RoutedKeys) -> Tensor:
        """A X [n, t]: how much of each edit's residual arrives at the keys of t tokens; experts
        that the edit does not change add nothing.
        """
        device = self._solved.device
        seen = torch.zeros(len(self._gram), X.edits, dtype=torch.float64, device=device)
        for j in self.experts:
            if j in X.rows:
                columns = X.rows[j].to(device)
                found = self._inverse[j].mT @ self.metric.metrics[j].columns(X.keys[j], "X")
                seen[self._rows[j][:, None], columns] += found
        return self._solved @ seen

    def realised(self, R: Tensor, X: RoutedKeys | None = None) -> Tensor:
        """Shift of the layer's output at the keys X of t tokens, [d, t]; at the edited keys (R G)
        if X is None.
        """
        return self._residual(R) @ (self.G if X is None else self.read(X))

    def jvp(self, dR: Tensor, X: RoutedKeys) -> Tensor:
        """Tangent of the output at the keys X for a change dR [d, n]: dR (A X), [d, t]."""
        return self.realised(dR, X)

    def vjp(self, cotangent: Tensor | Mapping[int, Tensor], X: RoutedKeys | None = None) -> Tensor:
        """dL/dR [d, n].

        From dense cotangents of the Delta_j, expert -> Gamma_j [d, m] (absent: 0), or from output
        gradients g [d, t] at the keys X: g (A X)^T.
        """
        if isinstance(cotangent, Tensor):
            seen = self.G if X is None else self.read(X)
            if cotangent.ndim != 2 or cotangent.shape[1] != seen.shape[1]:
                raise ValueError(
                    f"cotangent must have shape [d, {seen.shape[1]}], got {tuple(cotangent.shape)}"
                )
            return cotangent.to(seen) @ seen.mT
        if not cotangent:
            raise ValueError("vjp needs the cotangent of at least one expert")
        d = next(iter(cotangent.values())).shape[0]
        total = torch.zeros(d, len(self._gram), dtype=torch.float64, device=self._gram.device)
        for j in self.experts:
            if j in cotangent:
                total[:, self._rows[j]] += cotangent[j].to(total) @ self._inverse[j]
        return total @ self._solved.mT

    def price(self, R: Tensor) -> Tensor:
        """Preservation cost, sum_j tr(Delta_j M_j Delta_j^T) and the history's share; scalar."""
        R = self._residual(R)
        return ((R @ self.B) * (R @ self.G if self.constraint == "soft" else R)).sum()

    def compensated(self, U: Tensor) -> Tensor:
        """Residuals that realise exactly U [d, n] at the keys: U + U S^-1."""
        U = self._residual(U)
        if self.constraint == "equality":
            return U
        _check_independent(self.S)
        return U + U @ _inverse_of(self.S)

    def _residual(self, R: Tensor) -> Tensor:
        if R.ndim != 2 or R.shape[1] != self.edits:
            raise ValueError(
                f"residuals must have shape [d, {self.edits}], one column per edit, got "
                f"{tuple(R.shape)}"
            )
        return R.to(self._solved)


def _inverse_of(gram: Tensor) -> Tensor:
    """The inverse of a positive definite matrix [n, n], scaled to a unit diagonal first."""
    norm = gram.diagonal().sqrt()
    unit = gram / norm / norm[:, None]
    return torch.cholesky_inverse(torch.linalg.cholesky(unit)) / norm / norm[:, None]


def _check_independent(gram: Tensor) -> None:
    """Raises ValueError unless keys of this Gram matrix [n, n] can be written exactly."""
    norm = gram.diagonal().sqrt()
    if not bool((norm > 0).all()):
        zero = torch.nonzero(~(norm > 0)).flatten().tolist()
        raise ValueError(
            f"exact writing: keys {zero[:10]} are zero in the metric, or reach no expert; leave "
            "these edits out, or use constraint='soft' without compensation"
        )
    if len(gram):
        factor_of_cosines(gram / norm / norm[:, None], len(gram))
