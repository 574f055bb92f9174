"""Unit: folders of results written by version 0.1 (`runs_0_1`, made with tiny models) are still
read, and their intervals come out again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from knowedit.evaluation.evaluation import plain, summarise
from knowedit.evaluation.intervals import Estimate
from knowedit.evaluation.measures import Answer, Question
from knowedit.evaluation.protocols import migrate
from knowedit.evaluation.subjects import same_subject
from knowedit.evaluation.subjects.same_subject import SameSubjectEvaluation
from knowedit.io.tables import Table, figure
from knowedit.models.generation import Score
from knowedit.report.run import ENDINGS, PAGE, SECTIONS, grid, read, report
from knowedit.studies.arithmetic import measure
from knowedit.studies.arithmetic.measure import table
from tests.knowedit.commandline import CommandLine

RUNS = Path(__file__).with_name("runs_0_1")


def same(found, wanted, shares):
    """Equal but for rounding in the last bits; where all agreed, a share was certain in the old
    version and has an exact interval today. Magnitudes are differences of probabilities, which are
    exponentials in float32: each processor's own is within a unit of its last place, 2^-24 of at
    most 1.
    """
    assert found.keys() == wanted.keys()
    for kind, row in wanted.items():
        assert found[kind].keys() == row.keys()
        for name, estimate in row.items():
            now = found[kind][name]
            if name in shares and estimate["low"] == estimate["high"] in (0, 1):
                assert now["high"] - now["low"] > 0.02 and estimate["mean"] in now.values()
                now = {**now, "low": estimate["low"], "high": estimate["high"]}
            finest = 2.0**-24 if name == "magnitude" else 1e-12
            assert now == pytest.approx(estimate, rel=1e-9, abs=finest)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_figure_of_an_old_folder_is_reported(tmp_path):
    shutil.copytree(RUNS / "all", tmp_path / "run")
    text = report(tmp_path / "run")
    results, subjects, layers, single, _, study = read(tmp_path / "run").values()
    for result in results:
        for row in result["evaluation"]["after"].values():
            for e in row.values():
                assert str(Estimate(**e)) in text
        assert f"KL {result['drift']['kl']:.4f} nats" in text
        for step in result["course"]:
            assert f"{step['drift']['kl']:.3f}" in text
    for result in subjects:
        for row in result["evaluation"]["after"].values():
            assert all(f"{figure(e['mean'], '.3f')} [" in text for e in row.values())
    assert all(f"{layer['kappa']['C'][0]:.3f}" in text for layer in layers)
    assert repr(single["prompt"]) in text and "strongest around layer 1" in text
    assert study["methods"][0]["verdict"] in text and "not run: EditError" in text
    assert "\n\n\n" not in text
    page = (tmp_path / "run" / PAGE).read_text(encoding="utf-8")
    sections = [s for name, found in read(tmp_path / "run").items() for s in SECTIONS[name](found)]
    tables = sum(isinstance(block, Table) for section in sections for block in section.blocks)
    assert page.count("<svg") == 8 and page.count("<table") == tables + 1  # the norms


def test_a_report_is_printed_as_json(tmp_path, monkeypatch, capsys):
    shutil.copytree(RUNS / "batch", tmp_path / "run")
    knowedit = CommandLine(monkeypatch, capsys, tmp_path)
    printed = json.loads(knowedit("report", "run", "--json"))
    assert printed["page"] == f"run/{PAGE}" and (tmp_path / "run" / PAGE).is_file()
    table = printed["sections"][0]["blocks"][0]
    assert table["columns"][:3] == ["", "measure", "unedited"] and table["rows"]


def test_tables_are_written_in_the_form_that_is_asked_for(tmp_path, monkeypatch, capsys):
    shutil.copytree(RUNS / "batch", tmp_path / "run")
    knowedit = CommandLine(monkeypatch, capsys, tmp_path)
    for form, ending in ENDINGS.items():
        written = json.loads(knowedit("report", "run", "--tables", form, "--json"))["tables"]
        assert written and all(Path(name).suffix == f".{ending}" for name in written)
        first = (tmp_path / written[0]).read_text(encoding="utf-8")
        assert "efficacy" in first and first.endswith("\n") and not first.endswith("\n\n")
        assert f"wrote {written[0]}" in knowedit("report", "run", "--tables", form)
    assert "did you mean 'latex'" in knowedit("report", "run", "--tables", "latx", code=1)


def test_a_table_of_measures_keeps_kinds_together_and_explains_them():
    half = {"mean": 0.5, "low": 0.0, "high": 1.0, "records": 2}
    before = {"efficacy": {"success": half}, "neighbourhood": {"success": half}, "mine": {}}
    after = {**before, "neighbourhood": {"success": half, "unchanged": half}}
    after["portability"] = {"exact": half}
    table = grid(
        {"unedited": {**before, "portability": {"exact": half}}, "A": after}, explained=True
    )
    kinds = [row[0] for row in table.rows]
    assert kinds == ["efficacy", "neighbourhood", "neighbourhood", "portability"]
    assert [row[1] for row in table.rows][1:3] == ["success", "unchanged"]
    said = " ".join(table.notes)
    assert "other subjects keep" in said and "first choice" in said and "magnitude" not in said
    assert not grid({"A": after}).notes


def test_old_results_become_todays():
    (old,) = json.loads((RUNS / "batch" / "results.json").read_text())
    new = migrate(old)
    assert new["side_effects"]["drift"] == old["drift"] and new["trajectory"] == []
    assert migrate(new) == new
    course = json.loads((RUNS / "all" / "results.json").read_text())[0]
    assert migrate(course)["trajectory"] == course["course"]


def test_intervals_over_records_are_the_old_ones():
    """They were scipy's, drawn from one stream in the order of the measures."""
    (old,) = json.loads((RUNS / "batch" / "results.json").read_text())
    asked, before, after = [], [], []
    for row in lines_of(RUNS / "batch" / "prompts.jsonl"):
        asked.append(Question(*(row[k] for k in ("record", "kind", "prompt", "right", "wrong"))))
        for when, answers in (("before", before), ("after", after)):
            right, wrong = (
                None if (p := row[f"p_{side}_{when}"]) is None else Score(float(np.log(p)), False)
                for side in ("right", "wrong")
            )
            answers.append(Answer(Score(right.logprob, row[f"exact_{when}"]), wrong))
    rng = np.random.default_rng(0)
    found = {"before": summarise(asked, before, rng), "after": summarise(asked, after, rng, before)}
    for when, estimates in found.items():
        shares = ("success", "exact", "unchanged")
        same(plain(estimates), old["evaluation"][when], shares)


def test_intervals_over_subjects_are_the_old_ones():
    for result in json.loads((RUNS / "all" / "same_subject.json").read_text()):
        found = SameSubjectEvaluation.from_dict(result["evaluation"])
        for when in ("before", "after"):
            same(plain(getattr(found, when)), result["evaluation"][when], same_subject.SHARES)


def test_intervals_over_prompts_are_the_old_ones():
    study = json.loads((RUNS / "all" / "study.json").read_text())
    rows = lines_of(RUNS / "all" / "prompts.jsonl")
    (entry,) = [entry for entry in study["methods"] if "judge" in entry]
    for half in ("judge", "tune"):
        same(table(rows, half), entry[half], measure.SHARES)
    same(table(rows), entry["all"], measure.SHARES)
