"""Bit-exact undo of any edit, in any order: the weight is always round(W0 + sum of active edits),
recomputed from W0.

Subtracting an edit from a 16-bit weight does not give the old bits back, and repeated adding
drifts. A ledger keeps the pristine weight and the edits (small factors, or dense deltas) instead;
the state is a function of the *set* of active edits.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from knowedit_kernels._arguments import need_tensors
from knowedit_kernels._memory import overlaps
from knowedit_kernels.lowrank.edited_weight import (
    Change,
    EditedWeight,
    LedgerError,
    is_same_memory,
    place_of,
    write,
)
from knowedit_kernels.lowrank.report import UpdateReport


class WeightLedger:
    """Records edits of named weights by key, low-rank or dense, and undoes any of them exactly.

    weights: name -> tensor, edited in place. transposed: names of weights stored [in, out] (GPT-2's
    Conv1D); factors are U [out, r], V [in, r] all the same, a dense delta has the weight's own
    shape. rounding: "nearest" or "stochastic" (with ``seed``; low-rank edits only). offload: keep
    the pristine copies in host memory.

    A weight may be a view, such as one expert's matrix `parameter[j]` of a mixture: it is recorded,
    checked and undone by itself, and `add_many` writes all that an edit touches in one call.

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
        if weights is not None and not isinstance(weights, Mapping):
            raise TypeError(
                f"weights must be names and tensors, as {{'layer': weight}}, not "
                f"{type(weights).__name__}"
                + ("; dict(it.named_parameters()) is" * isinstance(weights, torch.nn.Module))
            )
        unknown = set(transposed) - set(weights or {})
        if unknown:
            raise ValueError(f"transposed names unknown weights: {sorted(unknown)}")
        self._rounding, self._seed, self._offload = rounding, seed, offload
        self._entries: dict[str, EditedWeight] = {}
        self._since: dict[str, None] = {}  # names of the edited, by when their bits were kept
        self._places: dict[Hashable, str] = {}  # by memory, the first name that was given to it
        for name, weight in (weights or {}).items():
            self.register(name, weight, name in transposed)

    def register(self, name: str, weight: Tensor, transposed: bool = False) -> None:
        """Makes ``weight`` known; raises ValueError for a name or a tensor that is known already.
        One that is not 2-D takes dense deltas only.
        """
        if name in self._entries:
            raise ValueError(f"weight {name!r} is already registered")
        need_tensors(**{f"weight {name!r}": weight})
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
        twin = self._entries.get(self._places.setdefault(place_of(weight), name))
        if twin is not None and is_same_memory(twin.weight, weight):
            raise ValueError(
                f"weight {name!r} is the same memory as {twin.name!r} (tied weights?): register it "
                "once, or an edit of one would look like somebody else's write to the other"
            )
        self._entries[name] = EditedWeight(name, weight, transposed, self._offload)

    def __repr__(self) -> str:
        return f"WeightLedger(weights={len(self._entries)}, active={list(self.active)})"

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Edits these tensors from now on under their names, where a model has others than it had.

        Raises LedgerError for one whose earlier tensor has edits in force.
        """
        for name, weight in weights.items():
            entry = self._entries.get(name)
            if entry is None or is_same_memory(entry.weight, weight):
                continue
            if entry.changes:
                raise LedgerError(
                    f"weight {name!r} is another tensor than the one that was edited: put that one "
                    "back and undo its edits, or call reset() and load the model again"
                )
            entry.weight = weight

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Edits these tensors from now on under their names, edits in force included: those of a
        copied model, which hold the very bits that the earlier ones do.

        Raises LedgerError for one that does not.
        """
        for name, weight in weights.items():
            if not torch.equal(self._entries[name].weight, weight):
                raise LedgerError(f"weight {name!r} is no copy of the one that was edited")
        for name, weight in weights.items():
            self._entries[name].weight = weight

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
                entry.check_change(change, self._rounding)
            except ValueError as error:
                raise ValueError(f"{entry.name!r}: {error}") from None
            entry.check_untouched()
        try:
            for entry, change in zip(entries, changes.values()):
                like = entry.weight.new_empty(
                    0, dtype=torch.promote_types(entry.weight.dtype, torch.float32)
                )
                entry.settled = False
                if not entry.changes:
                    self._since.pop(entry.name, None)
                    self._since[entry.name] = None
                if isinstance(change, Tensor):
                    entry.changes[key] = alpha * change.detach().to(like)
                else:
                    entry.changes[key] = (
                        alpha * change[0].detach().to(like),
                        change[1].detach().to(like, copy=True),
                    )
            reports = write(entries, self._rounding, self._seed)
            for entry in entries:
                if lost := reports[entry.name].nonfinite:
                    delta = changes.get(entry.name)
                    if isinstance(delta, Tensor) and not bool(delta.isfinite().all()):
                        raise LedgerError(
                            f"edit {key!r} has NaN or infinity in its delta of {entry.name!r}: "
                            "nothing was changed"
                        )
                    raise LedgerError(
                        f"edit {key!r} overflows {entry.weight.dtype} in {lost} "
                        f"entries of {entry.name!r}: "
                        "nothing was changed; scale the edit down or use a wider dtype"
                    )
            return {entry.name: reports[entry.name] for entry in entries}
        except BaseException:  # on the last line, too: who is told of no edit undoes none
            self._drop(entries, key)
            raise

    def remove(self, key: str) -> None:
        """Undoes one edit on every weight it covers; raises LedgerError for an unknown key."""
        self._settle_all()
        entries = [entry for entry in self._entries.values() if key in entry.changes]
        if not entries:
            raise LedgerError(
                f"edit {key!r} is not active; active: {', '.join(self.active) or 'none'}"
            )
        for entry in entries:
            entry.check_untouched()
        try:
            self._drop(entries, key)
        except BaseException:  # half of an edit is worse than none
            self._drop(entries, key)
            raise

    def reset(self) -> None:
        """Restores every pristine weight and forgets all edits, whatever else was written to the
        weights since. Of views that overlap, the bits that were kept first are written last.
        """
        for entry in self._entries.values():
            entry.check_layout()
        for name in reversed(self._since):
            entry = self._entries[name]
            self._drop([entry], *entry.changes)

    def verify(self) -> None:
        """Raises LedgerError if a weight with active edits was changed by anyone else."""
        self._settle_all()
        for entry in self._entries.values():
            entry.check_untouched()

    def _find(self, weight: str | Tensor) -> EditedWeight:
        for entry in self._entries.values():
            if entry.name == weight if isinstance(weight, str) else entry.weight is weight:
                return entry
        if not isinstance(weight, str):
            need_tensors(weight=weight)
        what = repr(weight) if isinstance(weight, str) else f"tensor of shape {tuple(weight.shape)}"
        raise LedgerError(
            f"unknown weight {what}: register it first; known: {', '.join(self._entries) or 'none'}"
        )

    def _drop(self, entries: Sequence[EditedWeight], *keys: str) -> None:
        for entry in entries:
            if any(key in entry.changes for key in keys):
                entry.settled = False
            for key in keys:
                entry.changes.pop(key, None)
        self._settle(entries)

    def _settle(self, entries: Iterable[EditedWeight]) -> None:
        """Brings weights to what their edits say."""
        waiting = [entry for entry in entries if not entry.settled]
        if not waiting:
            return
        changed = [entry for entry in waiting if entry.changes]
        write(changed, self._rounding, self._seed, report=False)
        for entry in waiting:
            if not entry.settled:
                entry.restore()

    def _settle_all(self) -> None:
        """After an interruption whose mending was interrupted too; else there is nothing to do."""
        self._settle(self._entries.values())
