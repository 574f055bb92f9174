"""Unit: whole methods measured by each protocol."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from knowedit.errors import EditError, KnowEditError
from knowedit.evaluation import baseline as baselines
from knowedit.evaluation import drift, evaluate, protocols
from knowedit.evaluation import evaluation as evaluations
from knowedit.evaluation.baseline import Baseline, Scope
from knowedit.evaluation.measures.base import ask
from knowedit.evaluation.measures.perplexity import perplexity
from knowedit.evaluation.protocols import PROMPTS, PROTOCOLS, RESULTS, migrate, run, write_run
from knowedit.methods import MEMIT as MemitClass
from knowedit.methods.registry import make_method
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.methods.test_locate import FACTS, statistics_of

TEXTS = ["The sea is wet, and the sky above it is blue."]
MEMIT = {"kind": "memit", "layers": [1], "target": {"steps": 2}}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_result_says_what_was_measured_and_how(tiny_llama, tmp_path, protocol):
    statistics, method = statistics_of(tiny_llama, [1]), make_method(MEMIT)
    before = weights_fingerprint(tiny_llama.hf)
    whole = protocol != "single"
    baseline = Baseline(tiny_llama, FACTS, texts=TEXTS, generate=2, whole=whole, progress=False)
    found = run(baseline, statistics, method, protocol, "ours", batch=2, every=2, progress=False)
    assert found.generation.after["prompt"]["contains"].records == 2
    assert found.generation.before["text"]["fluency"].mean > 0
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active
    assert make_method(found.config) == method and found.facts == len(FACTS)
    assert len(found.trajectory) == (3 if protocol == "sequential" else 0)
    assert list(found.side_effects) == ([] if protocol == "single" else ["drift", "perplexity"])
    if protocol == "batch":
        edit = method.compute(tiny_llama, FACTS, statistics, progress=False)
        assert found.evaluation.after == evaluate(tiny_llama, edit, FACTS, progress=False).after
        assert found.side_effects["drift"]["kl"] == pytest.approx(drift(tiny_llama, edit).kl)
        clean = perplexity(tiny_llama, TEXTS)
        with edit.applied_to(tiny_llama):
            wanted = {"before": clean, "after": perplexity(tiny_llama, TEXTS)}
        assert found.side_effects["perplexity"] == pytest.approx(wanted)
        assert f"perplexity of held-out text: {clean:.2f}, then" in str(found)
    if protocol == "sequential":
        last = found.trajectory[-1]
        assert last.edits == len(FACTS)
        assert found.side_effects["drift"]["kl"] == pytest.approx(last.drift.kl)
        assert found.side_effects["perplexity"]["after"] == pytest.approx(last.perplexity)
        assert found.evaluation.after["efficacy"] == last.measures["efficacy"]
    write_run(tmp_path, [found])
    (record,) = json.loads((tmp_path / RESULTS).read_text())
    assert migrate(record) == record
    rows = [json.loads(line) for line in (tmp_path / PROMPTS).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [q.prompt for q in found.evaluation.questions]


def test_nothing_to_measure_is_refused(tiny_llama):
    with pytest.raises(KnowEditError, match="unknown protocol 'bulk'; known: batch"):
        run(Baseline(tiny_llama, FACTS, progress=False), None, make_method(MEMIT), "bulk")
    with pytest.raises(KnowEditError, match="no facts to measure"):
        Baseline(tiny_llama, [])


def test_the_unedited_model_is_asked_once_for_all_methods(tiny_llama, monkeypatch):
    titles = []

    def counted(model, asked, *, title="asking", progress=True):
        titles.append(title)
        return ask(model, asked, title=title, progress=progress)

    for module in (baselines, protocols, evaluations):
        monkeypatch.setattr(module, "ask", counted)
    monkeypatch.setattr(protocols, "load_model", lambda *names, **options: tiny_llama)
    monkeypatch.setattr(protocols, "load", lambda *names, **options: FACTS)
    monkeypatch.setattr(
        protocols, "statistics_for", lambda *given, **options: statistics_of(tiny_llama, [1])
    )
    methods = [make_method(MEMIT), make_method({**MEMIT, "target": {"steps": 3}})]
    arguments = {"limit": None, "corpus": None, "tokens": None, "say": lambda text: None}
    for protocol in PROTOCOLS:
        titles.clear()
        two = list(
            protocols.measure(
                "model", "ours", methods, protocol=protocol, batch=2, every=2, **arguments
            )
        )
        assert len(two) == 2 and titles.count("answers before the edit") == 1
        assert two[0].evaluation.answers_before == two[1].evaluation.answers_before
        assert two[0].evaluation.answers_after != two[1].evaluation.answers_after


def test_what_cannot_be_written_together_is_refused_before_anything_is_collected(
    tiny_llama, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("statistics were collected first")

    monkeypatch.setattr(protocols, "load_model", lambda *names, **options: tiny_llama)
    monkeypatch.setattr(protocols, "load", lambda *names, **options: FACTS)
    monkeypatch.setattr(protocols, "statistics_for", never)
    methods = [make_method(MEMIT), make_method({"kind": "rome", "layers": [1]})]
    arguments = {"limit": None, "corpus": None, "tokens": None, "say": lambda text: None}
    for protocol, refused in (("batch", EditError), ("sequential", EditError)):
        with pytest.raises(refused, match="ROME writes one subject.*--protocol single"):
            list(protocols.measure("model", "x", methods, protocol=protocol, **arguments))
    for protocol, batch in (("single", 50), ("sequential", 1)):
        with pytest.raises(AssertionError, match="first"):
            list(
                protocols.measure(
                    "model", "x", methods, protocol=protocol, batch=batch, **arguments
                )
            )


def test_what_is_sampled_once_is_no_part_of_an_edits_time(tiny_llama, monkeypatch):
    """The samples are there before the clock is started."""
    order = []

    class Slow(MemitClass, abstract=True):
        def read_ahead(self, model, progress=True):
            order.append("read")

        def _compute(self, *given):
            order.append("computed")
            return super()._compute(*given)

    baseline = Baseline(tiny_llama, FACTS, whole=False, progress=False)
    method = Slow(layers=(1,))
    clock = SimpleNamespace(perf_counter=lambda: order.append("clock") or 0.0)
    monkeypatch.setattr(protocols, "time", clock)
    protocols.run(baseline, statistics_of(tiny_llama, [1]), method, progress=False)
    assert order[:3] == ["read", "clock", "computed"]


def test_a_scope_says_what_was_asked_for():
    assert Scope().to_dict() == {"text": None, "seed": 0}
    whole = Scope("held.txt", 3, 2, {"Lyon": ["A city."]}, "easyedit", ("cloze",), 5)
    assert list(whole.to_dict()) == [
        *("text", "seed", "generate", "references", "definition", "ability", "ability_items")
    ]
    with pytest.raises(KnowEditError, match="unknown definition 'mine'"):
        Scope(definition="mine")
