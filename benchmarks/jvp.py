"""Derivatives in many directions: through the editing solve, and through a model's upper layers.

The solve: our closed form against differentiating a dense `torch.linalg.solve` (what unrolling a
bi-level problem costs). The layers, in SmolLM2's shape: all tangents at once against one
`torch.func.jvp` after the other, and against the double backward that serves where attention has no
forward mode. The peers get the formulas; torch's fused attention refuses.

Predicted before the first run (one thread): gradient through the frozen solve 100x a step (an LU is
55 times the flops), 60x over 25 steps with our solver's own cost counted; with moving keys 4x (a
new solver, then a solve with 200 columns), 32 such gradients at once 10x. A layer's 32 tangents
against the loop: attention 2.5x (half the products, one softmax), RMSNorm and SwiGLU 3x (memory);
two whole layers 2x forward mode, 3x double backward, both bound by the same matrix products.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn import functional as F

from knowedit_kernels import jvp as ours
from knowedit_kernels.jvp import Factors, edit_vjp, reference
from knowedit_kernels.numerics import tangent_error
from knowedit_kernels.solver import Covariance, EditSolver, weight_for_gain

from . import common
from .common import Check, relative_error
from .solve import problem

SAME = 1e-6  # gradient of the proxy and of the unrolled solve
STEPS = 25  # of an optimiser through the solve
BLOCK = 1e-5  # of two layers, each with a dozen float32 roundings


def solve(
    report: common.Report, d: int, d_out: int, n: int, tokens: int, count: int, repeats: int
) -> None:
    """dL/dR, and dL/dK, from gradients g of the edited layer's output at tokens X: Delta X = R A
    X.
    """
    C, K, R = problem(d, d_out, n)
    _, X, g = problem(d, d_out, tokens, seed=1)
    metric = Covariance(C)
    metric = metric.with_weight(weight_for_gain(metric, K))
    M, solver = metric.weight * C.double(), EditSolver(metric, K)

    def unrolled(cotangents: Tensor, keys: bool) -> tuple[Tensor, ...]:
        """The dense solve forward, then a backward pass for every cotangent [d_out, tokens]."""
        leaves = (R.clone().requires_grad_(), K.clone().requires_grad_(keys))
        shift = (leaves[0] @ torch.linalg.solve(M + leaves[1] @ leaves[1].T, leaves[1]).T) @ X
        wanted = leaves if keys else leaves[:1]
        return tuple(
            map(
                torch.stack,
                zip(
                    *(torch.autograd.grad(shift, wanted, c, retain_graph=True) for c in cotangents)
                ),
            )
        )

    def closed(solver: EditSolver, cotangents: Tensor, keys: bool) -> tuple[Tensor, ...]:
        (found,) = edit_vjp([solver], [R], [Factors(cotangents, X.T[None])], keys)
        return (found.residual,) if found.keys is None else (found.residual, found.keys)

    def compare(case: str, cotangents: Tensor, keys: bool, target: float | None = None) -> None:
        def mine() -> tuple[Tensor, ...]:  # keys that move need a new solver every time
            return closed(EditSolver(metric, K) if keys else solver, cotangents, keys)

        def peer() -> tuple[Tensor, ...]:
            return unrolled(cotangents, keys)

        pairs = zip(("dL/dR", "dL/dK"), mine(), peer())
        errors = [Check(f"{name} of unrolled", relative_error(a, b), SAME) for name, a, b in pairs]
        seconds = common.interleave(
            {"unrolled": peer, "ours": mine, "solver": lambda: EditSolver(metric, K)},
            repeats,
            clock=common.processor_time(),
        )
        details: dict[str, Any] = {"n": n, "d": d, "tokens": tokens, "count": len(cotangents)}
        report.compare(
            f"{case}, n = {n}, d = {d}", seconds, "unrolled", errors, target=target, **details
        )
        if not keys:
            whole = {
                "unrolled": [STEPS * s for s in seconds["unrolled"]],
                "ours": [STEPS * s + once for s, once in zip(seconds["ours"], seconds["solver"])],
            }
            name = f"{case}, n = {n}, d = {d}, {STEPS} steps, solver counted"
            report.compare(name, whole, "unrolled", errors, target=target, **details)

    many = torch.stack([problem(1, d_out, tokens, seed=2 + i)[2] for i in range(count)])
    compare("gradient of a target", g[None], False, target=20.0)
    compare("gradient of target and keys", g[None], True)
    compare(f"{count} gradients of target and keys", many, True)


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def one_by_one(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """The peer: a forward-mode pass for every direction."""
    return torch.stack([jvp(function, tuple(primals), along)[1] for along in zip(*tangents)])


def layers(
    report: common.Report,
    tokens: int,
    width: int,
    heads: int,
    shared: int,
    count: int,
    repeats: int,
) -> None:
    d, (q, k, v) = (
        64,
        draw((1, heads, tokens, 64), (1, shared, tokens, 64), (1, shared, tokens, 64)),
    )
    x, weight, gate, up = draw(
        (tokens, heads * d), (heads * d,), (tokens, width), (tokens, width), seed=1
    )
    cases: dict[
        str, tuple[Callable[..., Tensor], list[Tensor], Callable[..., ours.WithTangents]]
    ] = {
        "attention": (reference.attention, [q, k, v], lambda *t: ours.attention_jvp(q, k, v, *t)),
        "rms_norm": (
            lambda x: reference.rms_norm(x, weight.to(x.dtype)),
            [x],
            lambda t: ours.rms_norm_jvp(x, weight, t),
        ),
        "swiglu": (reference.swiglu, [gate, up], lambda *t: ours.swiglu_jvp(gate, up, *t)),
    }
    for name, (formula, primals, fused) in cases.items():
        tangents = draw(*((count, *p.shape) for p in primals), seed=2)
        exact = reference.tangents(formula, primals, tangents)[1]
        errors = [
            Check(
                "of fp64",
                relative_error(fused(*tangents).tangents, exact),
                tangent_error(name, torch.float32),
            )
        ]
        runs: dict[str, Callable[[], object]] = {
            "loop": partial(one_by_one, formula, primals, tangents),
            "ours": partial(fused, *tangents),
        }
        seconds = common.interleave(runs, repeats, clock=common.processor_time())
        report.compare(
            f"{name}, {count} tangents, {tokens} tokens",
            seconds,
            "loop",
            errors,
            count=count,
            tokens=tokens,
        )


class Layers:
    """Two decoder layers of a Llama in plain functions, which take the three operations as
    arguments.
    """

    def __init__(self, width: int, heads: int, shared: int) -> None:
        hidden, self.d = heads * 64, 64
        sizes = [
            (hidden, hidden),
            (shared * 64, hidden),
            (shared * 64, hidden),
            (hidden, hidden),
            (width, hidden),
        ]
        shapes = [*sizes, (width, hidden), (hidden, width)]
        self.weights = [
            [w / w.shape[1] ** 0.5 for w in draw(*shapes, seed=layer)] for layer in range(2)
        ]
        self.norm = torch.ones(hidden)

    def __call__(
        self, h: Tensor, attention: Callable, rms_norm: Callable, swiglu: Callable
    ) -> Tensor:
        norm = self.norm.to(h.dtype)
        for weights in self.weights:
            wq, wk, wv, wo, gate, up, down = (w.to(h.dtype) for w in weights)
            x = rms_norm(h, norm)
            q, k, v = (
                F.linear(x, w).unflatten(-1, (-1, self.d)).transpose(1, 2) for w in (wq, wk, wv)
            )
            h = h + F.linear(attention(q, k, v).transpose(1, 2).flatten(2), wo)
            x = rms_norm(h, norm)
            h = h + F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)
        return h


def block(
    report: common.Report,
    tokens: int,
    width: int,
    heads: int,
    shared: int,
    count: int,
    repeats: int,
) -> None:
    model = Layers(width, heads, shared)
    h, along = draw((1, tokens, heads * 64), (count, 1, tokens, heads * 64))

    def plain(h: Tensor) -> Tensor:
        return model(h, reference.attention, reference.rms_norm, reference.swiglu)

    def fused(h: Tensor) -> Tensor:
        return model(h, ours.attention, ours.rms_norm, ours.swiglu)

    def double_backward() -> Tensor:
        leaf = h.clone().requires_grad_()
        out = plain(leaf)
        u = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, leaf, u, create_graph=True)
        return torch.stack([torch.autograd.grad(pulled, u, t, retain_graph=True)[0] for t in along])

    def forward_mode() -> Tensor:
        return vmap(lambda t: jvp(fused, (h,), (t,))[1])(along)

    exact = reference.tangents(plain, [h], [along])[1]
    errors = [Check("of fp64", relative_error(forward_mode(), exact), BLOCK)]
    runs = {
        "loop": lambda: one_by_one(plain, [h], [along]),
        "double backward": double_backward,
        "ours": forward_mode,
    }
    seconds = common.interleave(runs, repeats, clock=common.processor_time())
    for baseline in ("loop", "double backward"):
        name = f"two layers, {count} tangents, {tokens} tokens, against {baseline}"
        report.compare(name, seconds, baseline, errors, count=count, tokens=tokens)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("jvp", __doc__, 7)
    parser.set_defaults(threads=[1])
    arguments = parser.parse_args(argv)
    quick, repeats = arguments.quick, arguments.repeats
    report = common.report("jvp", arguments, by_processor=True)
    for threads in arguments.threads:
        with common.threads(threads):
            solve(report, *((64, 24, 5, 12, 2) if quick else (1536, 576, 50, 200, 32)), repeats)
            layers(report, *((8, 48, 2, 1, 2) if quick else (128, 1536, 9, 3, 32)), repeats)
            block(report, *((6, 48, 2, 1, 2) if quick else (32, 1536, 9, 3, 32)), repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
