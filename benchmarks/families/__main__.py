"""Check every decoder family that transformers can build against the plain model.

An interrupted run goes on where it stopped, as long as it is one of the same commit.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Report, parser
from benchmarks.families import matrix, models
from benchmarks.families.page import line, summary

NAME = "families"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(NAME, __doc__, 0, timed=False)
    arguments.add_argument("kinds", nargs="*", help="model types (default: all)")
    arguments.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    arguments.add_argument("--again", action="store_true", help="also what was done already")
    given = arguments.parse_args(argv)
    kinds = given.kinds or (["llama", "gpt2"] if given.quick else models.kinds())
    output = given.output or (None if given.quick or given.kinds else RESULTS / f"{NAME}.jsonl")
    report = Report(NAME, output)
    earlier = [] if given.again or output is None else done(output, report.rows[0])
    report.rows += earlier
    left = sorted(set(kinds) - {row["kind"] for row in earlier})
    for row in matrix.rows(left, given.jobs):
        report.note(line(row), **row)
        report.failed |= row["verdict"] == "wrong"
    print(summary(report.rows[1:]))
    return report.finish()


def done(output: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same commit."""
    if not output.is_file():
        return []
    before, *rows = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    same = ("commit", "torch", "transformers")
    if any(before["environment"].get(k) != header["environment"].get(k) for k in same):
        return []
    return rows


if __name__ == "__main__":
    sys.exit(main())
