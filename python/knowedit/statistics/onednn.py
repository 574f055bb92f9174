"""float32 linear layers through oneDNN where MKL, which torch multiplies with, is slow: on CPUs
that are not Intel's.

MKL leaves out AVX-512 there: 97 GFLOP/s on one core of an EPYC (family 26) where oneDNN reaches
210. Which of the two runs follows from the processor alone, so that the same machine gives the same
    bits every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Linear(TorchFunctionMode):
    """While it is entered, `F.linear` of float32 CPU tensors goes to oneDNN; without gradients."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and all(map(_plain, args[:2])):
            return torch.ops.mkldnn._linear_pointwise(
                args[0], args[1], args[2] if len(args) > 2 else None, "none", [], ""
            )
        return func(*args, **(kwargs or {}))


def fast_linear() -> AbstractContextManager[Any]:
    """`Linear` where it helps, else nothing."""
    return Linear() if _helps() else nullcontext()


@lru_cache(1)
def _helps() -> bool:
    """AVX-512 on a CPU of another maker than Intel, and a torch that has the operator."""
    if (
        not hasattr(torch.ops.mkldnn, "_linear_pointwise")
        or "AVX512" not in torch.backends.cpu.get_cpu_capability()
    ):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
    )
