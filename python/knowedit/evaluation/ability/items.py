"""The bundled tasks: 160 items of four kinds, written for this package, in `items.jsonl`.

An item is a text, the answer that goes on with it, and wrong answers: `{"task", "prompt", "answer",
"others"}`. The model's choice is the answer with the highest log-likelihood a token; an answer that
is only as likely as another is not chosen. None asks about a fact of the embedded set.

| task | items | choices | chance |
|---|---|---|---|
| knowledge: questions of common knowledge | 40 | 4 | 0.25 |
| cloze: the word that a sentence ends in | 40 | 4 | 0.25 |
| reading: a question about the sentences before it | 40 | 4 | 0.25 |
| sentiment: whether a review is positive or negative, half of each | 40 | 2 | 0.5 |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knowedit.evaluation.measures.base import rate
from knowedit.models.editable import EditableModel

ITEMS = Path(__file__).with_name("items.jsonl")


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        answer: the right one; others: the wrong ones.
    """

    task: str
    prompt: str
    answer: str
    others: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """All answers, the right one first."""
        return (self.answer, *self.others)


@cache
def bundled() -> dict[str, tuple[Item, ...]]:
    """The items of each task, in the order of the file."""
    records = map(json.loads, ITEMS.read_text(encoding="utf-8").splitlines())
    items = [Item(r["task"], r["prompt"], r["answer"], tuple(r["others"])) for r in records]
    tasks = dict.fromkeys(item.task for item in items)
    return {task: tuple(item for item in items if item.task == task) for task in tasks}


def chance(items: Sequence[Item]) -> float:
    """The accuracy of somebody who chooses at random."""
    return float(np.mean([1 / len(item.choices) for item in items]))


def marks(model: EditableModel, items: Sequence[Item]) -> dict[str, NDArray[np.float64]]:
    """The figures of each item, `[items]`: "accuracy", 1 where the model chooses the right answer,
    and "p(right)", the share of that answer in the choices' probabilities (geometric means over
    tokens).

    Raises:
        ModelError: the model's probabilities are no numbers.
    """
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    found = iter(rate(model, *zip(*pairs)))
    logprobs = [np.array([next(found).logprob for _ in item.choices]) for item in items]
    right = [float(found[0] > found[1:].max()) for found in logprobs]
    shares = [1 / np.exp(found - found[0]).sum() for found in logprobs]
    return {"accuracy": np.array(right), "p(right)": np.array(shares)}
