"""Every example runs as it stands (unit; model for scripts that load one)."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import knowedit

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
def test_an_example_runs(path, request, tmp_path, monkeypatch, capsys):
    """As a program of its own, but that the default model is the one which all tests share."""
    monkeypatch.chdir(tmp_path)

    def loaded(dtype):
        assert dtype == "float32"
        return request.getfixturevalue("smollm")

    monkeypatch.setattr(knowedit, "load_model", loaded)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out and not list(tmp_path.iterdir())
