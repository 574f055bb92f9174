"""How much memory a computation took at its worst moment."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yield a function: the most memory in use since, beyond that at the start, in bytes; None
    where it cannot be known.

    On a GPU what torch allocated, all GPUs together; elsewhere the process's resident set, as Linux
    counts it. What was freed before is given back first (glibc), or reusing it would go unseen.
    """
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        start = sum(map(torch.cuda.memory_allocated, gpus))
        yield lambda: sum(map(torch.cuda.max_memory_allocated, gpus)) - start
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")  # the peak starts again from now
        resident = _kilobytes("VmRSS")
    except (OSError, KeyError):
        yield lambda: None
        return
    yield lambda: 1024 * max(_kilobytes("VmHWM") - resident, 0)


def _kilobytes(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0])
