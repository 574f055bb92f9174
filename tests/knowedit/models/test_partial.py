"""Parts of a model against the whole model, on tiny models of several families and on the real one
(unit, model).
"""

import pytest
import torch

from knowedit.errors import ModelError
from knowedit.models import partial
from knowedit.models.editable import EditableModel
from knowedit.models.partial import (
    PartialModel,
    capture,
    hooked,
    layer_outputs,
    read,
    with_weights,
)
from knowedit.models.partial.comparing import off
from tests.knowedit.models.tiny import build

#: Fixtures of tiny models, one a family; each must pass what is parametrised over them.
EVERY_FAMILY = ("tiny_llama", "tiny_gpt2", "tiny_mistral")
TEXTS = [
    ("The capital of France is", "France", "Lyon"),
    ("x", "x", "a rather long answer with many tokens"),
    ("They say that the official language of Brazil is", "Brazil", "Norse"),
]


def whole(model, rows):
    ids, mask = model.pad([r.ids for r in rows])
    return model.hf.base_model(
        input_ids=ids, attention_mask=mask, use_cache=False
    ).last_hidden_state


@pytest.mark.parametrize("name", [*EVERY_FAMILY, "smollm"])
@pytest.mark.parametrize("layer", [0, 2])
def test_equals_the_whole_model(request, name, layer):
    model = request.getfixturevalue(name)
    rows = [model.row(*text) for text in TEXTS]
    part, full = PartialModel(model, rows, layer + 1), whole(model, rows)
    final = part.run()
    some = part.select(torch.tensor([2, 0]))
    torch.testing.assert_close(some.run(), final[[2, 0]], rtol=1e-5, atol=1e-5)
    for i, row in enumerate(rows):
        length = len(row.ids) - row.subject
        found, wanted = final[i, :length], full[i, row.subject : len(row.ids)]
        # every element, too: one near 0 has the rounding of the largest, which is near 40
        assert off(found, wanted) <= 5e-6
        assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()


#: Families whose layers are replayed though they take their cache by another name, or whose whole
#: model is run instead.
OTHERS = ("gptj", "codegen", "gpt_bigcode", "gpt_neo", "bloom", "lfm2", "qwen3_5_text", "gemma3")


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_equal_their_plain_forward(byte_tokenizer, family):
    """A changed state at the first token, and whole texts, against a hook on the plain model."""
    model = EditableModel(build(family), byte_tokenizer)
    rows = [model.row(*text) for text in TEXTS]
    part = PartialModel(model, rows, 2)
    states, push = part.states.clone(), torch.linspace(-1, 1, model.hidden)
    states[:, 0] += push
    final, some = part.run(states), part.select(torch.tensor([2, 0]))
    torch.testing.assert_close(some.run(states[[2, 0]]), final[[2, 0]], rtol=1e-4, atol=1e-4)
    for i, row in enumerate(rows):
        with hooked({model.layers[1]: lambda _, y, at=row.subject: at_token(y, at, push)}):
            full = model.final_states(torch.tensor([row.ids]))[0, row.subject :]
        torch.testing.assert_close(final[i, : len(full)], full, rtol=1e-4, atol=1e-4)
    texts = PartialModel.for_texts(model, 2, 80)
    for group, below in layer_outputs(model, [row.ids for row in rows], 1, budget=1):
        wanted = model.final_states(torch.tensor([rows[group[0]].ids]))
        torch.testing.assert_close(texts.run(below), wanted, rtol=1e-4, atol=1e-4)


