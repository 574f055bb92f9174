"""What an update says of itself."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor


class UpdateReport:
    """What an update asked for and what the weight's dtype let through. Reading a figure waits for
    the device.

    probe_error [out, p] float32 (None without probe keys): (applied - ideal) @ probe, what rounding
    adds to the layer's output at those keys.
    """

    def __init__(
        self, sums: Tensor, total: int, probe_error: Tensor | None, row: int | None = None
    ) -> None:
        self._sums, self._row, self.total, self.probe_error = sums, row, total, probe_error

    @cached_property
    def _figures(self) -> list[float]:
        return (self._sums if self._row is None else self._sums[self._row]).tolist()

    @property
    def ideal_norm(self) -> float:
        """Frobenius norm of alpha U V^T."""
        return self._figures[0] ** 0.5

    @property
    def applied_norm(self) -> float:
        """Frobenius norm of the change of W."""
        return self._figures[1] ** 0.5

    @property
    def error_norm(self) -> float:
        """Frobenius norm of (applied - ideal): what rounding did."""
        return self._figures[2] ** 0.5

    @property
    def survived(self) -> float:
        """<applied, ideal> / ||ideal||^2: the share of the edit that arrived; 1 for an
        empty edit.
        """
        ideal, applied, error = self._figures[:3]
        return (ideal + applied - error) / (2 * ideal) if ideal else 1.0

    @property
    def changed(self) -> int:
        """Entries of W whose value changed."""
        return int(self._figures[3])

    @property
    def nonfinite(self) -> int:
        """Entries that became infinite or NaN (an update too large for the dtype)."""
        return int(self._figures[4])

    def __repr__(self) -> str:
        return (
            f"UpdateReport(ideal_norm={self.ideal_norm:.4g}, applied_norm={self.applied_norm:.4g}, "
            f"survived={self.survived:.4f}, changed={self.changed} of {self.total}, "
            f"nonfinite={self.nonfinite})"
        )
