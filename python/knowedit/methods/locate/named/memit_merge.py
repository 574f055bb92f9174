"""MEMIT-Merge (2025, arXiv 2502.07322): facts of one subject share their key, so they share one
value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.errors import EditError
from knowedit.methods.locate.named.memit import MEMIT


@dataclass(frozen=True)
class MEMITMerge(MEMIT):
    """Metric: the covariance. Targets: one joint value per subject, written at its mean key.
    Spread: as MEMIT.

    `MEMIT` merges too unless told not to; this is the method as published, and it cannot be told
    not to.

    Raises:
        EditError: `merge_subjects=False`.
    """

    mean_keys: bool = True
    gain: float = 0.98

    name: ClassVar[str] = "MEMIT-Merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.merge_subjects:
            raise EditError(
                "MEMIT-Merge merges the facts of a subject; for separate values use "
                "MEMIT(merge_subjects=False)"
            )
