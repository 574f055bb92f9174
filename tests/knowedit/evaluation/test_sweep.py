"""Unit: sweeps from their files to their table; every row can be made again from its record."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from knowedit.errors import ConfigError, KnowEditError
from knowedit.evaluation import evaluate
from knowedit.evaluation import sweep as sweeps
from knowedit.evaluation.sweep import FILE, Sweep, combinations, measure_sweep, read_sweep, table
from knowedit.methods.registry import make_method
from knowedit.report.run import PAGE, report
from tests.knowedit.methods.test_locate import FACTS, statistics_of

TEXT = """
dataset: ours
seed: 3
methods:
  - emmet
  - {kind: memit, merge_subjects: false}
  - {kind: alphaedit, grid: {metric.gain: [0.5]}}
grid: {layers: [[1], [2]]}
"""


def test_a_file_says_every_variant(tmp_path):
    (tmp_path / "grid.yaml").write_text(TEXT)
    sweep = read_sweep(tmp_path / "grid.yaml")
    found = [(v.method.kind, v.method.layers, v.settings) for v in sweep.variants()]
    assert [kind for kind, _, _ in found] == ["emmet"] * 2 + ["memit"] * 2 + ["alphaedit"] * 2
    assert [layers for _, layers, _ in found] == [(1,), (2,)] * 3
    assert found[-1][2] == {"layers": [2], "metric.gain": 0.5}
    assert not sweep.variants()[2].method.merge_subjects
    (tmp_path / "grid.json").write_text(json.dumps(sweep.to_dict()))
    assert read_sweep(tmp_path / "grid.json") == sweep == Sweep.from_dict(sweep.to_dict())
    same = Sweep(methods=("memit", "memit"), grid={"gain": [0.5, 0.5, 0.6]})
    assert [v.method.metric.gain for v in same.variants()] == [0.5, 0.6]


def test_the_seed_is_that_of_every_method_that_says_none():
    own = [{"kind": "lora", "seed": 7}, {"kind": "memit", "material": {"seed": 8}}]
    sweep = Sweep(methods=("lora", "memit", *own), seed=3)
    lora, memit, one, two = (v.method for v in sweep.variants())
    assert (lora.seed, memit.material.seed) == (3, 3)
    assert (one.seed, two.material.seed) == (7, 8)
    (again,) = Sweep(methods=(memit.to_dict(),)).variants()  # its record says all
    assert again.method == memit


def test_the_example_is_a_sweep():
    sweep = read_sweep(Path(__file__).parents[3] / "examples" / "sweep.yaml")
    found = [(v.method.kind, v.method.metric.kind, v.method.metric.gain) for v in sweep.variants()]
    assert [gain for _, _, gain in found] == [0.8, 0.95] * 3
    assert [kinds for *kinds, _ in found[::2]] == [
        ["memit", "covariance"],
        ["alphaedit", "null-space"],
        ["recipe", "blend"],
    ]


@pytest.mark.parametrize("corpus", ["self", ["self"]])
def test_a_corpus_is_one_or_a_list(corpus):
    sweep = Sweep.from_dict({"methods": ["neuron-patch"], "corpus": corpus})
    assert sweep == Sweep(methods=("neuron-patch",), corpus="self")
    assert sweep.variants()[0].method.corpus == "self"
    several = Sweep.from_dict({"methods": ["memit"], "corpus": ["a.txt", "b.txt"]})
    assert several.corpus == ("a.txt", "b.txt") == Sweep.from_dict(several.to_dict()).corpus


def test_methods_as_they_ship_are_compared_and_not_swept(tiny_llama, tmp_path):
    record = {"sweep": Sweep(methods=("memit", "emmet")).to_dict(), "rows": []}
    for kind in ("memit", "emmet"):
        config = make_method(kind).to_dict()
        row = {"method": kind, "settings": {}, "config": config, "reason": "no", "result": None}
        record["rows"].append(row)
    (tmp_path / FILE).write_text(json.dumps(record))
    assert "comparison of 2 methods" in report(tmp_path)


def test_every_combination():
    assert list(combinations({})) == [{}]
    found = list(combinations({"a": [1, 2], "b": ["x", "y"]}))
    assert len(found) == 4 and found[1] == {"a": 1, "b": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs methods"),
        ("methods: [memit]\nmethod: x", "no setting 'method'; did you mean 'methods'"),
        ("methods: [memti]", "did you mean 'memit'"),
        ("methods: [3]", "must be a name or a record"),
        ("methods: [memit]\nprotocol: batches", "protocol"),
        ("methods: [memit]\ngrid: {gain: 0.9}", "grid.gain must be a list"),
        ("methods: [memit]\ngrid: {gian: [0.9]}", "^[^:]*: memit has no setting 'gian'"),
        (
            "methods: [memit, rome]\ngrid: {metric.gain: [0.9]}",
            "rome: exact has no setting 'gain'.*a method may have a grid of its own",
        ),
        ("methods: [memit", "neither YAML nor JSON"),
        ("- memit", "expected a record"),
    ],
)
def test_bad_files_are_refused_before_anything_is_loaded(tmp_path, text, message):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sweep(tmp_path / "grid.yaml").variants()


def test_one_table_and_rows_that_can_be_made_again(tiny_llama, tmp_path, monkeypatch):
    fast = {"steps": 2, "lr": 0.5}
    methods = [{"kind": "memit", "target": fast}, {"kind": "emmet", "target": fast}]
    sweep = Sweep(methods=tuple(methods), grid={"layers": [[1], [9]]}, dataset="ours")
    statistics, said = statistics_of(tiny_llama, [1]), []
    record = measure_sweep(
        sweep, tiny_llama, FACTS, statistics, tmp_path, progress=False, say=said.append
    )
    assert record == json.loads((tmp_path / FILE).read_text())
    assert [line for line in said if line.endswith("measuring")] == [
        f"{name} layers=[{layer}], {number} of 4: computing and measuring"
        for number, (name, layer) in enumerate(product(("MEMIT", "EMMET"), (1, 9)), 1)
    ]
    assert len(said) == 6 and said[2].startswith("MEMIT layers=[9], 2 of 4: ModelError: ")
    assert [row["reason"] is None for row in record["rows"]] == [True, False] * 2
    shown = table(record)
    heads = [column.header for column in shown.heads]
    assert heads == [
        *("method", "layers", "efficacy success", "efficacy exact", "drift same", "drift kl"),
        "s a fact",
    ]
    assert [row[:2] for row in shown.cells()] == [
        *(["unedited", ""], ["MEMIT", "[1]"], ["EMMET", "[1]"])
    ]
    assert (
        shown.rows[0][2].mean
        == record["rows"][0]["result"]["evaluation"]["before"]["efficacy"]["success"]["mean"]
    )
    assert shown.notes[0].startswith("efficacy: the edited prompt") and "drift: " in shown.notes[0]
    assert "magnitude" not in shown.notes[0] and "paraphrase" not in shown.notes[0]
    assert shown.notes[1].startswith("MEMIT layers=[9]: ")
    row = record["rows"][0]
    edit = make_method(row["config"]).compute(tiny_llama, FACTS, statistics, progress=False)
    again = evaluate(tiny_llama, edit, FACTS, progress=False)
    assert again.to_dict() == row["result"]["evaluation"]
    assert row["result"]["config"] == row["config"] == edit.config
    text = report(tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert str(shown) in text and "ours" in text and "sweep of 4 settings on" in text
    asked = make_method("memit", ["layers=[1]", "target.steps=2", "target.lr=0.5"]).to_dict()
    assert row["config"] == asked  # so that the command may say it in words
    (command,) = [line for line in text.splitlines() if line.startswith("MEMIT layers=[1]: know")]
    assert "--method memit --set" in command and "--dataset ours" in command
    assert "target.steps=2" in command and FACTS[0].text in page
    for prompts in tmp_path.glob("prompts-*.jsonl"):
        assert len(prompts.read_text().splitlines()) == row["result"]["evaluation"]["prompts"]
    assert len(list(tmp_path.glob("prompts-*.jsonl"))) == 2

    def never(*arguments, **others):
        raise AssertionError("measured again")

    def stopped(*arguments, **others):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps.protocols, "run", stopped)  # at MEMIT's row that failed
    with pytest.raises(KeyboardInterrupt):
        measure_sweep(sweep, tiny_llama, FACTS, statistics, tmp_path, progress=False)
    assert sweeps.rows_kept(tmp_path) == 2  # the one behind it too
    monkeypatch.setattr(sweeps.protocols, "run", never)
    less = Sweep(methods=(methods[0],), grid={"layers": [[1]]}, dataset="ours")
    said.clear()
    kept = measure_sweep(
        less, tiny_llama, FACTS, statistics, tmp_path, progress=False, say=said.append
    )
    assert said == [f"MEMIT layers=[1], 1 of 1: kept from {tmp_path}"]
    assert kept["rows"] == record["rows"][:1]
    other = Sweep(methods=("memit",), dataset="theirs")
    with pytest.raises(KnowEditError, match="a sweep of other facts"):
        measure_sweep(other, tiny_llama, FACTS, statistics, tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(KnowEditError, match="cannot be gone on from"):
        measure_sweep(less, tiny_llama, FACTS, statistics, tmp_path)
