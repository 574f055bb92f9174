"""Edits as an adapter on the model that is served (unit)."""

import copy

import pytest
import torch
from torch import nn

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.served import on_served
from knowedit.errors import EditError
from knowedit.facts.fact import Fact

FACT = Fact("{} lives in", "Ada", "Rome")


def edit_of(model, facts, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    changes = {}
    for layer in (0, 1):
        rows, columns = model.weight(layer).shape
        if model.layout.transposed:
            columns, rows = rows, columns
        left = torch.randn(rows, 2, generator=drawn)
        changes[model.layout.weight_name(layer)] = LowRank(
            left, 0.05 * torch.randn(columns, 2, generator=drawn)
        )
    return Edit("TEST", changes, facts, model.fingerprint)


class Half(nn.Linear):
    """A served layer that gives half of what its float copy does."""

    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@torch.no_grad()
def test_the_served_model_is_the_float_copy(name, request):
    tiny = request.getfixturevalue(name)
    other = copy.deepcopy(tiny.hf)
    edit, bits = edit_of(tiny, [FACT]), [p.clone() for p in other.parameters()]
    found = on_served(tiny, other, [edit])
    with edit.applied_to(tiny):
        (score,) = tiny.score([FACT.text], [FACT.new_answer])
    assert found.after == pytest.approx((score.probability,), rel=1e-4)
    assert found.exact == (score.exact,) and found.before != found.after
    assert found.gain == pytest.approx((1,), abs=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), bits))
    assert "facts exact" in str(found) and type(found).from_dict(found.to_dict()) == found


@torch.no_grad()
def test_what_differs_there_is_seen(tiny_llama):
    """All that follows the edited projections is halved, so the change is felt otherwise."""
    other = copy.deepcopy(tiny_llama.hf)
    edit = edit_of(tiny_llama, [FACT])
    for layer in other.model.layers:
        linear = layer.self_attn.o_proj
        half = Half(linear.in_features, linear.out_features, bias=False)
        half.weight = linear.weight
        layer.self_attn.o_proj = half
    found = on_served(tiny_llama, other, [edit])
    assert abs(found.gain[0] - 1) > 1e-3


def test_an_edit_without_facts(tiny_llama):
    with pytest.raises(EditError, match="no facts"):
        on_served(tiny_llama, tiny_llama.hf, [edit_of(tiny_llama, [])])
