"""Tools that hold a kernel to its budget: grading against float64, poisoned buffers, sentinel
margins.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from knowedit_kernels.numerics import Budget


@dataclass(frozen=True)
class Grade:
    """Measured error of a result: see `numerics` for the three measures. NaN anywhere makes them
    NaN.
    """

    normwise: float
    elementwise: float
    bias: float

    def failures(self, budget: Budget) -> list[str]:
        """One line per exceeded limit; empty when the result is within budget. NaN is a failure."""
        limits = {
            name: (getattr(self, name), getattr(budget, name))
            for name in ("normwise", "elementwise", "bias")
        }
        return [
            f"{name} {got:.3g} > {limit:.3g}"
            for name, (got, limit) in limits.items()
            if not abs(got) <= limit
        ]

    def check(self, budget: Budget, what: str = "result") -> None:
        """Raises AssertionError naming every exceeded limit with its figure."""
        if failures := self.failures(budget):
            raise AssertionError(f"{what} misses its budget: {'; '.join(failures)}")


def moment_scale(reference: torch.Tensor) -> torch.Tensor:
    """sqrt(c_ii c_jj) [d, d] of a second moment [d, d]: the natural size of its entries."""
    root = reference.diagonal().clamp_min(0).sqrt()
    return torch.outer(root, root)


def grade(
    result: torch.Tensor, reference: torch.Tensor, scale: torch.Tensor | None = None
) -> Grade:
    """Grades `result` against the float64 `reference` of the same shape.

    `scale` (same shape) is the size each entry's error is measured in; default: the reference's
    root mean square. `bias` is the mean signed error in that scale, over the diagonal where `scale`
    is a moment's (square matrix), over all entries otherwise. Raises ValueError on a shape
    mismatch.
    """
    if result.shape != reference.shape:
        raise ValueError(
            f"result has shape {tuple(result.shape)}, reference {tuple(reference.shape)}"
        )
    if reference.numel() == 0:
        return Grade(0.0, 0.0, 0.0)
    reference = reference.double().cpu()
    error = result.double().cpu() - reference
    norm = reference.norm().item()
    if scale is None:
        unit = torch.full_like(
            reference, max(norm / reference.numel() ** 0.5, torch.finfo(torch.float64).tiny)
        )
    else:
        # a zero scale means the entry must be exact: any error there counts as infinite
        unit = scale.double().cpu()
    relative = torch.where(error == 0, error, error / unit)
    signed = relative.diagonal() if scale is not None and relative.dim() == 2 else relative
    return Grade(
        normwise=error.norm().item() / norm if norm else (0.0 if not error.any() else float("inf")),
        elementwise=relative.abs().max().item(),
        bias=signed.mean().item(),
    )


def grade_moment(result: torch.Tensor, reference: torch.Tensor) -> Grade:
    """Grades a second moment [d, d] in the scale sqrt(c_ii c_jj)."""
    return grade(result, reference, moment_scale(reference.double().cpu()))


def poisoned_empty(
    *shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> torch.Tensor:
    """An output buffer filled with NaN (integers: the largest value), so that an unwritten entry
    shows.
    """
    value = (
        float("nan")
        if dtype.is_floating_point
        else (True if dtype == torch.bool else torch.iinfo(dtype).max)
    )
    return torch.full(shape, value, dtype=dtype, device=device)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within the scope `torch.empty` and `torch.empty_like` return poisoned memory."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            return tensor
        return tensor.copy_(poisoned_empty(*tensor.shape, dtype=tensor.dtype, device=tensor.device))

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
    ):
        yield


@dataclass(frozen=True)
class Guarded:
    """A tensor inside a larger buffer whose margins hold a sentinel; `check()` proves them
    untouched.
    """

    tensor: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor
    inside: torch.Tensor

    def check(self) -> None:
        """Raises AssertionError when anything outside the tensor was written."""
        changed = (self.buffer != self.before) & ~self.inside
        if changed.any():
            raise AssertionError(f"{int(changed.sum())} elements written outside the tensor")


def guarded(tensor: torch.Tensor, margin: int = 64, row_margin: int = 0) -> Guarded:
    """Copies `tensor` into the middle of a sentinel-filled buffer.

    `margin` elements surround it on both ends; `row_margin` extra elements follow every row of the
    last dimension (so the view is strided). The sentinel is -77, exact in every dtype we use.
    """
    *rest, width = tensor.shape
    rows = math.prod(rest)
    pitch = width + row_margin
    buffer = torch.full((2 * margin + rows * pitch,), -77, dtype=tensor.dtype, device=tensor.device)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    strides = [pitch]
    for size in reversed(rest[1:]):
        strides.insert(0, strides[0] * size)
    layout = ((*rest, width), (*strides[: len(rest)], 1), margin)
    view = buffer.as_strided(*layout)
    view.copy_(tensor)
    inside.as_strided(*layout).fill_(True)
    return Guarded(view, buffer, buffer.clone(), inside)
