"""What an edit did to a set of facts: every measure of facts before and after, with intervals.

For a prompt and its two answers, `p` is the length-normalised probability (geometric mean over
tokens); which prompts and which answers, and what counts as a success, each measure says
(`knowedit.evaluation.measures`). A record's prompts are averaged first, then records (Meng et al.
2022); intervals are 95 % bootstrap intervals over records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np

from knowedit.edits.card import EVALUATION
from knowedit.edits.edit import Edit
from knowedit.errors import EditError
from knowedit.evaluation import intervals
from knowedit.evaluation.intervals import Estimate
from knowedit.evaluation.measures.base import (
    Answer,
    Question,
    answered,
    ask,
    fact_measures,
    questions,
)
from knowedit.facts.fact import Fact, FactError, as_facts
from knowedit.io.progress import bar
from knowedit.io.ranks import team
from knowedit.io.tables import Column, Table
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model

Estimates = dict[str, dict[str, Estimate]]  # {kind: {measure: Estimate}}
#: These draw their bootstrap samples from one stream, in this order, as the published results did.
#: Every other measure has a stream of its own, so that a new one moves no other's interval.
ONE_STREAM = ("efficacy", "paraphrase", "neighbourhood")


@dataclass(frozen=True)
class Evaluation:
    """What an edit did to a set of facts.

    Attributes:
        before, after: `{kind: {measure: Estimate}}`; `after["neighbourhood"]` also has `unchanged`.
        questions, answers_before, answers_after: every single prompt.
    """

    before: Estimates
    after: Estimates
    questions: list[Question]
    answers_before: list[Answer]
    answers_after: list[Answer]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary (without the single prompts)."""
        prompts = len(self.questions)
        return {"before": plain(self.before), "after": plain(self.after), "prompts": prompts}

    def keep_in(self, edit: Edit) -> None:
        """Keep the estimates with the edit: the file it is saved to, and the cards of what is made
        of it, have them.
        """
        edit.report.details[EVALUATION] = self.to_dict()

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

    def table(self, title: str = "") -> Table:
        """Every measure before and after."""
        return before_and_after(self.before, self.after, title)

    def __str__(self) -> str:
        return str(self.table())


def plain(estimates: Estimates) -> dict[str, dict[str, dict[str, float]]]:
    """Estimates as JSON has them."""
    return {kind: {m: asdict(e) for m, e in row.items()} for kind, row in estimates.items()}


def before_and_after(before: Estimates, after: Estimates, title: str = "") -> Table:
    """A row a kind and measure, with the intervals before and after."""
    rows = [
        (kind, measure, before.get(kind, {}).get(measure), now)
        for kind, row in after.items()
        for measure, now in row.items()
    ]
    return Table(["", "measure", Column("before", ".3f"), Column("after", ".3f")], rows, title)


@accepts_model
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

    Raises:
        FactError: no facts, one fact alone, or what is not a Fact.
        EditError: `edit` is not an Edit.
    """
    if not isinstance(edit, (Edit, type(None))):
        raise EditError(f"an edit is what Edit.load and compute return, got {type(edit).__name__}")
    asked, before = _asked(model, as_facts(facts), progress)
    if edit is None:
        return compared(asked, before, before, seed)
    with edit.applied_to(model):
        after = ask(model, asked, title="answers under the edit", progress=progress)
    return compared(asked, before, after, seed)


@accepts_model
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
    facts = as_facts(facts)
    asked, before = _asked(model, facts, progress)
    ranks = team()
    mine = slice(ranks.rank, len(facts), ranks.size)
    parts = ranks.each(
        lambda: answers_under(
            model,
            islice(edits, mine.start, None, mine.step),
            asked,
            before,
            range(len(facts))[mine],
            progress=progress,
        )
    )
    return compared(asked, before, in_order(parts), seed)


def _asked(
    model: EditableModel, facts: Sequence[Fact], progress: bool
) -> tuple[list[Question], list[Answer]]:
    """What is asked about the facts, and the answers of the model as it is."""
    if not facts:
        raise FactError("there are no facts to measure; give at least one")
    asked = [
        q for record, fact in enumerate(answered(model, facts)) for q in questions(record, fact)
    ]
    return asked, ask(model, asked, title="answers before the edit", progress=progress)


def answers_under(
    model: EditableModel,
    edits: Iterable[Edit | None],
    asked: Sequence[Question],
    before: Sequence[Answer],
    records: Sequence[int] | None = None,
    *,
    progress: bool = True,
) -> dict[int, Answer]:
    """The answers to each fact's questions under its own edit (None: those `before`), which is
    applied alone and undone, by the number of the question; `edits` as of `evaluate_each`.

    Args:
        records: the numbers of the edits' facts; None: 0, 1, ...
    """
    after: dict[int, Answer] = {}
    records = range(max((q.record + 1 for q in asked), default=0)) if records is None else records
    total = sum(q.record in records for q in asked)
    with bar("answers under the edit", total, "prompts", show=progress) as advance:
        for edit, group in groupby(zip(edits, records), key=itemgetter(0)):
            own = {record for _, record in group}
            mine = [i for i, q in enumerate(asked) if q.record in own]
            if edit is None:
                answers = [before[i] for i in mine]
            else:
                with edit.applied_to(model):
                    answers = ask(model, [asked[i] for i in mine], progress=False)
            after.update(zip(mine, answers))
            advance(len(mine))
    return after


def in_order(parts: Iterable[Mapping[int, Answer]]) -> list[Answer]:
    """All answers of several `answers_under`, which together have every question."""
    found = {i: answer for part in parts for i, answer in part.items()}
    return [found[i] for i in range(len(found))]


def compared(
    asked: Sequence[Question], before: Sequence[Answer], after: Sequence[Answer], seed: int = 0
) -> Evaluation:
    """The answers of an unedited and of an edited model, with their estimates."""
    rng = np.random.default_rng(seed)
    was, now = summarise(asked, before, rng), summarise(asked, after, rng, before)
    return Evaluation(was, now, list(asked), list(before), list(after))


def summarise(
    asked: Sequence[Question],
    answers: Sequence[Answer],
    rng: np.random.Generator,
    before: Sequence[Answer] | None = None,
) -> Estimates:
    """Estimates per kind and measure.

    Args:
        before: the answers of the unedited model, where `answers` are those under an edit.
    """
    table: Estimates = {}
    for kind, measure in fact_measures().items():
        mine = [i for i, q in enumerate(asked) if q.kind == kind]
        if not mine:
            continue
        found = [measure.values(answers[i], None if before is None else before[i]) for i in mine]
        stream = rng if kind in ONE_STREAM else np.random.default_rng(0)
        owners = np.array([asked[i].record for i in mine])
        columns = {name: np.array([values[name] for values in found]) for name in found[0]}
        table[kind] = {
            name: estimate(values, owners, stream, share=name in measure.shares)
            for name, values in columns.items()
            if not np.isnan(values).all()
        }
    return table


def estimate(
    values: np.ndarray, records: np.ndarray, rng: intervals.Random = 0, *, share: bool = False
) -> Estimate:
    """Mean over records of the mean over their prompts, with its interval over records; NaN values
    are left out.

    Args:
        share: the values are yes or no (see `intervals.mean`).
    """
    known = ~np.isnan(values)
    sums, counts = intervals.by_cluster(values[known], records[known])
    return intervals.mean(sums / counts, rng=rng, share=share)
