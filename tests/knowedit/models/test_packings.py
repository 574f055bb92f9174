"""GPTQ's and AWQ's files as floats, against packings written here, bit by bit (unit)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import knowedit as ke
from knowedit.errors import ModelError
from knowedit.models.packings import awq_weight, gptq_weight, packing_of
from tests.knowedit.models.tiny import build

IN, OUT, GROUP = 96, 32, 16
MLPS = ("mlp", "experts", "feed_forward")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output at each place of a word
IDS = torch.arange(3, 15)[None]


def words(bits_of):
    """int32 words `[n, words]` of bits `[n, 32 * words]`, the lowest first."""
    value = (bits_of.reshape(len(bits_of), -1, 32).long() << torch.arange(32)).sum(-1)
    return torch.where(value >= 2**31, value - 2**32, value).int()


def stream(numbers, bits):
    """Rows of numbers, one after the other, as words."""
    return words(((numbers.long()[..., None] >> torch.arange(bits)) & 1).flatten(1))


def quantised(weight, bits, group=GROUP):
    """Of `weight` `[out, in]`: q `[in, out]`, zeros and scales `[groups, out]`."""
    rows = weight.float().T.reshape(-1, group, len(weight))
    low, high = rows.amin(1), rows.amax(1)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    q = (rows / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1)
    return q.flatten(0, 1).int(), zeros.int(), scales.half()


def as_gptq(weight, bits, layout="gptq", order=None):
    """The parts of a layer in GPTQ's layout, and the floats that it stands for."""
    order = torch.arange(weight.shape[1]) if order is None else order
    q, zeros, scales = quantised(weight[:, order], bits)
    group = torch.arange(len(order)) // GROUP
    floats = torch.empty_like(weight, dtype=torch.float32)
    floats[:, order] = ((q - zeros[group]).float() * scales.float()[group]).T
    g_idx, in_place = torch.empty_like(group), torch.empty_like(q)
    g_idx[order], in_place[order] = group, q
    held = (zeros - 1) % 2**bits if layout == "gptq" else zeros
    parts = {
        "qweight": stream(in_place.T, bits).T.contiguous(),
        "qzeros": stream(held, bits),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return parts, floats


def as_awq(weight):
    """The same in AWQ's."""
    q, zeros, scales = quantised(weight, 4)
    group = torch.arange(len(q)) // GROUP
    floats = ((q - zeros[group]).float() * scales.float()[group]).T

    def eights(numbers):
        return stream(numbers.reshape(len(numbers), -1, 8)[..., AWQ_ORDER].flatten(1), 4)

    return {"qweight": eights(q), "qzeros": eights(zeros), "scales": scales}, floats.contiguous()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_words_are_a_stream_of_bits(bits, layout):
    torch.manual_seed(bits)
    weight, order = torch.randn(OUT, IN), torch.randperm(IN)
    parts, wanted = as_gptq(weight, bits, layout, order)
    assert parts["qweight"].shape == (IN * bits // 32, OUT)
    found = gptq_weight(**parts, zeros_less_one=layout == "gptq")
    assert torch.equal(found, wanted)
    assert float((wanted - weight).abs().max()) < 6 / (2**bits - 1)  # it is that matrix


def test_gptq_groups_without_g_idx_are_neighbours():
    parts, wanted = as_gptq(torch.randn(OUT, IN), 4)
    del parts["g_idx"]
    assert torch.equal(gptq_weight(**parts, zeros_less_one=True), wanted)


def test_awq_words_are_eight_outputs_the_even_ones_first():
    parts, wanted = as_awq(torch.randn(OUT, IN))
    assert parts["qweight"].shape == (IN, OUT // 8)
    assert torch.equal(awq_weight(**parts), wanted)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"scales": torch.ones(6, 31)}, "bits"),
        ({"scales": torch.ones(2, OUT)}, "2 groups"),
        ({"g_idx": torch.full((IN,), 6)}, "96 numbers of 6 groups"),
        ({"g_idx": torch.zeros(5).int()}, "96 numbers of 6 groups"),
        ({"g_idx": torch.arange(IN) / GROUP}, "96 numbers of 6 groups"),
        ({"g_idx": torch.zeros(IN).int()}, "96 inputs into one group and 0 into another"),
        ({"g_idx": torch.arange(IN).clamp(max=5)}, "91 inputs into one group and 1 into another"),
        ({"qweight": torch.zeros(12, OUT, dtype=torch.int16)}, "words of int32"),
        ({"qzeros": torch.zeros(6, 4, dtype=torch.int64)}, "words of int32"),
    ],
)
def test_parts_that_do_not_fit_are_told(change, said):
    parts = as_gptq(torch.randn(OUT, IN), 4)[0] | change
    with pytest.raises(ValueError, match=said):
        gptq_weight(**parts, zeros_less_one=True)


class Record:
    """A configuration of one thing."""

    def __init__(self, **record):
        self.quantization_config = record

    def get_text_config(self):
        return self


@pytest.mark.parametrize(
    "record, layout",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, None),
        ({"quant_method": "awq", "version": "GEMM"}, "awq"),
        ({"quant_method": "awq", "version": "gemv"}, None),
        ({"quant_method": "awq", "bits": 8}, None),
        ({"quant_method": "fp8"}, None),
    ],
)
def test_only_layouts_that_are_known_are_unpacked(record, layout):
    assert packing_of(Record(**record)) == layout


# -- a whole checkpoint


