"""The benchmarks of RoSE and MetaKE: what they draw, how they pool, what their pages say (unit,
data).
"""

import json
from types import SimpleNamespace

import pytest

from benchmarks import common, metake, pages, rose
from knowedit.evaluation.evaluation import Evaluation
from knowedit.evaluation.measures.base import Answer, Question
from knowedit.evaluation.subjects.same_subject import SameSubjectEvaluation, Value
from knowedit.facts.groups import groups, halves
from knowedit.facts.sets import load
from knowedit.models.generation import Score
from knowedit.studies.arithmetic.summary import COLUMNS, goals, verdict
from tests.knowedit.evaluation.test_geometry import GROUPS
from tests.knowedit.methods.test_locate import statistics_of


@pytest.mark.data
def test_rose_judges_subjects_that_nothing_was_tuned_on(data):
    tuned = {group[0].subject for group in halves(groups(load("same-subject"), least=3, most=4))[0]}
    for seed in range(3):
        chosen, others = rose.draw(seed, quick=False)
        subjects = [group[0].subject for group in chosen]
        assert not tuned & set(subjects) and len(set(subjects)) == len(subjects)
        assert {len(group) for group in chosen} == {1, 2, 3, 4}
        assert not {fact.subject for fact in others} & set(subjects)
    assert [g[0].subject for g in rose.draw(0, False)[0]] != [
        g[0].subject for g in rose.draw(1, False)[0]
    ]


@pytest.mark.data
def test_metake_draws_distinct_subjects_and_measures_some_of_them(data):
    facts, measured = metake.draw("crowded", 60, 0)
    assert len(facts) == 60 and len({fact.subject for fact in facts}) == 60
    assert set(measured) <= set(facts) and all(fact.paraphrases for fact in measured)
    facts, measured = metake.draw("same-subject", 6, 0)
    assert facts == measured and len({fact.subject for fact in facts}) == 6 and len(facts) > 12


def test_every_method_has_a_name_of_its_own():
    for part in ("crowded", "same-subject"):
        names = [name for name, _, _ in metake.methods(part)]
        assert names[0] == metake.KNOWN and len(set(names)) == len(names)
    names = [name for name, _ in rose.methods((), 0)]
    assert names[0] == rose.OURS and len(set(names)) == len(names) > len(list(rose.methods((), 1)))


def test_every_method_of_rose_runs(tiny_llama):
    facts, statistics = (
        [fact for group in GROUPS for fact in group],
        statistics_of(tiny_llama, [1, 2]),
    )
    setting = rose.Setting((1, 2), 1, rose.TUNED.values)
    methods = dict([*rose.methods((), 1, setting), *rose.methods((), 0, setting)])
    assert len({json.dumps(method.to_dict()) for method in methods.values()}) == len(methods) == 10
    for name, method in methods.items():
        steps = {"target.steps": 2}
        steps |= {"training.settings.steps": 2} if method.training else {}
        made = method.with_settings(steps)
        edit = made.compute(tiny_llama, facts, statistics, progress=False)
        assert (edit.report.details.get("look_ahead") is not None) == bool(method.training), name


@pytest.mark.parametrize("part", ["crowded", "same-subject"])
def test_metake_and_its_controls_run(tiny_llama, monkeypatch, tmp_path, part):
    facts = [fact for group in GROUPS for fact in group]
    setting = metake.Setting(1, metake.TUNED.values, 1.0)
    monkeypatch.setattr(metake, "draw", lambda part, size, seed: (facts, facts[:2]))
    text = SimpleNamespace(measure=lambda: {"kl": 0.5, "perplexity": 3.0})
    report = common.Report("metake", tmp_path / "metake.jsonl")
    statistics = statistics_of(tiny_llama, [1])
    done = {(part, 4, 0, "MEMIT 0.98")}
    metake.run(report, tiny_llama, statistics, text, part, 4, 0, done, setting)
    names = [row["method"] for row in report.rows[1:]]
    assert names == [n for n, _, _ in metake.methods(part) if n != "MEMIT 0.98"]
    assert not tiny_llama.ledger.active and report.rows[1]["metake_minus_this"] is None
    assert all(row["metake_minus_this"]["efficacy exact"] for row in report.rows[2:])


