"""Editors on a real GPU: statistics on the CPU, model on the device; computed, applied, undone, and
in sequence (gpu).
"""

import pytest
import torch

from knowedit.edits.history import History
from knowedit.facts.fact import Fact
from knowedit.methods import make_method
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import WeightsWatch
from tests.knowedit.methods.test_locate import statistics_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon"),
    Fact(prompt="They say {} speaks", subject="Brazil", target="Norse"),
]
DEVICE = "cuda"


@pytest.fixture
def model(tiny_llama):
    return EditableModel(tiny_llama.hf.to(DEVICE), tiny_llama.tokenizer, name="tiny")


@pytest.mark.parametrize("method", ["memit", "alphaedit", "rose", "metake", "ft", "lora"])
def test_computed_applied_and_taken_back(model, method):
    layers = {"layers": (1, 2)} if method not in ("ft", "lora") else {}
    editor = make_method(method, {**layers, **({"when": "always"} if method == "metake" else {})})
    before = model.fingerprint
    said = model.score([fact.text for fact in FACTS], [fact.target for fact in FACTS])
    with editor.compute(model, FACTS, statistics_of(model, [1, 2]), progress=False).applied_to(
        model
    ):
        now = model.score([fact.text for fact in FACTS], [fact.target for fact in FACTS])
        assert sum(s.logprob for s in now) > sum(s.logprob for s in said)
    model._state.weights = WeightsWatch()
    assert model.fingerprint == before


def test_a_sequence_goes_on_from_a_file(model, tmp_path):
    editor, statistics = make_method("metake", {"layers": (1, 2)}), statistics_of(model, [1, 2])
    first = Session(editor, model, statistics)
    first.write(FACTS[:1], progress=False)
    history = History.load(first.history.save(tmp_path / "history"))
    later = Session(editor, model, statistics, history).write(FACTS[1:], force=True, progress=False)
    assert later.report.details["look_ahead"]["rehearsed"] == 1 and len(model.ledger.active) == 2
