"""Unit, and model for scripts that load one: every example runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


CASES = [
    pytest.param(
        path,
        id=path.stem,
        marks=[pytest.mark.model] if "load_model" in path.read_text("utf-8") else [],
    )
    for path in EXAMPLES
]


def test_there_are_examples():
    assert {"facts", "kernels", "toolbox"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", CASES)
def test_an_example_runs(path, tmp_path):
    ran = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout and not list(tmp_path.iterdir())
