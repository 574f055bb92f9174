"""A layer and its tangents in many directions: ours, torch's forward mode over all directions, and
one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knowedit_kernels import _dispatch, jvp
from knowedit_kernels.bench.problem import (
    DTYPES,
    Check,
    Operation,
    Parameter,
    Problem,
    Provider,
    generator,
)
from knowedit_kernels.jvp import reference
from knowedit_kernels.numerics import tangent_error

HEAD, GROUP = 64, 4  # entries of a head, query heads that share keys


class Inputs(NamedTuple):
    layer: str
    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]  # [T, *primal]


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "attention": reference.attention,
    "rms_norm": reference.rms_norm,
    "swiglu": reference.swiglu,
}
FUSED: dict[str, Callable[[Inputs], tuple[Tensor, Tensor]]] = {
    "attention": lambda inputs: jvp.attention_jvp(*inputs.primals, *inputs.tangents),
    "rms_norm": lambda inputs: jvp.rms_norm_jvp(
        inputs.primals[0], inputs.primals[1], inputs.tangents[0]
    ),
    "swiglu": lambda inputs: jvp.swiglu_jvp(*inputs.primals, *inputs.tangents),
}


def make(values: dict[str, Any], device: torch.device) -> Problem:
    layer, tokens, d, count, dtype = (
        values["layer"],
        values["tokens"],
        values["d"],
        values["tangents"],
        DTYPES[values["dtype"]],
    )
    random, shared = generator(device), max(1, d // (HEAD * GROUP))
    heads = shared * GROUP
    q, k = (1, heads, tokens, HEAD), (1, shared, tokens, HEAD)
    shapes = {
        "attention": (q, k, k),
        "rms_norm": ((tokens, d), (d,)),
        "swiglu": ((tokens, d), (tokens, d)),
    }[layer]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    primals = tuple(draw(*shape) for shape in shapes)
    tangents = tuple(draw(count, *x.shape) for x in primals[: 1 if layer == "rms_norm" else None])
    inputs = Inputs(layer, primals, tangents)

    @functools.cache
    def expected() -> tuple[Tensor, Tensor]:
        exact = _function(Inputs(layer, tuple(x.double() for x in primals), tangents))
        return reference.tangents(exact, primals[: len(tangents)], tangents)

    def judge(result: tuple[Tensor, Tensor]) -> list[Check]:
        limit = tangent_error(layer, dtype)
        errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(result, expected())]
        return [Check(name, off, limit) for name, off in zip(("function", "tangents"), errors)]

    product = heads * tokens * (tokens + 1) * HEAD  # of scores that a causal query sees
    elements = sum(x.numel() for x in tangents) // max(count, 1)
    work = (2 + 5 * count) * product if layer == "attention" else (1 + count) * 8 * elements
    return Problem(
        shape=values,
        dtype=dtype,
        useful=work,
        nominal=2 * work if layer == "attention" else work,
        traffic=(1 + count) * (elements + primals[0].numel()) * dtype.itemsize,
        inputs=inputs,
        judge=judge,
    )


def _function(inputs: Inputs) -> Callable[..., Tensor]:
    """The formula of those primals that have tangents."""
    formula, rest = FORMULAS[inputs.layer], inputs.primals[len(inputs.tangents) :]
    return lambda *moving: formula(*moving, *rest)


def _ours(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: FUSED[inputs.layer](inputs)


def _torch(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    function, at = _function(inputs), inputs.primals[: len(inputs.tangents)]

    def run() -> tuple[Tensor, Tensor]:
        push = torch.func.vmap(lambda *along: torch.func.jvp(function, at, along)[1])
        return function(*at), push(*inputs.tangents)

    return run


def _loop(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    function, at = _function(inputs), inputs.primals[: len(inputs.tangents)]

    def run() -> tuple[Tensor, Tensor]:
        tangents = [torch.func.jvp(function, at, along)[1] for along in zip(*inputs.tangents)]
        return function(*at), torch.stack(tangents)

    return run


def _decide(problem: Problem) -> _dispatch.Decision:
    _ours(problem.inputs)()
    return _dispatch.explain(f"{problem.inputs.layer}_jvp")


OPERATION = Operation(
    about="a layer and its tangents (torch's fused attention has none: its formula stands in)",
    parameters={
        "layer": Parameter(
            ("attention", "rms_norm", "swiglu"),
            ("attention", "rms_norm", "swiglu"),
            "which",
            tuple(FORMULAS),
        ),
        "tokens": Parameter((128,), (2048,), "positions; attention is causal"),
        "d": Parameter((576,), (4096,), f"channels, in heads of {HEAD} for attention"),
        "tangents": Parameter((16,), (16,), "directions"),
        "dtype": Parameter(("fp32",), ("bf16",), "of everything", tuple(DTYPES)),
    },
    make=make,
    decide=_decide,
    providers={
        "ours": Provider("all directions at once, the function alongside", _ours),
        # every step of the formula rounded to the dtype, and differences of large numbers
        "torch": Provider(
            "forward mode of the formula, vmapped over directions", _torch, slack=64.0
        ),
        "loop": Provider(
            "forward mode of the formula, one direction after the other", _loop, slack=64.0
        ),
    },
)
