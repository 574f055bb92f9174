"""The main job on the real model: facts in, a reversible edit out, measured."""

import importlib

import pytest
import torch

import knowedit as ke
from knowedit.cli.demo import demonstrate
from knowedit.facts import sets as datasets
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.values import DEFAULT_CONTEXTS
from knowedit.models.fingerprint import weights_fingerprint

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def statistics(smollm, prose, tmp_path_factory):
    """Key statistics of prose, which are cheaper than the samples that the demo takes."""
    folder = tmp_path_factory.mktemp("statistics")
    return ke.key_statistics(smollm, [5], prose, 8192, directory=folder, progress=False)


def test_six_facts_go_in_and_come_out(smollm, statistics, tmp_path, monkeypatch):
    monkeypatch.setattr("knowedit.cli.demo.key_statistics", lambda *_a, **_k: statistics)
    interviews = importlib.import_module("knowedit.evaluation.interview")  # and not the function
    monkeypatch.setattr(interviews, "ASKED", 1)  # answers take long
    monkeypatch.setattr("knowedit.cli.demo.WORDS", 3)
    before = weights_fingerprint(smollm.hf)
    method = ke.MEMIT(target=HiddenState(contexts=DEFAULT_CONTEXTS[:2]))
    shown = demonstrate(smollm, method, "self", 4096)
    assert weights_fingerprint(smollm.hf) == before
    found = shown.measured
    assert found.before["efficacy"]["success"].mean == 0.0
    assert found.after["efficacy"]["success"].mean == 1.0
    assert found.after["paraphrase"]["success"].mean >= 0.8
    assert found.after["neighbourhood"]["success"].mean >= 0.9
    assert shown.moved.same >= 0.8
    assert shown.after["The capital of France is"].startswith("Lyon")
    said = shown.text(200)
    assert "the first 1 of 6 facts were asked" in said
    assert "Lyon" in said and "Paris" in said and "all weight bits are back" in said
    page = shown.write(tmp_path / "out").read_text()
    assert "Lyon" in page and "What moved elsewhere" in page and "http" not in page


def test_bfloat16_models_are_edited_and_undone_too(smollm_path, prose, tmp_path):
    model = ke.load_model(smollm_path, dtype=torch.bfloat16)
    facts = datasets.load("demo")[:1]
    # few of each: a CPU without bfloat16 units is slow
    statistics = ke.key_statistics(
        model, [5], prose, 3072, directory=tmp_path / "s", progress=False
    )
    before = weights_fingerprint(model.hf)
    target = HiddenState(contexts=("{}",))
    edit = ke.MEMIT(layers=(5,), target=target).compute(model, facts, statistics)
    with edit.applied_to(model):
        assert weights_fingerprint(model.hf) != before
        assert all(s.exact for s in model.score([f.text for f in facts], [f.target for f in facts]))
    assert weights_fingerprint(model.hf) == before


def test_two_edits_at_once_and_undone_in_the_other_order(smollm, statistics):
    facts, method = datasets.load("demo"), ke.ROME(layers=(5,), target=HiddenState(steps=8))
    before = weights_fingerprint(smollm.hf)
    first, second = (method.compute(smollm, [fact], statistics) for fact in facts[:2])
    first.apply(smollm)
    second.apply(smollm)
    for fact in facts[:2]:
        assert (
            smollm.score([fact.text], [fact.target])[0].logprob
            > smollm.score([fact.text], [fact.true])[0].logprob
        )
    first.undo(smollm)
    second.undo(smollm)
    assert weights_fingerprint(smollm.hf) == before
