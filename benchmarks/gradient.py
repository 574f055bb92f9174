"""Gradient methods on the default model, each as it ships: what they learn, what they move
elsewhere, what they cost.

`demo`: the six facts of `knowedit demo`, `embedded`: sixteen of the embedded set, one of each
relation; all facts of a set in one edit. MEMIT on statistics from the model's own samples is there
for comparison. `--resume` goes on with an output file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from knowedit.evaluation import drift, evaluate
from knowedit.facts.fact import Fact
from knowedit.facts.sets import load
from knowedit.io.tables import Table
from knowedit.methods import Method, Recipe, make_method, statistics_for
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics

from . import common

METHODS = ("memit", "ft", "ft-l", "lora", "regularised-lora", "kl-ft", "kl-lora")
SHOWN = {
    "exact": "efficacy exact",
    "paraphrase": "paraphrase success",
    "in full": "paraphrase exact",
    "neighbours": "neighbourhood success",
    "unchanged": "neighbourhood unchanged",
}


def sets(quick: bool = False) -> dict[str, list[Fact]]:
    """Facts by the set's name."""
    if quick:
        return {"demo": load("demo")[:1]}
    first: dict[str | None, Fact] = {}
    for fact in load("embedded"):
        first.setdefault(fact.relation, fact)
    return {"demo": load("demo"), "embedded": list(first.values())}


def measure(
    model: EditableModel,
    method: Method,
    facts: Sequence[Fact],
    statistics: KeyStatistics | None = None,
) -> dict[str, Any]:
    """One row: quality with intervals, drift, cost; the model is left as it was found."""
    start = time.perf_counter()
    edit = method.compute(
        model, facts, statistics if isinstance(method, Recipe) else None, progress=False
    )
    seconds, moved = time.perf_counter() - start, drift(model, edit)
    found, report = evaluate(model, edit, facts, progress=False), edit.report.to_dict()
    return {
        "method": method.name,
        "facts": len(facts),
        "seconds": seconds,
        "kl": moved.kl,
        "same": moved.same,
        "before": common.flat(found.before),
        "after": common.flat(found.after),
        **{
            name: report.get(name)
            for name in ("steps", "loss", "lead", "trainable", "peak_memory_bytes", "warnings")
        },
        "norm": max(report["relative_norm"].values()),
        "settings": edit.config,
    }


def line(row: dict[str, Any]) -> str:
    shown = "  ".join(
        f"{name} {row['after'][key]['mean']:.2f}"
        for name, key in SHOWN.items()
        if key in row["after"]
    )
    return f"{row['set']:9} {row['method']:17} {shown}  KL {row['kl']:.4f}  {row['seconds']:.0f} s"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a method, a part a set."""
    heads = ["method", *SHOWN, "KL", "same word", "steps", "seconds", "trained", "memory", "norm"]
    parts = []
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        before = [_percent(mine[0]["before"], key) or "100" for key in SHOWN.values()]
        lines = [["unedited", *before, "0", "100", *[""] * 5]]
        for row in mine:
            trained, memory = row["trainable"], row["peak_memory_bytes"]
            lines.append(
                [
                    row["method"],
                    *(_percent(row["after"], key) for key in SHOWN.values()),
                    f"{row['kl']:.4f}",
                    common.percent(row["same"]),
                    str(row["steps"]) if isinstance(row["steps"], int) else "",
                    f"{row['seconds']:.0f}",
                    f"{trained / 1e6:.2f} M" if trained else "",
                    f"{memory / 2**30:.2f} GiB" if memory is not None else "",
                    f"{row['norm']:.3f}",
                ]
            )
        title = f"{name}, {mine[0]['facts']} facts in one edit"
        parts.append(Table(heads, lines, title).markdown())
    return "\n\n".join(parts)


def _percent(measures: dict[str, Any], key: str) -> str:
    return common.percent(measures[key]["mean"] if key in measures else None)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Paraphrases learned against what moves elsewhere."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for row in (row for row in rows if row["set"] == name):
            point = row["kl"], 100 * row["after"]["paraphrase success"]["mean"]
            axis.plot(
                *point, "o" if row["trainable"] else "s", color="C0" if row["trainable"] else "C1"
            )
            axis.annotate(
                row["method"], point, fontsize=8, xytext=(5, 3), textcoords="offset points"
            )
        axis.set(
            xscale="log",
            xlabel="KL on ordinary text (nats)",
            ylabel="paraphrases (%)",
            title=f"{name}",
            ylim=(0, 105),
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("gradient", __doc__, 1, timed=False)
    parser.add_argument("--method", action=common.Repeated, default=list(METHODS))
    parser.add_argument("--dataset", action=common.Repeated, default=["demo", "embedded"])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the output file has"
    )
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model, dtype=torch.float32)
    chosen = {
        name: facts for name, facts in sets(arguments.quick).items() if name in arguments.dataset
    }
    methods = {name: make_method(name) for name in arguments.method}
    path: Path = arguments.output or common.RESULTS / "gradient.jsonl"
    kept = (
        [json.loads(text) for text in path.read_text().splitlines()[1:]]
        if arguments.resume and path.is_file()
        else []
    )
    report = common.report("gradient", arguments, model=model.name)
    report.rows += kept
    done = {(row["set"], row["method"]) for row in kept}
    left = [
        (name, method)
        for name in chosen
        for method in methods.values()
        if (name, method.name) not in done
    ]
    statistics = statistics_for([method for _, method in left], model, "self", 16_384)
    for name, method in left:
        row = {"set": name, **measure(model, method, chosen[name], statistics)}
        report.note(line(row), **row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
