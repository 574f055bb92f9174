"""What a processor does well."""

from __future__ import annotations

import torch


def has_bf16_units(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there: on accelerators, and on CPUs
    with AVX-512 BF16 (those with AMX have it). Others emulate them, four times slower than float32;
    that oneDNN has bfloat16 kernels for a CPU does not mean that it has the units.
    """
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
