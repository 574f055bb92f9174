"""Causal tracing: every place against a whole forward pass of its own, as the published code
runs it; then averages (unit, model).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import tracing as benchmark
from knowedit.errors import EditError
from knowedit.evaluation import intervals
from knowedit.evaluation.tracing.localisation import _average, roles, trace_many
from knowedit.evaluation.tracing.tracing import KINDS, Trace, embedding_deviation, trace
from knowedit.facts.fact import Fact
from knowedit.facts.sets import load
from knowedit.io.tables import Table
from knowedit.models.fingerprint import WeightsWatch
from knowedit.report import plots
from knowedit.report.run import report, trace_blocks
from tests.knowedit.cli.conftest import knowedit, place  # noqa: F401
from tests.knowedit.models.layouts import without_attention
from tests.knowedit.models.test_partial import tiny_mistral  # noqa: F401

PROMPT, SUBJECT = "In Oslo it is", "Oslo"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_mistral"])
def test_equals_a_forward_pass_for_each_place(request, name):
    model = request.getfixturevalue(name)
    found = trace(model, PROMPT, SUBJECT, samples=3, window=2, seed=5, budget=40)
    places = [
        (kind, t, layer) for kind in KINDS for t in range(len(found.tokens)) for layer in range(4)
    ]
    for (kind, t, layer), expected in zip(places, benchmark.naive(model, found, places)):
        assert float(found.effect[kind][t, layer]) == pytest.approx(float(expected), abs=1e-5)
    assert all(float(effect.abs().max()) > 1e-3 for effect in found.effect.values())


@pytest.mark.model
def test_equals_a_forward_pass_on_a_real_model(smollm):
    found = trace(smollm, "Rome is in", "Rome", "Italy", samples=2)
    assert found.answer == " Italy"
    places = [("hidden", 0, 3), ("mlp", 1, 0), ("mlp", 0, 5), ("attention", 2, 29)]
    assert found.window == 6
    for (kind, t, layer), expected in zip(places, benchmark.naive(smollm, found, places)):
        assert float(found.effect[kind][t, layer]) == pytest.approx(float(expected), abs=1e-5)


def test_what_must_hold_exactly(tiny_llama):
    found = trace(tiny_llama, PROMPT, SUBJECT, samples=4)
    begin, end = found.subject
    assert "".join(found.tokens[begin:end]) == SUBJECT
    hidden = found.effect["hidden"]
    assert float(hidden[-1, -1]) == pytest.approx(found.clean - found.corrupted, abs=1e-6)
    assert float(hidden[:-1, -1].abs().max()) < 1e-6  # the head sees the last token only
    for kind in KINDS:
        assert not found.effect[kind][:begin].any() and not found.error[kind][:begin].any()
        assert found.error[kind][begin:].max() > 0


def test_the_model_is_as_before(tiny_llama):
    before, shown = tiny_llama.next_logprobs([PROMPT]), tiny_llama.fingerprint
    trace(tiny_llama, PROMPT, SUBJECT, samples=2)
    assert tiny_llama.next_logprobs([PROMPT]).equal(before)
    tiny_llama._state.weights = WeightsWatch()
    assert tiny_llama.fingerprint == shown
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.hf.modules())


def test_noise_is_fixed_by_the_seed(tiny_llama):
    all_kinds, again = (trace(tiny_llama, PROMPT, SUBJECT, samples=3, budget=b) for b in (4096, 7))
    alone = trace(tiny_llama, PROMPT, SUBJECT, samples=3, kinds=["mlp"])
    other = trace(tiny_llama, PROMPT, SUBJECT, samples=3, seed=1)
    for kind in KINDS:
        torch.testing.assert_close(all_kinds.effect[kind], again.effect[kind], atol=1e-6, rtol=0)
    torch.testing.assert_close(all_kinds.effect["mlp"], alone.effect["mlp"], atol=1e-6, rtol=0)
    assert all_kinds.corrupted == alone.corrupted != other.corrupted
    assert [*alone.effect] == ["mlp"]
    louder = trace(tiny_llama, PROMPT, SUBJECT, samples=3, noise=6)
    assert louder.deviation == pytest.approx(2 * all_kinds.deviation)
    subjects = [fact.subject for fact in load("embedded")]
    assert all_kinds.deviation == pytest.approx(3 * embedding_deviation(tiny_llama, subjects))


def test_bfloat16_is_close(tiny_llama):
    exact = trace(tiny_llama, PROMPT, SUBJECT, samples=3)
    tiny_llama.hf.to(torch.bfloat16)
    coarse = trace(tiny_llama, PROMPT, SUBJECT, samples=3)
    assert coarse.clean == pytest.approx(exact.clean, abs=0.02) and coarse.token == exact.token
    for kind in KINDS:
        assert coarse.effect[kind].dtype == torch.float32
        torch.testing.assert_close(coarse.effect[kind], exact.effect[kind], atol=0.02, rtol=0)


def test_the_answer_is_the_likelier_of_its_tokens(tiny_llama):
    logp = tiny_llama.next_logprobs([PROMPT])[0]
    own = trace(tiny_llama, PROMPT, SUBJECT, samples=2, kinds=["hidden"])
    assert own.token == int(logp.argmax()) and own.clean == pytest.approx(
        float(logp.max().exp()), abs=1e-6
    )
    given = trace(tiny_llama, PROMPT, SUBJECT, "qu", samples=2, kinds=["hidden"])
    assert given.answer == "q"  # a blank token is no answer
    assert given.clean == pytest.approx(float(logp[given.token].exp()), abs=1e-6)
    assert "is not the model's most likely next token" in given.warnings[0]
    assert any("not sure" in warning for warning in given.warnings)


@pytest.mark.parametrize(
    ("prompt", "subject", "settings", "message"),
    [
        ("Oslo is", "Bergen", {}, "'Bergen' does not occur in 'Oslo is'"),
        ("Oslo", "Oslo", {}, "nothing follows the subject 'Oslo'"),
        ("It is in Oslo", "Oslo", {}, "nothing follows the subject"),
        ("Oslo is", "Oslo", {"answer": " "}, "has no token of its own"),
        ("Oslo is", "Oslo", {"samples": 1}, "samples must be at least 2"),
        ("Oslo is", "Oslo", {"noise": 0}, "noise must be positive"),
        ("Oslo is", "Oslo", {"noise": math.inf}, "noise must be positive"),
        ("Oslo is", "Oslo", {"noise": math.nan}, "noise must be positive"),
        (
            "Oslo is",
            "Oslo",
            {"kinds": ["mpl"]},
            "kinds must be some of hidden, mlp, attention, got mpl",
        ),
        ("Oslo is", "Oslo", {"kinds": []}, "got none"),
        ("Oslo is", "Oslo", {"window": 0}, "window must be at least one layer"),
    ],
)
def test_bad_input(tiny_llama, prompt, subject, settings, message):
    with pytest.raises(EditError, match=re.escape(message)):
        trace(tiny_llama, prompt, subject, **settings)


def test_a_layer_without_attention_restores_nothing(tiny_llama):
    whole = trace(tiny_llama, PROMPT, SUBJECT, samples=2).effect["attention"]
    tiny_llama.layout = without_attention(tiny_llama.layout, 1)
    found = trace(tiny_llama, PROMPT, SUBJECT, samples=2).effect["attention"]
    assert whole[:, 1].abs().max() > 1e-4 and found[:, 1].abs().max() < 1e-6
    torch.testing.assert_close(found[:, [0, 2, 3]], whole[:, [0, 2, 3]])


def made(tokens, subject, effect, kind="mlp"):
    """A trace with given effects."""
    effects = torch.tensor(effect)
    names = [f"t{i}" for i in range(tokens)]
    return Trace(
        "m",
        "p",
        names,
        subject,
        "a",
        0,
        0.9,
        0.1,
        {kind: effects},
        {kind: torch.zeros_like(effects)},
        1,
        0.1,
        2,
        0,
    )


def test_roles():
    assert roles(made(8, (1, 4), [[0.0]] * 8)) == [
        "",
        "first subject",
        "middle subject",
        "last subject",
        "next",
        "further",
        "further",
        "last",
    ]
    assert roles(made(3, (0, 1), [[0.0]] * 3)) == ["last subject", "next", "last"]
    assert roles(made(3, (0, 2), [[0.0]] * 3)) == ["first subject", "last subject", "last"]


def test_averages_over_facts_and_advice(tiny_llama):
    one = made(4, (0, 3), [[0.0] * 4, [0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.0, 0.0], [0.2] * 4])
    two = made(3, (0, 1), [[0.3, 0.5, 0.2, 0.0], [0.0] * 4, [0.4] * 4])
    found = _average(tiny_llama, [one, two], 3, 1, seed=0)
    assert found.rows == ["first subject", "middle subject", "last subject", "next", "last"]
    assert found.counts == [1, 1, 2, 1, 2]
    rows = dict(zip(found.rows, found.effect["mlp"]))
    assert rows["last subject"] == pytest.approx([0.4, 0.3, 0.1, 0.0]) and rows[
        "last"
    ] == pytest.approx([0.3] * 4)
    low, high = (
        dict(zip(found.rows, table["mlp"]))["last subject"] for table in (found.low, found.high)
    )
    assert low == pytest.approx([0.3, 0.1, 0, 0]) and high == pytest.approx(
        [0.5, 0.5, 0.2, 0]
    )  # of two facts: both ends
    advice = found.advice
    assert advice is not None and (advice.peak, advice.low, advice.high, advice.carriers) == (
        1,
        1,
        1,
        [1],
    )
    assert (
        advice.preset == [1]
        and advice.preset_effect == pytest.approx([0.3])
        and advice.first == pytest.approx(0.4)
    )
    assert "around layer 1" in str(advice) and "the preset edits 1 (100%)" in str(advice)
    wider = _average(
        tiny_llama, [replace(one, window=2), replace(two, window=2)], 0, 0, seed=0
    ).advice
    assert wider is not None and (wider.peak, wider.preset_effect) == (2, advice.preset_effect)
    assert (
        _average(tiny_llama, [replace(one, window=6), two], 0, 0, seed=0).advice is None
    )  # no window above layer 0
    assert _average(tiny_llama, [made(3, (0, 1), [[0.0] * 4] * 3)] * 2, 0, 0, 0).advice is None
    assert json.loads(json.dumps(found.to_dict()))["advice"]["peak"] == 1


def test_bootstrap_over_facts():
    values = np.random.default_rng(1).normal(0.3, 0.1, (50, 2))
    means = intervals.draws(50) @ values / 50
    low, high = np.quantile(means, intervals.TAILS, axis=0)
    half = 1.96 * values.std(0, ddof=1) / 50**0.5
    assert low == pytest.approx(values.mean(0) - half, abs=0.1 * half.max())
    assert high == pytest.approx(values.mean(0) + half, abs=0.1 * half.max())


@pytest.mark.model
def test_facts_the_model_knows(smollm):
    facts = [
        Fact("The capital of {} is", "France", "Paris", true="Paris"),
        Fact("The capital of {} is", "France", "Lyon", true="Lyon"),
        Fact("The capital of {}ance is", "Fr", "Paris", true="Paris"),
        Fact("The Colosseum is located in the city of {} in", "Rome", "Italy", true="Italy"),
        Fact("The capital of {} is", "Italy", "Rome", true="Rome"),
    ]
    found = trace_many(smollm, facts, 2, samples=2, kinds=("hidden",), seed=3, progress=False)
    assert [f["answer"] for f in found.facts] == [" Paris", " Italy"] and (
        found.unknown,
        found.unusable,
    ) == (1, 1)
    deviation = embedding_deviation(smollm, [fact.subject for fact in facts])
    alone = trace(
        smollm, facts[0].text, "France", samples=2, kinds=("hidden",), seed=3, deviation=deviation
    )
    assert found.facts[0]["corrupted"] == alone.corrupted and found.deviation == alone.deviation
    assert found.advice is None
    with pytest.raises(EditError, match="knows 0 of 1 facts, 0 cannot be traced"):
        trace_many(smollm, facts[1:2], progress=False)


def test_pictures_and_tables_show_the_effects(tiny_llama, tmp_path):
    single = trace(tiny_llama, PROMPT, SUBJECT, samples=3).to_dict()
    average = _average(
        tiny_llama, [made(3, (0, 1), [[0.1, 0.7, 0.0, 0.0]] * 3)] * 2, 0, 0, 0
    ).to_dict()
    maps = plots.trace(single).axes
    for axis, kind in zip(maps, KINDS):
        assert axis.collections[0].get_array().ravel().tolist() == pytest.approx(
            np.ravel(single["effect"][kind]).tolist()
        )
    assert [label.get_text() for label in maps[0].get_yticklabels()] == single["rows"]
    assert sum(row.endswith("*") for row in single["rows"]) == len(SUBJECT)
    assert plots.trace(average).axes[1].lines[0].get_ydata().tolist() == pytest.approx(
        [0.1, 0.7, 0.0, 0.0]
    )
    table = next(block for block in trace_blocks(average) if isinstance(block, Table))
    assert table.cells()[-1] == ["last (2)", "| █  |", "+0.700", "[+0.700, +0.700]", "1"]
    for name, record in (("trace", single), ("traces", average)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    text = report(tmp_path)
    assert (
        "2 facts the model knows" in text
        and "3 draws of noise" in text
        and "strongest around layer 1" in text
    )
    assert (tmp_path / "report.html").read_text().count("<svg") == 2


def test_the_command(knowedit, place):  # noqa: F811
    said = knowedit(
        "trace",
        "model",
        PROMPT,
        "--subject",
        SUBJECT,
        "--samples",
        "3",
        "--window",
        "2",
        "-o",
        "run",
    )
    assert "MLP outputs, windows of 2" in said and "subject (*) corrupted" in said
    record = json.loads((place / "run/trace.json").read_text())
    assert (place / "run/trace.png").stat().st_size > 5000 and record["samples"] == 3
    same = json.loads(
        knowedit(
            "trace",
            "model",
            PROMPT,
            "--subject",
            SUBJECT,
            "--samples",
            "3",
            "--window",
            "2",
            "--json",
        )
    )
    assert same == record
    assert "the model knows 0 of 2 facts" in knowedit(
        "trace", "model", "--dataset", "facts.jsonl", code=1
    )
    for wrong in (
        ("model",),
        ("model", PROMPT),
        ("model", PROMPT, "--subject", SUBJECT, "--dataset", "embedded"),
    ):
        assert "give a prompt with its --subject, or a --dataset" in knowedit(
            "trace", *wrong, code=1
        )
    assert "--answer goes with a prompt" in knowedit(
        "trace", "model", "--dataset", "embedded", "--answer", "x", code=1
    )
    assert "does not occur" in knowedit("trace", "model", PROMPT, "--subject", "Bergen", code=1)


def test_the_prediction_counts_token_layers(tiny_llama):
    found = trace(tiny_llama, "ab", "a", samples=2, kinds=["hidden"])
    a_layer = sum(p.numel() for p in tiny_llama.layers[0].parameters())
    head = 258 * 32 / a_layer
    theirs = 8 * 3 * 2 * (4 + head)  # places, rows, tokens, layers
    ours = 2 * (
        (2 + 1) * (3 + 2 + 1 + 0) + 8 * head
    )  # samples, tokens from each of two on, layers above; the head
    assert benchmark.predicted(tiny_llama, found) == pytest.approx(theirs / ours)
