"""Figures of the real hosts: how rows are kept and shown, and a host that imports what is absent
(unit). The hosts themselves are not here.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks import easyedit, hosts
from knowedit.models.linear import OneDNNLinear
from knowedit_kernels import SecondMoment

ROW = {
    "host_cpu_s": 40.0,
    "accelerated_cpu_s": 5.0,
    "ratio": 8.0,
    "largest_relative_difference": 2e-6,
    "edits": 8,
    "made_by_the_host": 2,
}


def test_a_row_replaces_the_one_of_its_case(tmp_path):
    path = tmp_path / "hosts.jsonl"
    keep = hosts.kept_in(path, "embedded")
    keep({"case": "a", "ratio": 1.0})
    keep({"case": "b", "ratio": 2.0})
    keep({"case": "a", "ratio": 3.0})
    header, *rows = map(json.loads, path.read_text("utf-8").splitlines())
    assert header["benchmark"] == "hosts" and "cpu" in header["environment"]
    assert [(row["case"], row["ratio"]) for row in rows] == [("b", 2.0), ("a", 3.0)]
    hosts.kept_in(None, "embedded")({"case": "c"})  # --quick keeps nothing


def test_the_page_says_what_was_scaled_and_what_rounding_does(tmp_path):
    rounding = {
        "case": "memit: rounding of one edit",
        "largest_relative_difference": 2e-4,
        "host_in_float32": 3e-4,
        "accelerated_in_float32": 1e-4,
        "accelerated_in_float64": 4e-9,
    }
    keep = hosts.kept_in(tmp_path / "hosts.jsonl", "embedded")
    keep({"case": "memit: 8 edits", **ROW})
    counted = {"host_multiplications": 17e9, "accelerated_multiplications": 2e9}
    keep({"case": "memit: 8 edits", **counted})  # a run of its own, which times nothing
    keep({"case": "memit: ROME, 2 edits", **ROW, "made_by_the_host": 8})
    keep(rounding)
    page = hosts.table(tmp_path)
    assert "| memit: 8 edits (the host: 2, scaled) | 40.0 | 5.0 | 8.0 | 7 | 8.5 | 2e-06 |" in page
    assert "| memit: ROME, 2 edits | 40.0 | 5.0 | 8.0 | 6 |  | 2e-06 |" in page
    assert "its float32 result is 3e-04 away, the accelerated one 1e-04" in page
    assert "the accelerated one in float64 4e-09" in page


def test_the_page_of_an_editor_says_whether_the_edited_model_says_the_same(tmp_path):
    keep = hosts.kept_in(tmp_path / "easyedit.jsonl", "embedded")
    keep({"case": "MEMIT, 1 edits", **ROW, "same_outputs": True})
    keep({"case": "ROME, 1 edits", **ROW, "same_outputs": False})
    page = easyedit.table(tmp_path)
    assert "| MEMIT, 1 edits | 40.0 | 5.0 | 8.0 | 2e-06 | the same |" in page
    assert "| ROME, 1 edits | 40.0 | 5.0 | 8.0 | 2e-06 | something else |" in page
    assert "`python -m benchmarks.easyedit`" in page


def test_multiplications_are_those_of_products_and_of_half_a_moment():
    weight, x = torch.randn(5, 3), torch.randn(2, 7, 3)
    moment = SecondMoment(3, precision="exact")

    def task():
        with OneDNNLinear():
            torch.nn.functional.linear(x, weight)
        x @ weight.T
        moment.update(x[0])
        moment.sum()

    assert hosts.multiplications(task) == 2 * (14 * 3 * 5) + 7 * 3 * 4 / 2


def test_what_a_host_imports_and_nobody_calls_may_be_absent(tmp_path, monkeypatch):
    (tmp_path / "a_host").mkdir()
    (tmp_path / "a_host" / "__init__.py").write_text("from a_host.part import answer\n")
    (tmp_path / "a_host" / "part.py").write_text(
        "import no_such_thing.deep\nfrom no_such_other import name\nanswer = 42\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    assert hosts.imported("a_host").answer == 42
    for name in ("a_host", "a_host.part", "no_such_thing", "no_such_thing.deep", "no_such_other"):
        sys.modules.pop(name, None)
