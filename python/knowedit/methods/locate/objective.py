"""What an edit under training is judged by: texts that should be said or go on as before, run
through the edited model.

Everything below the first edited layer is cached (`replay.Suffix`); a text is replayed from there
on with the frozen read-ins and the write-outs of the moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.methods.locate.keys import GroupKeys
from knowedit.models.editable import EditableModel
from knowedit.models.partial import Suffix
from knowedit.models.tokens import Row, batches
from knowedit_kernels import EditSolver
from knowedit_kernels.target_loss import target_loss

#: What a step sees: the planned shift `R` at the lookup token; the realised one, `R G`; the edited
#: weights at every token.
Through = Literal["plan", "proxy", "edit"]
THROUGH: tuple[Through, ...] = ("plan", "proxy", "edit")
#: A layer's write-outs `[groups, hidden]`.
WriteOuts = dict[int, Tensor]


@dataclass(frozen=True)
class Line:
    """One text of the objective.

    Attributes:
        row: `subject` is the lookup token. With `answer` the text should be said (mean NLL of its
            tokens); without, the model should go on as it did: KL(clean || edited) from the lookup
            token on, or at the last token only.
        group: the group of facts it belongs to.
        weight: factor of its loss.
        last: share of the last token in a KL; 1 leaves the others out.
    """

    row: Row
    group: int
    weight: float = 1.0
    last: float = 1.0


@dataclass(frozen=True)
class FrozenLayer:
    """What the solver fixes at one layer before the targets are trained.

    Attributes:
        read_in: `[groups, d_ff]` A; the read-ins of a group's keys are added up, they share its
            write-out.
        gain: `[groups, groups]`; the shift at the groups' mean keys is `gain.T @ R`.
        price: `[groups, groups]`; `tr(Delta M Delta^T) = sum(R * (price @ R))`.
        norm: `[groups]` length of the hidden state at the lookup token.
    """

    read_in: Tensor
    gain: Tensor
    price: Tensor
    norm: Tensor

    @classmethod
    def of(cls, solver: EditSolver, found: GroupKeys, norm: Tensor) -> FrozenLayer:
        """From the solver of `found.keys` and the lengths `norm` of the hidden states."""
        groups = len(norm)
        share = torch.zeros(groups, len(found.owner), dtype=solver.A.dtype, device=solver.A.device)
        share[found.owner.to(share.device), torch.arange(len(found.owner), device=share.device)] = 1
        read_in = share @ solver.A
        mean = found.keys.T.to(solver.A) @ share.T / share.sum(1)
        full = solver.B @ solver.G if solver.constraint == "soft" else solver.B
        price = share @ (0.5 * (full + full.T)) @ share.T
        return cls(*(x.to(solver.A.device).float() for x in (read_in, read_in @ mean, price, norm)))

    def to(self, device: torch.device) -> FrozenLayer:
        return FrozenLayer(*(x.to(device) for x in vars(self).values()))

    def diagonal(self) -> FrozenLayer:
        """The ablation without coupling between groups: only the diagonal of the gain."""
        return replace(self, gain=self.gain.diagonal().diag())


class Lines:
    """Texts that are run together, cached below the first edited layer, in chunks of similar
    length.

    Args:
        first: the first edited layer.
        groups: how many groups there are.
        whole: replay whole texts, which is exact. Otherwise from the subject's first token on: what
            stands in front keeps its clean keys and values, although an edit moves them a little
            (long chat prefixes cost nothing then).

    Raises:
        EditError: layer 0 has nothing below it to cache.
    """

    def __init__(
        self,
        model: EditableModel,
        lines: Sequence[Line],
        first: int,
        groups: int,
        *,
        whole: bool = True,
        budget: int = 2048,
    ) -> None:
        if first < 1:
            raise EditError(
                "the look-ahead starts at layer 1; edit a later layer, or use a method without it"
            )
        self.groups, self.chunks = groups, []
        starts = [0 if whole else line.row.start or 0 for line in lines]
        lengths = [len(_inputs(line).ids) - start for line, start in zip(lines, starts)]
        for batch in batches(lengths, budget):
            self.chunks.append(
                _Chunk(model, [lines[i] for i in batch], [starts[i] for i in batch], first - 1)
            )

    def losses(
        self, layers: Mapping[int, FrozenLayer], out: WriteOuts, through: Through = "edit"
    ) -> Iterator[Tensor]:
        """`[2, groups]` of each chunk: the answers' NLL and the KL, weighted; differentiable."""
        for chunk in self.chunks:
            yield chunk.loss(_Shifts(layers, out, through), self.groups)


