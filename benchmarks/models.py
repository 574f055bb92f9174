"""The records of `benchmarks.quality` on the real models that `knowedit models` lists: methods with
each model's defaults, in pieces that are kept one by one (`docs/models.md`).

A piece is one method on some records: all in one edit (`batch`), or each in an edit of its own
(`single`). A run that was interrupted, or is started again with other models, methods or pieces,
goes on with the results file. Records are the unit of all intervals.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation import intervals
from knowedit.evaluation.baseline import held_out
from knowedit.evaluation.measures.base import Answer, Question, ask, fact_measures, questions
from knowedit.evaluation.measures.perplexity import perplexity
from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods import Method, base
from knowedit.methods.base import statistics_for
from knowedit.methods.registry import make_method
from knowedit.models.copies import COPIES, copy_of
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.presets import preset_for

from . import common
from .quality import CORPUS, HELD_OUT

NAME = "models"
TEXT = "wikitext2_raw_valid.txt.gz"
MOST = 1.02  # times the perplexity before, of a good edit
#: What a model's best method should reach (kind, measure): share of the records' prompts.
GOALS = {
    "efficacy success": 0.98,
    "efficacy exact": 0.95,
    "paraphrase success": 0.93,
    "neighbourhood unchanged": 0.95,
}
Piece = tuple[str, str, str, int, int]  # model, method, protocol, records from .. to (excluded)


def by_record(
    asked: Sequence[Question], after: Sequence[Answer], before: Sequence[Answer]
) -> dict[str, dict[str, float]]:
    """`{"kind measure": {record: mean over its prompts}}` of yes-or-no measures."""
    found: dict[str, dict[str, list[float]]] = {}
    known = fact_measures()
    for question, now, was in zip(asked, after, before):
        measure = known[question.kind]
        for name, value in measure.values(now, was).items():
            if name in measure.shares and not math.isnan(value):
                records = found.setdefault(f"{question.kind} {name}", {})
                records.setdefault(str(question.record), []).append(value)
    return {name: {r: mean(v) for r, v in records.items()} for name, records in found.items()}


@contextmanager
def looks() -> Iterator[list[float]]:
    """Within the block, the CPU seconds that each look of a method at its edited model took."""
    found: list[float] = []
    look = base.measure

    def timed(*args: Any) -> Any:
        start = time.process_time()
        seen = look(*args)
        found.append(time.process_time() - start)
        return seen

    with patch.object(base, "measure", timed):
        yield found


class Bench:
    """One model and what it says unedited, asked once for all methods.

    Args:
        facts: with their numbers in the data set.
        texts: held-out documents; none: no perplexity.
    """

    def __init__(
        self, model: EditableModel, facts: Mapping[int, Fact], texts: Sequence[str]
    ) -> None:
        self.model, self.facts, self.texts = model, facts, texts
        self.known: dict[int, tuple[list[Question], list[Answer]]] = {}
        self.clean: float | None = None

    def unedited(self, records: Iterable[int]) -> tuple[list[Question], list[Answer]]:
        """The records' questions and the unedited model's answers."""
        asked: list[Question] = []
        answers: list[Answer] = []
        for record in records:
            if record not in self.known:
                mine = questions(record, self.facts[record])
                self.known[record] = mine, ask(self.model, mine, progress=False)
            asked += self.known[record][0]
            answers += self.known[record][1]
        return asked, answers

    def perplexity(self) -> float | None:
        """Of the held-out texts, as the model is now."""
        return perplexity(self.model, self.texts) if self.texts else None

    def piece(
        self, method: Method, statistics: Any, protocol: str, records: Sequence[int]
    ) -> dict[str, Any]:
        """Compute and measure one piece; the model is left as it was found."""
        asked, before = self.unedited(records)
        facts = [self.facts[record] for record in records]
        start = time.process_time()
        with looks() as looked:
            if protocol == "batch":
                edits = [method.compute(self.model, facts, statistics, progress=False)]
                owned: list[Sequence[int]] = [records]
            else:
                edits = list(method.compute_each(self.model, facts, statistics, progress=False))
                owned = [[record] for record in records]
        seconds = (time.process_time() - start) / len(records)
        after: list[Answer] = []
        edited = None
        if self.texts and protocol == "batch" and self.clean is None:
            self.clean = self.perplexity()
        for edit, mine in zip(edits, owned):
            with edit.applied_to(self.model):
                after += ask(self.model, self.unedited(mine)[0], progress=False)
                edited = self.perplexity() if protocol == "batch" else None
        return {
            "before": by_record(asked, before, before),
            "after": by_record(asked, after, before),
            "perplexity": None if edited is None else [self.clean, edited],
            "cpu_seconds_a_fact": seconds,
            "looking": sum(looked) / len(records),  # of them
            **_reported(edits),
            "warnings": warnings_of(edits, self.model),
        }


def _reported(edits: Sequence[Edit]) -> dict[str, Any]:
    """What the edits say of themselves: the worst of them."""
    gains = [edit.report.gain for edit in edits if edit.report.gain is not None]
    measured = [edit.report.measured for edit in edits if edit.report.measured is not None]
    return {
        "lowest_gain": min(gains) if gains else None,
        "relative_norm": max(v for edit in edits for v in edit.report.relative_norm.values()),
        "ordinary": max(m.perplexity / m.perplexity_before for m in measured),
        "refused": sum(not edit.report.within_limits for edit in edits),
        "layers": sorted({layer for edit in edits for layer in edit.report.layers}, key=int),
    }


def warnings_of(edits: Sequence[Edit], model: EditableModel) -> list[str]:
    """What the edits warn of, with the model's name in place of its folder."""
    told = {text for edit in edits for text in edit.warnings}
    return sorted(text.replace(model.source, model.name) for text in told)


