"""`SecondMoment`: the streaming state around the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from knowedit_kernels import _modes
from knowedit_kernels import _ops as _ops  # defines the ops
from knowedit_kernels._arguments import open_device, whole_number
from knowedit_kernels.moments import audit as _audit
from knowedit_kernels.moments import files
from knowedit_kernels.moments.checks import check_whole
from knowedit_kernels.moments.functional import check_keys, check_precision, mirror_
from knowedit_kernels.moments.together import launch, number_of, update_together


def _capacity(dim: int, device: torch.device) -> int:
    """Rows per kernel launch: many, so that folds and barriers vanish; fewer for wide keys on a CPU
    (cache).
    """
    return (
        16384 if device.type != "cpu" else min(max(2**23 // max(dim, 1) // 256 * 256, 1024), 4096)
    )


class SecondMoment:
    """Streaming C += K^T K over the kept tokens, float64 [dim, dim].

    Rows are collected and accumulated in blocks of fixed size, so the result has the same bits
    however the tokens were batched, and tiny updates cost little. Not thread-safe. `precision`: see
    PRECISIONS.

    A launch that fails (out of memory) may leave a part of its rows in the sum: the moment then
    refuses everything but `load_state_dict` with RuntimeError.
    """

    @_modes.lasting
    def __init__(
        self, dim: int, *, device: torch.device | str = "cpu", precision: str = "exact"
    ) -> None:
        self.dim = dim = whole_number("dim", dim)
        self.precision, self.device = check_precision(precision), open_device(device)
        self.count = 0
        self._lower = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)
        self._sums = torch.zeros(1 + _audit.PROBES, dtype=torch.float64, device=self.device)
        self._signs = _audit.signs(dim, self.device)
        self._capacity = _capacity(dim, self.device)
        self._buffer: torch.Tensor | None = None
        self._filled = 0
        self._whole = True  # False: a launch failed, and what `_lower` holds is unknown
        self._turn = torch.zeros((), device=self.device)  # see `moment_update_` in `_ops`
        self._be_found()

    def __repr__(self) -> str:
        return (
            f"SecondMoment(dim={self.dim}, count={self.count}, precision={self.precision!r}, "
            f"device={str(self.device)!r})"
        )

    def _be_found(self) -> None:
        self._number = number_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._be_found()  # a copy is another moment

    def _check_whole(self) -> None:
        check_whole(self._whole)

    def _accumulate(self, block: torch.Tensor) -> None:
        launch([self], [block])

    def update(self, keys: torch.Tensor, mask: torch.Tensor | None = None) -> SecondMoment:
        """Adds the rows of `keys` [..., dim] (float64, float32, float16, bfloat16) whose `mask`
        [...] is True.

        Raises ValueError for a wrong shape or device, and for NaN, infinite or absurdly large keys,
        naming the first such token; TypeError for a wrong dtype, or no tensor. A refused batch
        leaves the state as it was.
        """
        update_together([self], [keys], mask)
        return self

    def _stage(
        self, keys: torch.Tensor, mask: torch.Tensor | None, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Audits a batch without changing the state: the kept rows [n, dim] and their audit sums.

        rows: indices of what `mask` keeps, None for all.
        """
        self._check_whole()
        if keys.device != self.device:
            raise ValueError(
                f"keys are on {keys.device}, the moment is on {self.device}: move the keys there"
            )
        dense = check_keys(keys, mask, self.dim, self.precision)
        out = self._slot(dense.shape[0] if rows is None else rows.numel(), dense)
        if out is None and rows is not None:
            out = dense.new_empty(rows.numel(), self.dim)
        sums = torch.zeros_like(self._sums)
        torch.ops.knowedit.moment_pack_(out, sums, dense, rows, self._signs)
        return (dense if out is None else out), sums

    def _slot(self, n: int, like: torch.Tensor) -> torch.Tensor | None:
        """The buffer's next `n` rows, or None if they do not fit or are of another dtype."""
        if self._buffer is None and n < self._capacity:
            self._buffer = like.new_empty(self._capacity, self.dim)
        if (
            self._buffer is None
            or self._buffer.dtype != like.dtype
            or self._filled + n > self._capacity
        ):
            return None
        return self._buffer[self._filled : self._filled + n]

    def _commit(self, rows: torch.Tensor, sums: torch.Tensor) -> list[torch.Tensor]:
        """Counts a staged batch; returns the blocks that are now full, in order, ready to be
        accumulated.
        """
        self._sums += sums
        self.count += len(rows)
        return self._blocks(rows)

    def _blocks(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Buffers `rows` and returns the full blocks."""
        blocks = (
            self._take_pending()
            if self._buffer is not None and self._buffer.dtype != rows.dtype
            else []
        )
        while len(rows):
            if self._filled == 0 and len(rows) >= self._capacity:
                blocks.append(rows[: self._capacity])
                rows = rows[self._capacity :]
                continue
            if self._buffer is None:
                self._buffer = rows.new_empty(self._capacity, self.dim)
            take = min(self._capacity - self._filled, len(rows))
            place = self._buffer[self._filled : self._filled + take]
            if place.data_ptr() != rows.data_ptr():  # else they were packed into their place
                place.copy_(rows[:take])
            self._filled, rows = self._filled + take, rows[take:]
            if self._filled == self._capacity:
                blocks += self._take_pending()
        return blocks

    def _take_pending(self) -> list[torch.Tensor]:
        blocks = [] if self._buffer is None or self._filled == 0 else [self._buffer[: self._filled]]
        self._buffer, self._filled = None, 0
        return blocks

    def _pending(self) -> torch.Tensor | None:
        return None if self._buffer is None or self._filled == 0 else self._buffer[: self._filled]

    @_modes.lasting
    def flush(self) -> SecondMoment:
        """Accumulates the buffered rows now. What came before then rounds independently of what
        comes after, so parts that were flushed alike sum to the same matrix in any order and on any
        number of ranks, to float64 rounding.
        """
        self._check_whole()
        for block in self._take_pending():
            self._accumulate(block)
        return self

    @_modes.lasting
    def sum(self) -> torch.Tensor:
        """sum of k k^T so far: a new, exactly symmetric float64 tensor [dim, dim]; the state is not
        disturbed.
        """
        self._check_whole()
        total = self._lower.clone()
        if (pending := self._pending()) is not None:
            torch.ops.knowedit.second_moment_([total], [pending], self.precision)
        return mirror_(total)

    def moment(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """sum() / count, [dim, dim]. Raises ValueError when no token has been seen."""
        if self.count == 0:
            raise ValueError(
                "no tokens seen: the moment is undefined; call update first (is the mask all "
                "False?)"
            )
        return (self.sum() / self.count).to(dtype)

    def audit(self) -> _audit.AuditResult:
        """The accumulation error measured on the data seen so far; see `AuditResult`."""
        return _audit.compare(self.sum(), self._sums, self.count)

    def finalize(
        self, audit: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, _audit.AuditResult]:
        """sum(), with the audit beside it if asked for."""
        total = self.sum()
        return (total, _audit.compare(total, self._sums, self.count)) if audit else total

    @_modes.lasting
    def merge(self, other: SecondMoment) -> SecondMoment:
        """Adds what `other` has seen (other stays as it is).

        Raises TypeError if that is no moment, ValueError if the dimensions differ or it is this
        one, whose tokens would count twice.
        """
        if not isinstance(other, SecondMoment):
            raise TypeError(f"merge takes another SecondMoment, not {type(other).__name__}")
        if other is self:
            raise ValueError("a moment cannot be merged with itself: its tokens would count twice")
        if other.dim != self.dim:
            raise ValueError(f"cannot merge moments of dimension {other.dim} and {self.dim}")
        self._lower += other.sum().to(self.device)
        self._sums += other._sums.to(self.device)
        self.count += other.count
        return self

    @_modes.lasting
    def all_reduce(self, group: Any = None) -> SecondMoment:
        """Sums over the ranks of a torch.distributed group, in float64: every rank then holds the
        total. Call once.
        """
        total, tail = self.sum(), torch.cat([self._sums, self._sums.new_tensor([self.count])])
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(tail, group=group)
        self._take_pending()
        self._lower, self._sums, self.count = total, tail[:-1], round(tail[-1].item())
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on with the same bits: the sum, the rows not yet accumulated,
        audit and count.
        """
        self._check_whole()
        pending = self._pending()
        return {
            "lower": self._lower,
            "sums": self._sums,
            "count": torch.tensor(self.count, device="cpu"),
            "pending": pending.clone()
            if pending is not None
            else self._lower.new_empty(0, self.dim),
        }

    @_modes.lasting
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> SecondMoment:
        """Restores `state_dict`, also of another device, whose blocks are of another size. Raises
        ValueError naming what is missing or of another dimension.
        """
        files.check_state(state, self.dim)
        self._take_pending()
        self._lower = state["lower"].to(self.device, copy=True)
        self._sums = state["sums"].to(self.device, copy=True)
        self._whole = True
        for block in self._blocks(state["pending"].to(self.device)):
            self._accumulate(block)
        self.count = int(state["count"])
        return self

    def save(self, path: str | Path) -> None:
        """Writes the state as safetensors; the file appears whole or not at all."""
        files.write(Path(path), self.state_dict(), {"precision": self.precision})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> SecondMoment:
        """Reads `save`'s file. Raises ValueError naming the file if it is truncated or not a
        moment.
        """
        state, metadata = files.read(Path(path))
        moment = cls(state["lower"].shape[0], device=device, precision=metadata["precision"])
        return moment.load_state_dict(state)
