"""Interleaved timing: every round times every provider, so a machine that slows down slows them
all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Larger than any GPU's L2, so that every timed call starts from memory as it would in a pass over a
# model.
_FLUSH_BYTES = 256 * 2**20
_HEAD_START = 500_000  # cycles, about 0.3 ms
_MOST_CALLS = 1000


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _events(run: Callable[[], Any], calls: int, flush: torch.Tensor) -> float:
    """Median seconds on the device. The sleep lets the host run ahead, so that a short kernel's
    launch is not timed.
    """
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(calls)
    ]
    for begin, end in pairs:
        flush.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(flush.device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def interleave(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, least: float = 0.05
) -> dict[str, list[float]]:
    """Seconds per call of every run, one entry a round, in alternating order.

    Runs shorter than `least` seconds are repeated within the round. On CUDA the L2 is emptied
    before every call.
    """
    calls = {}
    for name, run in runs.items():
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        calls[name] = min(
            max(1, math.ceil(least / max(time.perf_counter() - start, 1e-9))), _MOST_CALLS
        )
    flush = (
        torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        if device.type == "cuda"
        else None
    )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            once = (
                _host(runs[name], calls[name])
                if flush is None
                else _events(runs[name], calls[name], flush)
            )
            seconds[name].append(once)
    return seconds


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation; raises ValueError for an empty sequence."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values: at least one round is needed")
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    return ordered[low] + (ordered[math.ceil(place)] - ordered[low]) * (place - low)


def speedup(baseline: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(baseline, ours, strict=True))
