"""Editing by one pass: how many facts a CPU-second, and how far one step goes, at which token.

`speed`: batches of CounterFact facts, the methods by turns in one process; what an edit takes with
and without the look at the edited model that every method takes (`edits.measured`).
Statistics are collected before, and factored within the first batch.

`step`: the mean NLL of other facts' answers before and after one curvature-scaled step, none of
which is written: at the subject's last token, where MEMIT's values are, or at the tokens after
which the answer is scored, as `one-step` has it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods import make_method, statistics_for
from knowedit.methods.gradient.named.one_step import OneStep, at_answers, curvature_scaled
from knowedit.methods.locate.optimisers import GaussNewton
from knowedit.methods.locate.values import ValueSettings, optimise_values
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.partial import hooked
from knowedit.models.texts import AnswerLoss, Texts

from . import common
from .quality import CORPUS

METHODS = ("one-step", "ultraedit")
PLACES = {"subject": "the subject's last token", "answer": "the tokens that answer"}
FACTS, BATCHES, TOKENS = 48, 3, 16_384
#: Facts whose steps are looked at: none of those that are written.
LOOKED_AT = 32


def written(
    model: EditableModel,
    names: Sequence[str],
    batches: Sequence[Sequence[Fact]],
    corpus: Path,
    tokens: int,
) -> list[dict[str, Any]]:
    """CPU seconds of every batch with every method, by turns."""
    methods = {name: make_method(name) for name in names}
    statistics = statistics_for(methods.values(), model, corpus, tokens)
    rows = []
    for number, facts in enumerate(batches):
        for method in methods.values():
            given = statistics if method.needs_statistics else None
            _, seconds, look = common.timed_edit(method, model, facts, given)
            rows.append(
                {
                    "case": "speed",
                    "method": method.name,
                    "batch": number + 1,
                    "facts": len(facts),
                    "seconds": seconds,
                    "look": look,
                }
            )
    return rows


def at_subjects(model: EditableModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """`[facts]` mean NLL of each answer after one step at the subject's last token, or without it
    where that is less.
    """
    settings = ValueSettings(steps=2, optimiser=GaussNewton(), stop=0.0, contexts=("{}",))
    return optimise_values(model, [[fact] for fact in facts], layer, settings).nll


@torch.no_grad()
def at_answering_tokens(
    model: EditableModel, facts: Sequence[Fact], layer: int, method: OneStep
) -> Tensor:
    """`[facts]` the same after one step at each token after which the answer is scored."""
    _, gradients, nll, lengths = at_answers(model, facts, layer)
    steps = curvature_scaled(gradients, nll, method.aim, method.radius * lengths)
    texts = Texts(model, [model.row(f.text, answer=f.new_answer) for f in facts], layer)
    batch = texts.batch(range(len(facts)))
    line, place = batch.places.line, batch.places.place

    def add(_: Any, output: Tensor) -> Tensor:
        return output.index_put((line, place), steps.to(output), accumulate=True)

    with hooked({model.projection(layer): add}):
        left = AnswerLoss(batch.places)(texts.logits(batch))
    return batch.places.means(left)


def before(model: EditableModel, facts: Sequence[Fact]) -> Tensor:
    """`[facts]` mean NLL of each answer, nats a token."""
    scores = model.score([fact.text for fact in facts], [fact.new_answer for fact in facts])
    return torch.tensor([-score.logprob for score in scores])


def stepped(
    model: EditableModel, facts: Sequence[Fact], layers: Sequence[int], method: OneStep
) -> list[dict[str, Any]]:
    """What one step leaves, by place and layer."""
    rows = []
    for place in PLACES:
        for layer in layers:
            nll = (
                at_subjects(model, facts, layer)
                if place == "subject"
                else at_answering_tokens(model, facts, layer, method)
            )
            rows.append(
                {
                    "case": "step",
                    "place": place,
                    "layer": layer,
                    "facts": len(facts),
                    "nll": float(nll.mean()),
                    "likely": float((nll < math.log(2)).double().mean()),
                }
            )
    return rows


def table(folder: Path) -> str:
    """Both tables."""
    header, rows = common.read(folder, "onepass")
    speed = [row for row in rows if row["case"] == "speed"]
    heads = ["facts a CPU-second", *(f"batch {i + 1}" for i in range(BATCHES)), "with the look"]
    lines = []
    for name in dict.fromkeys(row["method"] for row in speed):
        own = [row for row in speed if row["method"] == name]
        facts = sum(row["facts"] for row in own)
        each = [row["facts"] / (row["seconds"] - row["look"]) for row in own]
        whole = facts / sum(row["seconds"] for row in own)
        lines.append([name, *(f"{value:.0f}" for value in each), f"{whole:.1f}"])
    title = f"{speed[0]['facts']} facts a batch"
    steps = [row for row in rows if row["case"] == "step"]
    layers = sorted({row["layer"] for row in steps})
    found = {(row["place"], row["layer"]): row for row in steps}
    left = []
    for place, told in PLACES.items():
        each = [found[place, layer] for layer in layers]
        cells = [f"{row['nll']:.2f} ({common.percent(row['likely'])})" for row in each]
        left.append([told, *cells])
    unedited = next(row for row in rows if row["case"] == "unedited")
    about = (
        f"Mean NLL of {unedited['facts']} answers after one step, nats a token, and in brackets "
        f"the share of answers likelier than not, in per cent (before: {unedited['nll']:.2f})"
    )
    steps_heads = ["one step at", *(f"layer {layer}" for layer in layers)]
    return "\n\n".join(
        [
            Table(heads, lines, title).markdown(),
            Table(steps_heads, left, about).markdown(),
            common.measured_on(header),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("onepass", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load_model(arguments.model, dtype=torch.float32)
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    size, batches, looked_at = (4, 2, 4) if arguments.quick else (FACTS, BATCHES, LOOKED_AT)
    pool = load("counterfact")
    last = pool[-size * batches :]
    tokens = 4096 if arguments.quick else TOKENS
    report = common.report("onepass", arguments, model=model.name, tokens=tokens)
    parts = [last[i * size : (i + 1) * size] for i in range(batches)]
    for row in written(model, METHODS, parts, corpus, tokens):
        rate = row["facts"] / (row["seconds"] - row["look"])
        report.note(
            f"{row['method']:10} batch {row['batch']}: {rate:.1f} facts a CPU-second", **row
        )
    facts = pool[:looked_at]
    nll = before(model, facts)
    report.note(
        f"unedited: {nll.mean():.2f} nats", case="unedited", facts=len(facts), nll=float(nll.mean())
    )
    depth = len(model.layers)
    layers = [depth // 6, depth // 2, 3 * depth // 4, 9 * depth // 10]
    for row in stepped(model, facts, layers, OneStep()):
        report.note(f"{row['place']:8} layer {row['layer']:3}: {row['nll']:.2f} nats", **row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
