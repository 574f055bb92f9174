"""The records on real models, here on a tiny one: pieces are kept, and not measured again
(unit).
"""

import json

import pytest

from benchmarks import common, models
from knowedit.evaluation import evaluate
from knowedit.facts.fact import Fact, Probe
from knowedit.methods import MEMIT
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.edits.test_edit import an_edit

FACTS = {
    number: Fact(
        "The capital of {} is",
        name,
        "Lyon",
        true="Paris",
        paraphrases=(f"{name}'s capital is", f"The seat of {name} is"),
        neighbours=(Probe("The capital of Italy is", "Paris"),),
    )
    for number, name in enumerate(("France", "Brazil", "Norway", "Peru"), 7)
}
TEXTS = ["The sea is wet, and the sky is blue."]
METHODS = {"memit": MEMIT(layers=(1,)).with_settings(["target.steps=2"])}


@pytest.fixture
def once(tiny_llama, tmp_path, monkeypatch):
    """Run pieces with what a results file has; returns its rows."""
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Some short text, number {i} of several." for i in range(30)))
    bench = models.Bench(tiny_llama, FACTS, TEXTS)

    def run(wanted, old=()):
        report = common.Report("models", tmp_path / "models.jsonl")
        report.rows += old
        models.run(report, bench, METHODS, wanted, corpus, 300)
        return [json.loads(line) for line in report.output.read_text().splitlines()][1:]

    return run


def test_pieces_are_measured_once(tiny_llama, once, tmp_path, monkeypatch):
    before = weights_fingerprint(tiny_llama.hf)
    batch, singles = ("batch", [7, 8]), [("single", part) for part in models.pieces([7, 8, 9], 2)]
    rows = once([batch, *singles])
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active
    assert [models.key_of(row)[1:] for row in rows] == [
        ("memit", "batch", 7, 9),
        ("memit", "single", 7, 9),
    ]
    assert rows[0]["perplexity"][0] != rows[0]["perplexity"][1] and rows[1]["perplexity"] is None
    told = models.table(tmp_path)
    assert "batches of 2" in told and "Short of a goal" in told and "7, 8" not in told
    assert told.endswith(common.measured_on(common.read(tmp_path, "models")[0]))
    monkeypatch.setattr(models.Bench, "piece", None)  # what there is, is not measured again
    assert once([batch, *singles], rows) == rows


def test_rows_of_another_machine_are_told(once, tmp_path):
    rows = once([("batch", [7, 8]), ("single", [7])])
    path = tmp_path / "models.jsonl"
    header = json.loads(path.read_text().splitlines()[0])
    rows[1]["environment"] = {**rows[1]["environment"], "cpu": "Another one"}
    rows[1]["method"] = "memit-merge"
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    first, other = models.table(tmp_path).split("\n\n")[-2:]
    name = rows[0]["model"]
    assert first == f"{name}, memit: {common.measured_on(header)}"
    assert other.startswith(f"{name}, memit-merge: ") and "Another one" in other


def test_a_piece_is_what_the_evaluation_says(tiny_llama, once, tmp_path):
    row = once([("batch", [7, 8])])[0]
    facts = [FACTS[7], FACTS[8]]
    collected = models.statistics_for(
        METHODS.values(), tiny_llama, tmp_path / "corpus.txt", row["tokens"]
    )
    edit = METHODS["memit"].compute(tiny_llama, facts, collected, progress=False)
    found = evaluate(tiny_llama, edit, facts, progress=False)
    assert set(models.GOALS) <= set(row["after"])
    for name, values in row["after"].items():
        kind, measure = name.split()
        assert list(values) == ["7", "8"]
        assert sum(values.values()) / 2 == pytest.approx(found.after[kind][measure].mean), name
    assert row["lowest_gain"] == pytest.approx(edit.report.gain)


def test_results_name_the_model_and_not_its_folder(tiny_llama):
    tiny_llama.hf.name_or_path = "/home/somebody/models/tiny"
    edit = an_edit(tiny_llama)
    edit.report.warnings.append(f"not calibrated: `knowedit calibrate {tiny_llama.source}`")
    told = models.warnings_of([edit, edit], tiny_llama)
    assert told == ["not calibrated: `knowedit calibrate tiny-llama`"]


def test_looking_at_the_edit_is_told_apart(once, tmp_path):
    row = once([("batch", [7, 8])])[0]
    assert 0 < row["looking"] < row["cpu_seconds_a_fact"]
    whole, rest = row["cpu_seconds_a_fact"], row["cpu_seconds_a_fact"] - row["looking"]
    assert f"| {whole:.2f} ({rest:.2f}) |" in models.table(tmp_path)
