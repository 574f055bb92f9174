"""Rows as a table and as JSON lines; two files compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADINGS = (
    "provider            ms p50 [p20, p80]        useful / nominal TFLOP/s  % peak    GB/s  % copy "
    " "
    "error (of our limit)          speed-up       energy"
)


class ResultsError(ValueError):
    """A results file cannot be read; the message names it and the line."""


def describe(shape: dict[str, Any]) -> str:
    """A problem's shape in words: "d=4096 tokens=65536 dtype=bf16"."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _error(row: Row) -> str:
    """The error nearest to its limit, in brackets in units of our own limit: "bias 4.1e-08
    (0.41)".
    """
    if not row["errors"]:
        return "not checked"
    share = {
        name: abs(value) / limit if limit else abs(value)
        for name, (value, limit) in row["errors"].items()
    }
    worst = max(share, key=lambda name: (share[name] != share[name], share[name]))
    text = f"{worst} {row['errors'][worst][0]:.1e} ({share[worst] * row['slack']:.2g})"
    return f"{text} OVER" if row["red"] else text


def format_row(row: Row) -> str:
    """One line of the table under HEADINGS."""
    if "ms" not in row:
        return f"{row['provider']:<12}  {row['status']}"
    ms = row["ms"]
    time = f"{ms['p50']:10.3f} [{ms['p20']:.3f}, {ms['p80']:.3f}]"
    rate = f"{row['useful_tflops']:9.3f} / {row['nominal_tflops']:.3f}"
    speed = f"{row['speedup']:.2f}x {row['baseline']}" if "speedup" in row else "-"
    energy = f"n/a ({row['joules_reason']})" if row["joules"] is None else f"{row['joules']:.3g} J"
    return (
        f"{row['provider']:<12}{time:<36}{rate:<24}{row['peak_percent']:7.1f}{row['gbps']:9.1f}"
        f"{row['copy_percent']:8.1f}  "
        f"{_error(row):<30}{speed:<15}{energy}"
    )


def format_environment(environment: dict[str, Any]) -> str:
    """The header above a table: the device, versions, and the measured ceilings."""
    ceilings = environment["ceilings"]
    facts = {name: value for name, value in environment.items() if name != "ceilings"}
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in ceilings["matmul_tflops"].items())
    return (
        ", ".join(f"{name} {value}" for name, value in facts.items())
        + f"\nmeasured ceilings: copy {ceilings['copy_gbps']:.1f} GB/s (read + write), matmul "
        f"TFLOP/s: {rates}"
        + "\nuseful counts the flops the answer needs (a second moment: N d (d + 1)); nominal "
        "those of the textbook method."
        + "\n% are of the measured ceilings, with useful flops. An error's (number) is in units of "
        "our own limit."
    )


def write(path: Path, environment: dict[str, Any], rows: Iterable[Row]) -> None:
    """Writes the environment and the rows, one JSON object a line."""
    lines = [json.dumps({"environment": environment}), *map(json.dumps, rows)]
    path.write_text("\n".join(lines) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Reads `write`'s file. Raises ResultsError naming the file and what is wrong with it."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        environment, rows = records[0]["environment"], records[1:]
        for row in rows:
            row["op"], row["provider"], row["shape"].items(), row["status"]
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} was not written by `bench --json`: {error}") from None
    return environment, rows


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], describe(row["shape"]), row["provider"]


def compare(before: list[Row], after: list[Row], tolerance: float) -> tuple[list[str], bool]:
    """Lines about every row of both files, and whether anything got worse.

    Worse: slower by more than the factor `tolerance` with p20-p80 ranges that do not overlap, or
    newly red, or gone.
    """
    old, new = ({_key(row): row for row in rows} for rows in (before, after))
    lines, worse = [], False
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if a is not None and b is not None and "ms" in a and "ms" in b:
            ratio = b["ms"]["p50"] / a["ms"]["p50"]
            apart = b["ms"]["p20"] > a["ms"]["p80"] or b["ms"]["p80"] < a["ms"]["p20"]
            slower, red = apart and ratio > tolerance, b["red"] and not a["red"]
            verdict = (
                "NOW OVER BUDGET"
                if red
                else "SLOWER"
                if slower
                else "faster"
                if apart and ratio < 1
                else "same"
            )
            lines.append(
                f"{' '.join(key)}: {a['ms']['p50']:.3f} -> {b['ms']['p50']:.3f} ms ({ratio:.2f}x "
                f"time), {verdict}"
            )
            worse |= slower or red
        else:
            had, has = (
                ("ran" if "ms" in row else row["status"]) if row else "absent" for row in (a, b)
            )
            lines.append(f"{' '.join(key)}: {had} -> {has}")
            worse |= had == "ran"
    return lines, worse
