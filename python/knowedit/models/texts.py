"""THE way to score texts: negative log-likelihood of answers, KL to the clean model, margins.

Final hidden states meet the head at the scored places only (`Places`), and the head is
`EditableModel.head`. The clean side of a KL is kept as final hidden states, from which the model's
own head makes the log-probabilities again: for a vocabulary of 49,152 and a hidden size of 576 that
is 85 times less memory, and exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowedit.io.progress import bar
from knowedit.models.editable import EditableModel, at_least_float32
from knowedit.models.partial import PartialModel, layer_outputs
from knowedit.models.tokens import Row
from knowedit_kernels.target_loss import target_loss

# lengths of batches are multiples: oneDNN compiles a kernel for every new shape of a bfloat16
# product
SHAPES = 8


@dataclass(frozen=True)
class Places:
    """Scored positions of a batch of texts.

    Attributes:
        line, place: `[n]` after which token of which text.
        token: `[n]` the token that should follow; -1: unknown.
    """

    line: Tensor
    place: Tensor
    token: Tensor

    @classmethod
    def of(
        cls, scored: Iterable[tuple[int, int, int]], device: torch.device | None = None
    ) -> Places:
        """From (line, place, token) of each."""
        columns = list(zip(*scored)) or [(), (), ()]
        return cls(*(torch.tensor(c, dtype=torch.long, device=device) for c in columns))

    def __len__(self) -> int:
        return len(self.line)

    def and_then(self, others: Places) -> Places:
        """These places and then others of the same batch."""
        pairs = zip(vars(self).values(), vars(others).values())
        return Places(*(torch.cat(pair) for pair in pairs))

    def states(self, final: Tensor) -> Tensor:
        """`[n, hidden]` of final hidden states `[B, T, hidden]`."""
        return final[self.line, self.place]

    def logits(self, model: EditableModel, final: Tensor) -> Tensor:
        """`[n, vocab]`, at least float32, from final hidden states `[B, T, hidden]`."""
        return at_least_float32(model.head(self.states(final)))

    def means(self, values: Tensor) -> Tensor:
        """Mean of `values` `[n]` over each text's places: `[texts]`; every text has some."""
        count = torch.bincount(self.line)
        return values.new_zeros(len(count)).index_add(0, self.line, values) / count

    def smallest(self, values: Tensor) -> Tensor:
        """The smallest of `values` `[n]` of each text: `[texts]`."""
        texts = int(self.line.max()) + 1
        return values.new_full((texts,), torch.inf).scatter_reduce(0, self.line, values, "amin")


