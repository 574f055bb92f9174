"""The specification in float64, and the gate that every implementation must pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit_kernels.lowrank.rounding import random_bits, round_stochastic
from knowedit_kernels.numerics import UpdateBudget


def updated(
    base: Tensor, U: Tensor, V: Tensor, alpha: float, rounding: str, seed: int = 0
) -> Tensor:
    """round(base + alpha U V^T), the sum in float64: base [out, in], U [out, r], V [in, r] ->
    base's dtype.
    """
    exact = base.double() + alpha * (U.double() @ V.double().mT)
    if rounding == "stochastic":
        return round_stochastic(
            exact.float(), random_bits(slice(0, len(base)), base.shape[1], seed, 0), base.dtype
        )
    return exact.to(base.dtype)


def place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` (its last place) at float64 magnitudes ``x``."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.frexp(x.abs().clamp_min(info.tiny)).exponent.double() - 1) * info.eps


@dataclass(frozen=True)
class UpdateGrade:
    """Error of an update in last places of the result: the largest, and the mean in the direction
    of the result.

    Nearest rounding gives at most 0.5 and about 0; truncation gives up to 1 and -0.5.
    """

    largest: float
    bias: float

    def failures(self, budget: UpdateBudget) -> list[str]:
        """Exceeded limits, one line each; NaN fails."""
        pairs = (("largest", self.largest, budget.largest), ("bias", abs(self.bias), budget.bias))
        return [
            f"{name} {got:.3g} > {limit:.3g} places"
            for name, got, limit in pairs
            if not got <= limit
        ]


def grade_update(
    result: Tensor, base: Tensor, U: Tensor, V: Tensor, alpha: float = 1.0
) -> UpdateGrade:
    """Grades ``result`` against base + alpha U V^T in float64.

    A place is at least ``max(eps / 8, 2^-22)`` of |base| + |alpha U| |V|^T: where these cancel, the
    arithmetic before rounding (float32, or split bfloat16 on tensor cores) cannot know the last
    places of what is left.
    """
    U, V, base = U.double() * alpha, V.double(), base.double()
    exact, size = base + U @ V.mT, base.abs() + U.abs() @ V.abs().mT
    floor = size * max(torch.finfo(result.dtype).eps / 8, 2.0**-22)
    error = (result.double() - exact) / torch.maximum(place(exact, result.dtype), floor)
    return UpdateGrade(float(error.abs().max()), float((error * exact.sign()).mean()))
