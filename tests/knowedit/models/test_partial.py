"""The replayed suffix against the whole model."""

import pytest
import torch

from knowedit.errors import ModelError
from knowedit.models.partial import Suffix

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


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_mistral", "smollm"])
@pytest.mark.parametrize("layer", [0, 2])
def test_equals_the_whole_model(request, name, layer):
    model = request.getfixturevalue(name)
    rows = [model.row(*text) for text in TEXTS]
    suffix, full = Suffix(model, rows, layer), whole(model, rows)
    final = suffix.run(suffix.hidden)
    some = suffix.select(torch.tensor([2, 0]))
    torch.testing.assert_close(some.run(some.hidden), final[[2, 0]], rtol=1e-5, atol=1e-5)
    for i, row in enumerate(rows):
        length = len(row.ids) - row.subject
        torch.testing.assert_close(
            final[i, :length], full[i, row.subject : len(row.ids)], rtol=2e-5, atol=2e-5
        )


def test_gradients_are_finite_with_padded_rows(tiny_llama):
    rows = [tiny_llama.row(*text) for text in TEXTS]
    suffix = Suffix(tiny_llama, rows, 1)
    hidden = suffix.hidden.clone().requires_grad_()
    suffix.run(hidden)[:, 0].sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad[:, 0].abs().sum() > 0


def test_the_last_layer_has_no_suffix(tiny_llama):
    with pytest.raises(ModelError, match="last one"):
        Suffix(tiny_llama, [tiny_llama.row(*TEXTS[0])], 3)


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
    return EditableModel(MistralForCausalLM(config), byte_tokenizer, name="tiny-mistral")
