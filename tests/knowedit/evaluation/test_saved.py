"""Unit: saved edits and edited folders are measured as the edit was when it was computed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from knowedit.edits.export.folder import save_edited
from knowedit.edits.history import History
from knowedit.edits.journal import Journal
from knowedit.errors import KnowEditError
from knowedit.evaluation.baseline import Baseline, Scope
from knowedit.evaluation.protocols import run
from knowedit.evaluation.saved import all_applied, check_tokens, compare, measure_saved
from knowedit.methods.registry import make_method
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.methods.test_locate import FACTS, statistics_of

TEXTS = ["The sea is wet, and the sky above it is blue."]
TWO = FACTS[:2]
METHOD = make_method({"kind": "memit", "layers": [1], "target": {"steps": 2}})


def figures(record, *more):
    """What was measured, as JSON has it."""
    record = json.loads(json.dumps(record.to_dict()))
    return {name: record[name] for name in ("evaluation", "side_effects", "said", *more)}


def test_what_was_saved_measures_as_when_it_was_computed(tiny_llama, tmp_path):
    statistics, before = statistics_of(tiny_llama, [1]), weights_fingerprint(tiny_llama.hf)
    edit = METHOD.compute(tiny_llama, TWO, statistics, progress=False)
    baseline = Baseline(tiny_llama, TWO, texts=TEXTS, generate=1, progress=False)
    told = run(baseline, statistics, METHOD, progress=False)
    found = compare(baseline, all_applied([edit], tiny_llama), progress=False)
    assert figures(found, "generation") == figures(told, "generation")
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active

    edit.save(tmp_path / "a.safetensors")
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    save_edited(tiny_llama, [edit], tmp_path / "edited")
    (tmp_path / "held.txt").write_text(TEXTS[0])
    model, results = str(tmp_path / "model"), tmp_path / "results"
    given = {"scope": Scope(str(tmp_path / "held.txt")), "say": lambda text: None}
    files = [tmp_path / "a.safetensors"]
    from_file = measure_saved(model, files, folder=results, **given)
    beside = measure_saved(str(tmp_path / "edited"), against=model, **given)
    for one, protocol in ((from_file, "saved edit"), (beside, "comparison")):
        assert figures(one) == figures(told) and one.protocol == protocol
    assert from_file.method == "MEMIT" and from_file.report == edit.report.to_dict()
    assert from_file.seconds is None and "s a fact" not in str(from_file)
    again = measure_saved(model, files, folder=results, **given)
    assert again == json.loads(json.dumps(from_file.to_dict()))  # as the folder has it

    # a fact that a later edit took out is not asked
    later = METHOD.compute(tiny_llama, FACTS[2:3], statistics, progress=False)
    later.replaces = {edit.key: (edit.groups[0],)}
    History(edit.fingerprint, [edit, later]).save(tmp_path / "history.safetensors")
    standing = measure_saved(model, [tmp_path / "history.safetensors"], say=print)
    asked = {question.prompt for question in standing.evaluation.questions}
    assert standing.facts == 2 and FACTS[2].text in asked and TWO[0].text not in asked


def test_what_cannot_be_measured_is_refused(tiny_llama, tmp_path):
    for given in ({}, {"files": [Path("a.safetensors")], "against": "model"}):
        with pytest.raises(KnowEditError, match="and not both"):
            measure_saved("model", **given)
    with pytest.raises(KnowEditError, match="which facts were written; give --dataset"):
        measure_saved("edited", against="model")
    other = SimpleNamespace(name="other", tokenizer=SimpleNamespace(get_vocab=lambda: {"x": 0}))
    with pytest.raises(KnowEditError, match="other and tiny-llama have other tokens"):
        check_tokens(tiny_llama, other)
    Journal.begin(tmp_path / "kept", tiny_llama.fingerprint, METHOD.to_dict())
    with pytest.raises(KnowEditError, match="kept holds no edit; write one first"):
        measure_saved("model", [tmp_path / "kept"])
