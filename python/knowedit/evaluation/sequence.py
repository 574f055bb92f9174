"""Sequential editing, measured as it goes: batch after batch into one model, compared with the
unedited one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.ability.ability import AbilityTasks, overall
from knowedit.evaluation.evaluation import Estimates, Evaluation, compared, summarise
from knowedit.evaluation.measures.base import Answer, Question, answered, ask, questions
from knowedit.evaluation.measures.drift import ORDINARY, Drift, compare
from knowedit.evaluation.measures.perplexity import perplexity
from knowedit.facts.fact import Fact
from knowedit.io.progress import bar
from knowedit.io.tables import Column, Table
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit_kernels.lowrank import Change


@dataclass(frozen=True)
class SequenceStep:
    """The model after a number of facts.

    Attributes:
        edits: facts written so far.
        measures: `{kind: {measure: Estimate}}` of facts written so far, as in `Evaluation`, and
            "ability" of the bundled tasks where that is measured.
        drift: of the next-word distribution after ordinary prompts, against the unedited model.
        perplexity: on held-out text; None without text.
        norm: largest |sum of the updates| / |W| over the changed matrices.
        gain: lowest gain of any batch so far; 1 for methods without.
        seconds: spent on computing and applying edits so far.
        cpu_seconds: of this process' processors, spent on the same.
    """

    edits: int
    measures: Estimates
    drift: Drift
    perplexity: float | None
    norm: float
    gain: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class SequenceMonitor:
    """Measures a model on its way through a sequence of edits, against its unedited self.

    Args:
        model: still unedited.
        facts: all that will be written, in order.
        texts: held-out documents for the perplexity.
        measured: indices of the facts that are measured; None: all of them.
        sample: so many of them at a step, spread evenly over those written so far; None: all.
        ability: tasks of general ability, of which the bundled ones are measured at every step.
        asked: the questions of the measured facts, with the unedited model's answers; None: they
            are asked.

    Raises:
        KnowEditError: the model has active edits.
    """

    def __init__(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        texts: Sequence[str] = (),
        *,
        measured: Iterable[int] | None = None,
        sample: int | None = None,
        ability: AbilityTasks | None = None,
        asked: tuple[Sequence[Question], Sequence[Answer]] | None = None,
        tokens: int = 2048,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if model.ledger.active:
            raise KnowEditError(
                "the monitor starts from the unedited model; undo the active edits first"
            )
        self.model, self.facts, self.texts, self.sample = model, list(facts), texts, sample
        self.tokens, self.seed, self.ability = tokens, seed, ability
        self.measured = sorted(set(measured if measured is not None else range(len(facts))))
        self.asked, self.before = asked or self._ask(progress)
        self.ordinary = model.next_logprobs(ORDINARY)

    def _ask(self, progress: bool) -> tuple[Sequence[Question], Sequence[Answer]]:
        chosen = answered(self.model, [self.facts[record] for record in self.measured])
        asked = [q for r, fact in zip(self.measured, chosen) for q in questions(r, fact)]
        return asked, ask(self.model, asked, title="answers before the edit", progress=progress)

    def measure(
        self, edits: Sequence[Edit], written: int, *, progress: bool = True
    ) -> SequenceStep:
        """The model as it is, after `edits` wrote the first `written` facts (none: what the
        unedited one says of them all).
        """
        among = [record for record in self.measured if record < (written or len(self.facts))]
        places = (
            np.linspace(0, len(among) - 1, min(self.sample or len(among), len(among)))
            .round()
            .astype(int)
        )
        chosen = {among[place] for place in places}
        mine = [i for i, q in enumerate(self.asked) if q.record in chosen]
        asked, before = [self.asked[i] for i in mine], [self.before[i] for i in mine]
        answers = (
            ask(self.model, asked, title=f"after {written}", progress=progress) if edits else before
        )
        measures = summarise(asked, answers, np.random.default_rng(self.seed), before)
        if self.ability is not None:
            measures |= overall(self.ability.bundled_marks(self.model))
        return SequenceStep(
            written,
            measures,
            compare(self.ordinary, self.model.next_logprobs(ORDINARY), ORDINARY),
            perplexity(self.model, self.texts, tokens=self.tokens) if self.texts else None,
            max(total_norms(self.model, edits).values(), default=0.0),
            min((e.report.gain for e in edits if e.report.gain is not None), default=1.0),
        )

    def evaluation(self, *, progress: bool = True) -> Evaluation:
        """All measured facts, before and as the model is now."""
        after = ask(self.model, self.asked, title="after", progress=progress)
        return compared(self.asked, self.before, after, self.seed)


def write_in_sequence(
    session: Session,
    monitor: SequenceMonitor,
    batch: int,
    every: int,
    *,
    measured: int | None = None,
    merge: bool = False,
    progress: bool = True,
) -> Iterator[SequenceStep]:
    """Write the monitor's facts in batches of `batch`; a step at the start, after every `every`
    facts, and at the end.

    A session whose history has the first of the facts goes on after them, without a step at the
    start.

    Args:
        measured: facts that were written at the last step of an interrupted run; a step that is due
            since then comes first. None: as many as the history has.
        merge: compact the session after every step, so that a later edit costs and keeps no more
            than an earlier one.

    Raises:
        KnowEditError: `batch` or `every` is not positive, or the history holds other facts.
    """
    if batch < 1 or every < 1:
        raise KnowEditError(f"batch and every must be positive, got {batch} and {every}")
    facts, begin = monitor.facts, len(session.history.facts)
    if session.history.facts != facts[:begin]:
        raise KnowEditError(
            "the session's history holds other facts than those to be written; start with a new "
            "history"
        )
    spent, written = Spent(), begin
    last = begin if measured is None else measured
    if not begin and measured is None:
        yield monitor.measure((), 0, progress=False)
    with bar(f"{session.method.name}: in sequence", len(facts), "facts", show=progress) as advance:
        advance(begin)
        while True:
            if written // every > last // every or written == len(facts) > last:
                step = monitor.measure(session.history.edits, written, progress=False)
                yield spent.told(step)
                last = written
                if merge:
                    session.compact()
            if written == len(facts):
                return
            part = facts[written : written + batch]
            with spent.on():
                edit = session.write(part, force=True, progress=False)
            spent.least(edit.report.gain)
            written += len(part)
            advance(len(part))


class Spent:
    """What writing has taken so far, and the lowest gain of what was written, which edits that are
    merged do not say any more.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.gain = 1.0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Count the block."""
        begun, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - begun
        self.cpu_seconds += time.process_time() - cpu

    def least(self, gain: float | None) -> None:
        """Another edit's gain, if it has one."""
        self.gain = min(self.gain, 1.0 if gain is None else gain)

    def told(self, step: SequenceStep) -> SequenceStep:
        """`step` with these numbers."""
        gain = min(self.gain, step.gain)
        return replace(step, seconds=self.seconds, cpu_seconds=self.cpu_seconds, gain=gain)


