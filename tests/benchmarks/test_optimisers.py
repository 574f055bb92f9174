"""The benchmark of value optimisers: what is timed, and its page (unit)."""

from __future__ import annotations

import json

from benchmarks import optimisers
from knowedit.facts.fact import Fact

FACTS = [
    Fact("The {} is", "sea", "blue or so"),
    Fact("They say {} was here", "Ada", "and"),
]


def test_more_evaluations_are_made_only_where_a_value_is_not_there(tiny_llama, monkeypatch):
    few, many = (optimisers.chosen(tiny_llama, FACTS, 2, most) for most in (2, 9))
    assert few["evaluations"] == 2 and 2 <= many["evaluations"] <= 9
    assert many["nll"] <= few["nll"] and few["seconds"] > 0 and few["facts"] == 2


def test_the_page_compares_whole_edits_with_the_published_values(tmp_path):
    measures = {key: {"mean": 0.5, "low": 0.25, "high": 1.0} for key in optimisers.SHOWN.values()}
    chosen = {"case": "chosen", "layer": 5, "most": 8, "facts": 32, "evaluations": 7.26}
    rows = [
        {**chosen, "seconds": 0.625, "nll": 0.18},
        {"case": optimisers.PEER, "facts": 2, "seconds": 20.0},
        {
            "case": "adam",
            "facts": 96,
            "seconds": 2.5,
            "evaluations": 20.0,
            "nll": 0.03,
            "after": measures,
        },
    ]
    environment = {"cpu": "X", "cores": 2, "torch": "2", "date": "2026-11-30T00:00:00+00:00"}
    header = {"benchmark": "optimisers", "environment": environment, "batch": 32}
    text = "".join(json.dumps(row) + "\n" for row in [header, *rows])
    (tmp_path / "optimisers.jsonl").write_text(text)
    page = optimisers.table(tmp_path)
    assert "| 5 | 8 | 7.3 | 0.62 | 0.180 |" in page
    assert "| adam | 20.0 | 2.50 | 8.0 | 0.030 | 50 [25, 100] |" in page
    assert f"| {optimisers.PEER} | {optimisers.SETTINGS.steps} | 20.0 | 1 |" in page
    assert "| 96 others, batches of 32 |" in page