def packed_folder(family, method, folder, tokenizer):
    """A folder in which matrices of the MLPs, also of single experts, are packed; and the model of
    their floats.
    """
    hf = build(family)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copytree(folder, folder / "floats")
    plain = load_file(folder / "model.safetensors")
    tensors = dict(plain)
    for name in plain:
        path, of_mlp = name.removesuffix(".weight"), any(f".{m}." in name for m in MLPS)
        if of_mlp and plain[name].ndim == 2 and len(plain[name]) % 8 == 0:
            parts, plain[name] = as_awq(plain[name]) if method == "awq" else as_gptq(plain[name], 4)
            del tensors[name]
            tensors |= {f"{path}.{part}": value for part, value in parts.items()}
    assert len(tensors) > len(plain)
    for place, held in ((folder, tensors), (folder / "floats", plain)):
        save_file(held, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, type(hf).from_pretrained(folder / "floats")


@pytest.fixture(params=["gptq", "awq"])
def packed(request, tmp_path, byte_tokenizer):
    """A llama's."""
    return packed_folder("llama", request.param, tmp_path, byte_tokenizer)


@pytest.mark.parametrize("family", ["mixtral", "olmo2", "granite", "gemma3"])
def test_other_families_are_packed_alike(family, tmp_path, byte_tokenizer):
    """Experts that transformers fuses, norms behind the MLP, scaled logits, a model of pictures."""
    folder, wanted = packed_folder(family, "gptq", tmp_path, byte_tokenizer)
    model = ke.load_model(folder, dtype="float32", dequantise=True)
    assert type(model.hf) is type(wanted)
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.hf.state_dict()[name], value), name


@torch.no_grad()
def test_a_checkpoint_is_the_floats_that_it_stands_for(packed):
    folder, wanted = packed
    with pytest.raises(ModelError, match="quantised .*dequantise=True"):
        ke.load_model(folder)
    model = ke.load_model(folder, dtype="float32", dequantise=True)
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.hf.state_dict()[name], value), name
    torch.testing.assert_close(model.hf(IDS).logits, wanted(IDS).logits)
    assert model.source == str(folder)
    assert not hasattr(model.hf.config, "quantization_config")


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_checkpoint_without_a_part_is_refused(packed, part):
    folder, _ = packed
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith(f"down_proj.{part}"))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"down_proj is packed and has no {part}"):
        ke.load_model(folder, dequantise=True)


def test_a_layer_both_packed_and_plain_is_refused(packed):
    folder, _ = packed
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="layers.1.mlp.down_proj packed and as floats"):
        ke.load_model(folder, dequantise=True)


def test_a_checkpoint_that_lacks_tensors_is_refused(packed):
    folder, _ = packed
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "layers.1." not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"lacks \d+ tensors of a LlamaForCausalLM"):
        ke.load_model(folder, dequantise=True)


@pytest.mark.parametrize("packed", ["gptq"], indirect=True)
def test_an_act_order_that_is_lost_is_refused(packed):
    folder, _ = packed
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert ke.load_model(folder, dtype="float32", dequantise=True)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith(".g_idx")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="by act-order and has no g_idx"):
        ke.load_model(folder, dequantise=True)


def reconfigured(folder, **changes):
    """Another `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"bits": 8}, "of 4 bits, and config.json says 8"),
        ({"group_size": 8}, "6 groups of at most 16, and config.json says 8"),
        ({"group_size": -1}, "6 groups of at most 16, and config.json says -1"),
        ({"group_size": "16"}, "quantization_config.group_size is '16', not a whole number"),
        ({"bits": [4]}, r"quantization_config.bits is \[4\], not a whole number"),
        ({"checkpoint_format": ["gptq"]}, r"checkpoint_format is \['gptq'\], not a name"),
    ],
)
@pytest.mark.parametrize("packed", ["gptq"], indirect=True)
def test_a_configuration_that_contradicts_the_files_is_refused(packed, changes, said):
    folder, _ = packed
    reconfigured(folder, **changes)
    with pytest.raises(ModelError, match=said.replace("6 groups", r"\d groups")):
        ke.load_model(folder, dequantise=True)


@pytest.mark.parametrize("packed", ["awq"], indirect=True)
def test_a_group_size_of_awq_is_compared_too(packed):
    folder, _ = packed
    reconfigured(folder, group_size=8)
    with pytest.raises(ModelError, match="of at most 16, and config.json says 8 to a group"):
        ke.load_model(folder, dequantise=True)


@pytest.mark.parametrize("packed", ["gptq"], indirect=True)
def test_settings_of_single_layers_are_left_to_the_files(packed):
    folder, _ = packed
    reconfigured(folder, bits=8, dynamic={"+:.*mlp.*": {"bits": 4}})
    assert ke.load_model(folder, dequantise=True)


def test_damaged_experts_are_refused(tmp_path, byte_tokenizer):
    """What transformers fuses is checked before it does."""
    folder, _ = packed_folder("mixtral", "gptq", tmp_path, byte_tokenizer)
    whole = load_file(folder / "model.safetensors")
    name = next(name for name in whole if "experts.1." in name and name.endswith(".g_idx"))
    for part, value, said in (
        ("g_idx", torch.zeros_like(whole[name]), "inputs into one group and 0|says 16 to a group"),
        ("qweight", None, r"experts\.1\..* is packed and has no qweight"),
        ("scales", whole[name.replace("g_idx", "scales")][:1], "groups"),
    ):
        changed = name.replace("g_idx", part)
        held = {n: t for n, t in whole.items() if n != changed}
        held |= {} if value is None else {changed: value}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            ke.load_model(folder, dequantise=True)