def at_token(states, place, push):
    changed = states.clone()
    changed[:, place] += push
    return changed


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_the_whole_model_gives_what_layers_alone_give(request, name):
    """Hooks see the part's tokens only, edits act there only, and gradients are the same."""
    model = request.getfixturevalue(name)
    rows = [model.row(*text) for text in TEXTS]
    generator = torch.Generator().manual_seed(2)
    factors = {
        2: (
            torch.randn(model.hidden, 1, generator=generator),
            torch.randn(model.d_ff, 1, generator=generator),
        )
    }
    found = []
    for replay in (True, False):
        part = PartialModel(model, rows, 2, _replay=replay)
        leaf = torch.zeros(len(rows), model.hidden, requires_grad=True)
        seen = []

        def add(_, y, leaf=leaf, seen=seen):
            seen.append(y.shape)
            return torch.cat([y[:, :1] + leaf[:, None], y[:, 1:]], 1)

        with model.virtual(factors), hooked({model.projection(3): add}):
            final = part.run()
        final[:, 0].square().sum().backward()
        lengths = [len(row.ids) - row.subject for row in rows]
        ends = [final[i, :length].detach() for i, length in enumerate(lengths)]
        assert seen == [part.states.shape]
        found.append((torch.cat(ends), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_5_text", "gpt_neo"])
def test_copies_of_the_rows_of_a_whole_model(byte_tokenizer, family):
    model = EditableModel(build(family), byte_tokenizer)
    ids = torch.tensor([model.row(*TEXTS[0]).ids, model.row(*TEXTS[0]).ids[::-1]])
    part = PartialModel.behind(capture(model, ids, 0), 5)
    states = part.states.repeat(3, 1, 1)
    for layer in range(len(model.layers)):
        states = part.layer(layer, states)
    full = model.final_states(ids)[:, 5:].repeat(3, 1, 1)
    torch.testing.assert_close(model.norm(states), full, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_with_padded_rows(tiny_llama):
    rows = [tiny_llama.row(*text) for text in TEXTS]
    part = PartialModel(tiny_llama, rows, 2)
    hidden = part.states.clone().requires_grad_()
    part.run(hidden)[:, 0].sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad[:, 0].abs().sum() > 0


def test_nothing_stands_above_the_last_layer(tiny_llama):
    with pytest.raises(ModelError, match="last one"):
        PartialModel(tiny_llama, [tiny_llama.row(*TEXTS[0])], 4)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_whole_texts_in_any_batch(request, name):
    model = request.getfixturevalue(name)
    rows = [model.row(*text) for text in TEXTS]
    full, part = whole(model, rows), PartialModel.for_texts(model, 2, 80)
    for group, states in layer_outputs(model, [row.ids for row in rows], 1, budget=1):
        for line, i in enumerate(group):
            length = len(rows[i].ids)
            found = part.run(states)[line, :length]
            torch.testing.assert_close(found, full[i, :length], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_layer_by_layer_behind_a_token_for_copies_of_the_rows(request, name):
    model = request.getfixturevalue(name)
    ids = torch.tensor([model.row(*TEXTS[0]).ids, model.row(*TEXTS[0]).ids[::-1]])
    found = capture(model, ids, 0)
    part = PartialModel.behind(found, 5)
    states = part.states.repeat(3, 1, 1)
    for layer in range(len(model.layers)):
        states = part.layer(layer, states)
    full = model.final_states(ids)[:, 5:].repeat(3, 1, 1)
    torch.testing.assert_close(model.norm(states), full, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_pass_ends_once_everything_was_read(request, name):
    model = request.getfixturevalue(name)
    ids, seen, ran = torch.tensor([[1, 2, 3]]), [], []
    layout = model.layout
    with hooked({layer: lambda _, y, i=i: ran.append(i) for i, layer in enumerate(model.layers)}):
        read(
            model,
            ids,
            inputs={layout.projection(1): lambda x: seen.append(("key", x.shape[-1]))},
            outputs={layout.layer(0): lambda x: seen.append(("output", x.shape[-1]))},
        )
    assert seen == [("output", model.hidden), ("key", model.d_ff)] and ran == [0]
    with pytest.raises(ModelError, match="ended without reaching lm_head"):
        names = [n for n, m in model.hf.named_modules() if m is model.hf.get_output_embeddings()]
        read(model, ids, outputs={name: seen.append for name in names})


def test_states_are_read_text_by_text_where_the_model_flattens_them(byte_tokenizer):
    """OPT's MLP has the tokens of all texts in one row."""
    model = EditableModel(build("opt"), byte_tokenizer)
    rows = [model.row("The capital of France is", "France"), model.row("Old Rome", "Rome")]
    together, _ = model.keys(rows, [1])
    for line, row in enumerate(rows):
        alone, _ = model.keys([row], [1])
        torch.testing.assert_close(together[1][line], alone[1][0], rtol=1e-5, atol=1e-6)
        seen = []
        handle = model.projection(1).register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(x[0])
        )
        model.hf(input_ids=torch.tensor([row.ids]))
        handle.remove()
        plain = seen[0].reshape(len(row.ids), -1)[row.subject]
        torch.testing.assert_close(together[1][line], plain, rtol=1e-5, atol=1e-6)


def test_weights_are_exchanged_for_one_call(tiny_gpt2):
    ids, name = torch.tensor([[1, 2, 3]]), tiny_gpt2.layout.weight_name(1)
    before, weight = tiny_gpt2.final_states(ids), tiny_gpt2.weight(1).detach().clone()
    leaf = (2 * weight).requires_grad_()
    found = with_weights(tiny_gpt2, {name: leaf}, lambda: tiny_gpt2.final_states(ids))
    assert torch.autograd.grad(found.sum(), leaf)[0].isfinite().all()
    assert torch.equal(tiny_gpt2.final_states(ids), before)
    with torch.no_grad():
        tiny_gpt2.weight(1).mul_(2)
    torch.testing.assert_close(tiny_gpt2.final_states(ids), found.detach())


def test_nothing_stays_trainable_and_no_gradient_is_left(tiny_gpt2):
    """A part of a model in training mode is run as if it were in evaluation mode and frozen."""
    rows = [tiny_gpt2.row(*text) for text in TEXTS]
    wanted = PartialModel(tiny_gpt2, rows, 2).run()
    tiny_gpt2.hf.train().requires_grad_(True)
    part = PartialModel(tiny_gpt2, rows, 2)
    states = part.states.clone().requires_grad_()
    final = part.run(states)
    final.sum().backward()
    assert torch.equal(final.detach(), wanted) and states.grad is not None
    assert all(p.requires_grad and p.grad is None for p in tiny_gpt2.hf.parameters())


@pytest.fixture
def tiny_mistral(byte_tokenizer):
    """A sliding window shorter than the rows: every layer has a mask of its own."""
    from transformers import MistralConfig, MistralForCausalLM

    from knowedit.models.editable import EditableModel

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=6,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return EditableModel(
        MistralForCausalLM(config).eval().requires_grad_(False), byte_tokenizer, name="tiny-mistral"
    )


def test_whether_whole_texts_can_be_run_is_tried_once(tiny_llama, monkeypatch):
    tried, real = [], partial.model._fits_texts
    monkeypatch.setattr(
        partial.model, "_fits_texts", lambda part: tried.append(part.from_layer) or real(part)
    )
    for layer, longest in [(1, 20), (1, 30), (2, 30), (1, 20)]:
        PartialModel.for_texts(tiny_llama, layer, longest)
    assert tried == [1, 2]
