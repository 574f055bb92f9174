"""Reports: every figure in a folder of results reaches the tables and the page, which stands
alone (unit).
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

from knowedit.errors import KnowEditError
from knowedit.evaluation.baseline import Baseline
from knowedit.evaluation.geometry.geometry import geometry
from knowedit.evaluation.protocols import run, write_run
from knowedit.evaluation.subjects.protocol import choose, differences, run_subjects, write_subjects
from knowedit.evaluation.subjects.same_subject import SameSubjectEvaluation
from knowedit.methods import make_method
from knowedit.methods.locate.values import ValueSettings
from knowedit.report import plots
from knowedit.report.run import PAGE, grid, report
from tests.knowedit.evaluation.test_geometry import GROUPS
from tests.knowedit.methods.test_locate import FACTS, statistics_of

VALUES = ValueSettings(steps=2, clamp=4.0)


def pictures(page):
    """The inline pictures, parsed."""
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_a_report_has_every_figure_and_stands_alone(tiny_llama, tmp_path):
    statistics = statistics_of(tiny_llama, [1, 2])
    results = [
        run(
            Baseline(tiny_llama, FACTS, progress=False),
            statistics,
            make_method(m, {"layers": 1}),
            "sequential",
            "a <set>",
            batch=1,
            every=1,
            progress=False,
        )
        for m in ("memit", "emmet")
    ]
    write_run(tmp_path, results)
    subjects = run_subjects(
        tiny_llama,
        GROUPS,
        statistics,
        [make_method(m, {"layers": 1}) for m in ("memit", "memit-merge")],
        "ours",
        wordings=1,
        progress=False,
    )
    write_subjects(tmp_path, subjects)
    layers = [
        one.to_dict()
        for one in geometry(tiny_llama, GROUPS, statistics, [1, 2], VALUES, threshold=2.0)
    ]
    (tmp_path / "geometry.json").write_text(json.dumps(layers, allow_nan=False))
    text, page = report(tmp_path), (tmp_path / PAGE).read_text()
    for result in results:
        for kind, row in result.evaluation.after.items():
            for measure, e in row.items():
                assert any(
                    line.split()[:2] == [kind, measure] and str(e) in line
                    for line in text.splitlines()
                )
        assert f"{result.trajectory[-1].drift.kl:.3f}" in text
    again = json.loads((tmp_path / "same_subject.json").read_text())
    for result, stored in zip(subjects, again):
        assert (
            SameSubjectEvaluation.from_dict(stored["evaluation"]).after == result.evaluation.after
        )
        assert all(str(e) in text for row in result.evaluation.after.values() for e in row.values())
    assert f"{layers[1]['kappa']['C'][0]:.3f}" in text and "subjects with 2 facts (1)" in text
    assert len(pictures(page)) == 4 and "a &lt;set&gt;" in page and "<set>" not in page
    # the pictures and words show the same numbers
    tables = {r.method: r.to_dict()["evaluation"]["after"] for r in subjects}
    bars = plots.same_subject(tables, subjects[0].to_dict()["evaluation"]["before"]).axes[3].patches
    heights = [
        t[k]["kl"]["mean"] for t in tables.values() for k in ("essence", "identity", "unrelated")
    ]
    assert sorted(bar.get_height() for bar in bars) == pytest.approx(sorted(heights))
    figure = plots.geometry(layers)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [g["kappa"]["C"][0] for g in layers]
    plots.save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert differences(subjects)[0].title.startswith(
        f"{subjects[-1].method} - {subjects[0].method}"
    )
    assert differences(subjects[:1]) == []
    assert not re.search(r"(src|href)=[\"']?http|@import|<script src", page)
    assert "MEMIT" in page and "&#34;kind&#34;: &#34;memit&#34;" in page  # to reproduce


def test_results_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(KnowEditError, match="holds no results"):
        report(tmp_path)
    (tmp_path / "geometry.json").write_text("[{")
    with pytest.raises(KnowEditError, match="damaged"):
        report(tmp_path)
    (tmp_path / "geometry.json").write_text('[{"layer": 1}]')
    with pytest.raises(KnowEditError, match="not results of this version"):
        report(tmp_path)


def test_a_grid_has_methods_side_by_side():
    table = grid({"a": {"k": {"m": {"mean": 0.5, "low": 0.25, "high": 1}}}, "b": {}})
    assert table.cells() == [["k", "m", "0.500 [0.250, 1.000]", ""]]


def test_a_picture_has_a_known_kind(tmp_path):
    with pytest.raises(KnowEditError, match="ends in .png"):
        plots.save(plots.trajectory({}), tmp_path / "x.bmp")


def test_choosing_subjects():
    every = choose("embedded", 2, None, "all", None)
    tune, held = choose("embedded", 2, 2, "tune", None), choose("embedded", 2, 2, "report", 3)
    assert all(len(group) == 2 for group in tune) and len(held) == 3 and len(every) > len(tune) > 10
    assert not {g[0].subject for g in tune} & {g[0].subject for g in held}
    for bad in (("embedded", 2, None, "middle", None), ("embedded", 40, None, "all", None)):
        with pytest.raises(KnowEditError, match=r"unknown half|no subject with 40"):
            choose(*bad)


def test_a_legend_stays_within_its_picture():
    """Names of a grid's rows are long, and there may be many."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rate = {"success": {"mean": 0.5, "low": 0.25, "high": 0.75, "records": 4}}
    for names in (["MEMIT"], [f"AlphaEdit metric.gain=0.{n}" for n in range(10, 17)]):
        figure = plots.measures({name: {"efficacy": rate} for name in names}, {"efficacy": rate})
        figure.draw(FigureCanvasAgg(figure).get_renderer())
        (shown,) = figure.legends
        box = shown.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        assert len(shown.get_texts()) == len(names) + 1
