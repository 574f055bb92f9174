"""Perplexity on held-out text: what many edits do to ordinary language."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from knowedit.errors import KnowEditError
from knowedit.evaluation.measures.base import ModelMeasure, register
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.tokens import cut, start_tokens


@register
class Perplexity(ModelMeasure):
    """`perplexity` of held-out text, before the edit and under it."""

    name, about, place = "perplexity", "ordinary language stays as likely", 101
    shown: ClassVar = {"after": ".2f"}
    needs_text = True

    def observe(self, model: EditableModel, texts: Sequence[str]) -> float:
        return perplexity(model, texts)

    def compare(self, before: float, after: float) -> dict[str, Any]:
        return {"before": before, "after": after}

    def describe(self, found: dict[str, Any]) -> str:
        return f"perplexity of held-out text: {found['before']:.2f}, then {found['after']:.2f}"


@accepts_model
@torch.no_grad()
def perplexity(
    model: EditableModel, texts: Iterable[str], *, tokens: int = 2048, window: int = 256
) -> float:
    """exp of the mean negative log-likelihood of `tokens` tokens of `texts` (documents in order),
    each predicted from those before it in its window of `window` tokens, which starts as the
    tokenizer starts a text; documents shorter than a window stand alone.

    Raises:
        KnowEditError: there is no document of two tokens.
    """
    total, count = 0.0, 0
    for ids in _windows(model, texts, min(window, model.max_length)):
        ids = ids[: tokens - count + 1]
        inputs, _ = model.pad([ids])
        logp = model.logprobs(model.final_states(inputs)[0, :-1])
        total -= float(logp.gather(1, inputs[0, 1:, None].to(logp.device)).double().sum())
        count += len(ids) - 1
        if count >= tokens:
            break
    if not count:
        raise KnowEditError("perplexity needs text of two tokens or more")
    return float(torch.tensor(total / count).exp())


def _windows(model: EditableModel, texts: Iterable[str], window: int) -> Iterator[list[int]]:
    start = start_tokens(model.tokenizer)
    for text in texts:
        ids = model.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        yield from (piece for piece in cut(ids, window, start) if len(piece) > 1)