def evaluation(exact):
    """Two facts; efficacy of the first and paraphrases of both."""
    asked = [
        Question(0, "efficacy", "p", "a", "b"),
        Question(0, "paraphrase", "q", "a", "b"),
        Question(1, "paraphrase", "r", "a", "b"),
    ]
    answers = [Answer(Score(-1.0, e), Score(-2.0, False)) for e in exact]
    return Evaluation({}, {}, asked, answers, answers)


def test_gaps_are_fact_by_fact():
    found = metake.gaps(evaluation([True, True, False]), evaluation([False, True, True]))
    assert (
        found["efficacy exact"] == [1.0]
        and found["paraphrase exact"] == [0.0, -1.0]
        and found["paraphrase success"] == [0.0, 0.0]
    )


def test_a_subject_in_several_draws_counts_once():
    def measured(values):
        return SameSubjectEvaluation(
            [Value("cloze", "exact", s, f, 0.0, v) for (s, f), v in values.items()], {}, []
        )

    seeds = [
        measured({("A", "f"): 1.0, ("B", "g"): 0.0}),
        measured({("A", "f"): 0.0, ("C", "h"): 1.0}),
    ]
    over = rose.pooled(
        [{key: value[1] for key, value in rose.values_of(seed).items()} for seed in seeds]
    )
    assert over["cloze"]["exact"].mean == pytest.approx(0.5) and over["cloze"]["exact"].records == 3


