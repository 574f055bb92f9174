"""Lower triangles row by row: [d (d + 1) / 2] numbers instead of [d, d], entry (i, j) at
i (i + 1) / 2 + j.
"""

from __future__ import annotations

import torch

_ROWS = 1024  # of a triangle copied at a time: no mask of the whole square is made


def size(dim: int) -> int:
    """The entries of a triangle of `dim` rows."""
    return dim * (dim + 1) // 2


def add_lower_(packed: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """packed [d (d + 1) / 2] += the lower triangle of `square` [d, d]; returns `packed`."""
    for rows, below in _strips(square):
        part = packed[size(rows.start) : size(rows.stop)]
        part += square[rows, : rows.stop][below].to(packed.dtype)
    return packed


def symmetric(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """The symmetric matrix [dim, dim] float64 of a packed lower triangle; a new tensor."""
    square = packed.new_zeros(dim, dim, dtype=torch.float64)
    for rows, below in _strips(square):
        part = packed[size(rows.start) : size(rows.stop)].double()
        strip = square[rows, : rows.stop]
        strip[below] = part
        square[: rows.start, rows] = strip[:, : rows.start].mT
        corner = strip[:, rows.start :]
        corner += corner.tril(-1).mT
    return square


def _strips(square: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """Row ranges of `square` [d, d], and which entries of [rows, : rows.stop] are below or on the
    diagonal.
    """
    strips = []
    for start in range(0, len(square), _ROWS):
        stop = min(start + _ROWS, len(square))
        shape = (stop - start, stop)
        ones = torch.ones(shape, dtype=torch.bool, device=square.device)
        strips.append((slice(start, stop), ones.tril(start)))
    return strips
