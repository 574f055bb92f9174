"""What `load_model` makes of the checkpoints that there are: adapters, quantised, sharded, and
of classes without a fused attention (unit).
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import knowedit as ke
from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import restore, save_edited
from knowedit.errors import ModelError
from knowedit.models.checkpoint import Checkpoint
from knowedit.models.load import class_for, fingerprint_of, load_model
from tests.knowedit.models.tiny import build


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """The tiny Llama as a folder."""
    tiny_llama.hf.save_pretrained(tmp_path / "base")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path, folder):
    """A folder with a LoRA adapter of it and nothing else."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
def test_an_adapter_is_merged_and_its_edit_kept(folder, adapter, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    said: list[str] = []
    model = ke.load_model(adapter, say=said.append)
    assert "merged into its base" in said[0] and str(folder) in said[0]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    torch.testing.assert_close(model.hf(IDS).logits, adapted(IDS).logits)
    assert model.source == str(adapter)  # not the base: its weights are others

    torch.manual_seed(2)
    change = LowRank(torch.randn(32, 1), torch.randn(48, 1))
    edit = Edit("TEST", {model.layout.weight_name(2): change}, [], model.fingerprint)
    save_edited(model, [edit], tmp_path / "out")
    with edit.applied_to(model):
        expected = model.hf(IDS).logits
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(written(IDS).logits, expected)
    assert (expected - adapted(IDS).logits).abs().max() > 0.1


def test_an_adapter_without_its_base(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    with pytest.raises(ModelError, match="does not name its base"):
        ke.load_model(adapter)


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes"])
def test_quantised_weights_are_refused_before_they_are_read(folder, method):
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"quantised \({method}\).*original checkpoint"):
        ke.load_model(folder)


@pytest.mark.parametrize("lost", ["layers.1.mlp.down_proj", "layers.3.", "embed_tokens"])
def test_weights_that_lack_a_tensor_are_refused(folder, lost):
    """transformers would draw it at random, another one each time."""
    tensors = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if lost not in name}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"lacks {len(tensors) - len(left)} tensors of a Llama"):
        ke.load_model(folder)


def test_sharded_bfloat16_weights(tiny_llama, tmp_path):
    half = tiny_llama.hf.to(torch.bfloat16)
    half.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_llama.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = ke.load_model(tmp_path)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.hf.parameters(), half.parameters()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_what_the_class_has(attention, byte_tokenizer, tmp_path, monkeypatch):
    """Which classes have it goes by transformers' version."""
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_supports_sdpa", attention == "sdpa")
    build("llama").save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    assert ke.load_model(tmp_path).hf.config._attn_implementation == attention
    if attention == "eager":
        with pytest.raises(ModelError, match="scaled_dot_product_attention"):
            ke.load_model(tmp_path, attn_implementation="sdpa")


@torch.no_grad()
def test_of_a_model_that_sees_pictures_the_text_decoder_is_edited(byte_tokenizer, tmp_path):
    """LLaVA: its checkpoints call the weights otherwise than its modules do; folder and undo."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=258, num_hidden_layers=3, **sizes)
    eyes = CLIPVisionConfig(image_size=28, patch_size=14, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    hf = Llava(LlavaConfig(vision_config=eyes, text_config=text, image_token_id=257))
    hf.save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")

    model = ke.load_model(tmp_path / "base", say=lambda _: None)
    assert type(model.hf) is Llava
    change = LowRank(torch.randn(32, 1), torch.randn(48, 1))
    name = model.layout.weight_name(1)
    assert name == "model.language_model.layers.1.mlp.down_proj.weight"
    edit = Edit("TEST", {name: change}, [], model.fingerprint)
    with edit.applied_to(model):
        wanted = model.hf(IDS).logits
    assert (wanted - model.hf(IDS).logits).abs().max() > 1e-3

    edited = Llava.from_pretrained(save_edited(model, [edit], tmp_path / "edited"))
    torch.testing.assert_close(edited(IDS).logits, wanted)
    before, after = model.hf.state_dict(), edited.state_dict()
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]
    assert restore(tmp_path / "edited") == model.fingerprint


def test_a_type_without_a_class_for_texts_is_opened_by_the_one_it_names():
    from transformers import CLIPConfig, Emu3ForCausalLM, Emu3TextConfig

    config = Emu3TextConfig(architectures=["Emu3ForCausalLM"])
    assert class_for(config) is Emu3ForCausalLM
    with pytest.raises(ModelError, match="no class for texts of models of the type 'clip'"):
        class_for(CLIPConfig())


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig

Path({!r}).touch()


class Own(LlamaConfig):
    model_type = "own"
"""


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_of_a_model_runs_only_where_it_is_asked_for(
    tiny_llama, folder, tmp_path, monkeypatch, what
):
    def asked(*_):
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "py"))
    ran, own = tmp_path / "ran", {"config": "AutoConfig", "tokenizer": "AutoTokenizer"}[what]
    (folder / "own.py").write_text(OWN_CODE.format(str(ran)))
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        record = json.loads(path.read_text())
        record["auto_map"] = {own: "own.Own" if what == "config" else ["own.Own", None]}
        record |= {"model_type": "own"} if what == "config" else {"tokenizer_class": "Own"}
        path.write_text(json.dumps(record))
    loads = [lambda: load_model(str(folder)), lambda: Checkpoint(folder).setup]
    for load in [*loads, lambda: fingerprint_of(folder)] if what == "config" else loads:
        with pytest.raises(ModelError, match="Python code of its own.*trust_remote_code=True"):
            load()
    assert not ran.exists()
    with contextlib.suppress(ModelError):  # it is no whole model; its code has run all the same
        load_model(str(folder), trust_remote_code=True)
    assert ran.exists()


# -- files that hold something else than the model's weights --------------------------------------


def rewritten(folder, **changes):
    """The folder's weights with other tensors added or put in their place."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_integers_are_no_weights(folder, dtype):
    """transformers casts them, and the scales that they need are nowhere."""
    name = "model.layers.1.mlp.down_proj.weight"
    held = load_file(folder / "model.safetensors")[name]
    rewritten(folder, **{name: (held * 10).to(dtype)})
    for opened in (load_model, Checkpoint):
        with pytest.raises(ModelError, match=rf"model\.safetensors: {name} is of .*8"):
            opened(folder)


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv", "qzeros", "g_idx"])
def test_scales_that_no_layer_takes_are_refused(folder, part):
    name = f"model.layers.1.mlp.down_proj.{part}"
    rewritten(folder, **{name: torch.ones(2)})
    with pytest.raises(ModelError, match=f"holds {name}, which is of quantised weights"):
        load_model(folder)


def test_other_tensors_that_no_layer_takes_are_warned_of(folder, caplog):
    rewritten(folder, **{"model.layers.9.extra": torch.ones(2)})
    load_model(folder)
    assert "holds 1 tensors that a LlamaForCausalLM does not take, model.layers.9.e" in caplog.text


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/other.safetensors", "", 7, None])
def test_an_index_names_files_of_its_folder(folder, file):
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for opened in (load_model, Checkpoint):
        with pytest.raises(ModelError, match="damaged weights"):
            opened(folder)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", torch.device("cuda:99")])
def test_a_device_that_is_not_here_is_named_before_a_model_is_read(folder, device, monkeypatch):
    monkeypatch.setattr("knowedit.models.load.resolve", None)
    with pytest.raises(ModelError, match=f"device_map='{device}' cannot be used: .*cpu.*auto"):
        load_model(folder, device_map=device)
