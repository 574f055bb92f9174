"""The tables and pictures of the pages in docs, made from results/*.jsonl (`--write`; `--check`
verifies).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from knowedit.evaluation import intervals
from knowedit.io.lines import number_of
from knowedit.io.tables import Table
from knowedit.models.copies import COPIES

from . import arithmetic as by_sum
from . import calibration as by_calibration
from . import capacity as by_room
from . import easyedit as by_editor
from . import geometry as by_layer
from . import gradient as by_gradient
from . import hessian as by_input
from . import hosts as by_host
from . import leaderboard
from . import models as by_model
from . import moe as by_expert
from . import neuron as by_neuron
from . import onepass as by_pass
from . import oneshot as by_call
from . import optimisers as by_optimiser
from . import portability as by_hop
from . import sequential as in_sequence
from . import tokens as by_tokens
from . import travel as by_program
from .common import HERE, RESULTS, measured_on, of_model, percent, read
from .families import page as by_family

DOCS = HERE.parent / "docs"
ROSE = {
    "cloze": "cloze success",
    "exact": "cloze exact",
    "paraphrase": "paraphrase success",
    "question": "question success",
    "chat question": "chat_question success",
    "exact ": "chat_question exact",
    "chat completion": "chat_completion success",
    "greedy": "greedy contains",
    "neighbours": "neighbourhood success",
    "unchanged": "neighbourhood unchanged",
    "identity KL": "identity kl",
    "kept": "identity kept",
    "unrelated kept": "unrelated kept",
}
METAKE = {
    "exact": "efficacy exact",
    "success": "efficacy success",
    "paraphrase": "paraphrase success",
    "paraphrase exact": "paraphrase exact",
    "neighbours": "neighbourhood success",
    "unchanged": "neighbourhood unchanged",
}
SEQUENTIAL = {
    "success": "efficacy success",
    "paraphrase": "paraphrase success",
    "neighbours": "neighbourhood success",
    "unchanged": "neighbourhood unchanged",
}


def rose(folder: Path, name: str = "rose") -> str:
    """One line a method, over all draws, and where RoSE's difference is beyond chance."""
    header, rows = read(folder, name)
    lines, first = [], next(r["pooled"] for r in rows if "pooled" in r)
    columns = {label: key for label, key in ROSE.items() if key in first}  # it may have no chat
    draws = len({r["seed"] for r in rows if "seed" in r})
    for row in [r for r in rows if "pooled" in r]:
        cells = []
        for label, key in columns.items():
            value = row["pooled"][key]["mean"]
            gap = (row.get("rose_minus_this") or {}).get(key)
            mark = (
                ""
                if gap is None or gap["low"] <= 0 <= gap["high"]
                else ("-" if gap["mean"] > 0 else "+")
            )
            cells.append((f"{value:.2f}" if "KL" in label else percent(value)) + mark)
        fewer = (
            f" ({len(row['seeds'])} of {draws} draws)"
            if len(row.get("seeds", ())) not in (0, draws)
            else ""
        )
        lines.append([f"{row['method']}{fewer}", *cells])
    facts = sorted({r["facts"] for r in rows if "facts" in r})
    timed = [r for r in rows if r.get("seed") == rows[0]["seed"] and "seconds" in r]
    note = ", ".join(f"{r['method']} {r['seconds'] / r['facts']:.1f}" for r in timed)
    about = (
        f"{number_of(draws, 'draw')} of {', '.join(map(str, facts))} facts. Seconds a fact on one "
        f"core, in the first of them: {note}."
    )
    return Table(["method", *columns], lines, notes=[about, measured_on(header)]).markdown()


def metake(folder: Path, name: str = "metake") -> str:
    """One line a method and size, over all draws; differences to MetaKE fact by fact."""
    header, rows = read(folder, name)
    parts = []
    for part, size in dict.fromkeys((r["part"], r["size"]) for r in rows):
        found = [r for r in rows if (r["part"], r["size"]) == (part, size)]
        columns = {k: v for k, v in METAKE.items() if v in found[0]["after"]}
        heads = [*columns, "KL on text", "perplexity", "norm", "MetaKE exact minus this [95 %]"]
        # the unedited model's decisions are unchanged by definition
        clean = [
            percent(np.mean([r["unedited"].get(k, 1.0) for r in found])) for k in columns.values()
        ]
        lines = [["unedited", *clean, "0", f"{found[0]['clean_perplexity']:.1f}", "0", ""]]
        for method in dict.fromkeys(r["method"] for r in found):
            mine = [r for r in found if r["method"] == method]
            cells = [
                percent(np.mean([r["after"][k]["mean"] for r in mine])) for k in columns.values()
            ]
            cells += [
                f"{np.mean([r[k] for r in mine]):.{digits}f}"
                for k, digits in (("kl", 3), ("perplexity", 1), ("norm", 2))
            ]
            gaps = [
                100 * gap
                for r in mine
                if r["metake_minus_this"]
                for gap in r["metake_minus_this"]["efficacy exact"]
            ]
            lines.append([method, *cells, f"{intervals.mean(gaps):+.0f}" if gaps else ""])
        seeds = len({r["seed"] for r in found})
        what = "facts" if part == "crowded" else "subjects"
        title = f"{part}, {size} {what}, {number_of(seeds, 'draw')}"
        parts.append(Table(["method", *heads], lines, title).markdown())
    return "\n\n".join([*parts, measured_on(header)])


