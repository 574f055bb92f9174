"""The arguments of the target loss, as every implementation takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from knowedit_kernels._dispatch import Call


@dataclass(frozen=True, eq=False)
class LossCall(Call):
    """``target_losses``: hidden, ref_hidden [rows, d]; weight [V, d]; targets int64 [rows] (below
    zero: no target); bias [V]; reference [rows, V] logits. softcap 0: none; reverse: the mean is
    under the edited model; gradient False: zeros in its place.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor | None
    bias: Tensor | None
    reference: Tensor | None
    ref_hidden: Tensor | None
    scale: float
    softcap: float
    reverse: bool
    gradient: bool

    def check(self) -> None:
        vocabulary = len(self.weight)
        if self.targets is not None and len(self.targets):
            largest = int(self.targets.max())
            if largest >= vocabulary:
                raise ValueError(f"target {largest} is outside the vocabulary of {vocabulary}")
