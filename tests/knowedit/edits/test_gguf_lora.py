"""Unit: a GGUF adapter holds llama.cpp's names and shapes, and the edit's own update."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from knowedit.edits.changes import Dense, LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.export.gguf_lora import write
from knowedit.edits.llamacpp import LlamaCpp
from knowedit.errors import EditError
from tests.knowedit.edits.test_edit import an_edit


def read(path):
    """Fields by name, and of each matrix the update that llama.cpp adds: alpha / rank times
    lora_b lora_a, where rank is the first dimension of lora_b.
    """
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    held = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for name in held:
        if name.endswith(".lora_a"):
            a, b = held[name].data, held[f"{name[:-1]}b"].data
            scale = fields["adapter.lora.alpha"] / int(held[f"{name[:-1]}b"].shape[0])
            found[name.removesuffix(".lora_a")] = scale * (b @ a)
    assert len(held) == 2 * len(found)
    return fields, found


@pytest.mark.parametrize("tiny,arch", [("tiny_llama", "llama"), ("tiny_gpt2", "gpt2")])
def test_the_update_by_llama_cpps_names(request, tiny, arch, tmp_path):
    model = request.getfixturevalue(tiny)
    edits = [an_edit(model, layers=(1, 2), rank=2), an_edit(model, 1, layers=(1,), rank=3)]
    fields, found = read(write(model, edits, tmp_path / "lora.gguf"))
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == arch
    said = json.loads(fields["knowedit.edits"])
    assert [one["key"] for one in said] == [edit.key for edit in edits]
    assert said[0]["facts"] == [edits[0].facts[0].to_dict()]
    wanted = {
        "blk.1.ffn_down.weight": edits[0].delta(1) + edits[1].delta(1),
        "blk.2.ffn_down.weight": edits[0].delta(2),
    }
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():  # [out, in], also where transformers stores the transpose
        np.testing.assert_allclose(found[name], delta.numpy(), rtol=1e-4, atol=1e-5)


def rotated(rows, positions, interleaved):
    """`[heads, size]` turned by a position, in either order of the rotary halves."""
    size = rows.shape[1]
    angle = positions * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    first = rows[:, 0::2] if interleaved else rows[:, : size // 2]
    second = rows[:, 1::2] if interleaved else rows[:, size // 2 :]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return turned


@pytest.mark.parametrize("module,heads", [("q_proj", 4), ("k_proj", 2)])
def test_queries_and_keys_of_llama_alternate(tiny_llama, tmp_path, module, heads):
    name = f"model.layers.1.self_attn.{module}.weight"
    generator = torch.Generator().manual_seed(0)
    rows, columns = tiny_llama.stored(name).shape
    change = LowRank(*(torch.randn(n, 2, generator=generator) for n in (rows, columns)))
    edit = Edit("TEST", {name: change}, [], tiny_llama.fingerprint)
    _, found = read(write(tiny_llama, [edit], tmp_path / "lora.gguf"))
    (delta,) = found.values()
    x = torch.randn(columns, dtype=torch.float64, generator=generator)
    theirs = (torch.from_numpy(delta).double() @ x).view(heads, -1)
    ours = (change.dense().double() @ x).view(heads, -1)
    assert torch.allclose(rotated(theirs, 3, True), rotated(ours, 3, False), atol=1e-4)


def test_what_it_cannot_hold_is_refused_with_the_reason(tiny_llama, tmp_path):
    path = tmp_path / "lora.gguf"
    name = tiny_llama.layout.weight_name(1)
    dense = an_edit(tiny_llama)
    dense.changes[name] = Dense(torch.zeros(32, 48))
    head = an_edit(tiny_llama)
    head.changes["lm_head.weight"] = LowRank(torch.ones(258, 1), torch.ones(32, 1))
    embedding = an_edit(tiny_llama)
    embedding.changes["model.embed_tokens.weight"] = head.changes["lm_head.weight"]
    ends = "is the embeddings or the head: .*knowedit apply"
    cases = ((dense, "densely"), (head, f"lm_head.weight {ends}"))
    for edits, said in (*cases, (embedding, f"embed_tokens.weight {ends}")):
        with pytest.raises(EditError, match=said):
            write(tiny_llama, [edits], path)
    with pytest.raises(EditError, match="holds model.other.weight in another way"):
        LlamaCpp(tiny_llama).name("model.other.weight")
    tiny_llama.hf.config.model_type = "unheard_of"
    with pytest.raises(EditError, match="'unheard_of' is not known"):
        write(tiny_llama, [an_edit(tiny_llama)], path)
    tiny_llama.hf.config.model_type = "llama"
    assert not path.exists()
    write(tiny_llama, [an_edit(tiny_llama)], path)
    with pytest.raises(EditError, match="exists"):
        write(tiny_llama, [an_edit(tiny_llama)], path)
