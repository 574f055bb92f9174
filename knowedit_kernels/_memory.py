"""How a tensor lies in memory."""

from __future__ import annotations

from torch import Tensor


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