def sequential(folder: Path, name: str = "sequential") -> str:
    """Each method after 100, 400 and 1,000 facts and at the end; the worst batch's exactness beside
    the mean of all batches.
    """
    header, rows = read(folder, name)
    heads = ["exact, all facts", "worst batch", *SEQUENTIAL, "perplexity", "drift", "norm"]
    lines = []
    for edits in sorted({0, 100, 400, 1000, max(row["edits"] for row in rows)}):
        for row in [r for r in rows if r["edits"] == edits][: None if edits else 1]:
            exact, measures = row["exact_by_batch"], row["measures"]
            found = [
                measures.get(kind, {}).get(measure)
                for kind, measure in map(str.split, SEQUENTIAL.values())
            ]
            exact = [share for share in exact if share is not None]
            all_facts = row["exact"] if "exact" in row else np.mean(exact) if exact else None
            cells = [percent(all_facts), percent(min(exact))] if exact else ["", ""]
            cells += [percent(None if value is None else value["mean"]) for value in found]
            cells += [f"{row['perplexity']:.1f}", f"{row['drift']['kl']:.3f}", f"{row['norm']:.2f}"]
            lines.append([str(edits), row["case"] if edits else "unedited", *cells])
    setting = header.get("setting", {})
    about = f"Layers: {setting.get('layers', '4-6')}. {measured_on(header)}"
    return Table(["facts", "method", *heads], lines, notes=[about]).markdown()


def tokens(folder: Path) -> str:
    """Quality against the tokens of the statistics."""
    header, rows = read(folder, "tokens")
    return "\n".join(
        [by_tokens.table([row for row in rows if "price" in row]), "", measured_on(header)]
    )


def tokens_picture(folder: Path, path: Path) -> None:
    by_tokens.draw([row for row in read(folder, "tokens")[1] if "price" in row], path)


def geometry(folder: Path) -> str:
    """Keys, edits and values, a column a layer."""
    header, rows = read(folder, "geometry")
    return "\n".join([by_layer.table(rows), "", measured_on(header)])


def geometry_picture(folder: Path, path: Path) -> None:
    by_layer.draw(read(folder, "geometry")[1], path)


def gradient(folder: Path) -> str:
    """One line a gradient method."""
    header, rows = read(folder, "gradient")
    return "\n".join([by_gradient.table(rows), "", measured_on(header)])


def gradient_picture(folder: Path, path: Path) -> None:
    by_gradient.draw(read(folder, "gradient")[1], path)


def sequential_picture(folder: Path, path: Path, name: str = "sequential") -> None:
    in_sequence.draw(read(folder, name)[1], path)


