"""Second moments of a mixture's experts: ours in one launch, a loop of products over the experts,
and our dense kernel over the same rows as the speed to reach.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knowedit_kernels import _dispatch, moments, testing
from knowedit_kernels.bench.moments import LAUNCH, gated_keys
from knowedit_kernels.bench.problem import (
    DTYPES,
    Check,
    Operation,
    Parameter,
    Problem,
    Provider,
    generator,
)
from knowedit_kernels.moments import reference, triangle
from knowedit_kernels.numerics import MOMENT, MOMENT_FP64

# Peers sum in float32 without care.
_PEER = 1e3
# Figures are of three experts: the one with the most rows, the median one and the last.
_JUDGED = 3


class Inputs(NamedTuple):
    keys: Tensor  # [rows, d], sorted by expert
    offsets: Tensor  # int64 [experts + 1], on the host
    weights: Tensor | None  # [rows]


def _routing(rows: int, experts: int, how: str) -> Tensor:
    """Rows of each expert [experts]: "even" as chance has it, "uneven" falling as 1 / rank."""
    share = torch.ones(experts) if how == "even" else 1 / torch.arange(1.0, experts + 1)
    drawn = torch.multinomial(share, rows, replacement=True, generator=generator(share.device))
    return torch.bincount(drawn, minlength=experts)


def make(values: dict[str, Any], device: torch.device) -> Problem:
    rows, d, experts = values["rows"], values["d"], values["experts"]
    keys = gated_keys(rows, d, device).to(DTYPES[values["dtype"]])
    counts = _routing(rows, experts, values["routing"])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    weights = None
    if values["weights"] == "gates":
        weights = torch.rand(rows, generator=generator(device), device=device)
    budget = MOMENT_FP64 if keys.dtype == torch.float64 else MOMENT
    by_rows = counts.argsort(descending=True)
    judged = sorted({int(by_rows[0]), int(by_rows[experts // 2]), experts - 1})[:_JUDGED]

    @functools.cache
    def expected(expert: int) -> Tensor:
        here = slice(int(offsets[expert]), int(offsets[expert + 1]))
        bounds = torch.tensor([0, here.stop - here.start])
        some = None if weights is None else weights[here]
        return reference.grouped_moment(keys[here], bounds, some)[0]

    @functools.cache
    def pooled() -> Tensor:
        return reference.grouped_moment(keys, torch.tensor([0, rows]), weights)[0]

    def judge(result: Tensor | moments.GroupedSecondMoment) -> list[Check]:
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape == (d, d):
            pairs = [(moments.functional.mirror_(result.clone()), pooled())]
        elif isinstance(result, Tensor) and result.dim() == 3:
            pairs = [(result[j], expected(j)) for j in judged]
        elif isinstance(result, Tensor):
            pairs = [(triangle.symmetric(result[j], d), expected(j)) for j in judged]
        else:
            pairs = [(result.matrix(j), expected(j)) for j in judged]
        grades = [testing.grade_moment(ours, exact) for ours, exact in pairs]
        return [
            Check(
                name,
                max((getattr(grade, name) for grade in grades), key=abs),
                getattr(budget, name),
            )
            for name in ("normwise", "elementwise", "bias")
        ]

    return Problem(
        shape=values,
        dtype=keys.dtype,
        useful=rows * d * (d + 1),
        nominal=2 * rows * d * d,
        traffic=keys.numel() * keys.element_size() + experts * triangle.size(d) * 16,
        inputs=Inputs(keys, offsets, weights),
        judge=judge,
    )


def _sums(inputs: Inputs) -> Tensor:
    size = triangle.size(inputs.keys.shape[1])
    groups = len(inputs.offsets) - 1
    return torch.zeros(groups, size, dtype=torch.float64, device=inputs.keys.device)


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    c = _sums(inputs)

    def run() -> Tensor:
        torch.ops.knowedit.grouped_moment_(
            c, inputs.keys, None, inputs.offsets, inputs.weights, "exact"
        )
        return c

    return run


def _streaming(inputs: Inputs) -> Callable[[], moments.GroupedSecondMoment]:
    groups, dim = len(inputs.offsets) - 1, inputs.keys.shape[1]
    state = moments.GroupedSecondMoment(groups, dim, device=inputs.keys.device)
    return lambda: state.update(inputs.keys, offsets=inputs.offsets, weights=inputs.weights)


def _dense(inputs: Inputs) -> Callable[[], Tensor]:
    """All rows in one sum: what the kernel costs without experts. Gates are multiplied in
    beforehand.
    """
    keys = inputs.keys
    if inputs.weights is not None:
        keys = keys.float() * inputs.weights[:, None]
    d = keys.shape[1]
    c = torch.zeros(d, d, dtype=torch.float64, device=keys.device)

    def run() -> Tensor:
        for part in keys.split(LAUNCH):
            torch.ops.knowedit.second_moment_([c], [part], "exact")
        return c

    return run


def _loop(inputs: Inputs) -> Callable[[], Tensor]:
    """What one writes in torch: for each expert a float32 product, added in float64."""
    keys, weights, d = inputs.keys, inputs.weights, inputs.keys.shape[1]
    groups = len(inputs.offsets) - 1
    c = torch.zeros(groups, d, d, dtype=torch.float64, device=keys.device)
    bounds = inputs.offsets.tolist()

    def run() -> Tensor:
        for j, (start, stop) in enumerate(itertools.pairwise(bounds)):
            wide = keys[start:stop]
            if wide.dtype != torch.float64:
                wide = wide.float()
            if weights is not None:
                wide = wide * weights[start:stop, None]
            c[j].add_(torch.mm(wide.T, wide))
        return c

    return run


def _decide(problem: Problem) -> _dispatch.Decision:
    inputs = problem.inputs
    return _dispatch.explain(
        "grouped_moment_",
        _sums(inputs),
        inputs.keys,
        None,
        inputs.offsets,
        inputs.weights,
        "exact",
    )


OPERATION = Operation(
    about="second moments of a mixture's experts, ragged rows sorted by expert",
    parameters={
        "experts": Parameter((128,), (128,), "experts"),
        "d": Parameter((768,), (768, 2880), "channels of a key"),
        "rows": Parameter((65536,), (524288,), "keys of all experts together"),
        "dtype": Parameter(("bf16",), ("bf16",), "of the keys", tuple(DTYPES)),
        "routing": Parameter(("even",), ("even", "uneven"), "of the rows", ("even", "uneven")),
        "weights": Parameter(("none",), ("none", "gates"), "of the rows", ("none", "gates")),
    },
    make=make,
    decide=_decide,
    providers={
        "ours": Provider("the kernel, one launch", _ours),
        "ours-stream": Provider(
            "GroupedSecondMoment: the kernel with copying, audit and NaN check", _streaming
        ),
        "dense": Provider("our dense kernel over the same rows, one sum", _dense),
        "torch": Provider("a loop of mm in float32 over the experts", _loop, slack=_PEER),
    },
)
