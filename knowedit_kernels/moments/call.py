"""The arguments of the ops of the second moment, as every implementation takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from knowedit_kernels._dispatch import Call


@dataclass(frozen=True, eq=False)
class MomentCall(Call):
    """``second_moment_``: the lower triangle of every c [d, d] float64 += keys^T keys.

    keys [tokens, d], parallel to cs; precision as in `functional.PRECISIONS`.
    """

    cs: Sequence[Tensor]
    keys: Sequence[Tensor]
    precision: str


@dataclass(frozen=True, eq=False)
class UpdateCall(Call):
    """``moment_update_``: the moments with these numbers take in keys [..., d] where mask [...].

    turns: a tensor of each moment, which the op is declared to write: what orders its updates.
    """

    turns: Sequence[Tensor]
    keys: Sequence[Tensor]
    mask: Tensor | None
    moments: Sequence[int]


@dataclass(frozen=True, eq=False)
class PackCall(Call):
    """``moment_pack_``: out = keys[rows], with sums of the kept rows added to audit [5] float64.

    keys [tokens, d]; out None: only the audit; rows int64, None: all; signs [4, d] float64.
    """

    out: Tensor | None
    audit: Tensor
    keys: Tensor
    rows: Tensor | None
    signs: Tensor


@dataclass(frozen=True, eq=False)
class GroupedCall(Call):
    """``grouped_moment_``: c [groups, d (d + 1) / 2] += the packed lower triangles of the moments.

    keys [n, d]; order int64 [n]: the rows sorted by group, None: as they lie; offsets int64
    [groups + 1] on the host; weights [n] (of the rows as they lie) or None; precision as in
    `functional.PRECISIONS`.
    """

    c: Tensor
    keys: Tensor
    order: Tensor | None
    offsets: Tensor
    weights: Tensor | None
    precision: str


@dataclass(frozen=True, eq=False)
class RowAuditCall(Call):
    """``row_audit_``: out = keys [n, d] unless None; sums [n, 5] float64 of every row for itself:
    its square and the squares of its products with signs [4, d] float64.
    """

    out: Tensor | None
    sums: Tensor
    keys: Tensor
    signs: Tensor
