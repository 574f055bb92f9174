"""Unit: which methods are tried, which one is taken, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from knowedit.errors import KnowEditError
from knowedit.evaluation import recommendation
from knowedit.evaluation.evaluation import Evaluation
from knowedit.evaluation.intervals import Estimate
from knowedit.evaluation.interview import Said
from knowedit.evaluation.protocols import RESULTS, Result, count_results
from knowedit.evaluation.recommendation import Recommendation, plausible, recommend
from knowedit.methods.registry import make_method
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.methods.test_locate import FACTS, statistics_of

QUICK = {"layers": [1], "target": {"steps": 2}}


def result(
    name, exact, paraphrase=None, unchanged=None, spread=0.0, seconds=1.0, warnings=(), chat=None
):
    """A method with these rates, each as wide as `spread` on either side, that says `chat` of two
    facts in a chat.
    """

    def rate(mean):
        return Estimate(mean, mean - spread, mean + spread, len(FACTS))

    after = {"efficacy": {"success": rate(exact), "exact": rate(exact)}}
    after |= {} if paraphrase is None else {"paraphrase": {"success": rate(paraphrase)}}
    after |= {} if unchanged is None else {"neighbourhood": {"unchanged": rate(unchanged)}}
    told = Evaluation({}, after, [], [], [])
    drift = {"drift": {"kl": 0.01}}
    report = {"warnings": list(warnings)}
    asked = range(0 if chat is None else 2)
    said = [Said(i, "chat", "?", "b", "", "b" if i < chat else "c") for i in asked]
    return Result(
        "m", "d", name, "batch", len(FACTS), told, drift, seconds, report, said=said
    ).to_dict()


def test_what_is_plausible_depends_on_how_many_facts_there_are():
    assert plausible(FACTS[:1]) == ["rome", "neuron-patch", "rose"]
    assert plausible(FACTS[:2]) == ["memit", "neuron-patch", "rose"]
    assert plausible([FACTS[0]] * 20) == ["memit", "metake", "neuron-patch", "rose"]


def test_the_exact_one_with_most_right_elsewhere_is_taken():
    found = Recommendation(
        FACTS,
        [
            result("vague", 0.6, 1.0, 1.0),  # right elsewhere, because it writes little
            result("plain", 1.0, 0.9, 0.8),
            result("kind", 0.97, 0.9, 0.95),
            result("loud", 1.0, 1.0, 1.0, warnings=["RUINOUS: the perplexity doubled"]),
        ],
        ["slow"],
    )
    assert found.choice["method"] == "kind"
    wordings, around = (
        sum(len(getattr(fact, name)) for fact in FACTS) for name in ("paraphrases", "neighbours")
    )
    assert found.sentence() == (
        f"Take kind: 97% of {len(FACTS)} facts are said exactly, 90% of {wordings} paraphrases "
        f"prefer the new fact, 95% of {around} neighbours decide as before."
    )
    text = str(found)
    assert "ruins the model" in text and "no time for slow" in text
    assert json.loads(json.dumps(found.to_dict()))["choice"] == "kind"


def test_one_method_that_there_was_time_for_is_not_called_the_best():
    found = Recommendation(FACTS, [result("a", 0.9)], ["b"])
    assert found.sentence().startswith("There was time for a alone: 90% of")
    assert Recommendation(FACTS, [result("a", 0.9)], []).sentence().startswith("Take a")


def test_what_few_facts_do_not_tell_apart_is_said():
    rows = [result("a", 1.0, 0.9, 0.95, 0.1), result("b", 1.0, 0.9, 0.9, 0.1, seconds=0.1)]
    assert f"{len(FACTS)} facts do not tell it from b" in Recommendation(FACTS, rows, []).sentence()


def test_what_comes_up_in_a_chat_decides_where_nothing_else_does():
    rows = [result("plain", 1.0, chat=1), result("heard", 1.0, seconds=9.0, chat=2)]
    found = Recommendation(FACTS, rows, [])
    assert found.choice["method"] == "heard" and "2 of 2 come up in a chat" in found.sentence()


def test_one_fact_is_one():
    assert (
        "100% of 1 fact is said exactly"
        in Recommendation(FACTS[:1], [result("a", 1.0)], []).sentence()
    )


def test_nothing_is_recommended_that_does_not_write_the_facts():
    found = Recommendation(FACTS, [result("a", 0.3, 1.0, 1.0)], [])
    assert found.choice is None and found.sentence().startswith("None of these")


def test_methods_are_measured_and_the_model_is_left_alone(tiny_llama):
    before = weights_fingerprint(tiny_llama.hf)
    times = iter(np.cumsum([0, 0, 30.0, 0, 30.0, 0]))  # each method takes half a minute
    bare = [replace(fact, paraphrases=(), neighbours=()) for fact in FACTS[:2]]
    found = recommend(
        tiny_llama,
        bare,
        [make_method({"kind": kind, **QUICK}) for kind in ("memit", "memit", "emmet")],
        statistics_of(tiny_llama, [1]),
        minutes=1.2,
        progress=False,
        say=lambda text: None,
        clock=lambda: float(next(times)),
    )
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active
    assert [one["method"] for one in found.results] == ["MEMIT", "MEMIT"]
    assert found.skipped == ["EMMET"]  # of unknown price: taken for a dear one
    assert "no fact has paraphrases" in str(found) and "no fact has neighbours" in str(found)
    with pytest.raises(KnowEditError, match="no methods"):
        recommend(tiny_llama, bare, [], None)


def test_results_are_kept_as_they_come_and_gone_on_with(tiny_llama, tmp_path, monkeypatch):
    given = {"folder": tmp_path, "progress": False, "asked": {"corpus": ["corpus.txt"]}}
    methods = [make_method({"kind": kind, **QUICK}) for kind in ("memit", "emmet")]
    statistics = statistics_of(tiny_llama, [1])
    run, said = recommendation.run, []

    def stopped(baseline, statistics, method, *others, **options):
        if method.kind == "emmet":
            raise KeyboardInterrupt
        return run(baseline, statistics, method, *others, **options)

    monkeypatch.setattr(recommendation, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        recommend(tiny_llama, FACTS, methods, statistics, **given)
    assert count_results(tmp_path) == 1
    monkeypatch.setattr(recommendation, "run", run)
    found = recommend(tiny_llama, FACTS, methods, statistics, say=said.append, **given)
    assert said[0] == f"MEMIT, 1 of 2: kept from {tmp_path}" and len(said) == 2
    assert [one["method"] for one in found.results] == ["MEMIT", "EMMET"]
    assert found.results[0]["run"]["asked"] == {"corpus": ["corpus.txt"]}
    assert json.loads((tmp_path / RESULTS).read_text()) == json.loads(json.dumps(found.results))
    with pytest.raises(KnowEditError, match="results of other facts"):
        recommend(tiny_llama, FACTS[:1], methods, statistics, **given)
