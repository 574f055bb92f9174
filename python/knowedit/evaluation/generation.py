"""What an edited model writes by itself, beside what it rates under teacher forcing: free answers,
fluency and consistency.

* contains: the greedy answer (`ANSWER` tokens) to a prompt, a question or a chat's turn holds the
  new object, as whole words.
* fluency (Meng et al. 2022, GE): the weighted entropy of the bi- and trigrams of a longer text
  that goes on with the prompt. A text that repeats itself has little.
* consistency (Meng et al. 2022, RS): the cosine of the tf-idf vectors of that text and of reference
  texts about things of which the new object is true.

Texts are greedy, so that they are the same each time (the paper samples among the five likeliest
tokens, and its figures are therefore no yardstick for these); words are runs of letters and digits,
and single signs of punctuation.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.evaluation import Estimates, before_and_after, estimate
from knowedit.evaluation.interview import ANSWER, prompts_of
from knowedit.evaluation.subjects.same_subject import contains
from knowedit.facts.fact import Fact, as_facts
from knowedit.io.tables import Table
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model

#: Tokens of a text whose fluency and consistency are measured, as in the paper.
LENGTH = 100
#: Sizes of n-grams, and the weight of the entropy of each; the figure is the mean of the products.
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
#: Reference texts by the object that is true of what they are about.
References = Mapping[str, Sequence[str]]


def ngram_entropy(text: str) -> float:
    """The fluency of a text, in bits: the mean over `WEIGHTS` of weight x entropy of the n-grams'
    frequencies; 0 for a text shorter than an n-gram.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    found = []
    for size, weight in WEIGHTS.items():
        counts = Counter(zip(*(words[start:] for start in range(size)))).values()
        total = sum(counts)
        found.append(weight * -sum(n / total * math.log2(n / total) for n in counts))
    return sum(found) / len(found)


class TfIdf:
    """tf-idf vectors with the usual smoothing, `idf = ln((1 + n) / (1 + df)) + 1`, of the words of
    two or more letters in `documents`; other words count nothing.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        known = [set(self._words(text)) for text in documents]
        frequency = Counter(word for words in known for word in words)
        self.idf = {w: math.log((1 + len(known)) / (1 + n)) + 1 for w, n in frequency.items()}

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"\b\w\w+\b", text.lower())

    def similarity(self, one: str, other: str) -> float:
        """The cosine of the two texts' vectors; 0 where one has no known word."""
        first, second = (
            {w: n * self.idf[w] for w, n in Counter(self._words(t)).items() if w in self.idf}
            for t in (one, other)
        )
        norms = math.hypot(*first.values()) * math.hypot(*second.values())
        return sum(v * second.get(w, 0.0) for w, v in first.items()) / norms if norms else 0.0


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Reference texts from a JSON file, `{"object": ["text", ...]}`.

    Raises:
        KnowEditError: it is not JSON, or of another form.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise KnowEditError(f"{path} is not JSON: {error}") from error
    lists = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(x, list) and all(isinstance(t, str) for t in x) for x in lists):
        raise KnowEditError(f'{path} must hold reference texts as {{"object": ["text", ...]}}')
    return dict(found)


class Figure(NamedTuple):
    """One number of one fact: `kind` and `name` as in `Estimates`."""

    record: int
    kind: str
    name: str
    value: float


class Writing:
    """Some facts, and what a model writes about them.

    Args:
        references: texts by object; a fact whose target has none gets no consistency, and a prompt
            after which `length` tokens have no room gets no text.
        length: tokens of the texts.
    """

    def __init__(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        references: References | None = None,
        *,
        length: int = LENGTH,
    ) -> None:
        self.model, self.facts, self.length = model, list(facts), length
        self.references = {
            target: " ".join(texts) for target, texts in (references or {}).items() if texts
        }
        self.vectors = TfIdf(text for texts in (references or {}).values() for text in texts)

    def read(self, record: int | None = None, model: EditableModel | None = None) -> list[Figure]:
        """The figures of one fact (None: of all), of the model as it is now; or of another model,
        with the same tokens.
        """
        model = model or self.model
        records = range(len(self.facts)) if record is None else [record]
        asked = [(r, *way) for r in records for way in prompts_of(model, self.facts[r])]
        answers = model.generate([prompt for _, _, prompt in asked], ANSWER)
        found = [
            Figure(r, way, "contains", float(contains(answer, self.facts[r].target)))
            for (r, way, _), answer in zip(asked, answers)
        ]
        room = model.max_length - self.length
        gone_on = {
            r: self.facts[r].text
            for r in records
            if len(model.tokenizer(self.facts[r].text)["input_ids"]) <= room
        }
        texts = model.generate(list(gone_on.values()), self.length)
        for r, text in zip(gone_on, texts):
            found.append(Figure(r, "text", "fluency", ngram_entropy(text)))
            if (reference := self.references.get(self.facts[r].target)) is not None:
                similar = self.vectors.similarity(text, reference)
                found.append(Figure(r, "text", "consistency", similar))
        return found


def summary(figures: Sequence[Figure]) -> Estimates:
    """Means over facts with their intervals."""
    table: Estimates = {}
    for kind, name in dict.fromkeys((one.kind, one.name) for one in figures):
        mine = [one for one in figures if (one.kind, one.name) == (kind, name)]
        values, owners = (np.array([one[i] for one in mine]) for i in (3, 0))
        share = name == "contains"
        table.setdefault(kind, {})[name] = estimate(values.astype(float), owners, share=share)
    return table


@dataclass(frozen=True)
class Generation:
    """What was written before an edit and under it: `{kind: {measure: Estimate}}` each."""

    before: Estimates
    after: Estimates

    def table(self) -> Table:
        """A row a measure."""
        title = "what it writes: the object in greedy answers, fluency (bits), consistency"
        return before_and_after(self.before, self.after, title)

    def __str__(self) -> str:
        return str(self.table())


@accepts_model
def evaluate_generation(
    model: EditableModel,
    edit: Edit,
    facts: Sequence[Fact],
    references: References | None = None,
    *,
    length: int = LENGTH,
) -> Generation:
    """What the model writes about `facts` before `edit` and under it; the model is left as it was
    found.

    Raises:
        FactError: what is not a list of facts.
    """
    writing = Writing(model, as_facts(facts), references, length=length)
    before = writing.read()
    with edit.applied_to(model):
        return Generation(summary(before), summary(writing.read()))