def answer_places(row: Row, line: int, from_token: int = 0) -> list[tuple[int, int, int]]:
    """(line, place, token) of every token of a row's answer, places counted from `from_token`."""
    answer = row.answer or 0
    return [(line, i - 1 - from_token, row.ids[i]) for i in range(answer, len(row.ids))]


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of the tokens that should follow, in nats."""

    places: Places

    def __call__(self, logits: Tensor) -> Tensor:
        """`[n]`, from logits `[n, vocab]` at the places."""
        chosen = logits.log_softmax(-1).gather(1, self.places.token.clamp(min=0)[:, None])[:, 0]
        return -chosen

    def lean(self, logits: Tensor) -> Tensor:
        """As a call, in less memory: no log-probabilities are kept; it rounds otherwise in the last
        bit.
        """
        return logits.logsumexp(-1) - logits.gather(1, self.places.token[:, None])[:, 0]

    def fused(self, model: EditableModel, final: Tensor) -> Tensor:
        """`[n]`, from final hidden states `[B, T, hidden]`: head, loss and gradient in one kernel,
        which never holds all logits; where the kernel knows the model's head.
        """
        if model.layout.head.kind == "own":
            return self(self.places.logits(model, final))
        return _fused(model, self.places.states(final), targets=self.places.token)[0]


@dataclass(frozen=True)
class KeepLoss:
    """KL between the clean model's distributions and those of now, in nats.

    Attributes:
        model: whose head makes the clean distributions.
        clean: `[n, hidden]` the clean model's final hidden states at the places; or `[n, vocab]`
            its log-probabilities, where they are few (`logprobs`).
        logprobs: `clean` is log-probabilities.
        reverse: KL(now || clean) instead of KL(clean || now).
    """

    model: EditableModel
    places: Places
    clean: Tensor
    logprobs: bool = False
    reverse: bool = False

    @torch.no_grad()
    def clean_logprobs(self) -> Tensor:
        """`[n, vocab]`, at least float32."""
        return self.clean if self.logprobs else self.model.logprobs(self.clean)

    def __call__(self, logits: Tensor) -> Tensor:
        """`[n]`, from logits `[n, vocab]` at the places."""
        clean, now = self.clean_logprobs(), logits.log_softmax(-1)
        if self.reverse:
            return (now.exp() * (now - clean)).sum(-1)
        return (clean.exp() * (clean - now)).sum(-1)

    def fused(self, model: EditableModel, final: Tensor) -> Tensor:
        """`[n]`, from final hidden states `[B, T, hidden]`; see `AnswerLoss.fused`. `clean` must be
        hidden states.
        """
        if model.layout.head.kind == "own":
            return self(self.places.logits(model, final))
        states = self.places.states(final)
        return _fused(model, states, ref_hidden=self.clean, reverse=self.reverse)[1]


def margins(logits: Tensor, token: Tensor) -> Tensor:
    """By how many nats each wanted token `[n]` leads the best other one in `[n, vocab]`; negative:
    another one wins.
    """
    best, own = logits.topk(2).values, logits.gather(1, token[:, None])[:, 0]
    return own - torch.where(own == best[:, 0], best[:, 1], best[:, 0])


def _fused(model: EditableModel, states: Tensor, **wanted: Any) -> tuple[Tensor, Tensor]:
    head, how = model.hf.get_output_embeddings(), model.layout.head
    found = target_loss(
        states,
        head.weight,
        bias=getattr(head, "bias", None),
        logit_scale=how.scale,
        softcap=how.softcap,
        **wanted,
    )
    return found.ce, found.kl


@dataclass(frozen=True)
class Batch:
    """Texts that are run together.

    Attributes:
        states: `[B, T, hidden]` in front of the first trained layer.
        places: what is scored.
        share: `[n]` 1 / scored positions of the text.
        clean: `[n, hidden]` the clean model's final hidden states there.
    """

    states: Tensor
    places: Places
    share: Tensor
    clean: Tensor


class Texts:
    """Rows with all that is below `from_layer` computed; their answers' tokens are scored (without
    an answer: what comes next).

    Args:
        from_layer: the first layer that an edit changes, 1 or more.
        budget: padded tokens a batch while they are computed.
        clean: also keep the clean model's final states, which `kl` needs.
    """

    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[Row],
        from_layer: int,
        *,
        budget: int = 2048,
        clean: bool = True,
        title: str = "",
        progress: bool = False,
    ) -> None:
        self.model, self.rows = model, rows
        self._inputs = [row.ids if row.answer is None else row.ids[:-1] for row in rows]
        self._longest = max(map(len, self._inputs))
        self.part = PartialModel.for_texts(model, from_layer, self._longest)
        self._states: list[Tensor] = [torch.empty(0)] * len(rows)
        self._clean: list[Tensor] = [torch.empty(0)] * len(rows)
        with torch.no_grad(), bar(title, len(rows), "texts", show=progress) as advance:
            for group, states in layer_outputs(model, self._inputs, from_layer - 1, budget):
                final = self.part.run(states) if clean else None
                for line, i in enumerate(group):
                    length = len(self._inputs[i])
                    # copies: a view would keep the whole batch alive
                    self._states[i] = states[line, :length].clone()
                    if final is not None:
                        self._clean[i] = final[line, self._first(i) : length].clone()
                advance(len(group))

    def __len__(self) -> int:
        return len(self.rows)

    def _first(self, i: int) -> int:
        """The first scored place of row `i`."""
        answer = self.rows[i].answer
        return (len(self._inputs[i]) if answer is None else answer) - 1

    def batch(self, which: Sequence[int]) -> Batch:
        """Some of the rows, padded to the longest and on to a multiple of `SHAPES`."""
        device = self._states[0].device
        states = torch.nn.utils.rnn.pad_sequence([self._states[i] for i in which], batch_first=True)
        room = min(-states.shape[1] % SHAPES, self._longest - states.shape[1])
        states = torch.nn.functional.pad(states, (0, 0, 0, room))
        scored, share = [], []
        for line, i in enumerate(which):
            row, span = self.rows[i], range(self._first(i), len(self._inputs[i]))
            known = row.answer is not None
            scored += [(line, place, row.ids[place + 1] if known else -1) for place in span]
            share += [1 / len(span)] * len(span)
        clean = torch.cat([self._clean[i] for i in which])
        return Batch(states, Places.of(scored, device), torch.tensor(share, device=device), clean)

    def logits(self, batch: Batch) -> Tensor:
        """`[n, vocab]` at the scored places of a batch, of the model as it now is."""
        return batch.places.logits(self.model, self.part.run(batch.states))

    def nll(self, batch: Batch) -> Tensor:
        """Mean NLL of each text's tokens, in nats, added up over the batch (an unknown token counts
        0).
        """
        found = AnswerLoss(batch.places)(self.logits(batch))
        return (found * batch.share * (batch.places.token >= 0)).sum()

    def kl(self, batch: Batch, clean: Tensor | None = None) -> Tensor:
        """Mean KL(clean || now) over each text's scored positions, in nats, added up over the
        batch; `clean`: other final states than the batch's own.
        """
        clean = batch.clean if clean is None else clean
        found = KeepLoss(self.model, batch.places, clean)(self.logits(batch))
        return (found * batch.share).sum()
