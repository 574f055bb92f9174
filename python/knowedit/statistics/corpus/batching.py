"""Texts in batches that hardly pad: pieces of similar length side by side, or packed one after
another.

A row holds one piece, or several behind each other whose positions start again at 0: transformers
then lets each attend to itself only (block-diagonal masks, or variable-length kernels where the
model uses FlashAttention).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_PADDING = 0.05  # of the tokens in a batch


@dataclass(frozen=True)
class Piece:
    """Tokens that are run together, and how many of the first ones are not counted."""

    ids: list[int]
    skip: int

    @property
    def count(self) -> int:
        return max(len(self.ids) - self.skip, 0)


@dataclass(frozen=True)
class TokenBatch:
    """Rows ready to run.

    Attributes:
        ids: `[rows, width]`.
        positions: `[rows, width]`, or None when every row is one piece.
        keep: `[rows, width]` bool, tokens whose keys count.
        first: `[rows, width]` bool, first tokens of pieces.
        tokens: how many of them are text.
        rows: the pieces, to say where something went wrong.
    """

    ids: Tensor
    positions: Tensor | None
    keep: Tensor
    first: Tensor
    tokens: int
    rows: list[list[Piece]]

    @property
    def pieces(self) -> list[Piece]:
        return [piece for row in self.rows for piece in row]

    def piece_at(self, row: int, column: int) -> Piece:
        """The piece that covers a token."""
        for piece in self.rows[row]:
            column -= len(piece.ids)
            if column < 0:
                return piece
        raise IndexError(f"token {column} of row {row} is padding")


def trim(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The first pieces, the last one cut, so that exactly `count` tokens count (or all, if they are
    fewer).
    """
    kept: list[Piece] = []
    for piece in pieces:
        if count <= 0:
            break
        kept.append(Piece(piece.ids[: piece.skip + count], piece.skip))
        count -= piece.count
    return kept


def batches(pieces: Sequence[Piece], budget: int, *, packed: bool = False) -> Iterator[TokenBatch]:
    """All pieces, in batches of at most `budget` tokens (or one row) of which at most `MAX_PADDING`
    are padding.

    Args:
        packed: fill each row with several pieces, up to the length of the longest one (or the
            budget).
    """
    rows = _packed(pieces, budget) if packed else [[piece] for piece in pieces]
    lengths = [sum(len(piece.ids) for piece in row) for row in rows]
    for group in _similar(lengths, budget):
        yield _batch([rows[i] for i in group])


def _packed(pieces: Sequence[Piece], budget: int) -> list[list[Piece]]:
    """First fit, longest first, into rows as long as the longest piece, or as the budget; longer
    ones stand alone.
    """
    rows: list[list[Piece]] = []
    free: list[int] = []
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))
    width = min(len(pieces[order[0]].ids), budget) if order else 0
    for piece in (pieces[i] for i in order):
        size = len(piece.ids)
        at = next((i for i, room in enumerate(free) if room >= size), None)
        if at is None:
            at = len(rows)
            rows.append([])
            free.append(width)
        rows[at].append(piece)
        free[at] -= size
    return rows


def _similar(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows of similar length together, shortest first."""
    group: list[int] = []
    filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        size = (len(group) + 1) * lengths[i]
        if group and (size > budget or size - filled - lengths[i] > MAX_PADDING * size):
            yield group
            group, filled = [], 0
        group.append(i)
        filled += lengths[i]
    if group:
        yield group


def _batch(rows: list[list[Piece]]) -> TokenBatch:
    width = max(sum(len(piece.ids) for piece in row) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    keep, first = torch.zeros(2, len(rows), width, dtype=torch.bool)
    tokens = 0
    for i, row in enumerate(rows):
        at = 0
        for piece in row:
            end = at + len(piece.ids)
            ids[i, at:end] = torch.tensor(piece.ids)
            positions[i, at:end] = torch.arange(len(piece.ids))
            keep[i, at + piece.skip : end] = True
            first[i, at] = True
            at = end
        if at < width:  # padding is a piece of its own: nothing that counts attends to it
            positions[i, at:] = torch.arange(width - at)
        tokens += at
    several = any(len(row) > 1 for row in rows)
    return TokenBatch(ids, positions if several else None, keep, first, tokens, rows)
