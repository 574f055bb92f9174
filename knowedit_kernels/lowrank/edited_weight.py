"""One weight of a ledger: what edits it, the bits it had without them, and whether it still has
those that the ledger wrote.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knowedit_kernels._memory import copied
from knowedit_kernels.lowrank.checks import check_update
from knowedit_kernels.lowrank.fingerprint import fingerprint, number
from knowedit_kernels.lowrank.report import UpdateReport
from knowedit_kernels.lowrank.update import (
    low_rank_update_,
    low_rank_update_many_,
)

Change = (
    tuple[Tensor, Tensor] | Tensor
)  #: of one weight: low-rank factors (U, V), or a dense delta of its shape


class LedgerError(RuntimeError):
    """A ledger's record and the weights disagree, or a key is used wrongly; the message says what
    to do.
    """


@dataclass
class EditedWeight:
    """A weight [out, in] (``transposed``: [in, out]) and the changes in force on it, by key."""

    name: str
    weight: Tensor
    transposed: bool
    offload: bool  # keep the pristine bits in host memory
    pristine: Tensor | None = (
        None  # the weight's bits without the changes, kept while there are any
    )
    changes: dict[str, Change] = field(default_factory=dict)
    fingerprint: int = 0
    settled: bool = True  # False while the weight may differ from what its edits say

    def base(self) -> Tensor:
        """Where to read the pristine bits: the weight itself, of which a copy is kept from now on,
        or that copy.
        """
        if self.pristine is not None:
            return self.pristine.to(self.weight.device)
        weight = self.weight.detach()
        self.pristine = copied(weight, "cpu" if self.offload else weight.device)
        return weight

    def restore(self) -> None:
        """Gives the weight its pristine bits and keeps no copy of them."""
        if self.pristine is not None:
            self.weight.detach().copy_(self.pristine)
            self.pristine = None
        self.settled = True

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of all low-rank changes side by side, as the weight is stored; in the order
        of their keys, so that they are a function of the set alone.
        """
        changes = [self.changes[key] for key in sorted(self.changes)]
        pairs = [change for change in changes if not isinstance(change, Tensor)]
        if not pairs:
            return self.weight.new_empty(0, 0), self.weight.new_empty(0, 0)
        U, V = (torch.cat(parts, dim=1) for parts in zip(*pairs))
        return (V, U) if self.transposed else (U, V)

    def check_change(self, change: Change, rounding: str) -> None:
        """Raises ValueError for a change that does not fit the weight or the rounding."""
        if not isinstance(change, Tensor):
            check_update(self.weight.mT if self.transposed else self.weight, *change)
        elif change.shape != self.weight.shape:
            raise ValueError(
                f"a dense delta of shape {tuple(change.shape)} does not fit a weight "
                f"{tuple(self.weight.shape)}"
            )
        elif rounding == "stochastic":
            raise ValueError(
                "dense deltas are rounded to nearest; this ledger rounds stochastically"
            )

    def check_untouched(self) -> None:
        """Raises LedgerError if anyone else wrote to the weight since its last edit."""
        self.check_layout()
        if self.pristine is not None and fingerprint(self.weight) != self.fingerprint:
            raise LedgerError(
                f"weight {self.name!r} was changed outside the ledger since its last edit: put "
                "the ledger's state "
                "back, or call reset() to return to the pristine weights"
            )

    def check_layout(self) -> None:
        """Raises LedgerError if the weight's dtype or shape is not that of its pristine bits."""
        weight, pristine = self.weight, self.pristine
        if pristine is not None and (
            weight.dtype != pristine.dtype or weight.shape != pristine.shape
        ):
            raise LedgerError(
                f"weight {self.name!r} was {pristine.dtype} {tuple(pristine.shape)} when edited "
                "and is now "
                f"{weight.dtype} {tuple(weight.shape)}: undo edits before converting a model "
                "(convert it back, then undo)"
            )


def write(
    entries: Sequence[EditedWeight], rounding: str, seed: int, report: bool = True
) -> dict[str, UpdateReport]:
    """Brings weights to what their edits say, low-rank ones that are alike in one call; reports by
    name, of none where nobody asks for them.
    """
    reports = {}
    together: dict[object, list[EditedWeight]] = {}
    for entry in entries:
        if any(isinstance(change, Tensor) for change in entry.changes.values()):
            base, target = _write_dense(entry, rounding, seed)
            if report:
                reports[entry.name] = _report(entry.weight.detach(), base, target)
        else:
            # Bits may depend on the implementation, and the weights of a call have the same one: a
            # weight's must not depend on which others are edited with it.
            weight = entry.weight
            alike = weight.device, weight.dtype, weight.shape[1] <= 1 or weight.stride(1) == 1
            # the random bits of a weight depend on its place in a call
            alone = entry.name if rounding == "stochastic" else None
            together.setdefault((*alike, alone), []).append(entry)
    for some in together.values():
        left, right = zip(*(entry.factors() for entry in some))
        weights, bases = [entry.weight for entry in some], [entry.base() for entry in some]
        prints = torch.empty(len(some), 2, dtype=torch.int64, device=weights[0].device)
        found = low_rank_update_many_(
            weights,
            left,
            right,
            rounding=rounding,
            seed=seed,
            bases=bases,
            prints=prints,
            report=report,
        )
        reports.update(zip((entry.name for entry in some), found or ()))
        for entry, halves in zip(some, prints.tolist()):
            entry.fingerprint, entry.settled = number(*halves), True
    return reports


def _write_dense(entry: EditedWeight, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
    """The same of one weight with dense changes: summed in float32, rounded once at the end.
    Returns the weight without them, and their sum before it was rounded.
    """
    changes = [entry.changes[key] for key in sorted(entry.changes)]
    dense = [change for change in changes if isinstance(change, Tensor)]
    weight = entry.weight.detach()
    entry.base()
    assert entry.pristine is not None
    base = entry.pristine.to(weight.device)
    target = base.to(dense[0].dtype, copy=True)
    for change in dense:
        target += change
    U, V = entry.factors()
    if U.numel():
        low_rank_update_(target, U, V, rounding=rounding, seed=seed, report=False)
    weight.copy_(target)
    entry.fingerprint, entry.settled = fingerprint(weight), True
    return base, target


def _report(weight: Tensor, base: Tensor, ideal: Tensor) -> UpdateReport:
    """What dense deltas asked for and what the weight's dtype let through."""
    planned, applied = ideal - base, weight.to(ideal.dtype) - base
    norms = [x.square().sum(dtype=torch.float64) for x in (planned, applied, applied - planned)]
    counts = [x.sum(dtype=torch.float64) for x in (weight != base, ~weight.isfinite())]
    return UpdateReport(torch.stack(norms + counts), weight.numel(), None)


def place_of(tensor: Tensor) -> Hashable:
    """The memory that a tensor is, and how it lies in it."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether what is written to one is written to the other."""
    return one is other or (one.data_ptr() != 0 and place_of(one) == place_of(other))
