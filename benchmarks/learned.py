"""MEND and SERAC, trained here and measured on CounterFact records that neither has seen.

Training: CounterFact's flat records without the subjects of the complete ones, and wrong sums. The
    trained networks stay in
the cache folder, where `MEND()` and `SERAC()` find them, and are trained only where they are
absent. Test: the last complete records, as edits of one fact and of several, with all their
paraphrases and neighbourhood prompts.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from knowedit.cli.train import facts_to_train_on
from knowedit.edits.edit import Edit
from knowedit.evaluation.evaluation import summarise
from knowedit.evaluation.measures.base import Answer, Question, ask, questions
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.methods import MEND, SERAC, Method
from knowedit.methods.learned.mend.network import MendNetwork
from knowedit.methods.learned.mend.training import MendTraining, train_mend
from knowedit.methods.learned.networks import default_file
from knowedit.methods.learned.serac.memory import MemoryEdit
from knowedit.methods.learned.serac.network import SeracNetwork
from knowedit.methods.learned.serac.training import SeracTraining, train_serac
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

from . import common


def networks(
    model: EditableModel, facts: int, steps: int | None
) -> tuple[MendNetwork, SeracNetwork]:
    """Those of the cache folder; trained where they are absent, or, for a quick run with `steps`,
    into no file that stays.
    """
    chosen = facts_to_train_on(["counterfact-flat", "sums"], ["counterfact"], facts, 0)
    mend, serac = MendTraining(), SeracTraining()
    if steps:
        mend = replace(mend, rank=8, plan=replace(mend.plan, steps=steps))
        serac = replace(
            serac, gate=replace(serac.gate, steps=steps), reader=replace(serac.reader, steps=steps)
        )
    files = [default_file(name + (".quick" if steps else ""), model) for name in ("mend", "serac")]
    if steps or not files[0].exists():
        print("training MEND's network ...", flush=True)
        train_mend(model, chosen, mend, files[0])
    if steps or not files[1].exists():
        print("training SERAC's gate and reader ...", flush=True)
        train_serac(model, chosen, serac, files[1])
    found = MendNetwork.load(files[0], model), SeracNetwork.load(files[1], model)
    for file in files if steps else ():
        file.unlink()
    return found


def edited(
    model: EditableModel,
    method: Method,
    facts: Sequence[Fact],
    size: int,
    asked: Sequence[Question],
) -> Iterator[tuple[Edit, list[int], list[Answer]]]:
    """An edit of each `size` facts: the edit, which of the questions are about its facts, and their
    answers.
    """
    for start in range(0, len(facts), size):
        edit = method.compute(model, facts[start : start + size], progress=False)
        mine = [i for i, question in enumerate(asked) if start <= question.record < start + size]
        with edit.applied_to(model):
            yield edit, mine, ask(model, [asked[i] for i in mine], progress=False)


def measure(
    report: common.Report,
    model: EditableModel,
    method: Method,
    facts: Sequence[Fact],
    size: int,
    asked: Sequence[Question],
    before: Sequence[Answer],
) -> None:
    """One row: CounterFact's measures, and what an edit costs."""
    after: list[Any] = [None] * len(asked)
    edits, inside = [], {kind: [0, 0] for kind in ("efficacy", "paraphrase", "neighbourhood")}
    for edit, mine, answers in edited(model, method, facts, size, asked):
        edits.append(edit)
        if isinstance(edit, MemoryEdit) and model.router:
            for i, text in zip(mine, model.router.route([asked[i].prompt for i in mine])):
                inside[asked[i].kind][0] += text is not None
                inside[asked[i].kind][1] += 1
        for i, answer in zip(mine, answers):
            after[i] = answer
    table = summarise(asked, after, np.random.default_rng(0), before)
    was = summarise(asked, before, np.random.default_rng(0))
    reports = [edit.report.to_dict() for edit in edits]
    costs = {name: [r[name] for r in reports] for name in ("seconds", "peak_memory_bytes")}
    seconds = statistics.median(costs["seconds"])
    short = {
        f"{k} {m}": round(v.mean, 3)
        for k, row in table.items()
        for m, v in row.items()
        if m != "magnitude"
    }
    report.note(
        f"{method.name:6} {size:3} facts an edit  {short}  {1e3 * seconds:.0f} ms",
        method=method.name,
        size=size,
        edits=len(edits),
        records=len(facts),
        after=common.flat(table),
        unedited={name: estimate["mean"] for name, estimate in common.flat(was).items()},
        seconds=seconds,
        first_seconds=costs["seconds"][0],
        peak_memory_bytes=max(
            (m for m in costs["peak_memory_bytes"] if m is not None), default=None
        ),
        in_scope={kind: n / total for kind, (n, total) in inside.items() if total},
        rank=[max(r["ranks"].values()) for r in reports] if method.name == "MEND" else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("learned", __doc__, 1, timed=False)
    parser.add_argument(
        "--training",
        type=int,
        default=1000,
        help="facts of CounterFact to train on, beside wrong sums",
    )
    parser.add_argument("--limit", type=int, default=50, help="records to test on")
    parser.add_argument(
        "--method", action=common.Repeated, choices=("MEND", "SERAC"), default=["MEND", "SERAC"]
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.training, arguments.limit = 40, 4
    model = load_model(dtype=torch.float32)
    mend, serac = networks(model, arguments.training, 2 if arguments.quick else None)
    report = common.report("learned", arguments, model=model.name, threads=torch.get_num_threads())
    if report.output and report.output.exists():  # what is not measured now stays
        rows = map(json.loads, report.output.read_text().splitlines()[1:])
        report.rows += [row for row in rows if row["method"] not in arguments.method]
    facts = conflict_free(load("counterfact"))[-arguments.limit :]
    asked = [question for i, fact in enumerate(facts) for question in questions(i, fact)]
    before = ask(model, asked, progress=False)
    for method, trained, sizes in (
        (MEND(mend), mend.report, (1, 10)),
        (SERAC(serac), serac.report, (1, 10, len(facts))),
    ):
        if method.name not in arguments.method:
            continue
        line = (
            f"{method.name}: {trained['trainable_parameters']:,} parameters, "
            f"{trained['cpu_seconds']:.0f} s of processor time"
        )
        report.note(
            f"{line}, validation {trained['validation']}", method=method.name, training=trained
        )
        for size in sizes:
            measure(report, model, method, facts, size, asked, before)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
