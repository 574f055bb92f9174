"""Mixtures made from a dense model, and the measurement of edits in them (unit)."""

import pytest
import torch

from benchmarks import mixtures, moe, moeedit
from benchmarks.common import RESULTS
from knowedit.cli import doctor
from knowedit.methods import MEMIT
from knowedit.methods.locate.metrics import Covariance
from knowedit.methods.locate.targets import HiddenState
from tests.knowedit.methods.helpers import FACTS
from tests.knowedit.methods.test_experts import statistics_of

TEXTS = ["The old king of Rome lived in a city by the river"] * 2 + ["People like snow"]


@pytest.mark.parametrize("make", [mixtures.copies, mixtures.in_gpt_oss])
def test_copies_say_what_the_dense_model_says(tiny_llama, make):
    """And have experts of their own: a token reaches two of four."""
    made = make(tiny_llama, 4, 2)
    assert moe.difference(made, tiny_llama) < moe.SAME
    experts = made.layout.experts(1)
    assert (experts.count, experts.top_k, experts.width) == (4, 2, 48)
    assert experts.transposed == (make is mixtures.in_gpt_oss)
    assert doctor._experts(made) == {"routed experts": "4 of size 48, 2 a token (4 layers)"}
    assert doctor._experts(tiny_llama) == {}


def test_slices_are_the_dense_models_neurons_behind_fitted_routers(tiny_llama):
    made = mixtures.slices(tiny_llama, TEXTS, 4, 2, shared=1 / 3)
    experts = made.layout.experts(1)
    assert (experts.count, experts.top_k, experts.width) == (4, 2, 8)
    assert made.layout.shared[1].width == 16
    fitted = moe.difference(made, tiny_llama)
    for layer in made.layers:  # of equal gates: each chosen slice as it was, and half of the shared
        layer.mlp.gate.weight.zero_()
        layer.mlp.shared_expert_gate.weight.zero_()
        layer.mlp.experts.down_proj /= layer.mlp.gate.top_k / 4
        layer.mlp.gate.top_k = 4
    assert moe.difference(made, tiny_llama) < moe.SAME < fitted


def test_what_an_edit_was_to_add_is_said_by_its_factors(tiny_llama):
    model = mixtures.copies(tiny_llama, 4, 2)
    editor = MEMIT(
        layers=(2,), target=HiddenState(steps=4, contexts=("{}",)), metric=Covariance(gain=0.8)
    )
    statistics = statistics_of(model, [2])
    edit = editor.compute(model, FACTS, statistics, progress=False)
    found, seconds = moe.planned(editor, model, statistics, edit)
    torch.testing.assert_close(found, edit.plan[2], rtol=1e-4, atol=1e-4)
    assert seconds >= 0


def test_a_list_of_experts_is_the_packed_block(tiny_llama):
    """As MoEEdit's code reads and writes it: the same function, of the same numbers in memory."""
    model = mixtures.copies(tiny_llama, 4, 2)
    states = torch.randn(1, 7, model.hidden)
    block = model.layers[2].mlp
    listed = moeedit.Listed(block)
    torch.testing.assert_close(listed(states), block(states), rtol=1e-5, atol=1e-6)
    listed.experts[3].down_proj.weight.data.add_(1.0)
    torch.testing.assert_close(listed(states), block(states), rtol=1e-5, atol=1e-6)


def test_a_page_shows_every_mixture_that_was_measured(tmp_path):
    (tmp_path / "moe.jsonl").write_text((RESULTS / "moe.jsonl").read_text())
    assert moe.table(tmp_path).count("tokens of statistics") == 1
    (tmp_path / "moe_slices.jsonl").write_text((RESULTS / "moe.jsonl").read_text())
    assert moe.table(tmp_path).count("tokens of statistics") == 2
