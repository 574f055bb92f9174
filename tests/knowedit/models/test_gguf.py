"""GGUF files as models: converted once, and what transformers dequantised can be saved (unit)."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import knowedit as ke
from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import save_edited
from knowedit.errors import ModelError
from knowedit.models.gguf import as_plain, is_gguf

HIDDEN, KEYS, VOCABULARY = 32, 64, 259


@pytest.fixture
def gguf_file(tmp_path, byte_tokenizer, monkeypatch):
    """A Llama of two layers, its matrices in Q8_0."""
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(KEYS)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(byte_tokenizer.get_vocab(), key=byte_tokenizer.get_vocab().get)
    writer.add_token_list([*tokens, "ab"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(257)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN)}
    for i in range(2):
        square = {f"blk.{i}.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")}
        up = {f"blk.{i}.ffn_{part}": (KEYS, HIDDEN) for part in ("gate", "up")}
        shapes |= square | up | {f"blk.{i}.ffn_down": (HIDDEN, KEYS)}
    made = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = gguf.quants.quantize(
            made.normal(0, 0.3, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor(f"{name}.weight", values, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(2) for n in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def an_edit(model):
    """Of rank one, in layer 1."""
    torch.manual_seed(0)
    rows, columns = model.weight(1).shape
    change = LowRank(torch.randn(rows, 1), torch.randn(columns, 1))
    return Edit("TEST", {model.layout.weight_name(1): change}, [], model.fingerprint)


def test_a_part_of_a_file_is_refused(gguf_file, tmp_path):
    part = tmp_path / "tiny-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 2)
    for tensor in gguf.GGUFReader(gguf_file).tensors[:5]:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="one of 2 parts of a file; join them first"):
        ke.load_model(part)


def test_a_file_is_a_model_and_converted_once(gguf_file):
    said: list[str] = []
    first = ke.load_model(gguf_file, say=said.append)
    again = ke.load_model(str(gguf_file), say=said.append)
    assert len(said) == 1 and first.fingerprint == again.fingerprint
    assert first.dtype == torch.float32 and not hasattr(first.hf.config, "quantization_config")
    made = np.random.default_rng(0).normal(0, 0.3, (VOCABULARY, HIDDEN)).astype(np.float32)
    found = first.hf.get_input_embeddings().weight.numpy()
    assert abs(found - made).max() < 0.3 * 5 / 127  # half a step of Q8_0 at five deviations
    assert first.row("cab").ids == [first.tokenizer.get_vocab()["c"], 258]


def test_a_model_that_transformers_dequantised_is_saved(gguf_file, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    hf = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = ke.EditableModel(hf, AutoTokenizer.from_pretrained(**source))
    before = model.weight(1).clone()
    edit = an_edit(model)
    save_edited(model, [edit], tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(saved - before, edit.delta(1, model), rtol=1e-4, atol=1e-5)
    assert hf.hf_quantizer is not None  # the model in memory stays as it was
    assert ke.load_model(tmp_path / "out").hf.config.to_dict().get("quantization_config") is None


def test_other_models_are_saved_as_they_are(tiny_llama):
    before = dict(vars(tiny_llama.hf))
    with as_plain(tiny_llama.hf):
        assert vars(tiny_llama.hf) == before


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and no more")
    assert is_gguf(path) and not is_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match=r"cannot read .*broken\.gguf"):
        ke.load_model(path, say=lambda _: None)