def total_norms(model: EditableModel, edits: Sequence[Edit]) -> dict[str, float]:
    """`|sum of the updates|_F / |W|_F` per changed matrix, one expert's being one, W without them;
    low-rank sums are not formed.
    """
    changes = [edit.by_parameter(model) for edit in edits if edit.changes]
    return {
        name: _total_norm(
            model.stored(name).detach(),
            [change[name].raw for change in changes if name in change],
            model.is_transposed(name),
        )
        for name in dict.fromkeys(name for change in changes for name in change)
        if model.stored(name).ndim == 2
    }


def _total_norm(weight: Tensor, parts: Sequence[Change], transposed: bool) -> float:
    now = weight.double()
    dense = [part for part in parts if isinstance(part, Tensor)]
    if dense:
        pairs = [part for part in parts if not isinstance(part, Tensor)]
        products = [right @ left.T if transposed else left @ right.T for left, right in pairs]
        total = sum(part.to(now) for part in [*dense, *products])
        return float(total.norm() / (now - total).norm())  # type: ignore[union-attr]
    now = now.T if transposed else now
    left, right = (torch.cat([part[i] for part in parts], 1).to(now) for i in range(2))
    square = float(((left.T @ left) * (right.T @ right)).sum().clamp(min=0))
    # |W - D|^2 = |W|^2 - 2 <W, D> + |D|^2 with W the edited weight
    clean = float(now.square().sum() - 2 * ((now @ right) * left).sum()) + square
    return (square / max(clean, 1e-300)) ** 0.5


#: Columns of `trajectory_table`: heading, kind and measure.
COLUMNS = {
    "efficacy": ("efficacy", "success"),
    "exact": ("efficacy", "exact"),
    "paraphrase": ("paraphrase", "success"),
    "neighbourhood": ("neighbourhood", "success"),
    "unchanged": ("neighbourhood", "unchanged"),
    "ability": ("ability", "accuracy"),
}


def trajectory_table(trajectory: Sequence[SequenceStep], title: str = "") -> Table:
    """A row a step: means, without intervals."""
    others = ("perplexity", "KL", "|D|/|W|", "gain")
    columns: list[Column | str] = [
        "edits",
        *(Column(name, ".3f", "right") for name in (*COLUMNS, *others)),
    ]
    rows = []
    for step in trajectory:
        found = [step.measures.get(kind, {}).get(measure) for kind, measure in COLUMNS.values()]
        means = [None if estimate is None else estimate.mean for estimate in found]
        rows.append([step.edits, *means, step.perplexity, step.drift.kl, step.norm, step.gain])
    return Table(columns, rows, title)
