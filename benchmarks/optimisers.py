"""How values are found: what an optimiser costs and how far it gets, chosen on one half of the
records and reported on the other.

`chosen`: of 32 facts of CounterFact's first half the evaluations, CPU seconds and NLL of the values
alone, over `most` and layers. `reported`: batches of 32 of the second half, edited as MEMIT edits
them; CPU seconds without the look at the edited model that every method takes, and the quality of
the edits. Beside them the published loop, one fact at a time with its own contexts, on the first
facts of the same half.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from knowedit.edits.edit import Edit
from knowedit.evaluation.evaluation import evaluate_each
from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods import make_method
from knowedit.methods.locate.optimisers import GaussNewton
from knowedit.methods.locate.values import ValueSettings, optimise_values
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import key_statistics

from . import common, peers
from .quality import CORPUS
from .values import SETTINGS

BATCH, BATCHES, TOKENS, NEIGHBOURS = 32, 3, 65_536, 4
LAYERS, MOST = (5, 8), (8, 12)
#: Settings of MEMIT by what they are called.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "adam": {"layers": LAYERS[:1]},
    **{
        f"gauss-newton, layer {layer}": {"layers": (layer,), "target.optimiser": "gauss-newton"}
        for layer in LAYERS
    },
}
PEER = "the published loop, values alone"
SHOWN = {
    "success": "efficacy success",
    "exact": "efficacy exact",
    "paraphrase": "paraphrase success",
    "in full": "paraphrase exact",
    "unchanged": "neighbourhood unchanged",
}


def chosen(model: EditableModel, facts: Sequence[Fact], layer: int, most: int) -> dict[str, Any]:
    """Values alone by Gauss-Newton."""
    settings = ValueSettings(steps=most, optimiser=GaussNewton(most=most))
    start = time.process_time()
    found = optimise_values(model, [[fact] for fact in facts], layer, settings)
    return {
        "case": "chosen",
        "layer": layer,
        "most": most,
        "facts": len(facts),
        "seconds": (time.process_time() - start) / len(facts),
        "evaluations": float(found.steps.mean()) + 1,
        "nll": float(found.nll.mean()),
    }


def reported(
    model: EditableModel,
    name: str,
    batches: Sequence[Sequence[Fact]],
    corpus: Path,
    tokens: int,
) -> dict[str, Any]:
    """Edits of all batches in one of the `WAYS`: cost and quality."""
    method = make_method("memit", WAYS[name])
    layers = method.statistics_layers(model)
    statistics = key_statistics(model, layers, corpus, tokens, progress=False)
    for layer in layers:
        statistics.metric(layer)  # factored before
    seconds, edits = 0.0, list[Edit]()
    steps, nll = list[float](), list[float]()
    for facts in batches:
        edit, whole, look = common.timed_edit(method, model, facts, statistics)
        seconds += whole - look
        edits += [edit] * len(facts)
        told = edit.report
        assert isinstance(told.steps, list) and told.planned_nll is not None
        steps += told.steps
        nll += [told.planned_nll] * len(facts)
    every = [fact for facts in batches for fact in facts]
    found = evaluate_each(model, edits, every, progress=False)
    return {
        "case": name,
        "facts": len(every),
        "seconds": seconds / len(every),
        "evaluations": sum(steps) / len(steps) + 1,
        "nll": sum(nll) / len(nll),
        "after": common.flat(found.after),
    }


def published(model: EditableModel, facts: Sequence[Fact], layer: int) -> dict[str, Any]:
    """The published loop over some facts."""
    start = time.process_time()
    for fact in facts:
        peers.compute_z(model, fact, layer, SETTINGS)
    seconds = (time.process_time() - start) / len(facts)
    return {"case": PEER, "facts": len(facts), "seconds": seconds}


def table(folder: Path) -> str:
    """Both tables."""
    header, rows = common.read(folder, "optimisers")
    first = [row for row in rows if row["case"] == "chosen"]
    heads = ["layer", "`most`", "evaluations a fact", "CPU-s a fact", "NLL"]
    lines = [
        [
            str(row["layer"]),
            str(row["most"]),
            f"{row['evaluations']:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['nll']:.3f}",
        ]
        for row in first
    ]
    title = f"To choose on: values of {first[0]['facts']} facts by `gauss-newton`"
    peer = next(row for row in rows if row["case"] == PEER)
    told = [row for row in rows if "after" in row]
    heads_told = [
        f"{told[0]['facts']} others, batches of {header['batch']}",
        "evaluations a fact",
        "CPU-s a fact",
        "times the published",
        "NLL",
        *SHOWN,
    ]
    lines_told = [
        [
            row["case"],
            f"{row['evaluations']:.1f}",
            f"{row['seconds']:.2f}",
            f"{peer['seconds'] / row['seconds']:.1f}",
            f"{row['nll']:.3f}",
            *(_share(row["after"][key]) for key in SHOWN.values()),
        ]
        for row in told
    ]
    published_line = [PEER, f"{SETTINGS.steps}", f"{peer['seconds']:.1f}", "1"]
    lines_told.append([*published_line, *[""] * (1 + len(SHOWN))])
    return "\n\n".join(
        [
            Table(heads, lines, title).markdown(),
            Table(heads_told, lines_told, "To report on").markdown(),
            common.measured_on(header),
        ]
    )


def _share(estimate: Mapping[str, float]) -> str:
    mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("optimisers", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load_model(arguments.model, dtype=torch.float32)
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    size, batches, tokens = (2, 1, 4096) if arguments.quick else (BATCH, BATCHES, TOKENS)
    pool = load("counterfact")
    half = len(pool) // 2
    report = common.report("optimisers", arguments, model=model.name, batch=size, tokens=tokens)
    for layer in LAYERS:
        for most in MOST:
            row = chosen(model, pool[:size], layer, most)
            report.note(
                f"layer {layer}, most {most}: {row['evaluations']:.1f} evaluations, "
                f"{row['seconds']:.2f} CPU-s a fact, NLL {row['nll']:.3f}",
                **row,
            )
    few = [replace(fact, neighbours=fact.neighbours[:NEIGHBOURS]) for fact in pool[half:]]
    parts = [few[i * size : (i + 1) * size] for i in range(batches)]
    row = published(model, few[:2], LAYERS[0])
    report.note(f"{PEER}: {row['seconds']:.1f} CPU-s a fact", **row)
    for name in WAYS:
        row = reported(model, name, parts, corpus, tokens)
        said = ", ".join(f"{short} {_share(row['after'][key])}" for short, key in SHOWN.items())
        report.note(f"{name}: {row['seconds']:.2f} CPU-s a fact; {said}", **row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
