"""Editing quality on real data: 100 CounterFact records that nothing was tuned on, the preset as it
ships.

Batch: MEMIT, 48 facts at once, twice (records 0-47 and 48-95 of the hundred). Single: a ROME edit
of its own for every record, all values optimised together. All paraphrases and all neighbourhood
prompts; intervals are 95 % bootstrap intervals over records.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from knowedit.edits.edit import Edit
from knowedit.evaluation.evaluation import Evaluation, evaluate_each
from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.methods import MEMIT, ROME, Method
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.presets import preset_for
from knowedit.statistics import KeyStatistics, key_statistics

from . import common

CORPUS = "enwiki_2021_sample_3MB.txt.gz"
HELD_OUT = 100  # the last records of the file
#: (kind, measure): least value. Neighbourhood success is relative to the unedited model's.
FLOORS = {
    "batch": {
        ("efficacy", "success"): 0.99,
        ("efficacy", "exact"): 0.92,
        ("paraphrase", "success"): 0.95,
        ("neighbourhood", "success"): -0.04,
        ("neighbourhood", "unchanged"): 0.96,
    },
    "single": {
        ("efficacy", "success"): 0.99,
        ("efficacy", "exact"): 0.94,
        ("paraphrase", "success"): 0.96,
        ("neighbourhood", "success"): -0.04,
    },
}


def batch_edits(
    editor: Method,
    model: EditableModel,
    facts: Sequence[Fact],
    statistics: KeyStatistics | None,
    size: int,
) -> tuple[list[Edit], list[Fact]]:
    """One edit for every full batch of `size` facts, repeated for each of its facts; and the facts
    covered.
    """
    edits: list[Edit] = []
    for start in range(0, len(facts) - size + 1, size):
        edits += [editor.compute(model, facts[start : start + size], statistics)] * size
    return edits, list(facts[: len(edits)])


def judge(report: common.Report, protocol: str, case: str, evaluation: Evaluation) -> None:
    """One row for every measure that has a floor, then the others for the record."""
    floors = FLOORS[protocol]
    for kind, measures in evaluation.after.items():
        for measure, estimate in measures.items():
            was = evaluation.before[kind].get(measure)
            details = {
                "low": estimate.low,
                "high": estimate.high,
                "records": estimate.records,
                "unedited": None if was is None else was.mean,
            }
            floor = floors.get((kind, measure))
            name = f"{kind} {measure}"
            if floor is not None:
                least = floor if floor >= 0 or was is None else was.mean + floor
                report.floor(case, name, estimate.mean, least, **details)
            else:
                before = "" if was is None else f"  unedited {was.mean:.3f}"
                report.note(
                    f"{case:24} {name:24} {estimate}{before}",
                    case=case,
                    measure=name,
                    value=estimate.mean,
                    **details,
                )


def run(
    report: common.Report,
    model: EditableModel,
    facts: Sequence[Fact],
    statistics: KeyStatistics,
    size: int,
) -> None:
    """Both protocols; the model is left as it was found."""
    start = time.perf_counter()
    edits, covered = batch_edits(MEMIT(), model, facts, statistics, size)
    seconds = (time.perf_counter() - start) / len(covered)
    evaluation = evaluate_each(model, edits, covered)
    judge(report, "batch", f"MEMIT, batches of {size}", evaluation)
    about(report, f"MEMIT, batches of {size}", list(dict.fromkeys(edits)), seconds)
    start = time.perf_counter()
    singles = list(ROME().compute_each(model, facts, statistics))
    seconds = (time.perf_counter() - start) / len(facts)
    judge(
        report, "single", f"ROME, {len(facts)} single edits", evaluate_each(model, singles, facts)
    )
    about(report, f"ROME, {len(facts)} single edits", singles, seconds)


def about(report: common.Report, case: str, edits: Sequence[Edit], seconds: float) -> None:
    gain = min(edit.report.gain for edit in edits)
    norm = max(value for edit in edits for value in edit.report.relative_norm.values())
    warnings = sorted({warning for edit in edits for warning in edit.warnings})
    line = (
        f"{case}: {seconds:.2f} s a fact, lowest gain {gain:.3f}, largest |delta| / |W| {norm:.2f}"
    )
    report.note(
        line,
        case=case,
        seconds_a_fact=seconds,
        lowest_gain=gain,
        relative_norm=norm,
        warnings=warnings,
        settings=edits[0].report.details["settings"],
        edits=len(edits),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("quality", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    arguments = parser.parse_args(argv)
    facts, size, tokens = load("counterfact")[-HELD_OUT:], arguments.batch, arguments.tokens
    if arguments.quick:
        facts, size, tokens = facts[:4], 2, 4096
    model = load_model(arguments.model, dtype=torch.float32)
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    statistics = key_statistics(model, preset_for(model).layers, corpus, tokens)
    report = common.report(
        "quality",
        arguments,
        model=model.name,
        dataset="counterfact",
        held_out=len(facts),
        tokens=tokens,
    )
    run(report, model, facts, statistics, size)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
