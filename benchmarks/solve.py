"""The editing solve: dense factorisations for every call (the peers) against one cached factor and
n x n systems (ours).

Key statistics are synthetic with the spectrum of SmolLM2's (condition about 10^3); both sides get
the same C, keys and residuals, and both return the dense update `[d_out, d]`; AlphaEdit's batches
are written into a weight instead, ours as factors. Errors are against a dense solve in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from knowedit_kernels import low_rank_update_
from knowedit_kernels.solver import Covariance, EditSolver, Metric, NullSpace, weight_for_gain

from . import common, peers
from .common import Check, relative_error

EXACT = 1e-12  # of the dense formula in float64
PROJECTOR = (
    1e-9  # neighbouring eigenvalues at the threshold are close: 2^-53 |C| / gap is about 10^-11
)
BETA, HISTORY, BATCH = 10.0, 10, 8  # AlphaEdit: L2, batches in sequence, edits a batch


def problem(d: int, d_out: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """C `[d, d]` float32 with eigenvalues over three decades, keys `[d, n]` drawn from it,
    residuals `[d_out, n]`.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    scale = torch.logspace(0, -1.5, d, dtype=torch.float64)
    root = basis * scale
    C = (root @ basis.T) @ (root @ basis.T).T
    K = root @ torch.randn(d, n, generator=generator, dtype=torch.float64)
    return (
        ((C + C.T) / 2).float(),
        K,
        torch.randn(d_out, n, generator=generator, dtype=torch.float64),
    )


def cached(metric: Metric, K: Tensor, R: Tensor) -> Tensor:
    """Ours: from a factored metric to the dense update."""
    return EditSolver(metric, K).delta(R)


def memit(report: common.Report, d: int, d_out: int, counts: Sequence[int], repeats: int) -> None:
    C, keys, residuals = problem(d, d_out, max(counts))
    metric = Covariance(C)
    for n in counts:
        K, R = keys[:, :n].contiguous(), residuals[:, :n].contiguous()
        weight = weight_for_gain(metric, K)
        soft = metric.with_weight(weight)
        dense, ours = partial(peers.memit_update, C, weight, K, R), partial(cached, soft, K, R)
        seconds = common.interleave(
            {"dense": dense, "ours": ours, "factor": partial(Covariance, C)},
            repeats,
            clock=common.processor_time(),
        )
        error = Check("of dense fp64", relative_error(ours(), dense()), EXACT)
        name = f"MEMIT solve, n = {n}, d = {d}"
        report.compare(
            f"{name}, factor cached", seconds, "dense", [error], target={8: 15.0}.get(n), n=n, d=d
        )
        first = {
            **seconds,
            "first call": [a + b for a, b in zip(seconds["ours"], seconds["factor"])],
        }
        report.compare(
            f"{name}, factor counted", first, "dense", [error], ours="first call", n=n, d=d
        )


def emmet(report: common.Report, d: int, d_out: int, n: int, repeats: int) -> None:
    C, K, R = problem(d, d_out, n)
    metric = Covariance(C)

    def ours() -> Tensor:
        return EditSolver(metric, K, "equality").delta(R)

    seconds = common.interleave(
        {"dense": lambda: peers.emmet_update(C, K, R), "ours": ours},
        repeats,
        clock=common.processor_time(),
    )
    error = Check("of dense fp64", relative_error(ours(), peers.emmet_update(C, K, R)), EXACT)
    report.compare(
        f"EMMET solve, n = {n}, d = {d}, factor cached", seconds, "dense", [error], n=n, d=d
    )


def rome(report: common.Report, d: int, repeats: int) -> None:
    C, K, _ = problem(d, 1, 1)
    seconds = common.interleave(
        {"inverse": lambda: peers.rome_inverse(C), "ours": lambda: Covariance(C)},
        repeats,
        clock=common.processor_time(),
    )
    exact = torch.linalg.solve(C.double(), K)
    error = Check("of dense fp64", relative_error(Covariance(C).inverse(K), exact), EXACT)
    theirs = relative_error(peers.rome_inverse(C) @ K.float(), exact)
    report.compare(
        f"ROME preparation, d = {d}", seconds, "inverse", [error], d=d, baseline_error=theirs
    )


def alphaedit(report: common.Report, d: int, d_out: int, repeats: int) -> None:
    """Ten batches of eight edits in sequence, each protecting the earlier ones and written into a
    float32 weight before the next (ours as factors, theirs as a dense update); then the projector
    itself."""
    C, keys, residuals = problem(d, d_out, HISTORY * BATCH)
    threshold = float(
        torch.linalg.eigvalsh(C.double())[int(0.7 * d) :][:2].mean()
    )  # between two eigenvalues
    space = NullSpace(C, beta=BETA, threshold=threshold)
    exact_P = peers.null_space_projector(C.double(), threshold)
    pairs = list(zip(keys.split(BATCH, 1), residuals.split(BATCH, 1)))
    narrow = [(K.float(), R.float()) for K, R in pairs]

    weight = torch.zeros(d_out, d)

    def dense(P: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        cache, updates = torch.zeros_like(P), []
        for K, R in pairs:
            updates.append(peers.alphaedit_update(P, cache, BETA, K, R))
            weight.add_(updates[-1])
        return updates

    def ours() -> list[tuple[Tensor, Tensor]]:
        metric: Metric = space
        updates = []
        for K, R in pairs:
            updates.append(EditSolver(metric, K).apply(R))
            left, right = (factor.float() for factor in updates[-1])
            low_rank_update_(weight, left, right.mT.contiguous())
            metric = metric.with_history(K)
        return updates

    seconds = common.interleave(
        {"dense": lambda: dense(exact_P.float(), narrow), "ours": ours},
        repeats,
        clock=common.processor_time(),
    )
    exact = torch.stack(dense(exact_P, pairs))
    error = Check(
        "of dense fp64", relative_error(torch.stack([R @ A for R, A in ours()]), exact), EXACT
    )
    theirs = relative_error(torch.stack(dense(exact_P.float(), narrow)), exact)
    name = f"AlphaEdit, {HISTORY} batches of {BATCH}, d = {d}"
    report.compare(
        name, seconds, "dense", [error], target=30.0, d=d, baseline_error=theirs, rank=space.rank
    )
    seconds = common.interleave(
        {
            "svd": lambda: peers.null_space_projector(C, threshold),
            "ours": lambda: NullSpace(C, beta=BETA, threshold=threshold),
        },
        max(1, repeats // 3),
        clock=common.processor_time(),
    )
    projected = exact_P @ keys
    error = Check(
        "of an SVD in fp64", relative_error(BETA * space.inverse(keys), projected), PROJECTOR
    )
    theirs = relative_error(peers.null_space_projector(C, threshold).double() @ keys, projected)
    report.compare(
        f"AlphaEdit projector, d = {d}", seconds, "svd", [error], d=d, baseline_error=theirs
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("solve", __doc__, 7)
    parser.add_argument(
        "--dim", type=int, default=1536, help="key dimension d (default: 1536, SmolLM2's)"
    )
    arguments = parser.parse_args(argv)
    d, counts = (96, (1, 8)) if arguments.quick else (arguments.dim, (1, 8, 100))
    d_out = max(8, d * 3 // 8)
    report = common.report("solve", arguments, by_processor=True)
    for count in arguments.threads:
        with common.threads(count):
            memit(report, d, d_out, counts, arguments.repeats)
            emmet(report, d, d_out, 8, arguments.repeats)
            rome(report, d, arguments.repeats)
            alphaedit(report, d, d_out, arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
