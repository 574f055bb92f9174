"""NeuronPatch on the records of `benchmarks.quality`: batches of 48 of the last 100 CounterFact records, and single edits.

The same facts, probes and floors as MEMIT's batches there; nothing of it was tuned on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from knowedit.datasets import data_dir, load
from knowedit.editors import NeuronPatch
from knowedit.evaluation.drift import drift
from knowedit.evaluation.metrics import evaluate_each
from knowedit.facts import Fact
from knowedit.model import EditableModel, load_model

from . import common
from .quality import CORPUS, HELD_OUT, about, batch_edits, judge


def run(
    report: common.Report, model: EditableModel, facts: Sequence[Fact], editor: NeuronPatch, size: int, singles: int
) -> None:
    """Both protocols; the model is left as it was found."""
    start = time.perf_counter()
    edits, covered = batch_edits(editor, model, facts, None, size)
    seconds = (time.perf_counter() - start) / len(covered)
    judge(report, "batch", f"Neuron-Patch, batches of {size}", evaluate_each(model, edits, covered))
    about(report, f"Neuron-Patch, batches of {size}", list(dict.fromkeys(edits)), seconds)
    moved = drift(model, edits[0])
    report.note(f"ordinary text: same next word {moved.same:.1%}, KL {moved.kl:.4f} nats", kl=moved.kl, same=moved.same)
    start = time.perf_counter()
    alone = list(editor.compute_each(model, facts[-singles:]))
    seconds = (time.perf_counter() - start) / len(alone)
    judge(report, "single", f"Neuron-Patch, {len(alone)} single edits", evaluate_each(model, alone, facts[-singles:]))
    about(report, f"Neuron-Patch, {len(alone)} single edits", alone, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("neuron", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--singles", type=int, default=24, help="of the last records, each an edit of its own")
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    arguments = parser.parse_args(argv)
    facts, size, singles = load("counterfact")[-HELD_OUT:], arguments.batch, arguments.singles
    editor = NeuronPatch(corpus=arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS)
    if arguments.quick:
        facts, size, singles = facts[:4], 2, 2
        editor = NeuronPatch(corpus=editor.corpus, tokens=4096)
    model = load_model(arguments.model, dtype=torch.float32)
    report = common.report("neuron", arguments, model=model.name, dataset="counterfact", tokens=editor.tokens)
    run(report, model, facts, editor, size, singles)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
