"""What is tried when a model is opened (unit)."""

import copy
import json

import pytest
import torch
from torch import nn

from knowedit.errors import ModelError
from knowedit.models import selfcheck
from knowedit.models.editable import EditableModel
from tests.knowedit.models.tiny import build


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(selfcheck, "_REMEMBERED", {})


def errors_of(model):
    return {check.name: check.error for check in model.checkup.checks}


def test_a_llama_passes_everything(tiny_llama):
    found = errors_of(EditableModel(build("llama"), tiny_llama.tokenizer))
    tried = {"head", "replay", "padded batch", "later tokens", "changed weight", "packed texts"}
    assert set(found) == tried
    assert all(error < 1e-5 for error in found.values())


@pytest.mark.parametrize(
    ("family", "replays", "packs"),
    [
        ("gptj", True, True),
        ("gpt_neo", False, True),
        ("bloom", False, False),
        ("qwen3_5_text", False, False),
    ],
)
def test_what_fails_runs_another_way(byte_tokenizer, family, replays, packs):
    model = EditableModel(build(family), byte_tokenizer)
    found = errors_of(model)
    assert model.replays == replays == (found["replay"] < 1e-3)
    assert (found["packed texts"] < 1e-3) == packs
    assert found["head"] < 1e-5 and found["changed weight"] < 1e-5


def test_a_head_that_is_more_than_a_function_of_the_states_is_refused(byte_tokenizer):
    hf = build("llama")
    plain = hf.forward

    def forward(input_ids=None, **given):
        out = plain(input_ids=input_ids, **given)
        out.logits = out.logits + input_ids[..., None]
        return out

    hf.forward = forward
    with pytest.raises(ModelError, match="what it does between them is not known"):
        EditableModel(hf, byte_tokenizer)


def test_a_model_that_sees_later_tokens_is_refused(byte_tokenizer):
    hf = build("llama")

    class Leaking(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) + x.mean(1, keepdim=True)

    hf.model.norm = Leaking(hf.model.norm)
    with pytest.raises(ModelError, match="no causal model"):
        EditableModel(hf, byte_tokenizer)


def test_a_weight_that_is_not_what_is_multiplied_is_refused(byte_tokenizer):
    """A module that keeps a copy of its weight in another form, as some quantised ones do."""

    class Cached(nn.Linear):
        def forward(self, x):
            return x @ self.copy.T

    hf = build("llama")
    for layer in hf.model.layers:
        old = layer.mlp.down_proj
        new = Cached(48, 32, bias=False)
        new.weight.data.copy_(old.weight)
        new.copy = old.weight.data.clone()
        layer.mlp.down_proj = new
    with pytest.raises(ModelError, match="does not multiply by this weight"):
        EditableModel(hf, byte_tokenizer)


@pytest.mark.parametrize("layer", [1, 2])
def test_every_kind_of_projection_is_tried(byte_tokenizer, layer):
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    hf = build("llama")
    hf.model.layers[layer].mlp.down_proj.__class__ = Half
    with pytest.raises(ModelError, match=rf"layers\.{layer}\.mlp.*does not multiply by this"):
        EditableModel(hf, byte_tokenizer)


@pytest.mark.parametrize("known", ["the model", "one like it"])
def test_hooks_are_tried_though_the_model_is_known(byte_tokenizer, known):
    hf = build("llama")
    EditableModel(hf, byte_tokenizer)
    hf = hf if known == "the model" else build("llama")
    hook = hf.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _x, y: y / 2)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp.*does not multiply by this weight"):
        EditableModel(hf, byte_tokenizer)
    hook.remove()
    EditableModel(hf, byte_tokenizer)


def test_the_coarsest_dtype_is_what_rounds(byte_tokenizer):
    """Projections that are kept in float32 in a bfloat16 model."""
    hf = build("llama").to(torch.bfloat16)
    for layer in hf.model.layers:
        projection = layer.mlp.down_proj.float()
        projection.register_forward_pre_hook(lambda _m, x: x[0].float())
        projection.register_forward_hook(lambda _m, _x, y: y.bfloat16())
    model = EditableModel(hf, byte_tokenizer)
    assert model.dtype == torch.float32 and model.rounding == 3e-2
    assert 1e-3 < max(errors_of(model).values()) < 3e-2


def test_large_models_are_remembered_on_the_disk(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "SMALL", 0)
    first = EditableModel(build("granite"), byte_tokenizer)
    (file,) = (tmp_path / "checkups").iterdir()
    monkeypatch.setattr(selfcheck, "_REMEMBERED", {})
    monkeypatch.setattr("knowedit.models.editable.detect", None)  # nothing is found anew
    monkeypatch.setattr("knowedit.models.editable.check_parts", None)
    again = EditableModel(build("granite"), byte_tokenizer)
    assert again.checkup == first.checkup and again.layout == first.layout
    monkeypatch.undo()
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "SMALL", 0)
    monkeypatch.setattr(selfcheck, "_REMEMBERED", {})
    file.write_text(json.dumps({"layout": {}}))
    assert EditableModel(build("granite"), byte_tokenizer).checkup == first.checkup


@pytest.mark.parametrize("change", ["config", "module", "scale", "memory", "strides", "inference"])
def test_what_matters_is_found_anew(byte_tokenizer, change):
    """The same shapes with another configuration, other code or other scales are another model."""
    one, other = build("granite"), build("granite")
    assert selfcheck._key(one) == selfcheck._key(other)
    if change == "config":
        other.config.logits_scaling = 4.0
    elif change == "module":
        other.model.layers[0].mlp.act_fn = nn.ReLU()
    elif change == "memory":
        first, second = (other.model.layers[i].mlp.down_proj for i in (1, 2))
        second.weight = nn.Parameter(first.weight.data, requires_grad=False)
    elif change == "strides":
        projection = other.model.layers[1].mlp.down_proj
        projection.weight.data = projection.weight.data[:1].expand(32, 48)
    elif change == "inference":
        with torch.inference_mode():
            other = copy.deepcopy(other)
    else:
        other.model.norm.weight.data.mul_(2)
    assert selfcheck._key(one) != selfcheck._key(other)


def test_damaged_weights_are_seen_though_the_model_is_known(byte_tokenizer):
    EditableModel(build("llama"), byte_tokenizer)
    hf = build("llama")
    hf.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        EditableModel(hf, byte_tokenizer)


def test_a_damaged_embedding_is_no_leak_of_later_tokens(byte_tokenizer):
    """NaN where only some texts read it."""
    hf = build("llama")
    hf.model.embed_tokens.weight.data[200] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        EditableModel(hf, byte_tokenizer)


def test_opening_draws_no_random_numbers_and_changes_nothing(byte_tokenizer):
    hf = build("qwen3_5_text")
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    EditableModel(hf, byte_tokenizer)
    assert torch.equal(torch.rand(1), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
