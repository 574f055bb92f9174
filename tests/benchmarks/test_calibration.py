"""The calibrations of real models, here of a tiny one: measured, kept, shown and shipped (unit)."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import calibration, common
from knowedit.evaluation.calibration import measure
from knowedit.facts.fact import Fact
from knowedit.models.calibration import Calibration

FACTS = [
    Fact("The capital of {} is", name, "Lyon", true="Paris", paraphrases=(f"In {name}: the city",))
    for name in ("France", "Brazil", "Norway", "Peru", "Chad")
]


def test_it_runs_to_its_end_and_takes_the_place_of_an_earlier_one(
    tiny_llama, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    for name, value in {"STEPS": 2, "OPENINGS": 2, "SPARED": 60, "CLAMPS": 1, "TRACED": 1}.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "known_facts", lambda model, facts, count: FACTS[:count])
    copy = SimpleNamespace(name="tiny", here=True, folder=tmp_path)
    monkeypatch.setattr(calibration, "COPIES", [copy])
    monkeypatch.setattr(calibration, "load_model", lambda folder, dtype: tiny_llama)
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert calibration.main(["tiny", "--limit", "5", "--ship"]) == 0
    assert calibration.found(tmp_path)[0].facts == 5
    assert calibration.main(["--limit", "4"]) == 0
    (kept,) = calibration.found(tmp_path)
    assert kept.facts == 4 and kept.of(tiny_llama)
    (file,) = (tmp_path / "shipped").iterdir()
    assert Calibration.from_dict(json.loads(file.read_text())).facts == 5
    assert f"layer {kept.choice.layer}" in capsys.readouterr().out
    told = calibration.table(tmp_path)
    assert "CPU s" in told and "4 facts" in told and "python -m benchmarks.calibration" in told
    calibration.draw(tmp_path, tmp_path / "pictures" / "c.png")
    assert (tmp_path / "pictures" / "c.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        calibration.main(["nothing"])
