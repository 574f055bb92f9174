"""What a model says: log-probabilities of given texts after given prompts, greedy continuations,
samples.

Where a router is registered (`EditableModel.router`; SERAC registers one), `score`, `next_logprobs`
and `generate` ask it which prompts another model should answer. The base has answered every prompt
before, those too: its batches, and so its bits, are the same as without a router.

Greedy is the arg-max and a sample is drawn from the model's own distribution, whatever the model's
`generation_config` asks for (penalties, bans, temperature, beams): what is measured is the model,
not the taste of whoever published it. Of that config only the tokens that end a text are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from knowedit.errors import ModelError
from knowedit.io.progress import Within
from knowedit.io.ranks import team
from knowedit.models.tokens import batches, start_tokens

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

T = TypeVar("T")


class Router(Protocol):
    """Sends some prompts to another model (the counterfactual one)."""

    def route(self, prompts: Sequence[str]) -> list[str | None]:
        """What to ask the counterfactual model instead of each prompt; None: the base answers."""

    def counterfactual(self) -> AbstractContextManager[None]:
        """Within the block the model is the counterfactual one."""


@dataclass(frozen=True)
class Score:
    """How the model rates an answer.

    Attributes:
        logprob: mean log-probability a token, nats.
        exact: whether every token is the arg-max.
        hits: the share of tokens that are.
        choices: the arg-max in place of each token.
    """

    logprob: float
    exact: bool
    hits: float = math.nan
    choices: tuple[int, ...] = ()

    @property
    def probability(self) -> float:
        """Geometric mean of the tokens' probabilities (the length-normalised probability of
        CounterFact).
        """
        return float(torch.tensor(self.logprob).exp())


def score(
    model: EditableModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    budget: int = 4096,
    progress: Callable[[float], None] | None = None,
) -> list[Score]:
    """Rate `answers[i]` after `prompts[i]`; rows that are a prefix of another row are read from it,
    not run again.

    Args:
        budget: padded tokens a batch.
        progress: called with the number of answers just rated.

    Raises:
        ModelError: prompts or answers that are no lists of texts, or not as many.
    """
    _check_texts(prompts, "prompts")
    _check_texts(answers, "answers")
    if len(prompts) != len(answers):
        raise ModelError(
            f"prompts and answers go together, got {len(prompts)} and {len(answers)} of them"
        )
    return _routed(
        model,
        prompts,
        _score(model, prompts, answers, budget, progress),
        lambda which, asked: _score(model, asked, [answers[i] for i in which], budget),
    )


def next_logprobs(model: EditableModel, prompts: Sequence[str], *, budget: int = 4096) -> Tensor:
    """Log-probabilities of the next token after each prompt: `[n, vocab]`, float32, on the CPU.
    Raises ModelError: prompts that are no list of texts.
    """
    _check_texts(prompts, "prompts")
    if not prompts:
        return torch.empty(0, model.hf.get_output_embeddings().weight.shape[0])
    found = _routed(
        model,
        prompts,
        _next_logprobs(model, prompts, budget),
        lambda _, asked: _next_logprobs(model, asked, budget),
    )
    return torch.stack(found)


def _check_texts(texts: Any, name: str) -> None:
    """Raise ModelError for one text alone, whose letters would be taken for texts, and for what is
    no list of texts.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ModelError(
            f"{name} must be a list of texts, got {type(texts).__name__} {texts!r:.80}; put one "
            "text in a list"
        )
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ModelError(f"{name}[{i}] must be a text, got {type(text).__name__} {text!r:.80}")


def generate(
    model: EditableModel,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    *,
    batch: int = 16,
    as_configured: bool = False,
) -> list[str]:
    """Greedy continuations (the new text only), `batch` prompts at a time.

    Args:
        as_configured: as the model's `generation_config` says instead: it may sample, punish
            repetition, search with beams.

    Raises:
        ModelError: prompts that are no list of texts, or less than one new token.
    """
    _check_texts(prompts, "prompts")
    for name, count in {"max_new_tokens": max_new_tokens, "batch": batch}.items():
        if not isinstance(count, Integral) or count < 1:
            raise ModelError(f"{name} must be a whole number from 1 on, got {count!r}")

    def ask(_: Sequence[int], asked: Sequence[str]) -> list[str]:
        found = continuations(model, asked, max_new_tokens, batch, as_configured=as_configured)
        return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    return _routed(model, prompts, ask([], prompts), ask)