def rose_picture(folder: Path, path: Path) -> None:
    """What each method recalls, against what it leaves alone; hollow: measured in fewer draws than
    the others.
    """
    rows = [r for r in read(folder, "rose")[1] if "pooled" in r]
    draws = max(len(r.get("seeds", ())) for r in rows)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    forms = [
        "cloze success",
        "question success",
        "chat_question success",
        "chat_completion success",
        "greedy contains",
    ]
    for number, row in enumerate(rows):
        means = [100 * row["pooled"][form]["mean"] for form in forms]
        whole = len(row.get("seeds", range(draws))) == draws
        style = {
            "color": f"C{number}" if "seeds" in row else "black",
            "marker": "o",
            "ls": "",
            "label": row["method"],
        }
        style |= {} if whole else {"markerfacecolor": "white"}
        axes[0].plot(means, np.arange(len(forms)) + 0.06 * (number - len(rows) / 2), ms=5, **style)
        x, y = (
            100 * row["pooled"][name]["mean"]
            for name in ("neighbourhood unchanged", "greedy contains")
        )
        axes[1].plot(x, y, ms=6, **style)
        if whole:
            axes[1].annotate(
                row["method"], (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
    axes[0].set_yticks(range(len(forms)), [form.split()[0].replace("_", " ") for form in forms])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("new object preferred, or said (%)")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=7,
        frameon=False,
    )
    axes[1].set_xlabel("neighbours' decisions unchanged (%)")
    axes[1].set_ylabel("greedy answer holds the new object (%)")
    _save(figure, path)


def metake_picture(folder: Path, path: Path) -> None:
    """Exactness against drift, one point a method."""
    rows = read(folder, "metake")[1]
    cases = list(dict.fromkeys((r["part"], r["size"]) for r in rows))
    figure = Figure(figsize=(5 * len(cases), 4.2), layout="constrained")
    axes = figure.subplots(1, len(cases), squeeze=False)
    for room, case in zip(axes[0], cases):
        found = [r for r in rows if (r["part"], r["size"]) == case]
        for method in dict.fromkeys(r["method"] for r in found):
            mine = [r for r in found if r["method"] == method]
            x, y = (
                np.mean([r["kl"] for r in mine]),
                100 * np.mean([r["after"]["efficacy exact"]["mean"] for r in mine]),
            )
            room.plot(
                x,
                y,
                "s" if method.startswith("MetaKE") else "o",
                ms=6,
                color="C1" if method.startswith("MetaKE") else "C0",
            )
            room.annotate(method, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
        room.set(
            title=f"{case[0]}, {case[1]}",
            xlabel="KL on ordinary text (nats a token)",
            ylabel="exact answers (%)",
        )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


#: The page of each run of `benchmarks.sequential`.
SEQUENCES = {
    "sequential": "sequential.md",
    "sequential_one_layer": "sequential.md",
    "sequential_neuron": "sequential.md",
    "sequential_one_pass": "sequential.md",
    "sequential_thousands": "sequential.md",
    of_model("sequential_thousands", "gemma-3-270m-q4_k_m"): "sequential.md",
    "sequential_moe": "moe.md",
}

PAGES: dict[str, tuple[str, Callable[[Path], str], Callable[[Path, Path], None]]] = {
    "rose": ("rose.md", rose, rose_picture),
    "metake": ("metake.md", metake, metake_picture),
    **{
        name: (page, partial(sequential, name=name), partial(sequential_picture, name=name))
        for name, page in SEQUENCES.items()
    },
    by_room.NAME: ("sequential.md", by_room.table, by_room.draw),
    "geometry": ("geometry.md", geometry, geometry_picture),
    "gradient": ("gradient.md", gradient, gradient_picture),
    "onepass": ("gradient.md", by_pass.table, by_model.no_picture),
    "optimisers": ("methods.md", by_optimiser.table, by_model.no_picture),
    "tokens": ("statistics.md", tokens, tokens_picture),
    "families": ("families.md", by_family.table, by_family.picture),
    "calibration": ("calibration.md", by_calibration.table, by_calibration.draw),
    by_model.NAME: ("models.md", by_model.table, by_model.no_picture),
    by_hop.NAME: ("portability.md", by_hop.table, by_model.no_picture),
    "neuron": ("neuron.md", by_neuron.table, by_neuron.draw),
    by_sum.NAME: ("arithmetic.md", by_sum.table, by_sum.draw),
    by_sum.ADDS: (
        "arithmetic.md",
        partial(by_sum.table, name=by_sum.ADDS),
        by_model.no_picture,
    ),
    **{
        of_model(name, copy.name): (
            f"{name}.md",
            partial(table, name=of_model(name, copy.name)),
            by_model.no_picture,
        )
        for name, table in (("rose", rose), ("metake", metake))
        for copy in COPIES
    },
    leaderboard.NAME: ("leaderboard.md", leaderboard.table, leaderboard.no_picture),
    "moe": ("moe.md", by_expert.table, by_model.no_picture),
    "hessian": ("hessians.md", by_input.table, by_input.no_picture),
    "oneshot": ("integrations/llmcompressor.md", by_call.table, by_input.no_picture),
    "hosts": ("integrations/index.md", by_host.table, by_input.no_picture),
    "easyedit": ("integrations/easyedit.md", by_editor.table, by_input.no_picture),
    by_program.NAME: ("travel.md", by_program.table, by_model.no_picture),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="put tables and pictures into the pages")
    mode.add_argument(
        "--check", action="store_true", help="exit 1 when a page's table is out of date"
    )
    arguments = parser.parse_args(argv)
    stale = []
    for name, (file, table, picture) in PAGES.items():
        page, start, end = arguments.docs / file, f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if not (arguments.results / f"{name}.jsonl").is_file() and name != leaderboard.NAME:
            continue
        text = page.read_text(encoding="utf-8")
        head, _, rest = text.partition(start)
        old, found, tail = rest.partition(end)
        if not found:
            print(f"{page}: no {start} ... {end} to hold the table; add the two comments")
            return 2
        new = table(arguments.results)
        if old.strip() != new.strip():
            stale.append(page)
        if arguments.write:
            page.write_text(f"{head}{start}\n{new}\n{end}{tail}", encoding="utf-8")
            picture(arguments.results, arguments.docs / "pictures" / f"{name}.png")
    if arguments.check and stale:
        print(
            f"out of date: {', '.join(map(str, stale))}; run `python -m benchmarks.pages --write`"
        )
    return int(bool(arguments.check and stale))


if __name__ == "__main__":
    sys.exit(main())
