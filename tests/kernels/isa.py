"""Skips for instruction sets that this processor lacks, told from the processor's own flags."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from knowedit_kernels._native import LACKING

#: The flags each kernel needs, as in csrc/cpu/isa.h.
AVX2 = frozenset({"avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
AVX512_BF16 = AVX512 | {"avx512_bf16"}
NEEDS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": AVX512_BF16 | {"amx_tile", "amx_bf16"},
}


@cache
def flags() -> frozenset[str]:
    """The processor's features, as Linux lists them; none where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].split()) if lines else frozenset()


def skip(name: str, reason: str) -> NoReturn:
    """Skip a test of kernel `name` that was refused for `reason`.

    Only a processor that lacks the flags excuses a missing instruction set (`tests/conftest.py`);
    one that has them, and is refused all the same, fails.
    """
    if reason == LACKING:
        lacking = sorted(NEEDS.get(name, frozenset()) - flags())
        if not lacking:
            pytest.fail(f"{name} is refused, yet this processor has {sorted(NEEDS.get(name, ()))}")
        pytest.skip(f"missing instruction set: {name} needs {', '.join(lacking)}")
    pytest.skip(reason)
