"""Unit: a GGUF file is copied with the edited tensors alone changed, each in a type that keeps the
edit.
"""

import json

import gguf
import numpy as np
import pytest
import torch

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.gguf_model import KEPT, write_gguf
from knowedit.edits.llamacpp import LlamaCpp
from knowedit.errors import EditError
from knowedit.models.editable import EditableModel
from tests.knowedit.edits.test_edit import an_edit

TYPES = gguf.GGMLQuantizationType


def quantised(model, path, kind):
    """The model's `down_proj` and `q_proj` as a GGUF file in one type, and the model with the
    weights that the file then holds.
    """
    theirs = LlamaCpp(model)
    writer = gguf.GGUFWriter(path, theirs.arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé"])
    writer.add_float32("some.figure", 0.5)
    for layer in range(4):
        for module in ("mlp.down_proj", "self_attn.q_proj"):
            name = f"model.layers.{layer}.{module}.weight"
            weight = model.stored(name).detach()
            data = gguf.quantize(weight.numpy(), kind)
            with torch.no_grad():
                weight.copy_(torch.from_numpy(gguf.dequantize(data, kind).copy()))
            rows = theirs.rows(name, weight).contiguous().numpy()
            data = gguf.quantize(rows, kind)
            assert np.array_equal(gguf.dequantize(data, kind), rows)
            writer.add_tensor(theirs.name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def held(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture
def wide_llama(tiny_llama):
    """With rows of whole blocks: keys of 64."""
    from transformers import LlamaForCausalLM

    from knowedit.models.editable import EditableModel

    config = tiny_llama.hf.config
    config.intermediate_size = 64
    torch.manual_seed(1)
    return EditableModel(LlamaForCausalLM(config).eval(), tiny_llama.tokenizer, name="wide")


def of_size(model, name, size):
    """An edit of rank one whose update has `size` times the weight's norm."""
    weight = model.stored(name).detach()
    generator = torch.Generator().manual_seed(2)
    U, V = (torch.randn(n, 1, generator=generator) for n in weight.shape)
    U *= size * weight.norm() / (U.norm() * V.norm())
    return Edit("TEST", {name: LowRank(U, V)}, an_edit(model).facts, model.fingerprint)


@pytest.mark.parametrize(
    "kind, size, now",
    [
        (TYPES.Q8_0, 0.5, "Q8_0"),
        (TYPES.Q4_1, 0.1, "Q8_0"),  # four bits move a weight as far as this edit does
        (TYPES.Q8_0, 0.01, "F16"),
        (TYPES.F16, 0.1, "F16"),
        (TYPES.F32, 0.1, "F32"),
    ],
)
@pytest.mark.parametrize("module", ["mlp.down_proj", "self_attn.q_proj"])
def test_the_edited_tensor_alone_differs(wide_llama, tmp_path, kind, size, now, module):
    source = quantised(wide_llama, tmp_path / "model.gguf", kind)
    name = f"model.layers.1.{module}.weight"
    edit = of_size(wide_llama, name, size)
    (written,) = write_gguf(wide_llama, [edit], source, tmp_path / "edited.gguf")
    assert (written.was, written.now) == (kind.name, now) and written.rounded <= KEPT
    (before, was), (after, found) = held(source), held(tmp_path / "edited.gguf")
    said = json.loads(after.pop("knowedit.edits"))
    assert said[0]["facts"] == [edit.facts[0].to_dict()]
    assert {n: v for n, v in after.items() if not n.startswith("GGUF")} == {
        n: v for n, v in before.items() if not n.startswith("GGUF")
    }
    assert list(found) == list(was)
    for called, tensor in found.items():
        if called != written.name:
            assert tensor.tensor_type == kind and np.array_equal(tensor.data, was[called].data)
    with edit.applied_to(wide_llama):
        wanted = LlamaCpp(wide_llama).rows(name, wide_llama.stored(name).detach().clone()).numpy()
    got = gguf.dequantize(found[written.name].data, found[written.name].tensor_type)
    moved = edit.delta(name).norm()
    assert np.linalg.norm(got - wanted) <= KEPT * moved


def test_a_type_without_an_encoder_becomes_one_with(wide_llama, tmp_path, monkeypatch):
    source = quantised(wide_llama, tmp_path / "model.gguf", TYPES.Q8_0)
    encode = gguf.quantize

    def lacks(data, kind):
        if kind == TYPES.Q8_0:
            raise NotImplementedError
        return encode(data, kind)

    monkeypatch.setattr(gguf, "quantize", lacks)
    (written,) = write_gguf(wide_llama, [an_edit(wide_llama)], source, tmp_path / "edited.gguf")
    assert str(written).startswith("blk.1.ffn_down.weight: Q8_0 -> F16; rounding is 0.")


def test_an_edited_file_is_edited_again(wide_llama, tmp_path):
    source, once = quantised(wide_llama, tmp_path / "model.gguf", TYPES.F32), tmp_path / "once.gguf"
    first = an_edit(wide_llama)
    write_gguf(wide_llama, [first], source, once)
    with first.applied_to(wide_llama):
        now = wide_llama.stored(wide_llama.layout.weight_name(1)).clone()
    with torch.no_grad():  # as the edited file is loaded
        wide_llama.stored(wide_llama.layout.weight_name(1)).copy_(now)
    model = EditableModel(wide_llama.hf, wide_llama.tokenizer, name="once")
    second = an_edit(model, 1, layers=(2,))
    write_gguf(model, [second], once, tmp_path / "twice.gguf")
    fields, _ = held(tmp_path / "twice.gguf")
    assert [one["key"] for one in json.loads(fields["knowedit.edits"])] == [first.key, second.key]


def test_another_file_is_refused_and_nothing_is_written(wide_llama, tiny_llama, tmp_path):
    source = quantised(wide_llama, tmp_path / "model.gguf", TYPES.F32)
    edit, out = an_edit(wide_llama), tmp_path / "edited.gguf"
    with torch.no_grad():
        wide_llama.stored("model.layers.1.mlp.down_proj.weight").mul_(1.1)
    edit.fingerprint = wide_llama.fingerprint
    with pytest.raises(EditError, match="does not hold the weights of wide in blk.1.ffn_down"):
        write_gguf(wide_llama, [edit], source, out)
    with pytest.raises(EditError, match="no edits"):
        write_gguf(wide_llama, [], source, out)
    assert not out.exists()
    out.touch()
    with pytest.raises(EditError, match="exists"):
        write_gguf(wide_llama, [edit], source, out)
