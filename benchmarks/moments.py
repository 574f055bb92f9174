"""Second moment C += KᵀK on the CPU against the best of torch, numpy and scipy, with the error of
each against float64.

Baselines, in float32 (bfloat16 keys are widened first, which is the only way to float32-grade
output on a CPU): `torch.mm(k.T, k)`, numpy's `k.T @ k`, and where scipy is installed its ssyrk; the
row is compared with the one whose median is lowest. torch's own bfloat16 product (bfloat16 output)
is shown as a control: the accuracy budget must reject it. "kernel" is the op alone, "fast" the same
with precision="fast"; "SecondMoment" adds the NaN check, the audit and the streaming buffer.

numpy's and scipy's OpenBLAS take OPENBLAS_NUM_THREADS threads, whatever --threads says: set it too.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from knowedit_kernels import explain
from knowedit_kernels.moments import SecondMoment, second_moment_
from knowedit_kernels.numerics import MOMENT, MOMENT_FAST, Budget
from knowedit_kernels.testing import grade_moment

from . import common
from .common import Check

SIZES = {576: 16384, 1536: 8192, 4096: 4096}  # d -> tokens
TARGETS = {torch.float32: 1.0, torch.bfloat16: 1.0}
STRETCH = {torch.bfloat16: 1.8}  # where the CPU multiplies bf16


def gated_keys(tokens: int, d: int, seed: int = 0) -> Tensor:
    """Keys shaped like a gated MLP's: heavy tails, channels of very different size, a mean;
    `[tokens, d]` float32.
    """
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, tokens, d, generator=generator).unbind()
    return (
        torch.nn.functional.silu(gate) * up * torch.rand(d, generator=generator).add(0.1).pow(2)
        + 0.01
    )


def checks_of(result: Tensor, reference: Tensor, budget: Budget = MOMENT) -> list[Check]:
    grade = grade_moment(result, reference)
    return [
        Check("normwise", grade.normwise, budget.normwise),
        Check("elementwise", grade.elementwise, budget.elementwise),
        Check("bias", abs(grade.bias), budget.bias),
    ]


def widened(k: Tensor) -> Tensor:
    wide = k.float()
    return torch.mm(wide.T, wide)


def numpy_product(k: Tensor) -> Any:
    wide = k.float().numpy()
    return wide.T @ wide


def scipy_syrk(k: Tensor, c: Tensor) -> None:
    """c [d, d] float32 += k^T k by BLAS, in place: its Fortran order is c transposed."""
    from scipy.linalg import blas

    blas.ssyrk(1.0, k.float().numpy().T, beta=1.0, c=c.numpy().T, lower=0, overwrite_c=1)


def baselines(k: Tensor) -> dict[str, Callable[[], Any]]:
    """What numpy, torch and, where it is installed, scipy do with keys [tokens, d]."""
    runs: dict[str, Callable[[], Any]] = {
        "torch.mm": partial(widened, k),
        "numpy": partial(numpy_product, k),
    }
    if importlib.util.find_spec("scipy"):
        runs["scipy ssyrk"] = partial(scipy_syrk, k, torch.zeros(k.shape[1], k.shape[1]))
    return runs


def kernel(c: Tensor, k: Tensor, precision: str = "exact") -> None:
    torch.ops.knowedit.second_moment_([c], [k], precision)


def case(report: common.Report, d: int, tokens: int, dtype: torch.dtype, repeats: int) -> None:
    """All rows of one size and dtype at the current number of threads."""
    k = gated_keys(tokens, d).to(dtype)
    wide = k.double()
    reference = wide.T @ wide
    scratch, state = torch.zeros(d, d, dtype=torch.float64), SecondMoment(d)
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    peers = baselines(k)
    runs: dict[str, Callable[[], Any]] = {
        **peers,
        "kernel": partial(kernel, scratch, k),
        "fast": partial(kernel, scratch, k, "fast"),
        "SecondMoment": partial(state.update, k),
    }
    if dtype == torch.bfloat16:
        runs["torch bf16 out"] = partial(torch.mm, k.T, k)
    seconds = common.interleave(runs, repeats, clock=common.processor_time())
    baseline = min(peers, key=lambda name: statistics.median(seconds[name]))
    theirs = grade_moment(widened(k), reference)
    details: dict[str, Any] = {
        "d": d,
        "tokens": tokens,
        "dtype": short,
        "baseline_normwise": theirs.normwise,
        "baseline_bias": theirs.bias,
    }
    ours = checks_of(second_moment_(torch.zeros_like(reference), k), reference)
    name = f"second moment {short}, d = {d}, {tokens} tokens"
    chosen = explain("second_moment_", [scratch], [k], "exact").chosen
    report.compare(
        name,
        seconds,
        baseline,
        ours,
        ours="kernel",
        target=TARGETS[dtype],
        implementation=chosen,
        stretch=STRETCH.get(dtype),
        **details,
    )
    plain = second_moment_(torch.zeros_like(reference), k, precision="fast")
    report.compare(
        f"{name}, fast",
        seconds,
        baseline,
        checks_of(plain, reference, MOMENT_FAST),
        ours="fast",
        implementation=chosen,
        **details,
    )
    whole = checks_of(SecondMoment(d).update(k).sum(), reference)
    report.compare(
        f"{name}, streaming and audited", seconds, baseline, whole, ours="SecondMoment", **details
    )
    if dtype == torch.bfloat16:
        wrong = checks_of(torch.mm(k.T, k), reference)
        report.compare(
            f"{name}, control",
            seconds,
            baseline,
            wrong,
            ours="torch bf16 out",
            control=True,
            **details,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("moments", __doc__, 9)
    parser.add_argument(
        "--size", action=common.Repeated, type=int, default=list(SIZES), help="key dimensions d"
    )
    arguments = parser.parse_args(argv)
    sizes = {64: 512} if arguments.quick else {d: SIZES.get(d, 4096) for d in arguments.size}
    report = common.report("moments", arguments, by_processor=True)
    for count in arguments.threads:
        with common.threads(count):
            for d, tokens in sizes.items():
                for dtype in (torch.float32, torch.bfloat16):
                    case(report, d, tokens, dtype, arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
