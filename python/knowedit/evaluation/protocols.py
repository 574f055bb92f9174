"""Measuring whole methods: all facts in one edit (`batch`), each fact in an edit of its own
(`single`), or batch after batch into the same model (`sequential`)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.drift import Drift, drift
from knowedit.evaluation.measures.counterfact import Evaluation, evaluate, evaluate_each
from knowedit.evaluation.sequence import Point, Watch, course_table, write_in_sequence
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.io.files import atomic_file
from knowedit.methods import make_editor, statistics_for
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics
from knowedit.statistics.corpus.corpus import Corpus

PROTOCOLS = ("batch", "single", "sequential")
SAMPLE = 200  # facts measured on the way of a sequence
HELD_OUT = 400  # documents for its perplexity


@dataclass(frozen=True)
class Result:
    """One method on one data set.

    Attributes:
        seconds: computing the edits, a fact (without loading, statistics and evaluation).
        drift: on ordinary text; not for `single`.
        report: of the edit (of the first one for `single` and `sequential`).
        course: for `sequential`, the model on its way.
    """

    model: str
    dataset: str
    method: str
    protocol: str
    facts: int
    evaluation: Evaluation
    drift: Drift | None
    seconds: float
    report: dict[str, Any]
    course: list[Point] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary."""
        plain = {
            name: getattr(self, name)
            for name in ("model", "dataset", "method", "protocol", "facts", "seconds")
        }
        moved = (
            None
            if self.drift is None
            else {"kl": self.drift.kl, "same": self.drift.same, "worst": self.drift.worst}
        )
        whole = {
            **plain,
            "evaluation": self.evaluation.to_dict(),
            "drift": moved,
            "report": self.report,
        }
        return (
            {**whole, "course": [point.to_dict() for point in self.course]}
            if self.course
            else whole
        )

    def __str__(self) -> str:
        head = (
            f"{self.method}, {self.protocol} of {self.facts} facts from {self.dataset}, "
            f"{self.seconds:.2f} s a fact"
        )
        lines = [head, str(self.evaluation)]
        if self.drift is not None:
            lines.append(
                f"ordinary text: same next word {self.drift.same:.0%}, KL {self.drift.kl:.4f} nats"
            )
        lines += course_table(self.course) if self.course else []
        return "\n".join(
            lines + [f"note: {warning}" for warning in self.report.get("warnings", [])]
        )


def measure(
    name: str,
    dataset: str,
    methods: Sequence[str],
    limit: int | None,
    protocol: str,
    corpus: Any,
    tokens: int | None,
    layers: tuple[int, ...] | None,
    dtype: str = "auto",
    *,
    device_map: Any = None,
    batch: int = 50,
    every: int = 100,
    text: Any = None,
    where: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Load everything and measure each method; what `knowedit eval` calls.

    Args:
        batch, every: of `sequential`: facts an edit, and facts between two looks.
        text: of `sequential`: held-out text for the perplexity (as `corpus`).
        where: statistics to take instead of collecting them from `corpus`.

    Raises:
        KnowEditError: an unknown method, protocol or data set, or what the parts raise.
    """
    editors = [make_editor(method, layers=layers) for method in methods]
    if protocol not in PROTOCOLS:
        raise KnowEditError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    facts = conflict_free(load(dataset))[:limit]
    model = load_model(name, dtype=dtype, device_map=device_map, say=say)
    statistics = statistics_for(editors, model, corpus, tokens, where)
    texts = list(islice(Corpus.parse(text).documents(), HELD_OUT)) if text else []
    return [
        run(
            model,
            facts,
            statistics,
            method,
            protocol,
            layers,
            dataset,
            batch=batch,
            every=every,
            texts=texts,
            corpus=corpus,
        )
        for method in methods
    ]


def run(
    model: EditableModel,
    facts: Sequence[Fact],
    statistics: KeyStatistics | None,
    method: str,
    protocol: str = "batch",
    layers: tuple[int, ...] | None = None,
    dataset: str = "",
    *,
    batch: int = 50,
    every: int = 100,
    texts: Sequence[str] = (),
    corpus: Any = None,
    progress: bool = True,
) -> Result:
    """Compute and measure one method; the model is left as it was found."""
    editor = make_editor(method, corpus=corpus, layers=layers)
    course: list[Point] = []
    start = time.perf_counter()
    if protocol == "sequential":
        watch = Watch(model, facts, texts, sample=SAMPLE, progress=progress)
        with Session(editor, model, statistics) as session:
            course += write_in_sequence(session, watch, batch, every, progress=progress)
            evaluation, report = (
                watch.evaluation(progress=progress),
                session.history.edits[0].report,
            )
        moved, seconds = course[-1].drift, course[-1].seconds
    elif protocol == "single":
        edits = _Timed(lambda: editor.compute_each(model, facts, statistics, progress=progress))
        evaluation = evaluate_each(model, edits, facts, progress=progress)
        seconds, moved, report = edits.seconds, None, edits.report
    else:
        edit = editor.compute(model, facts, statistics, progress=progress)
        seconds, moved, report = time.perf_counter() - start, drift(model, edit), edit.report
        evaluation = evaluate(model, edit, facts, progress=progress)
    seconds /= len(facts)
    return Result(
        model.name,
        dataset,
        editor.name,
        protocol,
        len(facts),
        evaluation,
        moved,
        seconds,
        report,
        course,
    )


class _Timed:
    """Edits computed one by one, with the seconds that this took and the first one's report; no
    edit is kept.
    """

    def __init__(self, compute: Callable[[], Iterable[Edit]]) -> None:
        self.compute, self.seconds, self.report = compute, 0.0, {}  # type: ignore[var-annotated]

    def __iter__(self) -> Iterator[Edit]:
        start = time.perf_counter()
        for edit in self.compute():
            self.seconds += time.perf_counter() - start
            self.report = self.report or edit.report
            yield edit
            start = time.perf_counter()


def write_run(folder: Path, results: Sequence[Result]) -> None:
    """`results.json` with the summaries and `prompts.jsonl` with every single prompt, each written
    whole.
    """
    with atomic_file(folder / "results.json") as path:
        path.write_text(
            json.dumps([r.to_dict() for r in results], indent=1) + "\n", encoding="utf-8"
        )
    with atomic_file(folder / "prompts.jsonl") as path:
        lines = (
            json.dumps({"method": r.method, **row}, ensure_ascii=False)
            for r in results
            for row in r.evaluation.rows()
        )
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
