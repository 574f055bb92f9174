"""First form of the one-command GPU suite: environment, measured ceilings, correctness on the device, second moments.

    python -m benchmarks.gpu_suite             on a machine with a CUDA device
    python -m benchmarks.gpu_suite --dry-run   the same steps at tiny sizes on the CPU

Predictions (H200; computed before any run, see knowedit_kernels/moments) stand beside the results. Ours is compared with
the best that torch composes (`mm(out_dtype=float32)` and a float64 fold every 8,192 tokens) and with ROME's float32 sum.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from knowedit_kernels import explain
from knowedit_kernels.moments import SecondMoment
from knowedit_kernels.testing import grade_moment

from . import common
from .moments import checks_of, gated_keys

#: d -> seconds per 10^6 tokens and layer on an H200: ours (Triton), best of torch, ROME's float32.
PREDICTED = {
    4096: {"ours": 0.029, "torch best": 0.054, "rome fp32": 0.69},
    14336: {"ours": 0.351, "torch best": 0.662, "rome fp32": 8.44},
}
TARGETS = {"torch best": 1.7, "rome fp32": 20.0}  # at d = 14336
FOLD, ROME_BATCH, BLOCK = 8192, 3072, 16384  # tokens: torch best's fold, ROME's batch, our launch
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    """What one run uses; tokens of the timed rows, the matmul's side, the copy's bytes."""

    dims: tuple[int, ...] = (4096, 14336)
    tokens: int = 65_536
    check: tuple[tuple[int, int], ...] = ((576, 5000), (1536, 20_000), (4096, 33_001))
    matmul: int = 8192
    copy: int = 1 << 30


DRY = Sizes(dims=(64,), tokens=512, check=((48, 301), (65, 257)), matmul=128, copy=1 << 20)


@contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds since entry, after the device has finished."""
    if device.type != "cuda":
        start = time.perf_counter()
        yield lambda: time.perf_counter() - start
        return
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()

    def elapsed() -> float:
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    yield elapsed


