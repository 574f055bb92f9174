"""Low-rank updates W += U V^T with one rounding: ours, torch's composition, and what MEMIT's code
does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knowedit_kernels import _dispatch, lowrank
from knowedit_kernels.bench.problem import (
    DTYPES,
    Check,
    Operation,
    Parameter,
    Problem,
    Provider,
    generator,
)
from knowedit_kernels.lowrank.reference import grade_update
from knowedit_kernels.numerics import UPDATE_NEAREST, UPDATE_STOCHASTIC

EDIT = 1e-3  # |update| / |W|, a typical edit


class Inputs(NamedTuple):
    W: Tensor  # [rows, d]
    U: Tensor  # [rows, rank] float32
    V: Tensor  # [d, rank] float32
    rounding: str


def make(values: dict[str, Any], device: torch.device) -> Problem:
    rows, d, rank, rounding = (values[name] for name in ("rows", "d", "rank", "rounding"))
    random = generator(device)
    W = torch.randn(rows, d, generator=random, device=device).mul_(0.02).to(DTYPES[values["dtype"]])
    U = torch.randn(rows, rank, generator=random, device=device) * (0.02 * EDIT / rank**0.5)
    V = torch.randn(d, rank, generator=random, device=device)
    budget = UPDATE_STOCHASTIC if rounding == "stochastic" else UPDATE_NEAREST[W.dtype]

    def judge(result: Tensor) -> list[Check]:
        grade = grade_update(result, W, U, V)
        return [
            Check("largest", grade.largest, budget.largest),
            Check("bias", grade.bias, budget.bias),
        ]

    return Problem(
        shape=values,
        dtype=W.dtype,
        useful=2 * rows * d * rank,
        nominal=2 * rows * d * rank,
        traffic=2 * W.numel() * W.element_size() + 4 * (U.numel() + V.numel()),
        inputs=Inputs(W, U, V, rounding),
        judge=judge,
    )


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    W = inputs.W.clone()

    def run() -> Tensor:
        lowrank.low_rank_update_(W, inputs.U, inputs.V, rounding=inputs.rounding)
        return W

    return run


def _kernel(inputs: Inputs) -> Callable[[], Tensor]:
    W = inputs.W.clone()
    sums = torch.empty(1, 5, dtype=torch.float64, device=W.device)

    def run() -> Tensor:
        torch.ops.knowedit.low_rank_update_(
            [W], [], [inputs.U], [inputs.V], inputs.rounding, 0, [], [], True, sums, [], None
        )
        return W

    return run


def _torch(inputs: Inputs) -> Callable[[], Tensor]:
    """The best that torch composes: in place where W has the arithmetic's dtype."""
    W = inputs.W.clone()
    if W.dtype == torch.float32:
        return lambda: W.addmm_(inputs.U, inputs.V.T)
    return lambda: W.copy_(torch.addmm(W.float(), inputs.U, inputs.V.T))


def _rome(inputs: Inputs) -> Callable[[], Tensor]:
    W = inputs.W.clone()

    def run() -> Tensor:
        update = inputs.U.double() @ inputs.V.double().T
        return W.add_(update.to(W.dtype))

    return run


def _nearest_only(inputs: Inputs) -> str | None:
    return None if inputs.rounding == "nearest" else "rounds to nearest only"


def _decide(problem: Problem) -> _dispatch.Decision:
    W, U, V, rounding = problem.inputs
    sums = torch.empty(1, 5, dtype=torch.float64, device=W.device)
    return _dispatch.explain(
        "low_rank_update_", [W], [], [U], [V], rounding, 0, [], [], True, sums, []
    )


OPERATION = Operation(
    about="low-rank weight updates W += U V^T",
    parameters={
        "rows": Parameter((576,), (4096,), "output channels of W"),
        "d": Parameter((1536,), (14336,), "input channels of W"),
        "rank": Parameter((8, 100), (8, 100), "columns of U and V"),
        "dtype": Parameter(("bf16",), ("bf16",), "of W", ("bf16", "fp16", "fp32")),
        "rounding": Parameter(
            ("nearest",), ("nearest",), "of the result", ("nearest", "stochastic")
        ),
    },
    make=make,
    decide=_decide,
    providers={
        "ours": Provider("low_rank_update_: checks, one pass over W, report", _ours),
        "ours-kernel": Provider("the op alone", _kernel),
        "torch": Provider(
            "addmm in float32 (in place for float32), one rounding", _torch, _nearest_only
        ),
        # the update is rounded before it is added: several places where the two cancel
        "rome": Provider(
            "MEMIT: dense float64 update, cast, added", _rome, _nearest_only, slack=8.0
        ),
    },
)
