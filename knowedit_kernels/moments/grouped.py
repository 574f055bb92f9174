"""`GroupedSecondMoment`: one second moment for each expert of a mixture, all in one launch.

A mixture's layer is one linear layer whose key is the concatenation of `g_j k_j` over its experts
j (gate times key). What an edit of expert j must preserve is therefore `sum g_j^2 k_j k_j^T` over
the tokens that were routed to j. Rows arrive sorted by expert, or with their expert's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from knowedit_kernels import _modes
from knowedit_kernels._arguments import need_tensors, open_device, whole_number
from knowedit_kernels.moments import audit as _audit
from knowedit_kernels.moments import files, triangle
from knowedit_kernels.moments.checks import check_whole, limit_of
from knowedit_kernels.moments.functional import check_keys, check_precision
from knowedit_kernels.moments.grouped_rows import check_rows, checked_weights, grouping
from knowedit_kernels.moments.waiting import Batch, Log, capacity_of

STORAGE = {"float64": torch.float64, "float32": torch.float32}
_FIELDS = ("lower", "sums", "counts")


class GroupedSecondMoment:
    """Streaming sum of w^2 k k^T of every group's rows, packed lower triangles [groups, d (d+1)/2].

    storage: "float64", or "float32" for half of the memory and one rounding more a launch
    (`numerics.float32_storage`). precision: see PRECISIONS; with weights, 16-bit keys are
    multiplied in float32. Rows are collected until a launch is worth while (512 a group on a CPU,
    4096 on a GPU, on average), so small updates cost little. The same updates give the same bits,
    on any number of threads. Not thread-safe.
    """

    @_modes.lasting
    def __init__(
        self,
        groups: int,
        dim: int,
        *,
        storage: str = "float64",
        device: torch.device | str = "cpu",
        precision: str = "exact",
    ) -> None:
        groups, dim = whole_number("groups", groups), whole_number("dim", dim)
        if storage not in STORAGE:
            raise ValueError(f"storage={storage!r} is unknown; choose one of: {', '.join(STORAGE)}")
        self.groups, self.dim, self.storage = groups, dim, storage
        self.precision, self.device = check_precision(precision), open_device(device)
        width = triangle.size(dim)
        self._lower = torch.zeros(groups, width, dtype=STORAGE[storage], device=self.device)
        self._sums = torch.zeros(groups, 1 + _audit.PROBES, dtype=torch.float64, device=self.device)
        self._counts = torch.zeros(groups, dtype=torch.int64, device="cpu")
        self._whole = True  # False: a launch failed, and what `_lower` holds is unknown
        self._signs = _audit.signs(dim, self.device)
        self._log = Log(groups, dim, capacity_of(groups, dim, self.device))

    def __repr__(self) -> str:
        return (
            f"GroupedSecondMoment(groups={self.groups}, dim={self.dim}, count={self.count}, "
            f"precision={self.precision!r}, device={str(self.device)!r})"
        )

    @property
    def counts(self) -> torch.Tensor:
        """Rows seen of every group, int64 [groups] on the host."""
        return self._counts.clone()

    @property
    def count(self) -> int:
        """Rows seen of all groups."""
        return int(self._counts.sum())

    @_modes.lasting
    def update(
        self,
        rows: torch.Tensor,
        *,
        counts: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> GroupedSecondMoment:
        """Adds rows [n, dim] (float64, float32, float16, bfloat16), each times its weight.

        Which rows are a group's is said by exactly one of: counts [groups], rows a group of rows
        sorted by group; offsets [groups + 1], where each group starts in them; index [n], the
        group of every row, in any order. weights [n], None: 1. A group may have no rows.

        Raises ValueError for shapes, groups or a device that do not fit, and for NaN, infinite or
        absurdly large rows or weights, naming the first such row; TypeError for a wrong dtype. A
        refused update leaves the state as it was.
        """
        check_whole(self._whole)
        named = {"counts": counts, "offsets": offsets, "index": index, "weights": weights}
        need_tensors(rows=rows, **{name: x for name, x in named.items() if x is not None})
        if rows.device != self.device:
            raise ValueError(
                f"rows are on {rows.device}, the moment is on {self.device}: move the rows there"
            )
        keys = check_keys(rows, None, self.dim, self.precision)
        if rows.dim() != 2:
            raise ValueError(f"rows has shape {list(rows.shape)}; it must be [n, {self.dim}]")
        order, starts = grouping(self.groups, len(keys), counts, offsets, index)
        weights = checked_weights(keys, weights)
        out = self._log.slot(keys, weights)
        sums = torch.zeros(len(keys), 1 + _audit.PROBES, dtype=torch.float64, device=self.device)
        torch.ops.knowedit.row_audit_(out, sums, keys, self._signs)
        check_rows(keys, sums, weights, index, starts, limit_of(self.precision))
        if weights is not None:
            sums *= weights.double().square()[:, None]
        sizes = starts.diff()
        self._sums += _sum_groups(sums if order is None else sums[order], sizes)
        self._counts += sizes
        if out is None:
            self._launch(self._log.take())
            out = self._log.slot(keys, weights)
            if out is None:  # more rows than the log holds
                self._launch(Batch(keys, weights, order, starts))
                return self
            out.copy_(keys)
        if index is None:
            index = torch.repeat_interleave(sizes).to(self.device)
        self._log.append(index, weights)
        return self

    def _launch(self, batch: Batch | None) -> None:
        """Accumulates a batch of rows of all groups, if there is one."""
        check_whole(self._whole)
        if batch is None:
            return
        self._whole = False
        torch.ops.knowedit.grouped_moment_(
            self._lower, batch.rows, batch.order, batch.offsets, batch.weights, self.precision
        )
        self._whole = True

    @_modes.lasting
    def flush(self) -> GroupedSecondMoment:
        """Accumulates the rows that wait for a launch now, as every look at the sums does."""
        self._launch(self._log.take())
        return self

    @_modes.lasting
    def matrix(self, group: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """sum of w^2 k k^T over the group's rows so far: a new symmetric tensor [dim, dim]."""
        if not 0 <= group < self.groups:
            raise ValueError(f"group {group} is unknown; the groups are 0 to {self.groups - 1}")
        return triangle.symmetric(self.flush()._lower[group], self.dim).to(dtype)

    @_modes.lasting
    def pooled(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The sum of all groups' matrices, [dim, dim]."""
        lower = self.flush()._lower.sum(0, dtype=torch.float64)
        return triangle.symmetric(lower, self.dim).to(dtype)

    def audit(self, group: int | None = None) -> _audit.AuditResult:
        """The accumulation error measured on the rows seen, of one group or of all together."""
        if group is None:
            return _audit.compare(self.pooled(), self._sums.sum(0), self.count)
        return _audit.compare(self.matrix(group), self._sums[group], int(self._counts[group]))

    @_modes.lasting
    def merge(self, other: GroupedSecondMoment) -> GroupedSecondMoment:
        """Adds what `other` has seen (other keeps it).

        Raises TypeError if that is no such moment, ValueError if the sizes differ or it is this
        one.
        """
        if not isinstance(other, GroupedSecondMoment):
            raise TypeError(f"merge takes another GroupedSecondMoment, not {type(other).__name__}")
        if other is self:
            raise ValueError("a moment cannot be merged with itself: its rows would count twice")
        if (other.groups, other.dim) != (self.groups, self.dim):
            raise ValueError(
                f"cannot merge moments of {other.groups} groups of dimension {other.dim} and of "
                f"{self.groups} groups of dimension {self.dim}"
            )
        self.flush()._lower += other.flush()._lower.to(self._lower)
        self._sums += other._sums.to(self.device)
        self._counts += other._counts
        return self

    @_modes.lasting
    def all_reduce(self, group: Any = None) -> GroupedSecondMoment:
        """Sums over the ranks of a torch.distributed group: every rank then holds the total. Call
        once.
        """
        counts = self._counts.to(self.device)
        for part in (self.flush()._lower, self._sums, counts):
            torch.distributed.all_reduce(part, group=group)
        self._counts = counts.cpu()
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on with the same bits (buffered rows are accumulated first)."""
        self.flush()
        return {"lower": self._lower, "sums": self._sums, "counts": self._counts}

    @_modes.lasting
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> GroupedSecondMoment:
        """Restores `state_dict`. Raises ValueError naming what is missing or of another size."""
        if missing := [name for name in _FIELDS if name not in state]:
            raise ValueError(f"state lacks {', '.join(missing)}: not a grouped second moment")
        for name, mine in zip(_FIELDS, (self._lower, self._sums, self._counts)):
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"state's {name} is {list(state[name].shape)}, expected {list(mine.shape)}"
                )
        self._log.take()
        for name, mine in zip(_FIELDS, (self._lower, self._sums, self._counts)):
            mine.copy_(state[name])
        self._whole = True
        return self

    def save(self, path: str | Path) -> None:
        """Writes the state as safetensors; the file appears whole or not at all."""
        about = {"precision": self.precision, "storage": self.storage, "dim": str(self.dim)}
        files.write(Path(path), self.state_dict(), about, files.GROUPED)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> GroupedSecondMoment:
        """Reads `save`'s file. Raises ValueError naming the file if it is truncated or foreign."""
        state, about = files.read(Path(path), files.GROUPED)
        try:
            moment = cls(
                len(state["counts"]),
                int(about["dim"]),
                storage=about["storage"],
                device=device,
                precision=about["precision"],
            )
            return moment.load_state_dict(state)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); collect again") from None


def _sum_groups(sums: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """sums [n, c] of rows sorted by group -> [groups, c], always added in the same order."""
    lengths = sizes.to(sums.device)
    return torch.segment_reduce(sums, "sum", lengths=lengths, axis=0, initial=0.0)
