"""The sequential benchmark on a tiny model: it goes on where it was interrupted, and leaves the
model as it found it (unit).
"""

import json
import shutil
from types import SimpleNamespace

import pytest

from benchmarks import common, sequential
from knowedit.errors import KnowEditError
from knowedit.evaluation.sequence import SequenceMonitor
from knowedit.facts.fact import Fact
from knowedit.methods import UltraEdit
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.statistics import key_statistics

SUBJECTS = ("France", "Brazil", "Norway", "Peru", "Chad", "Fiji")
FACTS = [
    Fact(
        "The capital of {} is",
        name,
        "Lyon",
        true="Paris",
        paraphrases=(f"{name}'s capital is",) * (name < "O"),
    )
    for name in SUBJECTS
]


@pytest.fixture
def run(tiny_llama, tmp_path):
    """Run one method from what a results file has; returns its rows."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "\n\n".join(
            f"Some short text, which is number {i} of several." * (1 + i % 3) for i in range(30)
        )
    )
    statistics = key_statistics(tiny_llama, [1], corpus, 500, directory=tmp_path / "s")
    told = [i for i, fact in enumerate(FACTS) if fact.paraphrases]
    monitor = SequenceMonitor(
        tiny_llama, FACTS, ["The sea is wet, and the sky is blue."], measured=told, progress=False
    )

    def once(name="memit", stop=None, old=(), **options):
        report = common.Report("sequential", tmp_path / "out.jsonl", setting={})
        report.rows += old
        if stop is not None:
            note, left = report.note, iter(range(stop))

            def interrupted(line, **row):
                note(line, **row)
                if next(left, None) is None:
                    raise KeyboardInterrupt

            report.note = interrupted
        method = sequential.method_for(name, (1,), 3, False)
        sequential.run(report, name, method, monitor, statistics, 2, 2, tmp_path / name, **options)
        return [json.loads(line) for line in report.output.read_text().splitlines()][1:]

    once.output = tmp_path / "out.jsonl"
    return once


def test_an_interrupted_run_goes_on(tiny_llama, run, tmp_path):
    before = weights_fingerprint(tiny_llama.hf)
    whole = run()
    assert [row["edits"] for row in whole] == [0, 2, 4, 6] and weights_fingerprint(
        tiny_llama.hf
    ) == before
    shutil.rmtree(tmp_path / "memit")
    with pytest.raises(KeyboardInterrupt):
        run(stop=2)
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active
    kept = [json.loads(line) for line in run.output.read_text().splitlines()][1:]
    assert [row["edits"] for row in kept] == [0, 2, 4]
    again = run(old=kept[:2])  # the batch was there before its row
    assert [row["edits"] for row in again] == [0, 2, 4, 6]
    for one, other in zip(whole, again):
        assert all(one[name] == other[name] for name in ("measures", "perplexity", "norm", "gain"))
    assert run(old=again) == again  # nothing left to do


def test_rows_without_a_history_start_over(run, tmp_path):
    rows = run()
    shutil.rmtree(tmp_path / "memit")
    assert [row["edits"] for row in run(old=rows)] == [0, 2, 4, 6]


def test_only_told_facts_are_measured_and_free_means_no_history(run):
    rows = [*run("memit-free"), *run()]
    assert {
        row["measures"]["paraphrase"]["success"]["records"] for row in rows if row["edits"] == 6
    } == {5}
    free, bound = (
        next(row for row in rows if row["case"] == case and row["edits"] == 6)
        for case in ("memit-free", "memit")
    )
    assert free["norm"] != bound["norm"]
    assert [len(row["exact_by_batch"]) for row in rows if row["case"] == "memit"] == [0, 1, 2, 3]
    with pytest.raises(KnowEditError, match="unknown method 'memo'; known: .*memit"):
        sequential.method_for("memo", (1,), 3, False)


def test_exactness_by_batch_and_equal_steps(tiny_llama, monkeypatch):
    known = {name: name in ("France", "Norway", "Peru") for name in SUBJECTS}

    def ask(model, asked, progress):
        return [
            SimpleNamespace(
                exact=float(known[q.prompt.removeprefix("The capital of ").removesuffix(" is")])
            )
            for q in asked
        ]

    monkeypatch.setattr(sequential, "ask", ask)
    assert sequential.exact_by_batch(tiny_llama, FACTS[:5], 2) == [[1, 0], [1, 1], [0]]
    assert sequential.exact_by_batch(tiny_llama, FACTS[:5], 2, [1, 4]) == [[0], [], [0]]
    stock, ours = (sequential.method_for(name, (1,), 3, False) for name in ("memit-free", "metake"))
    assert stock.target.steps == ours.target.steps + ours.training.settings.steps


def test_a_step_checks_as_many_facts_however_many_there_are():
    assert sequential.sample_of(50, None, 900, 0) is sequential.sample_of(20, 20, 900, 0) is None
    assert sequential.sample_of(900, 20, 900, 0) is None  # the last step asks them all
    found = [set(sequential.sample_of(n, 20, 900, 0)) for n in (300, 310, 890)]
    assert [len(one) for one in found] == [20] * 3 and max(found[0]) < 300
    assert len(found[0] & found[1]) >= 15  # mostly the same facts from step to step
    assert found[0] != set(sequential.sample_of(300, 20, 900, 1))


def test_merged_steps_say_the_same(run, tmp_path):
    apart = run()
    shutil.rmtree(tmp_path / "memit")
    merged = run(merge=True, checked=3)
    assert len(list((tmp_path / "memit").glob("0*"))) == 1
    for one, other in zip(apart, merged):
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-3)
        assert one["gain"] == pytest.approx(other["gain"], rel=1e-3)
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
    assert [row["checked"] for row in merged] == [0, 2, 3, 6]
    assert merged[-1]["exact"] == apart[-1]["exact"]
    assert merged[-1]["cpu_seconds"] > merged[1]["cpu_seconds"] > 0


def test_facts_are_drawn_by_seed():
    chosen = sequential.draw_facts(FACTS, 3, 0)
    assert chosen == sequential.draw_facts(FACTS, 3, 0) and len(set(chosen)) == 3
    assert sum(bool(fact.paraphrases) for fact in chosen) == 2  # there is only one other
    assert any(chosen != sequential.draw_facts(FACTS, 3, seed) for seed in (1, 2))
    with pytest.raises(KnowEditError, match="there are only 6 facts"):
        sequential.draw_facts(FACTS, 60, 0)


def test_values_are_found_as_the_command_says():
    plain = sequential.method_for("memit", (1,), 3, False)
    fast = sequential.method_for("memit", (1,), 3, False, "gauss-newton")
    assert [type(one.target.optimiser).__name__ for one in (plain, fast)] == ["Adam", "GaussNewton"]
    assert sequential.method_for("ultraedit-free", (1, 2), 3, False) == UltraEdit()


def test_a_results_file_names_a_corpus_without_its_folder(tmp_path):
    method = sequential.method_for("neuron-patch", (1,), 3, False, corpus=tmp_path / "text.gz")
    assert str(tmp_path) in str(method.to_dict())
    assert sequential.recorded(method)["corpus"] == "text.gz"
    assert str(tmp_path) not in str(sequential.recorded(method))
    plain = sequential.method_for("memit", (1,), 3, False)
    assert sequential.recorded(plain) == plain.to_dict()
