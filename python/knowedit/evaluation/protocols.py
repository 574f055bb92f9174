"""Measuring whole methods: all facts in one edit (`batch`), each fact in an edit of its own
(`single`), or batch after batch into the same model (`sequential`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.evaluation import Evaluation, evaluate, evaluate_each
from knowedit.evaluation.measures.base import ModelMeasure, measures, model_measures
from knowedit.evaluation.sequence import (
    SequenceMonitor,
    SequenceStep,
    trajectory_table,
    write_in_sequence,
)
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.io.files import atomic_file
from knowedit.methods.base import Method, statistics_for
from knowedit.methods.registry import make_method
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics
from knowedit.statistics.corpus.corpus import Corpus

PROTOCOLS = ("batch", "single", "sequential")
RESULTS, PROMPTS = "results.json", "prompts.jsonl"
SAMPLE = 200  # facts measured at a step of a sequence
HELD_OUT = 400  # documents for the perplexity


@dataclass(frozen=True)
class Result:
    """One method on one data set.

    Attributes:
        seconds: computing the edits, a fact (without loading, statistics and evaluation).
        side_effects: what each measure of whole models found, by its name; empty for `single`.
        report: of the edit (of the first one for `single` and `sequential`).
        config: the whole method, as `make_method` takes it.
        trajectory: for `sequential`, the model on its way.
    """

    model: str
    dataset: str
    method: str
    protocol: str
    facts: int
    evaluation: Evaluation
    side_effects: dict[str, dict[str, Any]]
    seconds: float
    report: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    trajectory: list[SequenceStep] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary; `migrate` brings those of earlier versions to this form."""
        names = ("model", "dataset", "method", "protocol", "facts", "seconds", "side_effects")
        return {
            **{name: getattr(self, name) for name in names},
            "evaluation": self.evaluation.to_dict(),
            "report": self.report,
            "config": self.config,
            "trajectory": [step.to_dict() for step in self.trajectory],
        }

    def __str__(self) -> str:
        head = (
            f"{self.method}, {self.protocol} of {self.facts} facts from {self.dataset}, "
            f"{self.seconds:.2f} s a fact"
        )
        parts = [head, str(self.evaluation), *describe(self.side_effects)]
        parts += (
            [str(trajectory_table(self.trajectory).without_empty_columns())]
            if self.trajectory
            else []
        )
        return "\n".join(
            parts + [f"note: {warning}" for warning in self.report.get("warnings", [])]
        )


