"""`benchmarks.jvp` runs, judges every row and names its target; tiny sizes (unit)."""

import json

import torch

from benchmarks import jvp


def test_every_row_is_accurate(tmp_path):
    output = tmp_path / "out.jsonl"
    assert jvp.main(["--quick", "--repeats", "1", "--output", str(output)]) == 0
    header, *rows = map(json.loads, output.read_text().splitlines())
    assert torch.__version__.startswith(header["environment"]["torch"])
    assert all(row["accurate"] and row["checks"] for row in rows)
    assert [row["target"] for row in rows if "target" in row] == [20.0, 20.0]


def test_a_wrong_gradient_is_over_budget(tmp_path, monkeypatch, capsys):
    right = jvp.edit_vjp

    def wrong(*args):
        (found,) = right(*args)
        return [found._replace(residual=found.residual * (1 + 1e-5))]

    monkeypatch.setattr(jvp, "edit_vjp", wrong)
    assert jvp.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "out.jsonl")]) == 1
    assert "MISSES ITS ACCURACY BUDGET" in capsys.readouterr().out
