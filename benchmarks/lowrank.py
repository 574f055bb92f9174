"""Low-rank updates W += U V^T on the CPU beside the best that torch composes, a copy of the weight,
and the update without probe keys; an edit put into a ledger and taken out again, beside a copy.

torch: `W.addmm_(U, V.T)` in place for float32, `W.copy_(torch.addmm(W.float(), U, V.T))` for
bfloat16; neither reports anything. Ours is `low_rank_update_`, its checks included, with
`report=False` ("plain") and with its report.
The control multiplies float32 weights' factors in bfloat16: the accuracy budget must reject it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from knowedit_kernels import WeightLedger, explain, low_rank_update_
from knowedit_kernels.lowrank.reference import grade_update
from knowedit_kernels.numerics import UPDATE_NEAREST

from . import common
from .common import Check

SHAPES = ((64, 256), (576, 1536), (4096, 14336))
RANKS = (1, 8, 100)
FEW = 8  # up to this rank an update is compared with a copy
KEYS = 8
TARGET, COPIES, PROBED, LEDGER = 1.0, 1 / 1.25, 1 / 1.3, 1 / 2
LEDGER_ENTRIES = 1 << 24  # of weights written in a round, at least
EDIT = 1e-3  # |update| / |W|, a typical edit
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def problem(rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """W [rows, columns], U [rows, rank], V [columns, rank], probe [columns, keys]; the last three
    float32.
    """
    generator = torch.Generator().manual_seed(rank)
    W = torch.randn(rows, columns, generator=generator).mul_(0.02).to(dtype)
    U = torch.randn(rows, rank, generator=generator) * (0.02 * EDIT / rank**0.5)
    V = torch.randn(columns, rank, generator=generator)
    return W, U, V, torch.randn(columns, KEYS, generator=generator)


def composed(W: Tensor, U: Tensor, V: Tensor) -> Callable[[], Tensor]:
    """The best that torch composes: in place where W has the dtype of the arithmetic."""
    if W.dtype == torch.float32:
        return lambda: W.addmm_(U, V.T)
    return lambda: W.copy_(torch.addmm(W.float(), U, V.T))


def checks_of(result: Tensor, W: Tensor, U: Tensor, V: Tensor) -> list[Check]:
    """Against float64, in last places; the first rows of a large weight."""
    rows = slice(0, max(1, (1 << 23) // W.shape[1]))
    grade, budget = grade_update(result[rows], W[rows], U[rows], V), UPDATE_NEAREST[W.dtype]
    return [
        Check("largest", grade.largest, budget.largest),
        Check("bias", abs(grade.bias), budget.bias),
    ]


def case(
    report: common.Report, rows: int, columns: int, rank: int, short: str, repeats: int
) -> None:
    """The rows of one size, rank and dtype at the current number of threads."""
    W, U, V, probe = problem(rows, columns, rank, DTYPES[short])
    mine, plain, theirs, probed, copy = (W.clone() for _ in range(5))
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: low_rank_update_(plain, U, V, report=False),
        "ours": lambda: low_rank_update_(mine, U, V),
        "torch": composed(theirs, U, V),
        "probed": lambda: low_rank_update_(probed, U, V, probe=probe),
        "copy": lambda: copy.copy_(W),
    }
    seconds = common.interleave(runs, repeats, clock=common.processor_time())
    results = [W.clone(), W.clone()]
    low_rank_update_(results[0], U, V)
    low_rank_update_(results[1], U, V, report=False)
    checks = checks_of(results[0], W, U, V)
    plain_checks = checks_of(results[1], W, U, V)
    details: dict[str, Any] = {"rows": rows, "columns": columns, "rank": rank, "dtype": short}
    details["implementation"] = explain("low_rank_update_").chosen
    name = f"low rank {short} [{rows}, {columns}], rank {rank}"
    bare = f"{name}, without a report"
    for ours, what, passed in (("ours", name, checks), ("plain", bare, plain_checks)):
        report.compare(what, seconds, "torch", passed, ours=ours, target=TARGET, **details)
        if rank <= FEW:
            beside = f"{what}, beside a copy"
            report.compare(beside, seconds, "copy", passed, ours=ours, target=COPIES, **details)
    report.compare(
        f"{name}, {KEYS} probe keys beside none",
        seconds,
        "ours",
        checks,
        ours="probed",
        target=PROBED if rank == FEW else None,
        **details,
    )
    if short == "fp32":
        rough = W + (U.bfloat16() @ V.bfloat16().T).float()
        report.compare(
            f"{name}, control", seconds, "torch", checks_of(rough, W, U, V), control=True, **details
        )


def ledger_case(report: common.Report, rows: int, columns: int, short: str, repeats: int) -> None:
    """An edit of rank 8, added to a pristine weight and removed again."""
    W, U, V, _ = problem(rows, columns, FEW, DTYPES[short])
    weight, copy, clock = W.clone(), W.clone(), common.processor_time()
    ledger = WeightLedger({"weight": weight})
    calls = max(1, LEDGER_ENTRIES // W.numel())
    seconds: dict[str, list[float]] = {"copy": [], "add": [], "remove": []}
    checks: list[Check] = []
    for turn in range(repeats + 1):
        spent = dict.fromkeys(seconds, 0.0)
        for _ in range(calls):
            times = [clock()]
            copy.copy_(W)
            times.append(clock())
            ledger.add("weight", U, V, key="edit")
            times.append(clock())
            if not checks:
                checks = checks_of(weight, W, U, V)
                times[-1] = clock()
            ledger.remove("edit")
            times.append(clock())
            for name, start, end in zip(spent, times, times[1:]):
                spent[name] += (end - start) / calls
        for name, total in spent.items() if turn else ():  # the first is not counted
            seconds[name].append(total)
    different = Check("entries that differ", float((weight != W).sum()), 0.0)
    for step, found in (("add", checks), ("remove", [different])):
        report.compare(
            f"ledger {short} [{rows}, {columns}], rank {FEW}, {step} beside a copy",
            seconds,
            "copy",
            found,
            ours=step,
            target=LEDGER,
            rows=rows,
            columns=columns,
            dtype=short,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("lowrank", __doc__, 9)
    arguments = parser.parse_args(argv)
    report = common.report("lowrank", arguments, by_processor=True)
    for count in arguments.threads:
        with common.threads(count):
            for rows, columns in ((16, 64),) if arguments.quick else SHAPES:
                for short in DTYPES:
                    for rank in RANKS:
                        case(report, rows, columns, rank, short, arguments.repeats)
                    ledger_case(report, rows, columns, short, arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
