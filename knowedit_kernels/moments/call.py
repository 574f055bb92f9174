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
class PackCall(Call):
    """``moment_pack_``: out = keys[rows], with sums of the kept rows added to audit [5] float64.

    keys [tokens, d]; out None: only the audit; rows int64, None: all; signs [4, d] float64.
    """

    out: Tensor | None
    audit: Tensor
    keys: Tensor
    rows: Tensor | None
    signs: Tensor
