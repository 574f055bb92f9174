"""A few families of the matrix (docs/families.md) hold every check; a wrong path shows; the page
says what the rows say (unit).
"""

import json

import pytest
import torch

from benchmarks import pages
from benchmarks.families import checks, matrix, models, page
from knowedit.errors import EditError, ModelError
from knowedit.models.editable import EditableModel

#: One of each make: gated, and plain with transposed matrices.
SOME = ("llama", "gpt2")


@pytest.mark.parametrize("kind", SOME)
def test_every_check_holds(kind):
    row = matrix.family(kind)
    assert {name: o for name, o in row["checks"].items() if "error" in o} == {}
    assert set(row["checks"]) == set(checks.CHECKS)


@pytest.mark.parametrize("kind", ["phi3", "nemotron", "opt", "lfm2"])
def test_neurons_of_every_make_are_rewritten(kind, tmp_path):
    """Gate and up in one matrix; no gate, and an activation that grows as a square; biases, and
    matrices that stand in the layer itself; an activation that nothing names.
    """
    assert checks.neurons(checks.Bench(kind, tmp_path)) < checks.CHECKS["neurons"].limit


@pytest.mark.parametrize("kind", ["openai-gpt", "xglm", "gemma3n_text", "llama4_text"])
def test_a_trace_goes_through_every_structure(kind, tmp_path):
    """Layers that return lists; masks as wide as the batch; several streams; experts, whose MLP has
    all texts in one row.
    """
    assert checks.trace_(checks.Bench(kind, tmp_path)) < checks.CHECKS["trace"].limit


def test_a_recurrence_is_copied_with_the_state_it_keeps(tmp_path):
    """RecurrentGemma, whose state holds the graph of its last run; MetaKE trains on a copy."""
    assert checks.metake(checks.Bench("recurrent_gemma", tmp_path)) < 0.02


def test_layers_that_do_not_pass_on_their_states_are_refused():
    """XLM's stack is a list of MLPs, around which the model itself adds up the stream."""
    with pytest.raises(ModelError, match="XLMWithLMHeadModel: no stack of decoder layers"):
        EditableModel(models.build("xlm"), models.tokenizer(), name="xlm")


def test_routed_experts_are_read_and_written(tmp_path):
    """Transposed matrices with biases."""
    bench = checks.Bench("gpt_oss", tmp_path)
    assert all(bench.model.layout.experts(layer) for layer in range(4))
    assert checks.experts(bench) < checks.CHECKS["experts"].limit


def test_neurons_in_front_of_a_norm_are_refused(tmp_path):
    with pytest.raises(EditError, match="bitnet: the keys of layer 2 are neither"):
        checks.neurons(checks.Bench("bitnet", tmp_path))


def test_an_adapter_that_peft_would_load_without_the_edit_is_refused(tmp_path):
    """Of a dense layer in a model whose other layers have experts."""
    with pytest.raises(EditError, match="takes targets named .*down_proj in a glm4_moe model"):
        checks.adapter(checks.Bench("glm4_moe", tmp_path))


def test_a_model_whose_earlier_tokens_see_later_ones_is_refused():
    with pytest.raises(ModelError, match="paligemma: .* earlier tokens see later ones"):
        EditableModel(models.build("paligemma"), models.tokenizer(), name="paligemma")


def test_nothing_in_a_model_is_neutral():
    hf = models.build("qwen2")
    assert hf.config.num_hidden_layers == 4 and hf.config.hidden_size == 32
    for name, parameter in hf.named_parameters():
        assert float(parameter.std()) > 0.01, name


def test_a_wrong_head_shows(tmp_path, monkeypatch):
    bench = checks.Bench("llama", tmp_path)
    assert checks.head(bench) < 1e-5
    own = EditableModel.head
    monkeypatch.setattr(EditableModel, "head", lambda self, states: 1.01 * own(self, states))
    assert checks.head(bench) > 1e-3 and checks.replay(bench) > 1e-3


def test_a_wrong_gain_shows():
    planned = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert checks.share(0.5 * planned, planned) == pytest.approx(0.5)
    assert checks.share(planned.flip(0), planned) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("checked", "verdict"),
    [
        ({"keys": 1e-6}, "right"),
        ({"keys": 1e-3}, "wrong"),
        ({"keys": float("nan")}, "wrong"),
        ({"keys": checks.Wrong("not so")}, "wrong"),
        ({"keys": EditError("not here"), "head": 0.0}, "partly"),
        ({"keys": 0.0, "adapter": EditError("not in peft's words")}, "right but peft"),
    ],
)
def test_a_verdict_follows_from_the_checks(monkeypatch, checked, verdict):
    def run(outcome):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    found = {
        name: checks.Check(name, 1e-5, lambda _, outcome=outcome: run(outcome))
        for name, outcome in checked.items()
    }
    monkeypatch.setattr(checks, "CHECKS", found)
    assert matrix.family("gpt2")["verdict"] == verdict


def test_the_page_says_what_was_measured():
    rows = [json.loads(line) for line in (pages.RESULTS / "families.jsonl").open()][1:]
    text = (pages.DOCS / "families.md").read_text()
    assert page.summary(rows) in text and page.table(pages.RESULTS) in text
