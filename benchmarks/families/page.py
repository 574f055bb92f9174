"""The table of docs/families.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import measured_on, read
from benchmarks.families.matrix import VERDICTS
from knowedit.io.tables import Table

MARKS = {"figure": "✓", "refused": "refused", "error": "✗"}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many families there are of each verdict, in one sentence."""
    counts = Counter(row["verdict"] for row in rows)
    said = [f"{counts[name]} {name} ({what})" for name, what in VERDICTS.items() if counts[name]]
    return f"{len(rows)} model types: {', '.join(said)}."


def line(row: Mapping[str, Any]) -> str:
    """One family in one line, for a terminal."""
    said = [row["why"]] if "why" in row else []
    for name, outcome in row["checks"].items():
        said += [f"{name}: {outcome[k]}" for k in ("refused", "error") if k in outcome]
    return f"{row['kind']:24} {row['verdict']:9} {'; '.join(said)[:300]}"


def table(folder: Path) -> str:
    """The summary, a line a family that can be edited, then why the others cannot."""
    header, rows = read(folder, "families")
    rows.sort(key=lambda row: row["kind"])
    checked = [row for row in rows if row["checks"]]
    names = list(dict.fromkeys(name for row in checked for name in row["checks"]))
    marks = [
        [
            row["kind"],
            *(mark(row["checks"].get(name, {})) for name in names),
            _reasons(row),
        ]
        for row in checked
    ]
    others = [[r["kind"], r["verdict"], r.get("why", "")] for r in rows if not r["checks"]]
    return "\n\n".join(
        [
            summary(rows),
            Table(["type", *names, "what is not right"], marks).markdown(),
            Table(["type", "verdict", "why"], others).markdown(),
            measured_on(header),
        ]
    )


def mark(outcome: Mapping[str, Any]) -> str:
    """A check's outcome in one sign."""
    return next((sign for name, sign in MARKS.items() if name in outcome), "")


def _reasons(row: Mapping[str, Any]) -> str:
    """What the checks that do not hold say, each reason once."""
    said = [o[k] for o in row["checks"].values() for k in ("refused", "error") if k in o]
    said += [
        f"{name}: held in float64 (float32, which the model itself rounds: {o['float32']:.1e})"
        for name, o in row["checks"].items()
        if "float32" in o
    ]
    return "; ".join(dict.fromkeys(said))


def picture(folder: Path, path: Path) -> None:
    """How many families pass each check."""
    rows = [row for row in read(folder, "families")[1] if row["checks"]]
    names = list(rows[0]["checks"])
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    left = [0] * len(names)
    for kind, colour in (("figure", "C0"), ("refused", "0.7"), ("error", "C3")):
        counts = [sum(kind in row["checks"].get(name, {}) for row in rows) for name in names]
        axes.barh(names, counts, left=left, color=colour, label={"figure": "holds"}.get(kind, kind))
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("model types")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
