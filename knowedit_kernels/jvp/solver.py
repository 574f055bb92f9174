"""Derivatives of the editing solve in many directions at once, in closed form: only skinny
matrices, one solve a layer.

Delta_l = R_l A_l(K_l) for each layer l (`EditSolver`). `edit_jvp` and `edit_vjp` differentiate in
residuals and keys; `spread.py` in the residual that several layers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knowedit_kernels._arguments import need_lists, need_tensors
from knowedit_kernels.solver import EditSolver


class Factors(NamedTuple):
    """T matrices left_t right_t of a weight's shape [d, m], never formed: left [T, d, r], right [T
    or 1, r, m], float64.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """[T, d, m]."""
        return self.left @ self.right

    def at(self, X: Tensor) -> Tensor:
        """What they do to keys X [m, t]: [T, d, t]."""
        return self.left @ (self.right @ X.to(self.right))


class EditCotangents(NamedTuple):
    """Gradients of one layer's residual [T, d, n] and keys [T, m, n] (None if not asked for),
    float64.
    """

    residual: Tensor
    keys: Tensor | None


def edit_jvp(
    solvers: Sequence[EditSolver],
    residuals: Sequence[Tensor],
    d_residuals: Sequence[Tensor] | None = None,
    d_keys: Sequence[Tensor] | None = None,
) -> list[Factors]:
    """Tangents of every layer's Delta = R A(K), as factors of rank n (2n where keys move), for T
    directions at once.

    solvers, residuals: one per layer, R [d, n]. d_residuals: [T, d, n] per layer; d_keys: [T, m, n]
    per layer; None is zero, not both. One solve with T n columns a layer. Where R depends on K (R =
    Z - W K), so must ``d_residuals``.

        dDelta = (dR - R A dK) A + (R B) (H^-1 dK)^T,    H^-1 X = M^-1 (X - K A X)

    Raises ValueError naming the layer. Source: our derivation (`jvp/README.md`).
    """
    if d_residuals is None and d_keys is None:
        raise ValueError("nothing to differentiate along: give d_residuals or d_keys")
    given = {"d_residuals": d_residuals, "d_keys": d_keys}
    _per_layer(solvers, **{name: values for name, values in given.items() if values is not None})
    out = []
    for layer, (solver, R) in enumerate(_per_layer(solvers, residuals=residuals)):
        R = _fitting(R, (None, solver.edits), solver, f"residuals[{layer}]")
        dR = None
        if d_residuals is not None:
            dR = _fitting(
                d_residuals[layer], (None, len(R), solver.edits), solver, f"d_residuals[{layer}]"
            )
        if d_keys is None:
            assert dR is not None
            out.append(Factors(dR, solver.A[None]))
            continue
        dK = _fitting(
            d_keys[layer], (None, solver.metric.dim, solver.edits), solver, f"d_keys[{layer}]"
        )
        if dR is not None and len(dR) != len(dK):
            raise ValueError(
                f"layer {layer} has {len(dR)} directions of residuals and {len(dK)} of keys"
            )
        moved = (
            _h_inverse(solver, dK.movedim(0, 1).flatten(1))
            .unflatten(1, (len(dK), solver.edits))
            .movedim(0, 2)
        )  # [T, n, m]
        drift = R @ (solver.A @ dK)
        left = torch.cat(
            [-drift if dR is None else dR - drift, (R @ solver.B).expand(len(dK), -1, -1)], 2
        )
        out.append(Factors(left, torch.cat([solver.A.expand(len(dK), -1, -1), moved], 1)))
    return out


def edit_vjp(
    solvers: Sequence[EditSolver],
    residuals: Sequence[Tensor],
    cotangents: Sequence[Factors],
    keys: bool = True,
) -> list[EditCotangents]:
    """Gradients of every layer's residual and keys for T cotangents of Delta at once: the transpose
    of `edit_jvp`.

    cotangents: dL/dDelta per layer as factors; with output gradients g [T, d, t] at keys X [m, t]
    that is ``Factors(g, X.T[None])``, and the solve then has t columns, however many T.
    ``keys=False`` freezes the keys (the
    structural gradient proxy: no solve at all).

        dL/dR = Gamma A^T,    dL/dK = H^-1 Gamma^T R B - A^T R^T Gamma A^T    (not counting R's own
        dependence on K)

    Raises ValueError naming the layer. Source: our derivation (`jvp/README.md`).
    """
    out = []
    for layer, (solver, R, (left, right)) in enumerate(
        _per_layer(solvers, residuals=residuals, cotangents=cotangents)
    ):
        R = _fitting(R, (None, solver.edits), solver, f"residuals[{layer}]")
        left = _fitting(left, (None, len(R), None), solver, f"cotangents[{layer}].left")
        right = _fitting(
            right, (None, left.shape[2], solver.metric.dim), solver, f"cotangents[{layer}].right"
        )
        if len(right) not in (1, len(left)):
            raise ValueError(
                f"cotangents[{layer}] has {len(left)} left and {len(right)} right factors"
            )
        read = right @ solver.A.mT  # [T or 1, r, n]
        if not keys:
            out.append(EditCotangents(left @ read, None))
            continue
        solved = (
            _h_inverse(solver, right.movedim(2, 0).flatten(1))
            .unflatten(1, right.shape[:2])
            .movedim(1, 0)
        )  # [., m, r]
        through = R.mT @ left  # [T, n, r]
        out.append(
            EditCotangents(
                left @ read, solved @ (through.mT @ solver.B) - solver.A.mT @ (through @ read)
            )
        )
    return out


def _h_inverse(solver: EditSolver, X: Tensor) -> Tensor:
    """(M + K K^T)^-1 X; under equality its limit, which annihilates K."""
    return solver.metric.inverse(X - solver.K @ (solver.A @ X))


def _per_layer(solvers: Sequence[EditSolver], **lists: Sequence) -> list[tuple]:
    need_lists(solvers=solvers, **lists)
    for name, values in lists.items():
        if len(values) != len(solvers):
            raise ValueError(
                f"{len(solvers)} solvers, but {len(values)} {name}: give one per layer, in lists"
            )
    return list(zip(solvers, *lists.values()))


def _fitting(x: Tensor, shape: tuple[int | None, ...], solver: EditSolver, name: str) -> Tensor:
    """`x` like the solver's tensors; raises ValueError unless it fits `shape` (None: any size)."""
    need_tensors(**{name: x})
    if x.ndim != len(shape) or any(size not in (None, got) for size, got in zip(shape, x.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
    return x.to(solver.A)
