"""CounterFact's measures (Meng et al. 2022): does the edit hold, does it generalise, does it stay
in place?

For a prompt and its two answers, `p` is the length-normalised probability (geometric mean over
tokens):

* efficacy, paraphrase:  success = p(new) > p(true);   magnitude = p(new) - p(true);   exact = every
  token of the new answer is the model's arg-max;
* neighbourhood:         success = p(true) > p(new);   magnitude = p(true) - p(new);   exact
  likewise for the true one; unchanged = the same decision as before the edit.

A record's prompts are averaged first, then records; intervals are 95 % bootstrap intervals over
records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from knowedit.edits.edit import Edit
from knowedit.facts.fact import Fact
from knowedit.io.progress import bar
from knowedit.models.editable import EditableModel
from knowedit.models.generation import Score

KINDS = ("efficacy", "paraphrase", "neighbourhood")


@dataclass(frozen=True)
class Estimate:
    """A mean over records with its 95 % bootstrap interval; rates are shares between 0 and 1."""

    mean: float
    low: float
    high: float
    records: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Question:
    """One prompt of one fact with the answer it should have after the edit (`right`) and the one it
    should not.
    """

    record: int
    kind: str
    prompt: str
    right: str
    wrong: str | None


@dataclass(frozen=True)
class Answer:
    """The model's rating of a question's two answers."""

    right: Score
    wrong: Score | None

    @property
    def success(self) -> float:
        return math.nan if self.wrong is None else float(self.right.logprob > self.wrong.logprob)

    @property
    def magnitude(self) -> float:
        return math.nan if self.wrong is None else self.right.probability - self.wrong.probability

    @property
    def exact(self) -> float:
        return float(self.right.exact)


@dataclass(frozen=True)
class Evaluation:
    """What an edit did to a set of facts.

    Attributes:
        before, after: `{kind: {measure: Estimate}}`; `after["neighbourhood"]` also has `unchanged`.
        questions, answers_before, answers_after: every single prompt.
    """

    before: dict[str, dict[str, Estimate]]
    after: dict[str, dict[str, Estimate]]
    questions: list[Question]
    answers_before: list[Answer]
    answers_after: list[Answer]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary (without the single prompts)."""
        return {
            name: {
                kind: {m: asdict(e) for m, e in measures.items()}
                for kind, measures in table.items()
            }
            for name, table in (("before", self.before), ("after", self.after))
        }

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a prompt."""
        return [
            {
                **asdict(q),
                "p_right_before": b.right.probability,
                "p_right_after": a.right.probability,
                "p_wrong_before": b.wrong.probability if b.wrong else None,
                "p_wrong_after": a.wrong.probability if a.wrong else None,
                "exact_before": b.right.exact,
                "exact_after": a.right.exact,
            }
            for q, b, a in zip(self.questions, self.answers_before, self.answers_after)
        ]

    def __str__(self) -> str:
        lines = [f"{'':14} {'measure':10} {'before':>22} {'after':>22}"]
        for kind, measures in self.after.items():
            for measure, value in measures.items():
                was = self.before[kind].get(measure)
                lines.append(
                    f"{kind:14} {measure:10} {'' if was is None else str(was):>22} {value!s:>22}"
                )
        return "\n".join(lines)


def evaluate(
    model: EditableModel,
    edit: Edit | None,
    facts: Sequence[Fact],
    *,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure `facts` before and after `edit` (None: only as the model is now, reported as both).

    The model is left as it was found.
    """
    return evaluate_each(model, [edit] * len(facts), facts, seed=seed, progress=progress)


def evaluate_each(
    model: EditableModel,
    edits: Iterable[Edit | None],
    facts: Sequence[Fact],
    *,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """As `evaluate`, with an edit of its own for each fact: each is applied alone and undone
    (single-edit protocol).

    An edit that several facts share stands once for each, one after the other. Edits that are made
    when they are asked for need not all be kept.
    """
    asked = [q for record, fact in enumerate(facts) for q in questions(record, fact)]
    before = ask(model, asked, title="before", progress=progress)
    after: list[Answer | None] = [None] * len(asked)
    with bar("after", len(asked), "prompts", show=progress) as advance:
        for edit, group in groupby(zip(edits, range(len(facts))), key=itemgetter(0)):
            records = {record for _, record in group}
            mine = [i for i, q in enumerate(asked) if q.record in records]
            with edit.applied_to(model) if edit is not None else nullcontext():
                answers = (
                    ask(model, [asked[i] for i in mine], progress=False)
                    if edit
                    else [before[i] for i in mine]
                )
            for i, answer in zip(mine, answers):
                after[i] = answer
            advance(len(mine))
    done = [a for a in after if a is not None]
    rng = np.random.default_rng(seed)
    return Evaluation(
        summarise(asked, before, len(facts), rng),
        summarise(asked, done, len(facts), rng, before),
        asked,
        before,
        done,
    )


def questions(record: int, fact: Fact) -> list[Question]:
    """The prompts of a fact, in the order efficacy, paraphrase, neighbourhood."""
    found = [Question(record, "efficacy", fact.text, fact.target, fact.true)]
    found += [Question(record, "paraphrase", p, fact.target, fact.true) for p in fact.paraphrases]
    for probe in fact.neighbours:
        truth = probe.answer or fact.true
        if truth is not None:
            found.append(Question(record, "neighbourhood", probe.prompt, truth, fact.target))
    return found


def ask(
    model: EditableModel, asked: Sequence[Question], *, title: str = "asking", progress: bool = True
) -> list[Answer]:
    """Both answers of every question, in as few rows as possible."""
    with bar(title, len(asked), "prompts", show=progress) as advance:
        pairs = [(q.prompt, text) for q in asked for text in (q.right, q.wrong) if text is not None]
        scored = (
            iter(model.score(*zip(*pairs), progress=lambda n: advance(n / 2)))
            if pairs
            else iter(())
        )
        return [Answer(next(scored), next(scored) if q.wrong is not None else None) for q in asked]


def summarise(
    asked: Sequence[Question],
    answers: Sequence[Answer],
    records: int,
    rng: np.random.Generator,
    before: Sequence[Answer] | None = None,
) -> dict[str, dict[str, Estimate]]:
    """Estimates per kind and measure."""
    table: dict[str, dict[str, Estimate]] = {}
    for kind in KINDS:
        mine = [i for i, q in enumerate(asked) if q.kind == kind]
        if not mine:
            continue
        values = {
            m: [getattr(answers[i], m) for i in mine] for m in ("success", "magnitude", "exact")
        }
        if before is not None and kind == "neighbourhood":
            values["unchanged"] = [float(answers[i].success == before[i].success) for i in mine]
        owners = np.array([asked[i].record for i in mine])
        table[kind] = {
            m: estimate(np.array(v), owners, rng)
            for m, v in values.items()
            if not np.isnan(v).all()
        }
    return table


def estimate(values: np.ndarray, records: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Mean over records of the mean over their prompts, with a percentile bootstrap interval over
    records.
    """
    known = ~np.isnan(values)
    means = np.array([values[known & (records == r)].mean() for r in np.unique(records[known])])
    mean = float(means.mean())
    if len(means) < 2 or np.ptp(means) == 0:
        return Estimate(mean, mean, mean, len(means))
    interval = bootstrap(
        (means,), np.mean, n_resamples=2000, method="percentile", rng=rng
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(means))