def line(row: Mapping[str, Any]) -> str:
    """One piece in one line."""
    shown = [f"{name} {100 * mean(row['after'][name].values()):.1f}" for name in GOALS]
    text = (
        ""
        if row["perplexity"] is None
        else "perplexity {:.2f} -> {:.2f}, ".format(*row["perplexity"])
    )
    return (
        f"{row['model']} {row['method']} {row['protocol']} {row['first']}-{row['last'] - 1}: "
        f"{', '.join(shown)}, {text}|change| / |W| {row['relative_norm']:.2f}, "
        f"{_seconds([row])} CPU-s a fact"
    )


# -- the page
# -------------------------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """A row a model, method and protocol, its pieces together; then what misses its goal."""
    header, rows = common.read(folder, NAME)
    cases: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        size = row["last"] - row["first"] if row["protocol"] == "batch" else 1
        cases.setdefault((row["model"], row["method"], row["protocol"], size), []).append(row)
    lines, missed = [], []
    for case, pieces in sorted(cases.items()):
        records = sum(row["last"] - row["first"] for row in pieces)
        what = f"batches of {case[3]}" if case[2] == "batch" else "single"
        cells, short = [], []
        for name, goal in GOALS.items():
            values = [v for row in pieces for v in row["after"].get(name, {}).values()]
            found = intervals.mean(values, share=True)
            cells.append(format(_percent(found), ".1f"))
            if found.mean < goal:
                short.append(f"{name} {100 * found.mean:.1f} (goal {100 * goal:.0f})")
        before = [v for row in pieces for v in row["before"]["neighbourhood success"].values()]
        after = [v for row in pieces for v in row["after"]["neighbourhood success"].values()]
        cells.append(f"{100 * mean(before):.1f} -> {100 * mean(after):.1f}")
        pairs = [row["perplexity"] for row in pieces if row["perplexity"]]
        rises = [after / before for before, after in pairs]
        cells.append(" ".join(f"{b:.2f} -> {a:.2f}" for b, a in pairs))
        if rises and max(rises) > MOST:
            short.append(f"perplexity {max(rises) - 1:+.1%} (goal {MOST - 1:+.0%})")
        cells += [
            f"{max(row['relative_norm'] for row in pieces):.2f}",
            _seconds(pieces),
            f"{sum(row['refused'] for row in pieces)}",
        ]
        at = ", ".join(sorted({layer for row in pieces for layer in row["layers"]}, key=int))
        lines.append([case[0], case[1], at, what, str(records), *cells])
        if short:
            missed.append(f"* {case[0]}, {case[1]}, {what}: {'; '.join(short)}.")
    heads = ["model", "method", "layers", "edits", "records", *GOALS]
    heads += ["neighbourhood success", "perplexity", "change", "CPU-s a fact", "refused"]
    told = ["Every row here reaches all of its goals."] if not missed else ["Short of a goal:", ""]
    whose = [(f"{row['model']}, {row['method']}", row) for row in rows]
    parts = ["\n".join([*told, *missed]), common.measured_each(header, whose)]
    return "\n\n".join([Table(heads, lines).markdown(), *parts])


