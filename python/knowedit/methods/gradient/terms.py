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
from knowedit.methods.gradient.trainable import Trainable
from knowedit.models.editable import EditableModel
from knowedit.models.generation import continuations
from knowedit.models.texts import AnswerLoss, KeepLoss, Places, margins
from knowedit.models.tokens import Row, batches


class TextLosses(NamedTuple):
    """What a term says of some texts, each `[texts]`: their losses (mean over their scored tokens,
    nats, differentiable), and by how many nats the wanted token leads the best other one where it
    leads least (negative: another one wins)."""

    texts: list[int]
    loss: Tensor
    lead: Tensor


class LossTerm(ABC):
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
        if not self.rows:
            raise EditError("there are no texts to train on; give at least one")
        self.draw = min(draw or len(self.rows), len(self.rows))

    @abstractmethod
    def places(self, row: Row) -> range:
        """The tokens of a text after which it is scored."""

    @abstractmethod
    def judge(self, logits: Tensor, places: Places, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
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

    def evaluate(self, part: Trainable, texts: Sequence[int]) -> Iterator[TextLosses]:
        """Batch after batch, so that each can be differentiated and forgotten before the next."""
        for batch in batches([len(self.rows[i].ids) for i in texts], self.budget):
            mine = [texts[i] for i in batch]
            ids, places = self._padded(mine)
            logits = part.run(lambda ids=ids, places=places: self._logits(ids, places))  # type: ignore[misc]
            loss, wanted = self.judge(logits, places, mine)
            lead = places.smallest(margins(logits.detach(), wanted))
            yield TextLosses(mine, places.means(loss), lead)

    def _logits(self, ids: Tensor, places: Places) -> Tensor:
        return places.logits(self.model, self.model.final_states(ids))

    def _padded(self, texts: Sequence[int]) -> tuple[Tensor, Places]:
        """`ids [B, T]` of some texts, and their places."""
        rows = [self.rows[i] for i in texts]
        ids, _ = self.model.pad([row.ids for row in rows])
        scored = [
            (line, place, row.ids[place + 1] if place + 1 < len(row.ids) else -1)
            for line, row in enumerate(rows)
            for place in self.places(row)
        ]
        return ids, Places.of(scored, self.model.device)


class AnswerTerm(LossTerm):
    """Answers that the model should give: their negative log-likelihood."""

    def places(self, row: Row) -> range:
        return range((row.answer or 1) - 1, len(row.ids) - 1)

    def judge(self, logits: Tensor, places: Places, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return AnswerLoss(places).lean(logits), places.token


class KeepTerm(LossTerm):
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
        for batch in batches([len(row.ids) for row in self.rows], budget):
            ids, places = self._padded(batch)
            found = places.states(model.final_states(ids))
            self.clean |= dict(zip(batch, found.split([len(self.rows[i].ids) for i in batch])))

    def places(self, row: Row) -> range:
        return range(len(row.ids))

    def judge(self, logits: Tensor, places: Places, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            clean = self.model.logprobs(torch.cat([self.clean[i] for i in texts]))
        return KeepLoss(self.model, places, clean, logprobs=True)(logits), clean.argmax(-1)


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
