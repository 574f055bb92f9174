"""Rating answers: log-probabilities of given texts after given prompts, in as few rows as
possible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knowedit.models.tokens import batches

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class Score:
    """How the model rates an answer: mean log-probability a token (nats), and whether every token
    is its arg-max.
    """

    logprob: float
    exact: bool

    @property
    def probability(self) -> float:
        """Geometric mean of the tokens' probabilities (the length-normalised probability of
        CounterFact).
        """
        return float(torch.tensor(self.logprob).exp())


@torch.no_grad()
def score(
    model: EditableModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    budget: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Rate `answers[i]` after `prompts[i]`; rows that are a prefix of another row are read from it,
    not run again.
    """
    rows = [model.row(p, answer=a) for p, a in zip(prompts, answers)]
    inputs = [tuple(r.ids[:-1]) for r in rows]
    hosts = _hosts(inputs)
    unique = sorted(set(hosts.values()), key=len)
    readers: dict[tuple[int, ...], list[int]] = {}
    for i, tokens in enumerate(inputs):
        readers.setdefault(hosts[tokens], []).append(i)
    scores: list[Score | None] = [None] * len(rows)
    for batch in batches([len(u) for u in unique], budget):
        ids, _ = model.pad([unique[b] for b in batch])
        hidden = model.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        spans = [(line, i) for line, b in enumerate(batch) for i in readers[unique[b]]]
        at = [
            (line, t - 1, rows[i].ids[t])
            for line, i in spans
            for t in range(rows[i].answer or 0, len(rows[i].ids))
        ]
        line, position, token = (torch.tensor(x, device=model.device) for x in zip(*at))
        logp = model.head(hidden[line, position]).float().log_softmax(-1)
        chosen = logp.gather(1, token[:, None])[:, 0]
        best = logp.argmax(-1) == token
        start = 0
        for _, i in spans:
            stop = start + len(rows[i].ids) - (rows[i].answer or 0)
            scores[i] = Score(float(chosen[start:stop].mean()), bool(best[start:stop].all()))
            start = stop
        if progress:
            progress(len(spans))
    return scores  # type: ignore[return-value]


@torch.no_grad()
def next_logprobs(model: EditableModel, prompts: Sequence[str], *, budget: int = 4096) -> Tensor:
    """Log-probabilities of the next token after each prompt: `[n, vocab]`, float32, on the CPU."""
    rows = [model.row(p).ids for p in prompts]
    result: list[Tensor | None] = [None] * len(rows)
    for batch in batches([len(r) for r in rows], budget):
        ids, mask = model.pad([rows[i] for i in batch])
        hidden = model.hf.base_model(input_ids=ids, use_cache=False)
        last = hidden.last_hidden_state[
            torch.arange(len(batch), device=model.device), mask.sum(1) - 1
        ]
        for i, logp in zip(batch, model.head(last).float().log_softmax(-1).cpu()):
            result[i] = logp
    return torch.stack([r for r in result if r is not None])


def _hosts(inputs: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each token tuple, the longest given tuple it is a prefix of (in sorted order it follows
    directly).
    """
    ordered = sorted(set(inputs))
    hosts: dict[tuple[int, ...], tuple[int, ...]] = {}
    for this, after in zip(reversed(ordered), [None, *reversed(ordered)]):
        hosts[this] = hosts[after] if after is not None and after[: len(this)] == this else this
    return hosts