def _seconds(pieces: Sequence[Mapping[str, Any]]) -> str:
    """CPU seconds a fact, and without looking at the edited model, where that is known."""
    whole = mean(row["cpu_seconds_a_fact"] for row in pieces)
    if not all("looking" in row for row in pieces):
        return f"{whole:.1f}"
    return f"{whole:.2f} ({whole - mean(row['looking'] for row in pieces):.2f})"


def _percent(found: intervals.Estimate) -> intervals.Estimate:
    return intervals.Estimate(100 * found.mean, 100 * found.low, 100 * found.high, found.records)


def no_picture(folder: Path, path: Path) -> None:
    """The page has none."""


# -- running
# -------------------------------------------------------------------------------------------------


def key_of(row: Mapping[str, Any]) -> Piece:
    """Which piece a row is."""
    return row["model"], row["method"], row["protocol"], row["first"], row["last"]


def pieces(records: Sequence[int], size: int) -> list[Sequence[int]]:
    """`records` cut into pieces of `size`; a shorter rest is left out."""
    return [records[at : at + size] for at in range(0, len(records) - size + 1, size)]


def run(
    report: common.Report,
    bench: Bench,
    methods: Mapping[str, Method],
    wanted: Sequence[tuple[str, Sequence[int]]],
    corpus: Any,
    tokens: int,
) -> None:
    """The pieces that the report does not have yet, each method's after the other's."""
    done = {key_of(row) for row in report.rows[1:]}
    preset = preset_for(bench.model)
    for protocol, records in wanted:
        for name, method in methods.items():
            key = (bench.model.name, name, protocol, records[0], records[-1] + 1)
            if key in done:
                continue
            statistics = statistics_for([method], bench.model, corpus, tokens)
            row = bench.piece(method, statistics, protocol, records)
            row |= dict(zip(("model", "method", "protocol", "first", "last"), key))
            row |= {"tokens": tokens, "origin": preset.origin}
            row |= {"environment": report.rows[0]["environment"]}
            report.note(line(row), **row)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(NAME, __doc__, 1, timed=False)
    parser.add_argument("--model", action="append", help="names; repeatable (default: all here)")
    parser.add_argument("--method", action="append", help="names; repeatable (default: memit)")
    parser.add_argument("--batch", type=int, default=48, help="records an edit; 0: none")
    parser.add_argument("--batches", type=int, default=2, help="at most so many")
    parser.add_argument("--singles", type=int, default=0, help="of the first records")
    parser.add_argument("--piece", type=int, default=4, help="single edits a piece")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    parser.add_argument("--text", type=Path, help=f"held out (default: {TEXT} in KNOWEDIT_DATA)")
    arguments = parser.parse_args(argv)
    folder = data_dir() or Path("KNOWEDIT_DATA")
    corpus, tokens = arguments.corpus or folder / CORPUS, arguments.tokens
    all_facts = load("counterfact")
    facts = dict(list(enumerate(all_facts))[-HELD_OUT:])
    batch, singles, piece = arguments.batch, arguments.singles, arguments.piece
    if arguments.quick:
        facts, batch, singles, piece, tokens = dict(list(facts.items())[:4]), 2, 2, 2, 2048
    numbers = list(facts)
    wanted: list[tuple[str, Sequence[int]]] = []
    if batch:
        wanted += [("batch", part) for part in pieces(numbers, batch)[: arguments.batches]]
    wanted += [("single", part) for part in pieces(numbers[:singles], piece)]
    methods = {
        name: make_method(name).with_corpus(corpus) for name in arguments.method or ["memit"]
    }
    report = common.report(NAME, arguments, dataset="counterfact", text=TEXT, goals=GOALS)
    if report.output is not None and report.output.is_file():
        header, kept = common.read_file(report.output)
        report.rows += [{"environment": header["environment"], **row} for row in kept]
    texts = held_out(arguments.text or folder / TEXT)
    for name in arguments.model or [copy.name for copy in COPIES if copy.here]:
        copy = copy_of(name)
        if copy is not None and not copy.here:
            raise KnowEditError(f"{copy.name} is not here: `knowedit models --get {copy.name}`")
        model = load_model(str(copy.folder) if copy else name, dtype=torch.float32)
        run(report, Bench(model, facts, texts), methods, wanted, corpus, tokens)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
