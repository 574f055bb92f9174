"""NeuronPatch on the records of `benchmarks.quality`: batches of 48 of the last 100 CounterFact
records, and single edits.

The same facts, probes and floors as MEMIT's batches there; nothing of it was tuned on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from knowedit.evaluation import drift, evaluate_each
from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods import NeuronPatch
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

from . import common
from .quality import CORPUS, HELD_OUT, about, batch_edits, judge


def run(
    report: common.Report,
    model: EditableModel,
    facts: Sequence[Fact],
    method: NeuronPatch,
    size: int,
    singles: int,
) -> None:
    """Both protocols; the model is left as it was found."""
    start = time.perf_counter()
    edits, covered = batch_edits(method, model, facts, None, size)
    seconds = (time.perf_counter() - start) / len(covered)
    judge(report, "batch", f"Neuron-Patch, batches of {size}", evaluate_each(model, edits, covered))
    about(report, f"Neuron-Patch, batches of {size}", list(dict.fromkeys(edits)), seconds)
    moved = drift(model, edits[0])
    report.note(
        f"ordinary text: same next word {moved.same:.1%}, KL {moved.kl:.4f} nats",
        kl=moved.kl,
        same=moved.same,
    )
    start = time.perf_counter()
    alone = list(method.compute_each(model, facts[-singles:]))
    seconds = (time.perf_counter() - start) / len(alone)
    judge(
        report,
        "single",
        f"Neuron-Patch, {len(alone)} single edits",
        evaluate_each(model, alone, facts[-singles:]),
    )
    about(report, f"Neuron-Patch, {len(alone)} single edits", alone, seconds)


SHOWN = {
    "success": "efficacy success",
    "exact": "efficacy exact",
    "paraphrase": "paraphrase success",
    "paraphrase exact": "paraphrase exact",
    "neighbours": "neighbourhood success",
    "unchanged": "neighbourhood unchanged",
}


def cases(folder: Path) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """`{case: {measure: row}}` of the results of `benchmarks.quality` and this benchmark, and the
    notes.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    notes = []
    for name in ("quality", "neuron"):
        header, rows = common.read(folder, name)
        for row in rows:
            if "measure" in row:
                found.setdefault(row["case"], {})[row["measure"]] = row
        machine = header["environment"]
        notes.append(
            f"`python -m benchmarks.{name}`: {machine['cpu']}, torch {machine['torch']}, "
            f"{machine['date'][:10]}."
        )
    return dict(sorted(found.items(), key=lambda case: "single" in case[0])), notes


def table(folder: Path) -> str:
    """Batches and single edits, beside MEMIT's and ROME's on the same records."""
    found, notes = cases(folder)
    lines = []
    for case, rows in found.items():
        cells = [f"{100 * rows[key]['value']:.1f}" for key in SHOWN.values()]
        was = rows["neighbourhood success"]["unedited"]
        cells[-2] += f" (unedited {100 * was:.1f})"
        lines.append([case, *cells])
    return "\n".join([Table(["edit", *SHOWN], lines).markdown(), "", *notes])


def draw(folder: Path, path: Path) -> None:
    """What is recalled and what is left alone, with 95 % intervals."""
    found, _ = cases(folder)
    shown = [name for name in SHOWN if name not in ("success", "neighbours")]
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    for number, (case, rows) in enumerate(found.items()):
        values = [rows[SHOWN[name]] for name in shown]
        place = [at + 0.16 * (number - (len(found) - 1) / 2) for at in range(len(shown))]
        low, high = (
            [100 * abs(row["value"] - row[end]) for row in values] for end in ("low", "high")
        )
        axis.errorbar(
            [100 * row["value"] for row in values],
            place,
            xerr=[low, high],
            fmt="o",
            ms=5,
            capsize=2,
            label=case,
        )
    axis.set_yticks(range(len(shown)), shown)
    axis.invert_yaxis()
    axis.set_xlabel("%")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("neuron", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument(
        "--singles", type=int, default=24, help="of the last records, each an edit of its own"
    )
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    arguments = parser.parse_args(argv)
    facts, size, singles = load("counterfact")[-HELD_OUT:], arguments.batch, arguments.singles
    method = NeuronPatch(corpus=arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS)
    if arguments.quick:
        facts, size, singles = facts[:4], 2, 2
        method = NeuronPatch(corpus=method.corpus, tokens=4096)
    model = load_model(arguments.model, dtype=torch.float32)
    report = common.report(
        "neuron", arguments, model=model.name, dataset="counterfact", tokens=method.tokens
    )
    run(report, model, facts, method, size, singles)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
