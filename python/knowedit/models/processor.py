"""What a processor does well."""

from __future__ import annotations

from pathlib import Path

import torch


def has_bf16_units(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there: on accelerators, and on CPUs
    with AVX-512 BF16 (those with AMX have it). Others emulate them, four times slower than float32;
    that oneDNN has bfloat16 kernels for a CPU does not mean that it has the units.
    """
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def free_memory() -> float:
    """Bytes of the host's memory that a program may still take; infinite where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return float("inf")
