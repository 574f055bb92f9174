"""The benchmark of one-pass editing: what a step leaves, and its page (unit, model, data)."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import onepass
from knowedit.facts.fact import Fact
from knowedit.methods.gradient.named.one_step import OneStep

FACTS = [
    Fact("The {} is", "sea", "blue or so"),
    Fact("They say {} was here", "Ada", "and"),
]


def test_one_step_is_seen_where_it_would_be_written(tiny_llama):
    """Steps of no length leave what is there; of some, something else, and less at the answer."""
    was = onepass.before(tiny_llama, FACTS)
    none = onepass.at_answering_tokens(tiny_llama, FACTS, 2, OneStep(radius=1e-9))
    torch.testing.assert_close(none.float(), was, rtol=1e-4, atol=1e-4)
    some = onepass.at_answering_tokens(tiny_llama, FACTS, 2, OneStep(radius=0.05))
    assert (some < none - 1e-3).all()
    assert (onepass.at_subjects(tiny_llama, FACTS, 1) <= was + 1e-4).all()


def test_the_page_has_rates_without_the_look_and_steps_by_layer(tmp_path):
    def fast(method, batch, seconds):
        row = {"case": "speed", "method": method, "batch": batch, "facts": 48, "look": 16.0}
        return {**row, "seconds": 16.0 + seconds}

    rows = [fast("One-Step", batch, 48 / (10 * batch)) for batch in (1, 2, 3)]
    rows += [{"case": "unedited", "facts": 32, "nll": 9.0}]
    rows += [
        {"case": "step", "place": place, "layer": layer, "facts": 32, "nll": nll, "likely": nll / 8}
        for place, layer, nll in [
            ("subject", 5, 6.0),
            ("answer", 5, 4.0),
            ("subject", 27, 2.0),
            ("answer", 27, 1.0),
        ]
    ]
    environment = {"cpu": "X", "cores": 2, "torch": "2", "date": "2026-11-30T00:00:00+00:00"}
    header = {"benchmark": "onepass", "environment": environment}
    text = "".join(json.dumps(row) + "\n" for row in [header, *rows])
    (tmp_path / "onepass.jsonl").write_text(text)
    page = onepass.table(tmp_path)
    assert "| One-Step | 10 | 20 | 30 | 2.5 |" in page
    assert "| the subject's last token | 6.00 (75) | 2.00 (25) |" in page
    assert "| the tokens that answer | 4.00 (50) | 1.00 (12) |" in page
    assert "32 answers" in page and "(before: 9.00)" in page


@pytest.mark.model
@pytest.mark.data
@pytest.mark.slow
def test_what_is_written_is_timed_by_turns(data, tmp_path):
    assert onepass.main(["--quick", "--output", str(tmp_path / "found.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    speed = [row for row in rows if row.get("case") == "speed"]
    assert [row["method"] for row in speed] == ["One-Step", "UltraEdit"] * 2
    assert all(row["seconds"] > row["look"] > 0 for row in speed)
