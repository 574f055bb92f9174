"""Each field of each kept result replaced by what it must not be: the command that goes on from it
takes it, or refuses it by an error of ours that names the file; nothing of it is raised raw (unit).
"""

import json

import pytest

from knowedit.cli.evaluate import _shown
from knowedit.errors import KnowEditError
from knowedit.evaluation import sweep
from knowedit.evaluation.protocols import RESULTS, count_results, kept_results
from knowedit.evaluation.recommendation import recommend
from knowedit.methods.registry import make_method
from tests.faults.test_headers import FACTS, places, replaced

WRONG = (None, {}, "x", -1)
FT = {**make_method("ft").to_dict(), "layers": [1], "steps": 1}


class MeasuredAgain(Exception):
    """Nothing was kept for the method: its record has another configuration now."""


def never(*_, **__):
    raise MeasuredAgain


def all_fields(file, read):
    """Put every wrong value into every field of a JSON file, and every wrong thing in its place."""
    record = json.loads(file.read_text())
    read()
    refused, escaped = set(), []
    for place in [(), *places(record)]:
        for value in WRONG:
            file.write_text(json.dumps(replaced(record, place, value) if place else value))
            try:
                read()
            except MeasuredAgain:
                pass
            except KnowEditError as error:
                refused.add(place)
                if file.parent.name not in str(error):
                    escaped.append(f"{place} = {value!r}: names no file: {error}"[:300])
            except Exception as error:
                escaped.append(f"{place} = {value!r}: {type(error).__name__}: {error}"[:300])
    assert not escaped, f"{len(escaped)}:\n" + "\n".join(escaped)
    return refused


@pytest.fixture
def run(tiny_llama, tmp_path):
    """`recommend` of one method in a folder of results."""

    def measured():
        found = recommend(
            tiny_llama, FACTS[:1], [make_method(FT)], None, folder=tmp_path / "run",
            progress=False, say=lambda _: None,
        )  # fmt: skip
        str(found), json.dumps(found.to_dict())

    measured()
    return measured


def test_recommend_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr("knowedit.evaluation.recommendation.Baseline", never)
    found = all_fields(tmp_path / "run" / RESULTS, run)
    assert {(0, "evaluation", "prompts"), (0, "run", "digest"), (0, "side_effects")} <= found


def test_eval_goes_on(run, tmp_path):
    folder = tmp_path / "run"
    (record,) = json.loads((folder / RESULTS).read_text())
    settings = {name: record["run"][name] for name in ("dataset", "digest")}

    def go_on():
        count_results(folder)
        for kept in kept_results(folder, settings).values():
            _shown(kept, folder)

    assert (0, "evaluation", "after") in all_fields(folder / RESULTS, go_on)


def test_a_grid_goes_on(tiny_llama, tmp_path, monkeypatch):
    grid = sweep.Sweep(methods=(FT,))

    def measured():
        record = sweep.measure_sweep(
            grid, tiny_llama, FACTS[:1], None, tmp_path / "run", progress=False
        )
        str(sweep.table(record)), sweep.results(record)

    measured()
    monkeypatch.setattr(sweep.Scope, "baseline", never)
    assert ("rows", 0, "result", "evaluation") in all_fields(
        tmp_path / "run" / sweep.FILE, measured
    )
