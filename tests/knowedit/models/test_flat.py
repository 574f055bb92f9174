"""All texts in one row: states and gradients of texts one below the other (unit; tiny models)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from knowedit.errors import ModelError
from knowedit.models.editable import EditableModel
from knowedit.models.partial import PartialModel, flat, texts_in_a_row
from knowedit.models.partial import model as parts
from knowedit.models.tokens import Row

TEXTS = ("a much longer text about Bob or so", "b is c, they say", "Ada", "Cleo, of c")


def part_of(model, layer=1):
    rows = [model.row(text, text.split()[0]) for text in TEXTS]
    assert len({len(row.ids) for row in rows}) == len(rows)
    return PartialModel(model, rows, layer)


def states_and_gradient(part, **how):
    torch.manual_seed(0)
    moved = (part.states + 0.1 * torch.randn_like(part.states)).requires_grad_()
    final = part.run(moved, **how)
    inside = part._way.inside
    weight = torch.randn_like(final) * inside[..., None]
    (gradient,) = torch.autograd.grad((final * weight).sum(), moved)
    return final.detach()[inside], gradient


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_equals_texts_one_below_the_other(request, name):
    part = part_of(request.getfixturevalue(name))
    assert parts.runs_flat(part.model) and part._way.flat is not None
    found, wanted = states_and_gradient(part, unseen=True), states_and_gradient(part)
    for mine, theirs in zip(found, wanted):
        assert (mine - theirs).norm() <= 2e-5 * theirs.norm()
    fewer = part.select(torch.tensor([1, 3]))
    assert torch.allclose(
        fewer.run(unseen=True)[fewer._way.inside], fewer.run()[fewer._way.inside], atol=1e-4
    )


class Widths(TorchFunctionMode):
    """The shapes of what linear layers are given, and how often torch attends."""

    def __init__(self):
        super().__init__()
        self.seen, self.attended = set(), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.seen.add(tuple(args[0].shape[:-1]))
        self.attended += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_layers_are_given_one_row_without_padding(tiny_llama):
    part = part_of(tiny_llama)
    part.run(unseen=True)  # once, to see that it can be
    with Widths() as widths:
        part.run(unseen=True)
    assert widths.seen == {(1, int(part._way.inside.sum()))} and not widths.attended


def test_a_model_that_attends_by_itself_runs_text_by_text(tiny_llama):
    tiny_llama.hf.set_attn_implementation("eager")
    assert parts.flat_error(tiny_llama) == float("inf")
    part = part_of(tiny_llama)
    assert torch.equal(part.run(unseen=True), part.run())


def test_a_model_that_begins_to_attend_by_itself_is_tried_again(tiny_llama):
    texts = [[5, 6, 7], [5, 6]]
    assert parts.runs_flat(tiny_llama) and texts_in_a_row(tiny_llama, texts) is not None
    tiny_llama.hf.set_attn_implementation("eager")
    part = part_of(tiny_llama)
    assert torch.equal(part.run(unseen=True), part.run())
    assert texts_in_a_row(tiny_llama, texts) is None


def test_bfloat16_runs_text_by_text(tiny_llama):
    """Its products compile a kernel for every number of tokens."""
    tiny_llama.hf.bfloat16()
    assert part_of(tiny_llama)._way.flat is None


def test_a_layer_that_attends_otherwise_is_refused(tiny_llama):
    part = part_of(tiny_llama)
    way = part._way.flat
    way.calls[2]["attention_mask"] = torch.zeros(1, 1, len(way.order.at), len(way.order.at))
    with pytest.raises(ModelError, match="attends in a way of its own"):
        way.run(part.states)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_whole_texts_in_one_row(request, name):
    """What they begin with in common is run once."""
    model = request.getfixturevalue(name)
    texts = [[5, 6, 7, 8], [5, 6], [9, 6, 7], [5, 6, 9, 9, 9]]
    row = texts_in_a_row(model, texts)
    assert row is not None and row.ids.shape == (1, 4 + 3 + 3)
    with Widths() as widths:
        states = row.run()
    assert widths.seen <= {(1, 10)} and not widths.attended
    for line, text in enumerate(texts):
        alone = model.final_states(torch.tensor([text]))[0]
        assert (states[row.of[line, : len(text)]] - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_the_last_tokens_of_texts_in_one_row(request, name, monkeypatch):
    """Keys and outputs are those of each text alone; what they begin with in common is run once."""
    model = request.getfixturevalue(name)
    texts = [[5, 6, 7, 8], [5, 6], [9, 6, 7], [5, 6, 9, 9, 9]]
    rows = [Row(text, len(text) - 1) for text in texts]
    monkeypatch.setattr(flat, "SPARED", 0)
    model.keys(rows, [1])  # once, to see that it can be
    with Widths() as widths:
        keys, outputs = model.keys(rows, [0, 1], outputs=True)
    assert widths.seen <= {(1, 10)} and not widths.attended
    for line, row in enumerate(rows):
        alone, out = model.keys([row], [0, 1], outputs=True)
        torch.testing.assert_close(outputs[line], out[0], rtol=1e-4, atol=1e-5)
        for layer in keys:
            torch.testing.assert_close(keys[layer][line], alone[layer][0], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(flat, "SPARED", 100)  # few tokens are not worth a trial
    with Widths() as widths:
        model.keys(rows, [0, 1], outputs=True)
    assert (1, 10) not in widths.seen


def test_whole_texts_stay_apart_where_attention_has_a_window_or_a_way_of_its_own(
    tiny_llama, byte_tokenizer
):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        initializer_range=0.3,
    )
    short = EditableModel(MistralForCausalLM(config).eval(), byte_tokenizer)
    assert flat.texts_error(short) > 1e-3 and texts_in_a_row(short, [[1, 2]]) is None
    assert texts_in_a_row(tiny_llama, [[1] * 513]) is None
    tiny_llama.hf.set_attn_implementation("eager")
    assert flat.texts_error(tiny_llama) == float("inf")
    assert texts_in_a_row(tiny_llama, [[1, 2]]) is None
