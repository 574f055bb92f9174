"""Keys of edits, or of any tokens, at the experts of a mixture that each of them reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoutedKeys:
    """The keys of n edits (or of any n tokens) at the experts that each of them reaches.

    rows: expert -> int64 [n_j], which edits reach it, each once. keys: expert -> [m, n_j] floating
    point, gate times key, one column for each of these edits.
    """

    edits: int
    rows: Mapping[int, Tensor]
    keys: Mapping[int, Tensor]

    @classmethod
    def gather(
        cls,
        keys: Tensor,
        edit: Tensor,
        expert: Tensor,
        gates: Tensor | None = None,
        edits: int | None = None,
    ) -> RoutedKeys:
        """Keys by slot, one slot for each token and expert that it reaches, as a router gives them.

        keys [slots, m]; edit and expert int [slots]: whose key it is, and which expert's; gates
        [slots], None: 1. Slots of one edit at one expert are summed, so the mean over an edit's c
        contexts is ``gates / c``. Edits, numbered from 0, default to as many as occur. A slot whose
        gate is 0 reaches its expert all the same.

        Raises ValueError for shapes that differ and for negative numbers.
        """
        slots = len(keys)
        shapes = {"edit": edit.shape, "expert": expert.shape}
        if gates is not None:
            shapes["gates"] = gates.shape
        for name, shape in shapes.items():
            if keys.ndim != 2 or shape != (slots,):
                raise ValueError(
                    f"keys {list(keys.shape)} must be [slots, m] and {name} {list(shape)} must be "
                    "[slots]: flatten the top-k experts of a token into slots"
                )
        edit, expert = (x.to(keys.device).long() for x in (edit, expert))
        if slots and int(torch.minimum(edit.min(), expert.min())) < 0:
            raise ValueError("edits and experts are numbered from 0: a number is negative")
        most = int(edit.max()) + 1 if slots else 0
        if edits is not None and most > edits:
            raise ValueError(f"edit {most - 1} occurs, but there are {edits} edits, from 0")
        wide = keys.double() if gates is None else keys.double() * gates.double()[:, None]
        rows, columns = {}, {}
        for j in expert.unique().tolist():
            here = (expert == j).nonzero().squeeze(1)
            rows[j], place = edit[here].unique(return_inverse=True)
            zero = wide.new_zeros(len(rows[j]), keys.shape[1])
            columns[j] = zero.index_add(0, place, wide[here]).mT
        return cls(most if edits is None else edits, rows, columns)

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that some edit reaches, in rising order."""
        return tuple(sorted(j for j, rows in self.rows.items() if len(rows)))

    def joined(self, other: RoutedKeys) -> RoutedKeys:
        """These edits and then those of `other`."""
        rows, keys = dict(self.rows), dict(self.keys)
        for j, theirs in other.rows.items():
            mine = rows.get(j)
            rows[j] = (
                theirs + self.edits if mine is None else torch.cat([mine, theirs + self.edits])
            )
            theirs = other.keys[j]
            keys[j] = theirs if mine is None else torch.cat([keys[j], theirs.to(keys[j])], dim=1)
        return RoutedKeys(self.edits + other.edits, rows, keys)

    def stacked(self, experts: Iterable[int] | None = None) -> Tensor:
        """The wide keys [sum of m, n] float64, zero where an edit does not reach an expert."""
        blocks = []
        for j in self.experts if experts is None else experts:
            block = torch.zeros(self._width(j), self.edits, dtype=torch.float64, device="cpu")
            if j in self.keys:
                block = block.to(self.keys[j].device)
                block[:, self.rows[j]] = self.keys[j].double()
            blocks.append(block)
        if not blocks:
            return torch.zeros(0, self.edits, dtype=torch.float64, device="cpu")
        return torch.cat([block.to(blocks[0].device) for block in blocks])

    def _width(self, expert: int) -> int:
        known = self.keys.get(expert, next(iter(self.keys.values()), None))
        if known is None:
            raise ValueError("no expert has keys: the key dimension is unknown")
        return known.shape[0]
