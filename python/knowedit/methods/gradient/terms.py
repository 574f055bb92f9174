"""What a gradient method's loss is made of: texts that should be said, and texts after which
nothing should change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.facts.fact import Probe
from knowedit.methods.gradient.trainable import Forward, Trainable, at_least_float32
from knowedit.models.editable import EditableModel
from knowedit.models.generation import continuations
from knowedit.models.tokens import Row, batches


class Found(NamedTuple):
    """What a term says of some texts, each `[texts]`: their losses (mean over their scored tokens,
    nats, differentiable), and by how many nats the wanted token leads the best other one where it
    leads least (negative: another one wins)."""

    texts: list[int]
    loss: Tensor
    lead: Tensor


class Term(ABC):
    """Texts with a loss each. A step takes `weight` times the mean over the texts that it draws.

    Args:
        draw: texts a step, every text once before any comes again; None: all of them.
        budget: padded tokens run at once (memory).
    """

    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[Row],
        weight: float = 1.0,
        draw: int | None = None,
        budget: int = 256,
    ) -> None:
        self.model, self.rows, self.weight, self.budget = model, list(rows), weight, budget
        if not self.rows or not all(row.ids for row in self.rows):
            raise EditError("there are no texts to train on, or one of them is empty")
        self.draw = min(draw or len(self.rows), len(self.rows))

    @abstractmethod
    def places(self, row: Row) -> range:
        """The tokens of a text after which it is scored."""

    @abstractmethod
    def judge(self, logits: Tensor, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses `[n]` at the places of `texts`, one text after another, from logits `[n, vocab]`;
        and the wanted tokens.
        """

    def drawn(self, step: int, seed: int) -> list[int]:
        """The texts of a step."""
        first, size, order = step * self.draw, len(self.rows), []
        for epoch in range(first // size, (first + self.draw - 1) // size + 1):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 32))
            order += torch.randperm(size, generator=generator).tolist()
        return order[first % size :][: self.draw]

    def evaluate(self, part: Trainable, texts: Sequence[int]) -> Iterator[Found]:
        """Batch after batch, so that each can be differentiated and forgotten before the next."""
        for batch in batches([len(self.rows[i].ids) for i in texts], self.budget):
            mine = [texts[i] for i in batch]
            ids, line, place = _scored(
                self.model, [(self.rows[i].ids, self.places(self.rows[i])) for i in mine]
            )
            logits = part.logits(ids, line, place)
            loss, wanted = self.judge(logits, mine)
            best, own = (
                logits.detach().topk(2).values,
                logits.detach().gather(1, wanted[:, None])[:, 0],
            )
            lead = own - torch.where(own == best[:, 0], best[:, 1], best[:, 0])
            mean = loss.new_zeros(len(mine)).index_add(0, line, loss) / torch.bincount(line)
            yield Found(
                mine, mean, torch.full_like(mean, torch.inf).scatter_reduce(0, line, lead, "amin")
            )


class Said(Term):
    """Answers that the model should give: their negative log-likelihood."""

    def places(self, row: Row) -> range:
        return range((row.answer or 1) - 1, len(row.ids) - 1)

    def judge(self, logits: Tensor, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        answers = [self.rows[i].ids[self.rows[i].answer :] for i in texts]
        wanted = torch.tensor(
            [token for answer in answers for token in answer], device=logits.device
        )
        return logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0], wanted


class Kept(Term):
    """Texts after each of whose tokens the model should go on as it does now: KL(clean || edited).

    The clean side is kept as final hidden states, from which the model's own head makes the
    log-probabilities again: for a vocabulary of 49,152 and a hidden size of 576 that is 85 times
    less memory, and exact.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[Row],
        weight: float = 1.0,
        draw: int | None = None,
        budget: int = 256,
    ) -> None:
        super().__init__(model, rows, weight, draw, budget)
        self.clean: dict[int, Tensor] = {}
        states = Forward(model)
        for batch in batches([len(row.ids) for row in self.rows], budget):
            ids, line, place = _scored(
                model, [(self.rows[i].ids, self.places(self.rows[i])) for i in batch]
            )
            found = states.hidden(ids, line, place).split([len(self.rows[i].ids) for i in batch])
            self.clean |= dict(zip(batch, found))

    def places(self, row: Row) -> range:
        return range(len(row.ids))

    def judge(self, logits: Tensor, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            clean = at_least_float32(
                self.model.head(torch.cat([self.clean[i] for i in texts]))
            ).log_softmax(-1)
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1), clean.argmax(-1)


def continued(model: EditableModel, texts: Sequence[str | Probe], tokens: int) -> list[Row]:
    """Prompts with their answers, or with what the model itself goes on with for `tokens` tokens
    (where it says anything).
    """
    probes = [Probe(text) if isinstance(text, str) else text for text in texts]
    rows = [
        model.row(probe.prompt, answer=probe.answer) for probe in probes if probe.answer is not None
    ]
    open_ended = [probe.prompt for probe in probes if probe.answer is None]
    own = zip(
        [model.row(prompt).ids for prompt in open_ended], continuations(model, open_ended, tokens)
    )
    return rows + [Row(ids + more, answer=len(ids)) for ids, more in own if more]


def _scored(
    model: EditableModel, texts: Sequence[tuple[Sequence[int], range]]
) -> tuple[Tensor, Tensor, Tensor]:
    """`ids [B, T]`, and for every place its line and its token's index."""
    ids, _ = model.pad([tokens for tokens, _ in texts])
    at = [(line, place) for line, (_, places) in enumerate(texts) for place in places]
    line, place = (torch.tensor(column, device=model.device) for column in zip(*at))
    return ids, line, place
