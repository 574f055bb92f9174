"""Mixtures made from a dense model, and the measurement of edits in them (unit)."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import common, mixtures, moe, moeedit
from benchmarks.common import RESULTS
from knowedit.cli import doctor
from knowedit.errors import KnowEditError
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


def test_a_run_keeps_what_other_methods_did_to_the_same_mixture(tmp_path):
    path = tmp_path / "moe.jsonl"
    path.write_text((RESULTS / "moe.jsonl").read_text())
    header, *rows = map(json.loads, path.read_text().splitlines())
    same = {name: header[name] for name in ("model", "dataset", "facts", "tokens")}
    report = common.Report("moe", path, **same)
    report.rows.append({"case": "the mixture"})
    read = moe._kept_rows(path)
    kept = moe._earlier(report, read, without=["MEMIT"])
    assert {row["case"] for row in kept} == {row["case"] for row in rows} - {"MEMIT", "the mixture"}
    assert report.rows[0] == header
    other = common.Report("moe", path, **{**same, "tokens": 1})
    assert moe._earlier(other, read, without=[]) == moe._kept_rows(None) == []


def test_rows_of_other_slices_are_not_overwritten():
    moe._check_alike([{}, {"case": "MEMIT"}, {"perplexity": 35.5}], 35.501)
    with pytest.raises(KnowEditError, match=r"of perplexity 35\.50, these have 34\.90"):
        moe._check_alike([{}, {"perplexity": 35.5}], 34.9)


def test_a_page_says_where_each_case_was_measured(tmp_path):
    header, *rows = map(json.loads, (RESULTS / "moe.jsonl").read_text().splitlines())
    elsewhere = {
        case: {**header["environment"], "cpu": f"a CPU of {make}"}
        for case, make in (("MoEEdit", "another make"), ("MEMIT", "one make"))
    }
    rows = [
        row | ({"environment": elsewhere[row["case"]]} if "write" in row else {}) for row in rows
    ]
    (tmp_path / "moe.jsonl").write_text("\n".join(map(json.dumps, [header, *rows])))
    told = moe.table(tmp_path)
    assert "MoEEdit: `python -m benchmarks.moe --kind copies`: a CPU of another make" in told
    assert "MEMIT: `python -m benchmarks.moe --kind copies`: a CPU of one make" in told


def test_where_other_wordings_are_sent(tiny_llama):
    """Shares by hand, from the router of the layer itself."""
    model = mixtures.copies(tiny_llama, 4, 2)
    fact = replace(FACTS[0], paraphrases=("People say that France has its capital in",))
    gates = {}
    module = model.projection(2).module
    rows = [model.row(text, fact.subject) for text in (fact.text, f"Oh, {fact.text}")]
    rows.append(model.row(fact.paraphrases[0], fact.subject))
    for number, row in enumerate(rows):
        given = []
        handle = module.register_forward_pre_hook(lambda _, x, given=given: given.append(x[1:]))
        model.hf(input_ids=torch.tensor([row.ids]))
        handle.remove()
        index, weight = (part.reshape(-1, 2)[row.subject] for part in given[0])
        gates[number] = torch.zeros(4).index_add(0, index, weight)
    found = moe.rerouted(model, [fact], 2, ("{}", "Oh, {}"))
    first = int((gates[0] + gates[1]).argmax())
    bare, any_of = gates[0] > 0, (gates[0] + gates[1]) > 0
    wanted = {
        "first": gates[2][first],
        "prompt": gates[2][bare].sum(),
        "contexts": gates[2][any_of].sum(),
        "experts": any_of.sum(),
        "without": gates[2][first] == 0,
    }
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=1e-5)