def results(folder):
    machine = {"cpu": "a processor", "cores": 2, "torch": "2", "date": "2026-11-20"}
    measures = {
        key: {"mean": 0.5, "low": 0.4, "high": 0.6, "records": 3} for key in pages.ROSE.values()
    }
    better = {
        key: {"mean": 0.2, "low": 0.1, "high": 0.3, "records": 3} for key in pages.ROSE.values()
    }
    rows = [
        {"benchmark": "rose", "environment": machine},
        {"method": "RoSE", "seed": 0, "facts": 10, "seconds": 50.0},
        {"method": "RoSE", "seed": 1, "facts": 12, "seconds": 60.0},
        {"method": "RoSE", "seeds": [0, 1], "pooled": measures, "rose_minus_this": None},
        {"method": "MEMIT", "seeds": [0], "pooled": measures, "rose_minus_this": better},
    ]
    (folder / "rose.jsonl").write_text("\n".join(map(json.dumps, rows)))
    after = {key: {"mean": 0.5} for key in pages.METAKE.values()}
    row = {
        "part": "crowded",
        "size": 200,
        "seed": 0,
        "after": after,
        "unedited": dict.fromkeys(after, 0.1),
        "kl": 0.1,
        "perplexity": 20.0,
        "clean_perplexity": 19.0,
        "norm": 0.9,
    }
    gap = {"efficacy exact": [1.0, 1.0, 0.0, 1.0]}
    rows = [
        {"benchmark": "metake", "environment": machine},
        {**row, "method": "MetaKE", "metake_minus_this": None},
        {**row, "method": "MEMIT 0.98", "metake_minus_this": gap},
    ]
    (folder / "metake.jsonl").write_text("\n".join(map(json.dumps, rows)))
    point = {
        "measures": {
            kind: {
                "success": measures["cloze success"],
                "exact": measures["cloze exact"],
                "unchanged": better["cloze exact"],
            }
            for kind in ("efficacy", "paraphrase", "neighbourhood")
        },
        "perplexity": 40.0,
        "drift": {"kl": 0.25},
        "norm": 1.5,
        "seconds": 800.0,
    }
    rows = [
        {"benchmark": "sequential", "environment": machine},
        *(
            {
                **point,
                "case": "memit",
                "edits": n,
                "exact_by_batch": [0.8, 0.9, 1.0, 0.7][: n // 100],
            }
            for n in (0, 200, 400)
        ),
    ]
    (folder / "sequential.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = {
        "set": "demo",
        "method": "LoRA",
        "facts": 6,
        "seconds": 50.0,
        "kl": 0.1,
        "same": 0.625,
        "steps": 7,
        "loss": 0.04,
        "trainable": 1_221_120,
        "peak_memory_bytes": 2**28,
        "norm": 0.1,
        "before": {"efficacy exact": {"mean": 0.0}},
        "after": {"efficacy exact": {"mean": 1.0}, "paraphrase success": {"mean": 0.5}},
    }
    rows = [
        {"benchmark": "gradient", "environment": machine},
        row,
        {**row, "method": "MEMIT", "trainable": None, "steps": [3]},
    ]
    (folder / "gradient.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = {"case": "MEMIT", "tokens": 1536, "efficacy success": 0.9, "price": 2.0, "solve": 0.5}
    rows = [
        {"benchmark": "tokens", "environment": machine},
        {"case": "statistics", "tokens": 1536},
        row,
    ]
    (folder / "tokens.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged: dict = {}
    for _, kind, measure in COLUMNS:
        judged.setdefault(kind, {})[measure] = {
            "mean": 0.5,
            "low": 0.25,
            "high": 0.75,
            "records": 9,
        }
    better = {**judged, "target": {"success": {"mean": 1.0, "low": 1.0, "high": 1.0, "records": 1}}}
    head = {
        "head": {"seeds": [42], "model": "small"},
        "notes": [],
        "unedited": judged,
        "interference": {},
    }
    cells = {
        "judge": better,
        "goals": goals(better),
        "verdict": verdict(better),
        "seconds": 7.0,
        "seeds": 2,
        "reason": None,
    }
    rows = [
        {"benchmark": "arithmetic", "environment": machine, **head},
        {"method": "rome", **cells},
        {"method": "lora", **cells, "judge": judged, "goals": goals(judged)},
        {"method": "mend", "reason": "not trained"},
    ]
    (folder / "arithmetic.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adding = {**rows[0], "benchmark": "arithmetic_adds", "head": {"seeds": [42], "model": "adder"}}
    (folder / "arithmetic_adds.jsonl").write_text("\n".join(map(json.dumps, (adding, rows[1]))))


def test_pages_have_tables_marks_and_pictures(tmp_path):
    results(tmp_path)
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, (file, _, _) in pages.PAGES.items():
        (docs / file).parent.mkdir(exist_ok=True)
        with open(docs / file, "a") as page:
            page.write(f"# Title\n<!-- {name}:start -->\nold\n<!-- {name}:end -->\nrest\n")
    where = ["--results", str(tmp_path), "--docs", str(docs)]
    assert pages.main([*where, "--check"]) == 1
    assert pages.main([*where, "--write"]) == 0 and pages.main([*where, "--check"]) == 0
    text = (docs / "rose.md").read_text()
    assert (
        "| RoSE | 50 |" in text
        and "| MEMIT (1 of 2 draws) | 50- |" in text
        and "2 draws of 10, 12 facts." in text
    )
    assert text.endswith("rest\n")
    assert "| +75 [" in (docs / "metake.md").read_text().replace("0.90 | +75", "| +75")
    course = (docs / "sequential.md").read_text()
    assert (
        "| 400 | memit | 85 | 70 | 50 | 50 | 50 | 20 | 40.0 | 0.250 | 1.50 |" in course
        and "| 200 |" not in course
    )
    assert (
        "| LoRA | 100 | 50 |  |  |  | 0.1000 | 62 | 7 | 50 | 1.22 M | 0.25 GiB | 0.100 |"
        in (docs / "gradient.md").read_text()
    )
    assert "| MEMIT | 1,536 | 0.900 |" in (docs / "statistics.md").read_text()
    best = (docs / "leaderboard.md").read_text()
    assert "## Several facts of one subject" in best and "## 2+2=5" in best
    assert "## Single edits" not in best  # no results, no table
    assert "| memit | 85 [" in best
    assert "| 50 [40, 60] | 20 [10, 30] | 40.0 -> 40.0 | 2.0 | 400 in batches of 50" in best
    sums = (docs / "arithmetic.md").read_text()
    assert "| rome | 1.00 (1.00) | 0.50 (0.25) |" in sums and "0.500 (0.750) | 7 | 2 |" in sums
    assert "not run: not trained" in sums
    assert "No method meets all goals at once. Nearest: rome" in sums
    assert "`python -m benchmarks.arithmetic`: adder, seeds 42;" in sums  # a second model's table
    assert "| adder | `arithmetic_adds`" in best
    shown = {
        path.stem for path in tmp_path.glob("*.jsonl")
    }  # a page without results stays as it is
    assert {"rose", "metake", "sequential", "tokens"} <= shown <= set(pages.PAGES)
    drawn = shown - {"arithmetic_adds"}
    assert all((docs / "pictures" / f"{name}.png").stat().st_size > 5000 for name in drawn)
    (docs / "rose.md").write_text("no markers")
    assert pages.main([*where, "--write"]) == 2