class _Chunk:
    """Rows on one cached suffix, and the positions that are scored."""

    def __init__(
        self, model: EditableModel, lines: Sequence[Line], starts: Sequence[int], below: int
    ) -> None:
        self.model = model
        rows = [_inputs(line) for line in lines]
        self.suffix = Suffix(
            model, [replace(row, subject=start) for row, start in zip(rows, starts)], below
        )
        said, kept = [], []  # (line, place in the suffix, token or 0, weight)
        for i, (line, row, start) in enumerate(zip(lines, rows, starts)):
            if line.row.answer is not None:
                answer = line.row.ids[line.row.answer :]
                at = line.row.answer - 1 - start
                said += [
                    (i, at + j, token, line.weight / len(answer)) for j, token in enumerate(answer)
                ]
            else:
                end, lookup = len(row.ids) - 1, line.row.subject or 0
                others = range(lookup, end) if line.last < 1 else range(0)
                last = line.last if others else 1.0
                kept.append((i, end - start, 0, line.weight * last))
                kept += [(i, p - start, 0, line.weight * (1 - last) / len(others)) for p in others]
        device = model.device
        self.owner = torch.tensor([line.group for line in lines], device=device)
        self.lookup = torch.tensor(
            [(line.row.subject or 0) - start for line, start in zip(lines, starts)], device=device
        )
        self.said, self.kept = (_columns(part, device) for part in (said, kept))
        with torch.no_grad():
            self.clean = (
                self.suffix.run(self.suffix.hidden)[self.kept[0], self.kept[1]] if kept else None
            )

    def loss(self, shifts: _Shifts, groups: int) -> Tensor:
        with shifts.on(self.model, self.owner, self.lookup):
            final = self.suffix.run(self.suffix.hidden)
        head = self.model.hf.get_output_embeddings()
        cap = getattr(self.model.hf.config, "final_logit_softcapping", None)
        losses = torch.zeros(2, groups, device=final.device)
        for kind, (line, place, token, weight) in enumerate((self.said, self.kept)):
            if not len(line):
                continue
            wanted = (
                {"targets": token} if kind == 0 else {"ref_hidden": self.clean, "reverse": False}
            )
            found = target_loss(
                final[line, place],
                head.weight,
                bias=getattr(head, "bias", None),
                softcap=cap,
                **wanted,
            )
            value = found.ce if kind == 0 else found.kl
            losses = losses.index_put(
                (torch.full_like(line, kind), self.owner[line]), value * weight, accumulate=True
            )
        return losses


def _inputs(line: Line) -> Row:
    """What is run: nothing is predicted after an answer's last token."""
    return line.row if line.row.answer is None else replace(line.row, ids=line.row.ids[:-1])


def _columns(
    table: Sequence[tuple[int, int, int, float]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    line, place, token, weight = zip(*table) if table else ((), (), (), ())
    ints = (
        torch.tensor(column, dtype=torch.long, device=device) for column in (line, place, token)
    )
    return *ints, torch.tensor(weight, dtype=torch.float32, device=device)  # type: ignore[return-value]


class _Shifts:
    """The edit under training, as one of the three things a step can see."""

    def __init__(
        self, layers: Mapping[int, FrozenLayer], out: Mapping[int, Tensor], through: Through
    ) -> None:
        if through == "edit":
            self.factors = {
                layer: (out[layer].T, frozen.read_in.T) for layer, frozen in layers.items()
            }
        else:
            self.added = {
                k: frozen.gain.T @ out[k] if through == "proxy" else out[k]
                for k, frozen in layers.items()
            }
        self.through = through

    @contextmanager
    def on(self, model: EditableModel, owner: Tensor, lookup: Tensor) -> Iterator[None]:
        if self.through == "edit":
            with model.virtual(self.factors):
                yield
            return

        def hook(shift: Tensor):
            def add(_module, _inputs, output):
                lines = torch.arange(len(owner), device=output.device)
                return output.index_put(
                    (lines, lookup), shift[owner.to(shift.device)].to(output), accumulate=True
                )

            return add

        handles = [
            model.projection(layer).register_forward_hook(hook(shift))
            for layer, shift in self.added.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
