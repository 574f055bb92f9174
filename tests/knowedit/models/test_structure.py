"""Parts found by running a few tokens, on tiny models of many families, each against the plain
forward pass of the model (unit).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from knowedit.errors import ModelError
from knowedit.models.editable import EditableModel
from knowedit.models.partial import hooked
from knowedit.models.structure import Head, detect
from tests.knowedit.models.tiny import build

#: Family, path of the edited projection, what follows it, how logits are made.
FOUND = [
    ("llama", "model.layers.{}.mlp.down_proj", "identity", "plain"),
    ("gpt2", "transformer.h.{}.mlp.c_proj", "identity", "plain"),
    ("gptj", "transformer.h.{}.mlp.fc_out", "identity", "plain"),
    ("gpt_neox", "gpt_neox.layers.{}.mlp.dense_4h_to_h", "identity", "plain"),
    ("gemma2", "model.layers.{}.mlp.down_proj", "other", "scaled"),
    ("gemma3_text", "model.layers.{}.mlp.down_proj", "other", "plain"),
    ("granite", "model.layers.{}.mlp.down_proj", "factor", "scaled"),
    ("cohere", "model.layers.{}.mlp.down_proj", "identity", "scaled"),
    ("olmo2", "model.layers.{}.mlp.down_proj", "other", "plain"),
    ("bloom", "transformer.h.{}.mlp.dense_4h_to_h", "identity", "plain"),
    ("falcon", "transformer.h.{}.mlp.dense_4h_to_h", "identity", "plain"),
    ("opt", "model.decoder.layers.{}.fc2", "identity", "plain"),
    ("lfm2", "model.layers.{}.feed_forward.w2", "identity", "plain"),
    ("gemma3", "model.language_model.layers.{}.mlp.down_proj", "other", "plain"),
]
IDS = torch.tensor([[3, 141, 59, 26, 53, 58, 97, 93, 23]])


def plain_change(hf, layer_path, projection_path, push):
    """By how much the layer's output moves when `push` is added to the projection's output."""
    seen = []
    layer, projection = hf.get_submodule(layer_path), hf.get_submodule(projection_path)
    for amount in (0.0, 1.0):
        with hooked(
            {
                projection: lambda _, y, amount=amount: y + amount * push,
                layer: lambda _, y: seen.append(y.detach().clone()),
            }
        ):
            hf(input_ids=IDS, use_cache=False)
    return (seen[1] - seen[0])[0, -1]


@pytest.mark.parametrize(("family", "projection", "stream", "head"), FOUND)
def test_parts_are_those_of_the_plain_model(byte_tokenizer, family, projection, stream, head):
    hf = build(family)
    model = EditableModel(hf, byte_tokenizer)
    layout = model.layout
    assert layout.editable == (0, 1, 2, 3) and layout.hidden == 32
    assert layout.pattern == f"{projection}.weight" and layout.head.kind == head
    push = torch.randn(32, generator=torch.Generator().manual_seed(1))
    for layer in layout.editable:
        found = layout.stream(layer)
        assert found.kind == stream
        assert hf.get_submodule(layout.projection(layer)).weight.numel() == 32 * layout.width(layer)
        moved = plain_change(hf, layout.layer(layer), layout.projection(layer), push)
        if stream == "other":
            off = torch.cosine_similarity(moved, push, dim=0) < 0.999 or moved.norm() < push.norm()
            assert off
        else:
            torch.testing.assert_close(moved, found.factor * push, rtol=1e-4, atol=1e-4)
    wanted = hf(input_ids=IDS, use_cache=False).logits
    states = model.final_states(IDS)
    torch.testing.assert_close(model.head(states), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.head(states[0, -1]), wanted[0, -1], rtol=1e-5, atol=1e-5)


def test_the_granite_factors_are_the_configurations():
    layout = detect(build("granite"))
    assert all(layout.stream(i).factor == pytest.approx(0.22, rel=1e-4) for i in range(4))
    assert layout.head.scale == pytest.approx(1 / 8, rel=1e-5) and layout.head.softcap is None


def test_the_soft_cap_of_gemma2_is_measured():
    layout = detect(build("gemma2"))
    assert layout.head.softcap == 5.0 and layout.head.scale == pytest.approx(1, rel=1e-4)


def test_a_bfloat16_copy_has_the_same_parts():
    for family in ("llama", "granite", "gemma2"):
        hf = build(family)
        one, other = detect(hf), detect(copy.deepcopy(hf).to(torch.bfloat16))
        for layer in range(4):
            assert one.stream(layer).kind == other.stream(layer).kind
            assert one.projection(layer) == other.projection(layer)
            assert one.mixers[layer] == other.mixers[layer]


def test_a_gate_behind_the_projection_is_no_factor():
    """A gate that differs by token is linear, and yet no constant."""
    hf = build("llama")

    class Gated(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) * x[..., :1].sigmoid()

    hf.model.layers[1].mlp = Gated(hf.model.layers[1].mlp)
    layout = detect(hf)
    assert [layout.stream(i).kind for i in range(4)] == ["identity", "gate", *["identity"] * 2]
    assert layout.projection(1) == "model.layers.1.mlp.mlp.down_proj"


def test_widths_differ_by_layer(byte_tokenizer):
    hf = build("llama")
    hf.model.layers[2].mlp = build("llama").model.layers[2].mlp
    mlp = hf.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, 80, bias=False), nn.Linear(32, 80, bias=False)
    mlp.down_proj = nn.Linear(80, 32, bias=False)
    model = EditableModel(hf, byte_tokenizer)
    assert [model.layout.width(i) for i in range(4)] == [48, 48, 80, 48] and model.d_ff == 80
    keys, _ = model.keys([model.row("Rome is", "Rome")], [1, 2])
    assert keys[1].shape == (1, 48) and keys[2].shape == (1, 80)


def test_dense_layers_in_front_of_experts_are_dense(byte_tokenizer):
    layout = EditableModel(build("deepseek_v3"), byte_tokenizer).layout
    assert [layout.experts(layer) is None for layer in range(4)] == [True, True, False, False]
    assert layout.weight_name(1) == "model.layers.1.mlp.down_proj.weight"
    assert layout.weight_name(2) == "model.layers.2.mlp.experts.down_proj"
    assert layout.shared[2].projection == "model.layers.2.mlp.shared_experts.down_proj"


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


#: What else lies where the weight of layer 1's projection does.
SHARED = {
    "the parameter": ("model.layers.3.mlp.down_proj", lambda weight: weight),
    "its memory": ("model.layers.3.mlp.down_proj", lambda weight: frozen(weight.data)),
    "another module": ("model.layers.2.self_attn.o_proj", lambda weight: weight),
    "read transposed": ("model.layers.2.mlp.up_proj", lambda weight: frozen(weight.data.T)),
    "a part of it": ("model.layers.2.self_attn.k_proj", lambda weight: frozen(weight.data[:16])),
    "behind its head": ("model.layers.0.self_attn.v_proj", lambda weight: frozen(weight.data[16:])),
}


@pytest.mark.parametrize("how", SHARED)
def test_shared_weights_are_not_edited(how):
    """An edit would change whatever else multiplies by them."""
    name, view = SHARED[how]
    hf = build("llama", intermediate_size=32)
    hf.get_submodule(name).weight = view(hf.model.layers[1].mlp.down_proj.weight)
    layout = detect(hf)
    assert layout.editable == ((0, 2) if name.endswith("down_proj") else (0, 2, 3))
    with pytest.raises(ModelError, match=f"layer 1 .*it shares its weight with {name}.weight"):
        layout.projection(1)


def test_weights_beside_each_other_in_memory_are_not_shared():
    """As trainers hold them: all parameters are views of one long tensor."""
    hf = build("llama")
    flat, start = torch.cat([p.data.reshape(-1) for p in hf.parameters()]), 0
    for parameter in hf.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    assert detect(hf).editable == (0, 1, 2, 3)


#: What keeps a module from having a weight that can be written to.
MADE = {
    "parametrised": lambda module: nn.utils.parametrizations.weight_norm(module),
    "normed": lambda module: nn.utils.weight_norm(module),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", MADE)
def test_a_weight_that_is_made_of_others_is_not_edited(how):
    hf = build("llama")
    MADE[how](hf.model.layers[2].mlp.down_proj)
    layout = detect(hf.requires_grad_(False))
    assert layout.editable == (0, 1, 3)
    with pytest.raises(ModelError, match=r"layer 2 .*down_proj\.weight is no parameter"):
        layout.projection(2)


def test_a_weight_whose_entries_share_memory_is_not_edited():
    hf = build("llama")
    projection = hf.model.layers[2].mlp.down_proj
    projection.weight = frozen(projection.weight.data[:1].expand(32, 48))
    with pytest.raises(ModelError, match="layer 2 .*share memory; make it contiguous"):
        detect(hf).projection(2)


def test_a_model_is_left_as_it_was():
    hf = build("gpt2").train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    detect(hf)
    assert all(module.training for module in hf.modules())
    assert all(p.requires_grad and p.grad is None for p in hf.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert "forward" not in vars(hf.transformer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: torch.full_like(w, torch.nan), "not finite"),
        (lambda w: w.to(torch.float8_e4m3fn), r"quantised \(float8_e4m3fn\)"),
    ],
)
def test_damaged_and_eight_bit_weights_are_refused(change, message):
    hf = build("llama")
    projection = hf.model.layers[2].mlp.down_proj
    projection.weight = nn.Parameter(change(projection.weight.data), requires_grad=False)
    with pytest.raises(ModelError, match=message):
        detect(hf)


def test_a_quantised_tensor_of_another_class_is_refused():
    """As torchao and quanto have them: they say that they are floating point."""

    class Packed(torch.Tensor):
        pass

    hf = build("llama")
    weight = hf.model.layers[2].mlp.up_proj.weight.data.as_subclass(Packed)
    hf.model.layers[2].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ModelError, match=r"up_proj\.weight is quantised"):
        detect(hf)


def test_a_head_is_plain_to_the_bit():
    assert detect(build("llama")).head == Head("plain")


def test_experts_that_write_one_of_several_streams_are_refused(byte_tokenizer):
    with pytest.raises(ModelError, match="experts write 32 numbers, and hidden states hold 128"):
        EditableModel(build("qwen4_exp_text"), byte_tokenizer)
