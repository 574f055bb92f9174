"""What giving neurons away costs, on a tiny model: measured as it is then, and put back (unit)."""

import json
from functools import partial

import pytest

from benchmarks import capacity, common
from knowedit.evaluation.measures.perplexity import perplexity

TEXTS = ["Every model reads some text, and says what comes next."] * 8


@pytest.fixture
def report(tmp_path, capsys):
    return common.Report("capacity", tmp_path / "capacity.jsonl", setting={})


def test_a_band_costs_what_its_layers_cost_and_is_put_back(tiny_llama, report):
    rows = [tiny_llama.row(text).ids for text in TEXTS]
    asked = partial(perplexity, tiny_llama, TEXTS, tokens=100)
    before = {name: value.clone() for name, value in tiny_llama.hf.state_dict().items()}
    report.note("", case="unedited", perplexity=(base := asked()))
    capacity.alone(report, tiny_llama, rows, asked)
    layers = range(len(tiny_llama.layers))
    capacity.together(report, tiny_llama, rows, asked, layers)
    after = tiny_llama.hf.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    own = [row for row in report.rows if row.get("case") == "alone"]
    band = [row for row in report.rows if row.get("case") == "together"]
    assert [row["layer"] for row in own] == [row["layer"] for row in band] == list(layers)
    width = tiny_llama.layout.part(0).width
    assert own[0]["neurons"] == [width // 8, width // 4]
    assert [row["neurons"] for row in band] == [width // 4 * n for n in range(1, len(layers) + 1)]
    # the lowest layer of a band is that layer alone; each changes what the model says
    assert band[0]["perplexity"] == pytest.approx(own[0]["perplexity"][-1], rel=1e-6)
    assert len({base, *(row["perplexity"] for row in band)}) == 1 + len(layers)


def test_the_page_reads_what_was_measured(tmp_path):
    rows = [
        {"benchmark": "capacity", "environment": common.environment()},
        {"case": "unedited", "perplexity": 20.0},
        {"case": "alone", "layer": 3, "neurons": [4, 8], "perplexity": [20.2, 20.5], "lost": 0.1},
        {"case": "alone", "layer": 4, "neurons": [4, 8], "perplexity": [20.1, 21.0], "lost": 0.1},
        {"case": "together", "layer": 3, "neurons": 8, "perplexity": 20.5, "lost": 0.1},
        {"case": "together", "layer": 4, "neurons": 16, "perplexity": 22.0, "lost": 0.1},
    ]
    (tmp_path / "capacity.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cells = [cell.strip() for cell in capacity.table(tmp_path).splitlines()[-3].split("|")[1:-1]]
    assert cells == ["3-4", "16", "8", "20.0 -> 22.0", "+10.0 %", "+5.0 %"]
    capacity.draw(tmp_path, tmp_path / "capacity.png")
    # a run that was stopped before each layer was measured by itself
    (tmp_path / "capacity.jsonl").write_text("\n".join(map(json.dumps, [*rows[:3], *rows[4:]])))
    cells = [cell.strip() for cell in capacity.table(tmp_path).splitlines()[-3].split("|")[1:-1]]
    assert cells == ["3-4", "16", "8", "20.0 -> 22.0", "+10.0 %"]
    capacity.draw(tmp_path, tmp_path / "capacity.png")
    assert (tmp_path / "capacity.png").stat().st_size > 5_000
