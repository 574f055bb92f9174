"""Running the same-subject evaluation: several methods on the same subjects, and their paired
differences.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.evaluation.measures.drift import Drift, drift
from knowedit.evaluation.subjects.same_subject import (
    SameSubjectEvaluation,
    compare,
    judge,
    observe,
    prepare,
)
from knowedit.facts.fact import Fact
from knowedit.facts.groups import groups, halves
from knowedit.facts.sets import load
from knowedit.io.files import atomic_file
from knowedit.io.lines import number_of
from knowedit.io.tables import Column, Table
from knowedit.methods.base import Method, statistics_for
from knowedit.methods.registry import make_method
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics

HALVES = ("all", "tune", "report")
FILE = "same_subject.json"


@dataclass(frozen=True)
class SubjectsResult:
    """One method on the facts of some subjects, all written in one edit.

    Attributes:
        seconds: computing the edit, a fact.
        config: the whole method, as `make_method` takes it.
    """

    model: str
    dataset: str
    method: str
    evaluation: SameSubjectEvaluation
    drift: Drift
    seconds: float
    report: dict[str, Any]
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {
            name: getattr(self, name)
            for name in ("model", "dataset", "method", "seconds", "report", "config")
        }
        return {**plain, "drift": asdict(self.drift), "evaluation": self.evaluation.to_dict()}

    def __str__(self) -> str:
        sizes = self.evaluation.sizes
        head = (
            f"{self.method}: {number_of(sum(sizes.values()), 'fact')} of "
            f"{number_of(len(sizes), 'subject')}, "
            f"{self.seconds:.2f} s a fact"
        )
        notes = [f"note: {warning}" for warning in self.report.get("warnings", [])]
        return "\n".join([head, str(self.evaluation), str(self.drift), *notes])


def choose(
    dataset: str,
    least: int,
    most: int | None,
    half: str,
    subjects: int | None,
    strict: bool = False,
) -> list[list[Fact]]:
    """The groups of a data set: with at least `least` facts, cut to `most`, of one half, the first
    `subjects`.

    Args:
        strict: as of `facts.sets.load`.

    Raises:
        KnowEditError: an unknown half, or no such subject.
    """
    if half not in HALVES:
        raise KnowEditError(f"unknown half {half!r}; known: {', '.join(HALVES)}")
    pool = load("counterfact-flat") if dataset == "same-subject" else []
    grouped = groups(load(dataset, strict=strict), least=least, most=most, pool=pool)
    if half != "all":
        grouped = halves(grouped)[HALVES.index(half) - 1]
    if not grouped[:subjects]:
        raise KnowEditError(f"{dataset} has no subject with {least} or more facts; lower --least")
    return grouped[:subjects]


def measure_subjects(
    name: str,
    dataset: str,
    methods: Sequence[str | Mapping[str, Any] | Method],
    corpus: Any,
    tokens: int | None,
    *,
    least: int = 2,
    most: int | None = None,
    half: str = "all",
    subjects: int | None = None,
    wordings: int | None = None,
    where: Path | None = None,
    device_map: Any = None,
    dtype: str = "auto",
    dequantise: bool = False,
    strict: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[SubjectsResult]:
    """Load everything and measure each method; what `knowedit same-subject` calls.

    Args:
        seed: of the statistics' corpus and of the intervals.
        strict: as of `facts.sets.load`.

    Raises:
        KnowEditError: an unknown method or half, no subjects, or what the parts raise.
    """
    made = [make_method(method).with_corpus(corpus) for method in methods]
    chosen = choose(dataset, least, most, half, subjects, strict)
    model = load_model(name, dtype=dtype, device_map=device_map, dequantise=dequantise, say=say)
    statistics = statistics_for(made, model, corpus, tokens, where, seed)
    return run_subjects(model, chosen, statistics, made, dataset, wordings=wordings, seed=seed)


def run_subjects(
    model: EditableModel,
    chosen: Sequence[Sequence[Fact]],
    statistics: KeyStatistics | None,
    methods: Sequence[Method],
    dataset: str = "",
    *,
    wordings: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[SubjectsResult]:
    """Compute and measure each method on the same subjects; the model is left as it was found.

    Args:
        seed: of the intervals.
    """
    probes, facts = prepare(model, chosen, wordings), [fact for group in chosen for fact in group]
    before = observe(model, probes, title="before", progress=progress)
    results = []
    for method in methods:
        start = time.perf_counter()
        edit = method.compute(model, facts, statistics, progress=progress)
        seconds, moved = (time.perf_counter() - start) / len(facts), drift(model, edit)
        with edit.applied_to(model):
            after = observe(model, probes, title=method.name, progress=progress)
        found = judge(probes, before, after, seed=seed)
        results.append(
            SubjectsResult(
                model.name,
                dataset,
                method.name,
                found,
                moved,
                seconds,
                edit.report.to_dict(),
                method.to_dict(),
            )
        )
    return results


def differences(results: Sequence[SubjectsResult]) -> list[Table]:
    """What the last method does differently from each other one: a table a pair of methods."""
    last = results[-1]
    return [
        difference_table(last.method, last.evaluation, other.method, other.evaluation)
        for other in results[:-1]
    ]


def difference_table(
    name: str, ours: SameSubjectEvaluation, other: str, theirs: SameSubjectEvaluation
) -> Table:
    """Paired differences, ours - theirs, where the interval excludes 0."""
    rows = [
        (kind, measure, gap)
        for kind, row in compare(ours, theirs).items()
        for measure, gap in row.items()
        if gap.excludes_zero
    ]
    return Table(
        ["", "measure", Column("difference", ".3f")],
        rows,
        f"{name} - {other}, paired on the same facts, where the interval excludes 0",
        () if rows else ("no difference is beyond chance",),
    )


def write_subjects(folder: Path, results: Sequence[SubjectsResult]) -> None:
    """`same_subject.json` with every method and every single value, written whole."""
    with atomic_file(folder / FILE) as path:
        text = json.dumps(
            [result.to_dict() for result in results], ensure_ascii=False, allow_nan=False
        )
        path.write_text(text + "\n", encoding="utf-8")