def timed(runs: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Device seconds of each run, alternating between them, after a warm-up call of each."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            with _clock(device) as elapsed:
                run()
                seconds[name].append(elapsed())
    return seconds


def ceilings(report: common.Report, sizes: Sizes, device: torch.device, repeats: int) -> float:
    """Copy bandwidth and bf16 matrix product on random data; returns the latter in FLOP/s."""
    source = torch.empty(sizes.copy, dtype=torch.uint8, device=device).random_()
    sink = torch.empty_like(source)
    a, b = torch.randn(2, sizes.matmul, sizes.matmul, device=device).bfloat16().unbind()
    seconds = timed({"copy": lambda: sink.copy_(source), "matmul": lambda: a @ b}, device, repeats)
    copied = 2 * sizes.copy / statistics.median(seconds["copy"])
    flops = 2 * sizes.matmul**3 / statistics.median(seconds["matmul"])
    report.note(f"copy {copied / 1e9:.0f} GB/s (read and write)", case="ceiling copy", bytes_per_second=copied)
    report.note(f"bf16 matmul {sizes.matmul}: {flops / 1e12:.3g} TFLOP/s", case="ceiling bf16 matmul", flops=flops)
    return flops


def correctness(report: common.Report, sizes: Sizes, device: torch.device) -> None:
    """`SecondMoment` on ragged, masked batches of every dtype against float64 on the CPU; fails the run when over budget."""
    for name, dtype in DTYPES.items():
        for d, tokens in sizes.check:
            keys = gated_keys(tokens, d).to(dtype)
            mask = torch.arange(tokens) % 7 != 3
            moment, start = SecondMoment(d, device=device), 0
            for size in (tokens // 3, 1, tokens):
                part = slice(start, start + size)
                moment.update(keys[part].to(device), mask[part].to(device))
                start += size
            kept = keys[mask].double()
            checks = checks_of(moment.sum().cpu(), kept.T @ kept)
            ok = all(check.ok for check in checks) and moment.audit().ok()
            report.failed |= not ok
            chosen = explain("second_moment_").chosen
            line = f"{name} d = {d}, {tokens} tokens, {chosen}: " + "; ".join(map(str, checks)) + f"; audit: {moment.audit()}"
            report.note(
                line, case="correctness", dtype=name, d=d, tokens=tokens, implementation=chosen, accurate=ok,
                errors={check.name: check.value for check in checks},
            )  # fmt: skip


def torch_best(c: Tensor, k: Tensor) -> None:
    """float32 output from 16-bit keys where torch can (CUDA), folded into float64."""
    for block in k.split(FOLD):
        c += torch.mm(block.T, block, out_dtype=torch.float32) if k.is_cuda else block.float().T @ block.float()


def rome(c: Tensor, k: Tensor) -> None:
    """ROME's sum: widened batches, float32 products, a float32 total."""
    for block in k.split(ROME_BATCH):
        wide = block.float()
        c += wide.T.mm(wide)


def ours(c: Tensor, k: Tensor) -> None:
    for block in k.split(BLOCK):
        torch.ops.knowedit.second_moment_([c], [block], "exact")


def moments(report: common.Report, sizes: Sizes, device: torch.device, peak: float, repeats: int) -> None:
    """bf16 second moments: seconds per 10^6 tokens, useful FLOP/s, errors, predictions."""
    for d in sizes.dims:
        k = gated_keys(sizes.tokens, d).bfloat16().to(device)
        state = SecondMoment(d, device=device)
        runs: dict[str, Callable[[], Any]] = {
            "ours": partial(ours, torch.zeros(d, d, dtype=torch.float64, device=device), k),
            "torch best": partial(torch_best, torch.zeros(d, d, dtype=torch.float64, device=device), k),
            "rome fp32": partial(rome, torch.zeros(d, d, device=device), k),
            "SecondMoment": partial(state.update, k),
        }
        seconds = timed(runs, device, repeats)
        reference = torch.zeros(d, d, dtype=torch.float64, device=device)
        for block in k.split(4096):
            reference.addmm_(block.double().T, block.double())
        result = SecondMoment(d, device=device).update(k).sum()
        checks = checks_of(result, reference)
        theirs = torch.zeros(d, d, device=device)
        rome(theirs, k)
        rome_error = grade_moment(theirs, reference).normwise
        useful = sizes.tokens * d * (d + 1)
        per_million = {name: statistics.median(s) * 1e6 / sizes.tokens for name, s in seconds.items()}
        flops = useful / statistics.median(seconds["ours"])
        for baseline in ("torch best", "rome fp32"):
            report.compare(
                f"second moment bf16, d = {d}, {sizes.tokens} tokens", seconds, baseline, checks,
                target=TARGETS[baseline] if d == 14336 else None, seconds_per_million=per_million, useful_flops=flops,
                share_of_peak=flops / peak, predicted=PREDICTED.get(d), rome_normwise=rome_error,
            )  # fmt: skip
        for name, predicted in PREDICTED.get(d, dict.fromkeys(per_million)).items():
            guess = "no prediction at this size" if predicted is None else f"predicted {predicted:.3f} on an H200"
            print(f"    {name:12} {per_million[name]:.4f} s per 10^6 tokens; {guess}")
        print(f"    ours: {flops / 1e12:.3g} useful TFLOP/s, {flops / peak:.0%} of the measured bf16 peak")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; writes no results file")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=common.Path, help="results file (default: benchmarks/results/gpu_suite.jsonl)")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("no CUDA device here: run this on a machine with an NVIDIA GPU and a CUDA build of torch, or use --dry-run")
        return 2
    sizes, device = (DRY, torch.device("cpu")) if arguments.dry_run else (Sizes(), torch.device("cuda"))
    output = arguments.output or (None if arguments.dry_run else common.RESULTS / "gpu_suite.jsonl")
    header: dict[str, Any] = {"device": str(device), "dry_run": arguments.dry_run}
    if device.type == "cuda":
        from knowedit_kernels._device import cuda_facts

        header["device"] = cuda_facts(device).key()
    report = common.Report("gpu_suite", output, **header)
    print(f"device: {header['device']}")
    peak = ceilings(report, sizes, device, arguments.repeats)
    correctness(report, sizes, device)
    moments(report, sizes, device, peak, arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
