"""What an edit under training is judged by: texts that should be said or go on as before, run
through the edited model.

Everything below the first edited layer is cached (`PartialModel`); a text is run from there on
with the frozen read-ins and the write-outs of the moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.methods.locate.keys import GroupKeys
from knowedit.models.editable import EditableModel
from knowedit.models.partial import Hook, PartialModel, hooked
from knowedit.models.texts import AnswerLoss, KeepLoss, Places, answer_places
from knowedit.models.tokens import Row, batches
from knowedit_kernels import EditSolver

#: What a step sees: the planned shift `R` at the lookup token; the realised one, `R G`; the edited
#: weights at every token.
Through = Literal["plan", "proxy", "edit"]
THROUGH: tuple[Through, ...] = ("plan", "proxy", "edit")
#: A layer's write-outs `[groups, hidden]`.
WriteOuts = dict[int, Tensor]


@dataclass(frozen=True)
class TrainedText:
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

    @property
    def run(self) -> Row:
        """What is run: nothing is predicted after an answer's last token."""
        return self.row if self.row.answer is None else replace(self.row, ids=self.row.ids[:-1])

    def kept(self) -> tuple[list[int], list[float]]:
        """Places at which the model should go on as it did, and their shares of the KL."""
        end, lookup = len(self.row.ids) - 1, self.row.subject or 0
        others = list(range(lookup, end)) if self.last < 1 else []
        if not others:
            return [end], [1.0]
        return [end, *others], [self.last] + [(1 - self.last) / len(others)] * len(others)


@dataclass(frozen=True)
class FrozenLayer:
    """What the solver fixes at one layer before the targets are trained.

    Attributes:
        read_in: `[groups, d_ff]` A; the read-ins of a group's keys are added up, they share its
            write-out.
        gain: `[groups, groups]`; the shift at the groups' mean keys is `gain.T @ R`.
        price: `[groups, groups]`; `tr(Delta M Delta^T) = sum(R * (price @ R))`.
        norm: `[groups]` length of the hidden state at the lookup token.
        writable: `[hidden, hidden]` projection on the outputs that may be written; None: all.
    """

    read_in: Tensor
    gain: Tensor
    price: Tensor
    norm: Tensor
    writable: Tensor | None = None

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
        moved = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return replace(self, **moved)

    def within(self, writable: Tensor | None) -> FrozenLayer:
        """The same with a projection on the outputs that may be written."""
        return replace(self, writable=None if writable is None else writable.to(self.price))

    def diagonal(self) -> FrozenLayer:
        """The ablation without coupling between groups: only the diagonal of the gain."""
        return replace(self, gain=self.gain.diagonal().diag())


class TrainedTexts:
    """Texts that are run together, cached below the first edited layer, in chunks of similar
    length.

    Args:
        first: the first edited layer.
        groups: how many groups there are.
        whole: run whole texts, which is exact. Otherwise from the subject's first token on: what
            stands in front keeps its clean keys and values, although an edit moves them a little
            (long chat prefixes cost nothing then).

    Raises:
        EditError: layer 0 has nothing below it to cache.
    """

    def __init__(
        self,
        model: EditableModel,
        texts: Sequence[TrainedText],
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
        starts = [0 if whole else text.row.start or 0 for text in texts]
        lengths = [len(text.run.ids) - start for text, start in zip(texts, starts)]
        for batch in batches(lengths, budget):
            self.chunks.append(
                _Chunk(model, [texts[i] for i in batch], [starts[i] for i in batch], first)
            )

    def losses(
        self, layers: Mapping[int, FrozenLayer], out: WriteOuts, through: Through = "edit"
    ) -> Iterator[Tensor]:
        """`[2, groups]` of each chunk: the answers' NLL and the KL, weighted; differentiable."""
        for chunk in self.chunks:
            yield chunk.loss(_Shifts(layers, out, through), self.groups)


class _Chunk:
    """Texts on one partial model, and their scored places with a weight each."""

    def __init__(
        self,
        model: EditableModel,
        texts: Sequence[TrainedText],
        starts: Sequence[int],
        first: int,
    ) -> None:
        self.model, device = model, model.device
        self.part = PartialModel(model, [text.run for text in texts], first, starts)
        answers: list[tuple[int, int, int]] = []
        kept: list[tuple[int, int, int]] = []
        weights: tuple[list[float], list[float]] = [], []
        for line, (text, start) in enumerate(zip(texts, starts)):
            if text.row.answer is not None:
                found = answer_places(text.row, line, start)
                answers += found
                weights[0].extend([text.weight / len(found)] * len(found))
            else:
                at, shares = text.kept()
                kept += [(line, place - start, -1) for place in at]
                weights[1].extend(text.weight * share for share in shares)
        self.owner = torch.tensor([text.group for text in texts], device=device)
        self.lookup = torch.tensor(
            [(text.row.subject or 0) - start for text, start in zip(texts, starts)], device=device
        )
        self.answers = AnswerLoss(Places.of(answers, device))
        with torch.no_grad():
            places = Places.of(kept, device)
            clean = places.states(self.part.run()) if kept else torch.empty(0)
            self.keep = KeepLoss(model, places, clean)
        self.weights = [torch.tensor(w, dtype=torch.float32, device=device) for w in weights]

    def loss(self, shifts: _Shifts, groups: int) -> Tensor:
        with shifts.on(self.model, self.owner, self.lookup):
            final = self.part.run()
        losses = torch.zeros(2, groups, device=final.device)
        parts: tuple[AnswerLoss | KeepLoss, ...] = (self.answers, self.keep)
        for kind, part in enumerate(parts):
            line = part.places.line
            if len(line):
                value = part.fused(self.model, final) * self.weights[kind]
                at = torch.full_like(line, kind), self.owner[line]
                losses = losses.index_put(at, value.to(losses), accumulate=True)
        return losses


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

    def on(
        self, model: EditableModel, owner: Tensor, lookup: Tensor
    ) -> AbstractContextManager[None]:
        """Within the block, texts of the groups `owner` `[B]` with their lookup tokens at `lookup`
        `[B]` see the edit.
        """
        if self.through == "edit":
            return model.virtual(self.factors)

        def hook(shift: Tensor) -> Hook:
            def add(_inputs: Tensor, output: Tensor) -> Tensor:
                lines = torch.arange(len(owner), device=output.device)
                texts = output.reshape(len(owner), -1, output.shape[-1])  # OPT has them in a row
                added = shift[owner.to(shift.device)].to(output)
                return texts.index_put((lines, lookup), added, accumulate=True).view_as(output)

            return add

        return hooked({model.projection(at): hook(shift) for at, shift in self.added.items()})
