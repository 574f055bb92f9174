"""How a tensor lies in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 22  # bytes: a copy of fewer costs less than the calls


def overlaps(tensor: Tensor) -> bool:
    """Whether two entries may share memory, as in an expanded tensor: writing to one writes to
    both. Strides that do not nest count as overlapping.
    """
    if tensor.is_contiguous():
        return False
    reach = 0  # how far apart the entries seen so far lie
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may have a byte in common: they reach across the same memory."""
    (begin, end), (other_begin, other_end) = reach(one), reach(other)
    return begin < other_end and other_begin < end


def reach(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on `device`, with the strides that `to` gives it."""
    layout = torch.empty_like(tensor, device="meta")
    flat = fresh((tensor.numel(),), tensor.dtype, device)
    return flat.as_strided(layout.shape, layout.stride()).copy_(tensor)


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A new contiguous tensor of any content.

    A large one in host memory asks for huge pages where the system has them: fresh pages of 4 KiB
    are faulted in one by one, which takes four times as long as filling them.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