def greedy(
    model: EditableModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int,
    *,
    logits: bool = False,
    as_configured: bool = False,
) -> Iterator[tuple[Tensor, int, Tensor | None]]:
    """Of each batch, left-padded: the new tokens `[B, T]`, the token that fills up finished rows,
    and if asked for the logits `[B, T, vocab]`. Equal prompts and batches give equal bits, with and
    without the logits; a router has no part in them.

    Args:
        as_configured: not greedy, but as the model's `generation_config` says.
    """
    fill = _fill(model)
    how = {} if as_configured else {"do_sample": False}
    for start in range(0, len(prompts), batch):
        rows = [model.row(p).ids for p in prompts[start : start + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([[fill] * (width - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device
        )
        with _generating(model, as_configured):
            out = model.hf.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=fill,
                output_logits=logits,
                logits_processor=_watched(model),
                return_dict_in_generate=True,
                **how,
            )
        yield out.sequences[:, width:], fill, torch.stack(out.logits, 1) if logits else None


def continuations(
    model: EditableModel,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    batch: int = 16,
    *,
    as_configured: bool = False,
) -> list[list[int]]:
    """Greedy continuations as tokens, without the padding behind the end of a text; a router has no
    part in them. `as_configured` as of `generate`.
    """
    ends = end_tokens(model)

    def written(together: Sequence[str]) -> list[list[int]]:
        ((new, fill, _),) = greedy(
            model, together, max_new_tokens, batch, as_configured=as_configured
        )
        return [_ended(row, ends, fill if as_configured else None) for row in new.tolist()]

    parts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    return [ids for found in team().share(parts, written) for ids in found]


def _ended(row: list[int], ends: set[int], fill: int | None) -> list[int]:
    """New tokens up to the one that ends the text. The token that fills up rows may be one that is
    said: where none ends it the row is whole, but for what `fill` is behind it where a
    configuration may end a text by other means.
    """
    end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    if end == len(row):
        while end and row[end - 1] == fill and fill not in ends:
            end -= 1
    return row[:end]


def samples(
    model: EditableModel,
    seed: int = 0,
    start: int = 0,
    *,
    batch: int = 64,
    length: int = 128,
    within: Within | None = None,
) -> Iterator[str]:
    """Endless texts sampled from the model itself (temperature 1, no truncation of the
    distribution).

    Document `n` depends on `seed` and `n` only, so a run can go on at `start`.

    Args:
        within: told after every token how much of a batch is done, and its size in tokens.

    Raises:
        ModelError: the tokenizer has no token that starts or ends a text.
    """
    begin, pad = _begin(model), model.tokenizer.pad_token_id
    ids = torch.tensor([begin] * batch, device=model.device)
    for number in range(start // batch, 1 << 31):
        with torch.random.fork_rng(), _generating(model):
            # the CPU generator uses 32 bits
            torch.manual_seed((seed * 1_000_003 + number) % (1 << 32))
            out = model.hf.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                logits_processor=_watched(model, within and partial(_within, within, ids, length)),
                max_new_tokens=length - len(begin),
                pad_token_id=pad if pad is not None else begin[-1],
            )
        texts = model.tokenizer.batch_decode(out, skip_special_tokens=True)
        yield from texts[start % batch :] if number == start // batch else texts


def end_tokens(model: EditableModel) -> set[int]:
    """The tokens after which a text is over: those of the model's `generation_config`, else the
    tokenizer's.
    """
    ends = model.hf.generation_config.eos_token_id
    if ends is None:
        ends = model.tokenizer.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@contextmanager
def _generating(model: EditableModel, as_configured: bool = False) -> Iterator[None]:
    """Within the block the model generates without gradients, and follows only what it is told:
    transformers fills whatever a call leaves open from the model's `generation_config`, so a plain
    one stands in its place (`as_configured`: the model's own stays).
    """
    from transformers import GenerationConfig

    own = model.hf.generation_config
    plain = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=sorted(end_tokens(model)) or None
    )
    with model.evaluating(), torch.no_grad():
        try:
            model.hf.generation_config = own if as_configured else plain
            yield
        finally:
            model.hf.generation_config = own


def _watched(model: EditableModel, told: Any = None) -> Any:
    """What transformers passes the logits of every step through; `told` sees them, too."""
    from transformers import LogitsProcessorList

    watchers = [partial(_numbers, model.name), told]
    return LogitsProcessorList([watcher for watcher in watchers if watcher is not None])


def _within(within: Within, begun: Tensor, length: int, ids: Tensor, logits: Tensor) -> Tensor:
    """Say how far a batch of rows `begun` is, of which each may get `length` tokens."""
    rows, before = begun.shape
    within((ids.shape[1] - before) / (length - before), rows * length)
    return logits


def _numbers(name: str, ids: Tensor, logits: Tensor) -> Tensor:
    """The next words' `logits` `[B, vocab]` as they are; among NaN the greedy choice would be some
    word all the same.
    """
    if logits.isnan().any():
        raise ModelError(
            f"{name} cannot generate: its probabilities are no numbers (NaN); its weights, or "
            "those of an edit in force, hold NaN or overflow; load it in float32, or take the "
            "original model again"
        )
    return logits


def _fill(model: EditableModel) -> int:
    """The token that fills up rows: the tokenizer's own for that, or one that ends a text."""
    pad = model.tokenizer.pad_token_id
    fill = pad if pad is not None else min(end_tokens(model), default=0)
    return int(fill) if fill < model.vocabulary else 0


def _begin(model: EditableModel) -> list[int]:
    """The tokens that a sampled text begins with: those of the tokenizer's template, else the one
    that starts a text, else the one that ends one.
    """
    tokenizer = model.tokenizer
    known = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    begin = start_tokens(tokenizer) or known[:1]
    if not begin:
        raise ModelError(
            f"{model.name} cannot be sampled: its tokenizer has no token that starts or ends a "
            "text; give texts as the corpus, or set tokenizer.bos_token"
        )
    return begin


def _routed(
    model: EditableModel,
    prompts: Sequence[str],
    found: list[T],
    ask: Callable[[Sequence[int], Sequence[str]], list[T]],
) -> list[T]:
    """`found`, with the counterfactual model's results where the router sends a prompt to it."""
    router = model.router
    if router is None:
        return found
    sent = {i: text for i, text in enumerate(router.route(prompts)) if text}
    if sent:
        with router.counterfactual():
            for i, value in zip(sent, ask(list(sent), list(sent.values()))):
                found[i] = value
    return found


@torch.no_grad()
def _score(
    model: EditableModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    budget: int,
    progress: Callable[[float], None] | None = None,
) -> list[Score]:
    rows = [model.row(p, answer=a) for p, a in zip(prompts, answers)]
    inputs = [tuple(r.ids[:-1]) for r in rows]
    hosts = _hosts(inputs)
    unique = sorted(set(hosts.values()), key=len)
    readers: dict[tuple[int, ...], list[int]] = {}
    for i, tokens in enumerate(inputs):
        readers.setdefault(hosts[tokens], []).append(i)

    def rate(batch: Sequence[int]) -> dict[int, Score]:
        """Of each answer that is read from the rows of a batch."""
        ids, _ = model.pad([unique[b] for b in batch])
        spans = [(line, i) for line, b in enumerate(batch) for i in readers[unique[b]]]
        at = [
            (line, t - 1, rows[i].ids[t])
            for line, i in spans
            for t in range(rows[i].answer or 0, len(rows[i].ids))
        ]
        line, position, token = (torch.tensor(x, device=model.device) for x in zip(*at))
        logp = model.logprobs(model.final_states(ids)[line, position])
        chosen = logp.gather(1, token[:, None])[:, 0]
        choices = logp.argmax(-1)
        best, firsts = choices == token, choices.tolist()
        found, start = {}, 0
        for _, i in spans:
            stop = start + len(rows[i].ids) - (rows[i].answer or 0)
            right = best[start:stop]
            found[i] = Score(
                float(chosen[start:stop].mean()),
                bool(right.all()),
                float(right.double().mean()),
                tuple(firsts[start:stop]),
            )
            start = stop
        if progress:
            progress(len(spans) * worth)
        return found

    parts, ranks = batches([len(u) for u in unique], budget), team()
    worth = ranks.worth(len(parts))
    scores = {i: score for part in ranks.share(parts, rate) for i, score in part.items()}
    return [scores[i] for i in range(len(rows))]


@torch.no_grad()
def _next_logprobs(model: EditableModel, prompts: Sequence[str], budget: int) -> list[Tensor]:
    rows = [model.row(p).ids for p in prompts]
    result: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches([len(r) for r in rows], budget):
        ids, mask = model.pad([rows[i] for i in batch])
        ends = torch.arange(len(batch), device=model.device), mask.sum(1) - 1
        for i, logp in zip(batch, model.logprobs(model.final_states(ids)[ends]).cpu()):
            result[i] = logp
    return result


def _hosts(inputs: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each token tuple, the longest given tuple it is a prefix of (in sorted order it follows
    directly).
    """
    ordered = sorted(set(inputs))
    hosts: dict[tuple[int, ...], tuple[int, ...]] = {}
    for this, after in zip(reversed(ordered), [None, *reversed(ordered)]):
        hosts[this] = hosts[after] if after is not None and after[: len(this)] == this else this
    return hosts
