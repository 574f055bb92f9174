"""Bit-exact undo of any edit, in any order: the weight is always round(W0 + sum of active edits),
recomputed from W0.

Subtracting an edit from a 16-bit weight does not give the old bits back, and repeated adding
drifts. A ledger keeps the pristine weight and the edits (small factors, or dense deltas) instead;
the state is a function of the *set* of active edits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knowedit_kernels._memory import overlaps
from knowedit_kernels.lowrank.fingerprint import fingerprint
from knowedit_kernels.lowrank.update import UpdateReport, check_update, low_rank_update_

Change = (
    tuple[Tensor, Tensor] | Tensor
)  #: of one weight: low-rank factors (U, V), or a dense delta of its shape


class LedgerError(RuntimeError):
    """A ledger's record and the weights disagree, or a key is used wrongly; the message says what
    to do.
    """


@dataclass
class _Entry:
    name: str
    weight: Tensor
    transposed: bool
    pristine: Tensor | None = None  # W0, kept while edits are active
    changes: dict[str, Change] = field(default_factory=dict)
    fingerprint: int = 0
    settled: bool = True  # False while the weight may differ from what its edits say


class WeightLedger:
    """Records edits of named weights by key, low-rank or dense, and undoes any of them exactly.

    weights: name -> tensor, edited in place. transposed: names of weights stored [in, out] (GPT-2's
    Conv1D); factors are U [out, r], V [in, r] all the same, a dense delta has the weight's own
    shape. rounding: "nearest" or "stochastic" (with ``seed``; low-rank edits only). offload: keep
    the pristine copies in host memory.

    With no active edit a weight has its original bits and no copy is kept. Before every change the
    ledger checks that nobody else wrote to the weight, and raises LedgerError if so. An interrupted
    `add_many` is taken back, an interrupted `remove` completed; where that is interrupted too, the
    next call does it. Not thread-safe.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor] | None = None,
        transposed: Collection[str] = (),
        rounding: str = "nearest",
        seed: int = 0,
        offload: bool = False,
    ) -> None:
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f"a ledger rounds 'nearest' or 'stochastic', got {rounding!r}: it must be "
                "recomputable"
            )
        unknown = set(transposed) - set(weights or {})
        if unknown:
            raise ValueError(f"transposed names unknown weights: {sorted(unknown)}")
        self._rounding, self._seed, self._offload = rounding, seed, offload
        self._entries: dict[str, _Entry] = {}
        for name, weight in (weights or {}).items():
            self.register(name, weight, name in transposed)

    def register(self, name: str, weight: Tensor, transposed: bool = False) -> None:
        """Makes ``weight`` known; raises ValueError for a name in use. One that is not 2-D takes
        dense deltas only.
        """
        if name in self._entries:
            raise ValueError(f"weight {name!r} is already registered")
        if weight.ndim == 0 or not weight.is_floating_point():
            raise ValueError(
                f"weight {name!r} must be a floating-point tensor, got {weight.dtype} "
                f"{tuple(weight.shape)}"
            )
        if overlaps(weight):
            raise ValueError(
                f"entries of weight {name!r} share memory (strides {weight.stride()}): register a "
                "contiguous copy of it"
            )
        self._entries[name] = _Entry(name, weight, transposed)

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Edits these tensors from now on under their names, where a model has others than it had.

        Raises LedgerError for one whose earlier tensor has edits in force.
        """
        for name, weight in weights.items():
            entry = self._entries.get(name)
            if entry is None or _is_same_memory(entry.weight, weight):
                continue
            if entry.changes:
                raise LedgerError(
                    f"weight {name!r} is another tensor than the one that was edited: put that one "
                    "back and undo its edits, or call reset() and load the model again"
                )
            entry.weight = weight

    @property
    def active(self) -> tuple[str, ...]:
        """Keys of the edits in force, in the order they were added."""
        return tuple(
            dict.fromkeys(key for entry in self._entries.values() for key in entry.changes)
        )

    @property
    def edited(self) -> tuple[str, ...]:
        """Names of the weights with edits in force."""
        return tuple(name for name, entry in self._entries.items() if entry.changes)

    def __contains__(self, name: str) -> bool:
        """Is a weight of this name registered?"""
        return name in self._entries

    def add(
        self, weight: str | Tensor, U: Tensor, V: Tensor, key: str, alpha: float = 1.0
    ) -> UpdateReport:
        """Adds alpha U V^T to one weight (by name, or the tensor itself) under ``key``.

        A key may cover several weights. The report compares the weight's whole state with its
        pristine one.
        """
        name = self._find(weight).name
        return self.add_many(key, {name: (U, V)}, alpha)[name]

    def add_many(
        self, key: str, changes: Mapping[str, Change], alpha: float = 1.0
    ) -> dict[str, UpdateReport]:
        """Adds an edit of several weights, all or nothing: name -> (U [out, r], V [in, r]), or a
        dense delta.
        """
        self._settle_all()
        entries = [self._find(name) for name in changes]
        for entry, change in zip(entries, changes.values()):
            if key in entry.changes:
                raise LedgerError(
                    f"edit {key!r} is already active on {entry.name!r}: remove it first"
                )
            try:
                self._check_change(entry, change)
            except ValueError as error:
                raise ValueError(f"{entry.name!r}: {error}") from None
            self._check_untouched(entry)
        reports = {}
        try:
            for entry, change in zip(entries, changes.values()):
                like = entry.weight.new_empty(
                    0, dtype=torch.promote_types(entry.weight.dtype, torch.float32)
                )
                entry.settled = False
                if entry.pristine is None:
                    entry.pristine = entry.weight.detach().to(
                        "cpu" if self._offload else like.device, copy=True
                    )
                if isinstance(change, Tensor):
                    entry.changes[key] = alpha * change.detach().to(like)
                else:
                    entry.changes[key] = (
                        alpha * change[0].detach().to(like),
                        change[1].detach().to(like, copy=True),
                    )
                report = reports[entry.name] = self._write(entry, entry.pristine)
                if report.nonfinite:
                    raise LedgerError(
                        f"edit {key!r} overflows {entry.weight.dtype} in {report.nonfinite} "
                        f"entries of {entry.name!r}: "
                        "nothing was changed; scale the edit down or use a wider dtype"
                    )
        except BaseException:
            for entry in entries:
                self._drop(entry, key)
            raise
        return reports

    def remove(self, key: str) -> None:
        """Undoes one edit on every weight it covers; raises LedgerError for an unknown key."""
        self._settle_all()
        entries = [entry for entry in self._entries.values() if key in entry.changes]
        if not entries:
            raise LedgerError(
                f"edit {key!r} is not active; active: {', '.join(self.active) or 'none'}"
            )
        for entry in entries:
            self._check_untouched(entry)
        try:
            for entry in entries:
                self._drop(entry, key)
        except BaseException:  # half of an edit is worse than none
            for entry in entries:
                self._drop(entry, key)
            raise

    def reset(self) -> None:
        """Restores every pristine weight and forgets all edits, whatever else was written to the
        weights since.
        """
        for entry in self._entries.values():
            self._check_layout(entry)
            self._drop(entry, *entry.changes)

    def verify(self) -> None:
        """Raises LedgerError if a weight with active edits was changed by anyone else."""
        self._settle_all()
        for entry in self._entries.values():
            self._check_untouched(entry)

    def _find(self, weight: str | Tensor) -> _Entry:
        for entry in self._entries.values():
            if entry.name == weight if isinstance(weight, str) else entry.weight is weight:
                return entry
        what = repr(weight) if isinstance(weight, str) else f"tensor of shape {tuple(weight.shape)}"
        raise LedgerError(
            f"unknown weight {what}: register it first; known: {', '.join(self._entries) or 'none'}"
        )

    def _write(self, entry: _Entry, pristine: Tensor) -> UpdateReport:
        changes = [
            entry.changes[key] for key in sorted(entry.changes)
        ]  # sorted: a function of the set alone
        pairs = [change for change in changes if not isinstance(change, Tensor)]
        dense = [change for change in changes if isinstance(change, Tensor)]
        weight = entry.weight.detach()
        base = pristine.to(weight.device)
        target = weight
        if dense:  # summed in float32, rounded once at the end
            target = base.to(dense[0].dtype, copy=True)
            for change in dense:
                target += change
        if pairs:
            U, V = (torch.cat(parts, dim=1) for parts in zip(*pairs))
            if entry.transposed:
                U, V = V, U
            started = None if dense else base
            report = low_rank_update_(
                target, U, V, rounding=self._rounding, seed=self._seed, base=started
            )
        if dense:
            weight.copy_(target)
            report = _report(weight, base, target)
        entry.fingerprint, entry.settled = fingerprint(weight), True
        return report

    def _check_change(self, entry: _Entry, change: Change) -> None:
        if not isinstance(change, Tensor):
            check_update(entry.weight.mT if entry.transposed else entry.weight, *change)
        elif change.shape != entry.weight.shape:
            raise ValueError(
                f"a dense delta of shape {tuple(change.shape)} does not fit a weight "
                f"{tuple(entry.weight.shape)}"
            )
        elif self._rounding == "stochastic":
            raise ValueError(
                "dense deltas are rounded to nearest; this ledger rounds stochastically"
            )

    def _drop(self, entry: _Entry, *keys: str) -> None:
        if any(key in entry.changes for key in keys):
            entry.settled = False
        for key in keys:
            entry.changes.pop(key, None)
        self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        """Brings a weight to what its edits say."""
        if entry.settled:
            return
        if entry.pristine is not None and entry.changes:
            self._write(entry, entry.pristine)
        elif entry.pristine is not None:
            entry.weight.detach().copy_(entry.pristine)
            entry.pristine = None
        entry.settled = True

    def _settle_all(self) -> None:
        """After an interruption whose mending was interrupted too; else there is nothing to do."""
        for entry in self._entries.values():
            self._settle(entry)

    def _check_untouched(self, entry: _Entry) -> None:
        self._check_layout(entry)
        if entry.pristine is not None and fingerprint(entry.weight) != entry.fingerprint:
            raise LedgerError(
                f"weight {entry.name!r} was changed outside the ledger since its last edit: put "
                "the ledger's state "
                "back, or call reset() to return to the pristine weights"
            )

    def _check_layout(self, entry: _Entry) -> None:
        weight, pristine = entry.weight, entry.pristine
        if pristine is not None and (
            weight.dtype != pristine.dtype or weight.shape != pristine.shape
        ):
            raise LedgerError(
                f"weight {entry.name!r} was {pristine.dtype} {tuple(pristine.shape)} when edited "
                "and is now "
                f"{weight.dtype} {tuple(weight.shape)}: undo edits before converting a model "
                "(convert it back, then undo)"
            )


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether what is written to one is written to the other."""

    def place(tensor: Tensor) -> tuple[object, ...]:
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device

    return one is other or place(one) == place(other)


def _report(weight: Tensor, base: Tensor, ideal: Tensor) -> UpdateReport:
    """What dense deltas asked for and what the weight's dtype let through."""
    planned, applied = ideal - base, weight.to(ideal.dtype) - base
    norms = [x.square().sum(dtype=torch.float64) for x in (planned, applied, applied - planned)]
    counts = [x.sum(dtype=torch.float64) for x in (weight != base, ~weight.isfinite())]
    return UpdateReport(torch.stack(norms + counts), weight.numel(), None)
