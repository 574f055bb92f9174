"""Derivatives of what several layers, written one after the other, make of the residual that they
share: `spread_jvp` and `spread_vjp`, in many directions at once, and the gain of all together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from knowedit_kernels._arguments import need_lists
from knowedit_kernels.solver import EditSolver

Spread = Literal["linear", "sqrt", "full"]
Through = Sequence[Callable[[Tensor], Tensor] | None]


def spread_shares(layers: int, how: Spread = "linear") -> list[float]:
    """The share of what is still missing that each of ``layers`` layers writes, in the order they
    are written.

    "linear": 1 / remaining (MEMIT); "sqrt": 1 / sqrt(remaining) (PMET); "full": all of it, each
    time (BLUE).
    """
    rules: dict[str, Callable[[int], float]] = {
        "linear": lambda left: 1 / left, "sqrt": lambda left: 1 / math.sqrt(left),
        "full": lambda left: 1.0,
    }  # fmt: skip
    if not isinstance(how, str) or how not in rules:
        raise ValueError(f"how must be one of {', '.join(rules)}, got {how!r}")
    return [rules[how](layers - i) for i in range(layers)]


def effective_gain(solvers: Sequence[EditSolver], how: Spread = "linear") -> Tensor:
    """G_eff [n, n]: several layers realise R G_eff at the edited keys, I - prod (I - share_i G_i).

    Keys are those before the edit, and layers below the last pass a shift of the residual stream on
    unchanged.
    """
    _check_chain(solvers)
    return compound_gain([solver.G for solver in solvers], how)


def compound_gain(gains: Sequence[Tensor], how: Spread = "linear") -> Tensor:
    """`effective_gain` of gains [n, n] themselves, in the order in which the layers are written."""
    missing = eye = torch.eye(len(gains[0]), dtype=gains[0].dtype, device=gains[0].device)
    for gain, share in zip(gains, spread_shares(len(gains), how)):
        missing = missing - share * (missing @ gain)
    return eye - missing


class SpreadTangents(NamedTuple):
    """Tangents of every layer's residual ([..., d, n] each: with `EditSolver.A`, of its Delta) and
    of the realised shift.
    """

    residuals: list[Tensor]
    realised: Tensor


def spread_jvp(
    solvers: Sequence[EditSolver],
    d_residual: Tensor,
    how: Spread = "linear",
    through: Through | None = None,
) -> SpreadTangents:
    """From the residual R [..., d, n] that is planned at the last layer to what each layer writes,
    and what arrives.

        E_0 = R,   R_i = share_i E_i,   E_(i+1) = E_i - J_i (R_i G_i),   realised = R - E_L

    The map is linear, so this is both it and its tangent, over any leading dimensions (directions).
    ``through[i]`` applies J_i, how a shift [..., d, n] of layer i's output at the edited positions
    arrives at the last layer (None: unchanged).
    Raises ValueError. Source: our derivation (`jvp/README.md`).
    """
    missing = start = _spread_input(solvers, d_residual, "d_residual")
    written = []
    for solver, share, apply in zip(
        solvers, spread_shares(len(solvers), how), _through(solvers, through)
    ):
        written.append(share * missing)
        missing = missing - apply(written[-1] @ solver.G)
    return SpreadTangents(written, start - missing)


def spread_vjp(
    solvers: Sequence[EditSolver],
    residuals: Sequence[Tensor | None] | None = None,
    realised: Tensor | None = None,
    how: Spread = "linear",
    through: Through | None = None,
) -> Tensor:
    """The transpose of `spread_jvp`: dL/dR [..., d, n] from the gradients of what each layer writes
    and of what arrives.

    ``through[i]`` applies J_i^T here. Raises ValueError.
    """
    _check_chain(solvers)
    parts = [None] * len(solvers) if residuals is None else list(residuals)
    if len(parts) != len(solvers):
        raise ValueError(f"{len(solvers)} layers, but gradients of {len(parts)} residuals")
    given = [x for x in (*parts, realised) if x is not None]
    if not given:
        raise ValueError("nothing to pull back: give residuals or realised")
    for x in given:
        _spread_input(solvers, x, "a gradient")
    direct = (
        torch.zeros_like(given[0], dtype=torch.float64) if realised is None else realised.double()
    )
    pulled = -direct
    steps = zip(solvers, spread_shares(len(solvers), how), _through(solvers, through), parts)
    for solver, share, apply, part in reversed(list(steps)):
        write = -(apply(pulled) @ solver.G)
        pulled = pulled + share * (write if part is None else write + part.double())
    return direct + pulled


def _check_chain(solvers: Sequence[EditSolver]) -> None:
    need_lists(solvers=solvers)
    if not solvers:
        raise ValueError("no layers: give at least one solver")
    if len(counts := {solver.edits for solver in solvers}) > 1:
        raise ValueError(f"the layers write different numbers of edits: {sorted(counts)}")


def _spread_input(solvers: Sequence[EditSolver], x: Tensor, name: str) -> Tensor:
    _check_chain(solvers)
    if x.ndim < 2 or x.shape[-1] != solvers[0].edits:
        raise ValueError(
            f"{name} must have shape [..., d, {solvers[0].edits}], got {list(x.shape)}"
        )
    return x.to(solvers[0].A)


def _through(
    solvers: Sequence[EditSolver], through: Through | None
) -> list[Callable[[Tensor], Tensor]]:
    if through is not None and len(through) != len(solvers):
        raise ValueError(
            f"through has {len(through)} maps for {len(solvers)} layers: give one (or None) per "
            "layer"
        )
    return [
        (lambda x: x) if apply is None else apply for apply in (through or [None] * len(solvers))
    ]
