"""The table of numbers of docs/benchmarks.md, made from results/*.jsonl; `--write` puts it between
the markers, `--check` verifies it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knowedit.io.tables import Table

from .common import HERE, RESULTS, read_all

START, END = "<!-- numbers:start -->", "<!-- numbers:end -->"
FILES = (
    "statistics", "scaling", "values", "solve", "jvp", "moments", "lowrank", "quality", "gpu_suite",
)  # fmt: skip


def table(folder: Path = RESULTS) -> str:
    """Markdown: rows with a target (speed), one table a processor, and rows with a floor (quality),
    then where and when they were measured.
    """
    speed: dict[str, list[list[str]]] = {}
    quality, notes = [], []
    for header, rows in [found for name in FILES for found in read_all(folder, name)]:
        kept = [row for row in rows if "target" in row]
        judged = [row for row in rows if "floor" in row]
        if kept:
            speed.setdefault(header["environment"]["cpu"], []).extend(map(_speed, kept))
        quality += [_quality(row) for row in judged]
        if kept or judged:
            notes.append(
                _note(header, max((row.get("others") or 0.0 for row in kept), default=0.0))
            )
    parts = []
    for processor, measured in speed.items():
        heads = ["what", "threads", "ours", "peer", "speed-up [spread]", "target", "error (limit)"]
        parts += [f"**{processor}**", "", Table(heads, measured).markdown(), ""]
    if quality:
        heads = ["quality", "measure", "value [95 % interval]", "floor", "reached"]
        parts += [Table(heads, quality).markdown(), ""]
    return "\n".join(parts + notes)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def _speed(row: dict[str, Any]) -> list[str]:
    gain = "not accurate"
    if "speedup" in row:
        low, high = row["spread"]
        gain = f"{_ratio(row['speedup'])}x [{_ratio(low)}, {_ratio(high)}]"
    short = "" if row.get("speedup", 0) >= row["target"] else " (short)"
    target = f"{round(row['target'], 2):g}x{short}"
    errors = "; ".join(f"{c['name']} {c['value']:.0e} ({c['limit']:.0e})" for c in row["checks"])
    times = [_seconds(row["seconds"]), _seconds(row["baseline_seconds"])]
    return [row["case"], str(row["threads"]), *times, gain, target, errors]


def _quality(row: dict[str, Any]) -> list[str]:
    between = (
        f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low", 0) < row.get("high", 0) else ""
    )
    reached = "yes" if row["reached"] else "**no**"
    value = f"{row['value']:.3f}{between}"
    return [row["case"], row["measure"], value, f"{row['floor']:.3f}", reached]


def _note(header: dict[str, Any], others: float) -> str:
    machine = header["environment"]
    shared = f", up to {others:.0%} of it busy with other programs" if others > 0.1 else ""
    return (
        f"`benchmarks.{header['benchmark']}`: {machine['cpu']}, {machine['cores']} cores{shared}, "
        f"torch {machine['torch']}, {machine['date'][:10]}, commit {machine['commit']}.  "
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="put the table into the page")
    mode.add_argument(
        "--check", action="store_true", help="exit 1 when the page's table is out of date"
    )
    arguments = parser.parse_args(argv)
    new = table(arguments.results)
    if not (arguments.write or arguments.check):
        print(new)
        return 0
    text = arguments.page.read_text(encoding="utf-8") if arguments.page.is_file() else ""
    head, start, rest = text.partition(START)
    old, end, tail = rest.partition(END)
    if not start or not end:
        print(f"{arguments.page}: no {START} ... {END} to hold the table; add the two comments")
        return 2
    if arguments.check:
        if old.strip() != new.strip():
            print(
                f"{arguments.page}: the numbers are out of date; run `python -m "
                f"benchmarks.table --write`"
            )
            return 1
        return 0
    arguments.page.write_text(f"{head}{START}\n{new}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
