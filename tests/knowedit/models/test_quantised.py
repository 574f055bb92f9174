"""Checkpoints with quantised weights as the floats that they stand for (unit)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import knowedit as ke
from knowedit.errors import ModelError
from knowedit.models.quantised import dequantise
from tests.knowedit.models.tiny import build

IDS = torch.arange(3, 15)[None]


class Int8Linear(nn.Module):
    """Rows of integers, each with a scale; it may round its inputs, too."""

    def __init__(self, linear, step=0.0):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.scale, self.step, self.bias = scale, step, linear.bias

    def forward(self, x):
        if self.step:
            size = x.abs().amax(-1, keepdim=True).clamp(min=1e-9)
            x = (x / size / self.step).round() * size * self.step
        y = x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T
        return y if self.bias is None else y + self.bias


def quantise(hf, step=0.0):
    """The MLPs of a tiny model held as integers."""
    for path, module in list(hf.named_modules()):
        if isinstance(module, nn.Linear) and ".mlp." in path:
            hf.set_submodule(path, Int8Linear(module, step))
    return hf


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # without biases, and with
@torch.no_grad()
def test_layers_are_what_they_make_of_unit_vectors(family, byte_tokenizer):
    hf = quantise(build(family))
    wanted = hf(IDS).logits
    with pytest.raises(ModelError, match="dequantise=True"):
        ke.load_model(hf, tokenizer=byte_tokenizer)
    assert dequantise(hf) < 1e-5
    assert not any(isinstance(module, Int8Linear) for module in hf.modules())
    torch.testing.assert_close(hf(IDS).logits, wanted)
    assert ke.load_model(hf, tokenizer=byte_tokenizer).layout.editable


@torch.no_grad()
def test_layers_that_round_their_inputs_are_told(caplog):
    assert 1e-4 < dequantise(quantise(build("llama"), step=1 / 127)) < 0.05
    assert "round their inputs" in caplog.text


@torch.no_grad()
def test_the_rounding_of_the_models_own_dtype_is_not_told(caplog):
    assert dequantise(quantise(build("llama").to(torch.bfloat16))) > 1e-4
    assert "round their inputs" not in caplog.text


def test_what_is_not_linear_is_refused():
    class Squares(Int8Linear):
        def forward(self, x):
            return super().forward(x).square()

    hf = build("llama")
    hf.model.layers[0].mlp.up_proj = Squares(hf.model.layers[0].mlp.up_proj)
    with pytest.raises(ModelError, match="layers.0.mlp.up_proj .* not near a linear layer"):
        dequantise(hf)


def test_what_does_not_run_here_is_refused():
    class Elsewhere(Int8Linear):
        def forward(self, x):
            raise RuntimeError("needs another machine")

    hf = build("llama")
    hf.model.layers[1].mlp.up_proj = Elsewhere(hf.model.layers[1].mlp.up_proj)
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj .*needs another machine"):
        dequantise(hf)


@torch.no_grad()
def test_a_checkpoint_of_8_bit_floats_is_edited_as_a_copy(byte_tokenizer, tmp_path):
    folder, plain = tmp_path / "fp8", build("llama")
    plain.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    held = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            scale = tensor.abs().max() / 448
            held[name] = (tensor / scale).to(torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            held[name] = tensor
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match="--dequantise"):
        ke.load_model(folder)
    model = ke.load_model(folder, dequantise=True, dtype=torch.float32)
    found = model.weight(1)
    name = model.layout.weight_name(1)
    wanted = held[name].float() * held[f"{name}_scale_inv"]
    torch.testing.assert_close(found, wanted)
    # saved, the copy is a plain model
    model.hf.save_pretrained(tmp_path / "copy")
    byte_tokenizer.save_pretrained(tmp_path / "copy")
    assert torch.equal(ke.load_model(tmp_path / "copy").weight(1), found)


#: What four bits stand for (OCP Microscaling Formats 1.0, FP4 E2M1); the upper half is negative.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = torch.cat([FP4, -FP4])


@torch.no_grad()
def test_a_checkpoint_of_mxfp4_experts_is_edited_as_a_copy(byte_tokenizer, tmp_path):
    """As gpt-oss is published: blocks of 32 inputs as two numbers a byte, behind a power of two."""
    folder = tmp_path / "mxfp4"
    plain = build("gpt_oss", intermediate_size=64)
    plain.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    held, wanted, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            held[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32, 16)
        packed = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        powers = torch.randint(119, 123, shape[:3], generator=generator, dtype=torch.uint8)
        pairs = torch.stack([FP4[(packed & 15).long()], FP4[(packed >> 4).long()]], -1).flatten(-2)
        numbers = pairs * 2.0 ** (powers.float() - 127)[..., None]
        wanted[name] = numbers.flatten(-2).mT
        held[f"{name}_blocks"], held[f"{name}_scales"] = packed, powers
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match="mxfp4.*--dequantise"):
        ke.load_model(folder)
    model = ke.load_model(folder, dequantise=True, dtype=torch.float32)
    name = model.layout.weight_name(1)
    torch.testing.assert_close(model.weight(1).float(), wanted[name])
    experts = model.layout.experts(1)
    assert experts.transposed and experts.bias and experts.width == 64
