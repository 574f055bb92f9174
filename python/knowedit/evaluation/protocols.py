"""Measuring whole methods: all facts in one edit (`batch`), or each fact in an edit of its own (`single`)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datasets import conflict_free, load
from ..editors import EDITORS
from ..errors import KnowEditError
from ..facts import Fact
from ..files import atomic_file
from ..model import EditableModel, load_model
from ..presets import preset_for
from ..statistics import KeyStatistics, key_statistics
from .drift import Drift, drift
from .metrics import Evaluation, evaluate, evaluate_each

PROTOCOLS = ("batch", "single")


@dataclass(frozen=True)
class Result:
    """One method on one data set.

    Attributes:
        seconds: computing the edits, a fact (without loading, statistics and evaluation).
        drift: on ordinary text; only for a batch.
        report: of the edit (of the first one for `single`).
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary."""
        plain = {name: getattr(self, name) for name in ("model", "dataset", "method", "protocol", "facts", "seconds")}
        moved = None if self.drift is None else {"kl": self.drift.kl, "same": self.drift.same, "worst": self.drift.worst}
        return {**plain, "evaluation": self.evaluation.to_dict(), "drift": moved, "report": self.report}

    def __str__(self) -> str:
        head = f"{self.method}, {self.protocol} of {self.facts} facts from {self.dataset}, {self.seconds:.2f} s a fact"
        lines = [head, str(self.evaluation)]
        if self.drift is not None:
            lines.append(f"ordinary text: same next word {self.drift.same:.0%}, KL {self.drift.kl:.4f} nats")
        return "\n".join(lines + [f"note: {warning}" for warning in self.report.get("warnings", [])])


def measure(
    name: str, dataset: str, methods: Sequence[str], limit: int | None, protocol: str, corpus: Any, tokens: int,
    layers: tuple[int, ...] | None, dtype: str = "auto", *, say: Callable[[str], None] = print,
) -> list[Result]:  # fmt: skip
    """Load everything and measure each method; what `knowedit eval` calls.

    Raises:
        KnowEditError: an unknown method, protocol or data set, or what the parts raise.
    """
    for method in methods:
        if method not in EDITORS:
            raise KnowEditError(f"unknown method {method!r}; known: {', '.join(EDITORS)}")
    if protocol not in PROTOCOLS:
        raise KnowEditError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    facts = conflict_free(load(dataset))[:limit]
    model = load_model(name, dtype=dtype, say=say)
    needed = layers or preset_for(model).layers
    statistics = key_statistics(model, needed, corpus, tokens)
    return [run(model, facts, statistics, method, protocol, layers, dataset) for method in methods]


def run(
    model: EditableModel, facts: Sequence[Fact], statistics: KeyStatistics, method: str, protocol: str = "batch",
    layers: tuple[int, ...] | None = None, dataset: str = "", *, progress: bool = True,
) -> Result:  # fmt: skip
    """Compute and measure one method; the model is left as it was found."""
    editor = EDITORS[method](layers=layers)
    start = time.perf_counter()
    if protocol == "single":
        edits = editor.compute_each(model, facts, statistics, progress=progress)
        seconds, moved, report = time.perf_counter() - start, None, edits[0].report
        evaluation = evaluate_each(model, edits, facts, progress=progress)
    else:
        edit = editor.compute(model, facts, statistics, progress=progress)
        seconds, moved, report = time.perf_counter() - start, drift(model, edit), edit.report
        evaluation = evaluate(model, edit, facts, progress=progress)
    return Result(model.name, dataset, editor.name, protocol, len(facts), evaluation, moved, seconds / len(facts), report)


def write_run(folder: Path, results: Sequence[Result]) -> None:
    """`results.json` with the summaries and `prompts.jsonl` with every single prompt, each written whole."""
    with atomic_file(folder / "results.json") as path:
        path.write_text(json.dumps([r.to_dict() for r in results], indent=1) + "\n", encoding="utf-8")
    with atomic_file(folder / "prompts.jsonl") as path:
        lines = (json.dumps({"method": r.method, **row}, ensure_ascii=False) for r in results for row in r.evaluation.rows())
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
