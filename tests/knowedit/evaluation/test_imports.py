"""Unit: measuring and reporting load no slow optional package before it is used."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "knowedit.evaluation",
    "knowedit.evaluation.geometry.geometry",
    "knowedit.evaluation.subjects.protocol",
    "knowedit.evaluation.sweep",
    "knowedit.evaluation.tracing.localisation",
    "knowedit.report.run",
    "knowedit.studies.arithmetic",
)
SLOW = ("scipy", "matplotlib", "datasets", "pandas", "peft")


def test_modules_come_without_slow_packages():
    script = (
        f"import sys, {', '.join(MODULES)}\n"
        f"print(*sorted({{*sys.modules}} & {{{', '.join(map(repr, SLOW))}}}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
