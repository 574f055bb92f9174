"""Rows of all groups that wait for a launch, in the order in which they came."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def sort_rows(index: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that sorts rows by their group, and where each group starts in it.

    index int [n], of groups 0 to groups - 1. Returns order int64 [n], stable, on the index's
    device, and offsets int64 [groups + 1] on the host. Raises ValueError or TypeError for an index
    that is no list of groups.
    """
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"index must hold whole numbers (the group of each row), not {index.dtype}")
    if index.dim() != 1:
        raise ValueError(
            f"index has shape {list(index.shape)}; it must be [n], one group a row: with top-k "
            "experts a token, flatten both it and the rows"
        )
    index = index.long()
    counts = torch.bincount(index.clamp(0, groups - 1), minlength=groups).cpu()
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= groups):
        wrong = int(((index < 0) | (index >= groups)).nonzero()[0])
        raise ValueError(f"index[{wrong}] is {int(index[wrong])}; the groups are 0 to {groups - 1}")
    return torch.argsort(index, stable=True), starts_of(counts)


def starts_of(counts: torch.Tensor) -> torch.Tensor:
    """counts [groups] -> offsets int64 [groups + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows [n, d] with their weights, order and offsets, as `grouped_moment_` takes them."""

    rows: torch.Tensor
    weights: torch.Tensor | None
    order: torch.Tensor | None
    offsets: torch.Tensor


class Log:
    """Rows in the order in which they came, of one dtype and all with or all without weights."""

    def __init__(self, groups: int, dim: int, capacity: int) -> None:
        self.groups, self.dim, self.capacity = groups, dim, capacity
        self.filled = 0
        self._rows: torch.Tensor | None = None
        self._index: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def slot(self, like: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
        """The next len(like) rows of the buffer; None if they do not fit or differ in kind."""
        if self.filled + len(like) > self.capacity:
            return None
        if self.filled == 0:
            self._allocate(like, weights)
        assert self._rows is not None
        alike = self._rows.dtype == like.dtype and (self._weights is None) == (weights is None)
        return self._rows[self.filled : self.filled + len(like)] if alike else None

    def _allocate(self, like: torch.Tensor, weights: torch.Tensor | None) -> None:
        if self._rows is None or self._rows.dtype != like.dtype:
            self._rows = like.new_empty(self.capacity, self.dim)
            self._index = torch.empty(self.capacity, dtype=torch.int64, device=like.device)
        self._weights = None if weights is None else weights.new_empty(self.capacity)

    def append(self, index: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Counts the rows that were written to the last `slot`, with their groups and weights."""
        here = slice(self.filled, self.filled + len(index))
        assert self._index is not None
        self._index[here] = index
        if weights is not None:
            assert self._weights is not None
            self._weights[here] = weights
        self.filled += len(index)

    def take(self) -> Batch | None:
        """All rows, which are then no longer the log's; None if there are none."""
        n, self.filled = self.filled, 0
        if n == 0:
            return None
        assert self._rows is not None and self._index is not None
        order, offsets = sort_rows(self._index[:n], self.groups)
        weights = None if self._weights is None else self._weights[:n]
        return Batch(self._rows[:n], weights, order, offsets)


def capacity_of(groups: int, dim: int, device: torch.device) -> int:
    """Rows a launch: enough to make reading and writing the sums cheap, in at most 2 GiB."""
    wanted = groups * (512 if device.type == "cpu" else 4096)
    return max(min(wanted, 2**31 // (4 * dim)), 4096)