def describe(side_effects: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a measure of the whole model; measures that are no longer known are left out."""
    known = measures()
    return [
        measure.describe(dict(found))
        for name, found in side_effects.items()
        if isinstance(measure := known.get(name), ModelMeasure)
    ]


def migrate(record: Mapping[str, Any]) -> dict[str, Any]:
    """`Result.to_dict`'s form of a record of any version.

    Raises:
        KeyError: the record is none of ours.
    """
    found = dict(record)
    if "side_effects" not in found:  # version 0.1: the drift alone
        moved = found.pop("drift")
        found["side_effects"] = {"drift": moved} if moved else {}
        found["trajectory"] = found.pop("course", [])
        found["config"] = {}
    return found


def measure(
    name: str,
    dataset: str,
    methods: Sequence[str | Mapping[str, Any] | Method],
    limit: int | None,
    protocol: str,
    corpus: Any,
    tokens: int | None,
    dtype: str = "auto",
    *,
    device_map: Any = None,
    batch: int = 50,
    every: int = 100,
    text: Any = None,
    where: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Load everything and measure each method; what `knowedit eval` calls.

    Args:
        methods: as `make_method` takes them; those that read ordinary text read the corpus.
        batch, every: of `sequential`: facts an edit, and facts between two steps.
        text: held-out text for the perplexity (as `corpus`).
        where: statistics to take instead of collecting them from `corpus`.
        seed: of the intervals.

    Raises:
        KnowEditError: an unknown method, protocol or data set, or what the parts raise.
    """
    made = [make_method(method).with_corpus(corpus) for method in methods]
    check_protocol(protocol)
    facts = conflict_free(load(dataset))[:limit]
    model = load_model(name, dtype=dtype, device_map=device_map, say=say)
    statistics = statistics_for(made, model, corpus, tokens, where)
    texts = held_out(text)
    return [
        run(
            model,
            facts,
            statistics,
            method,
            protocol,
            dataset,
            batch=batch,
            every=every,
            texts=texts,
            seed=seed,
        )
        for method in made
    ]


def check_protocol(name: str) -> None:
    """Raises KnowEditError for an unknown one."""
    if name not in PROTOCOLS:
        raise KnowEditError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")


def held_out(text: Any) -> list[str]:
    """The documents of a corpus that the perplexity is measured on; none without one."""
    return list(islice(Corpus.parse(text).documents(), HELD_OUT)) if text else []


def run(
    model: EditableModel,
    facts: Sequence[Fact],
    statistics: KeyStatistics | None,
    method: Method,
    protocol: str = "batch",
    dataset: str = "",
    *,
    batch: int = 50,
    every: int = 100,
    texts: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Compute and measure one method; the model is left as it was found.

    Args:
        dataset: its name, for the record.
        texts: held-out documents, for measures that need some.
        seed: of the intervals.

    Raises:
        KnowEditError: an unknown protocol, no facts, or what the method raises.
    """
    check_protocol(protocol)
    if not facts:
        raise KnowEditError("there are no facts to measure; give at least one")
    trajectory: list[SequenceStep] = []
    effects: dict[str, dict[str, Any]] = {}
    if protocol == "single":
        edits = _Timed(lambda: method.compute_each(model, facts, statistics, progress=progress))
        evaluation = evaluate_each(model, edits, facts, seed=seed, progress=progress)
        seconds, report = edits.seconds, edits.report
    else:
        watched = model_measures(texts=bool(texts))
        before = {name: m.observe(model, texts) for name, m in watched.items()}

        def moved() -> dict[str, dict[str, Any]]:
            return {n: m.compare(before[n], m.observe(model, texts)) for n, m in watched.items()}

        if protocol == "sequential":
            monitor = SequenceMonitor(
                model, facts, texts, sample=SAMPLE, seed=seed, progress=progress
            )
            with Session(method, model, statistics) as session:
                trajectory += write_in_sequence(session, monitor, batch, every, progress=progress)
                evaluation, effects = monitor.evaluation(progress=progress), moved()
                seconds, report = trajectory[-1].seconds, session.history.edits[0].report.to_dict()
        else:
            start = time.perf_counter()
            edit = method.compute(model, facts, statistics, progress=progress)
            seconds, report = time.perf_counter() - start, edit.report.to_dict()
            with edit.applied_to(model):
                effects = moved()
            evaluation = evaluate(model, edit, facts, seed=seed, progress=progress)
    return Result(
        model.name,
        dataset,
        method.name,
        protocol,
        len(facts),
        evaluation,
        effects,
        seconds / len(facts),
        report,
        method.to_dict(),
        trajectory,
    )


class _Timed:
    """Edits computed one by one, with the seconds that this took and the first one's report; no
    edit is kept.
    """

    def __init__(self, compute: Callable[[], Iterable[Edit]]) -> None:
        self.compute, self.seconds = compute, 0.0
        self.report: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Edit]:
        start = time.perf_counter()
        for edit in self.compute():
            self.seconds += time.perf_counter() - start
            self.report = self.report or edit.report.to_dict()
            yield edit
            start = time.perf_counter()


def write_run(folder: Path, results: Sequence[Result]) -> None:
    """`results.json` with the summaries and `prompts.jsonl` with every single prompt, each written
    whole.
    """
    with atomic_file(folder / RESULTS) as path:
        path.write_text(
            json.dumps([r.to_dict() for r in results], indent=1) + "\n", encoding="utf-8"
        )
    with atomic_file(folder / PROMPTS) as path:
        lines = (
            json.dumps({"method": r.method, **row}, ensure_ascii=False)
            for r in results
            for row in r.evaluation.rows()
        )
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
