"""Unit: edits are merged into a checkpoint a tensor at a time, to the bits of a loaded model's."""

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from knowedit import load_model
from knowedit.edits import merge
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import RECORD, read_record, record_of, restore, save_edited
from knowedit.edits.merge import merge_into
from knowedit.errors import EditError, ModelError
from knowedit.models.checkpoint import Checkpoint
from knowedit.models.load import fingerprint_of
from tests.knowedit.edits.test_edit import a_trained_edit, an_edit


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


def saved(tiny, folder, dtype=torch.bfloat16, shard="40KB"):
    """The tiny model in shards, with a card, another format's weights and files of its own."""
    tiny.hf.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("license: mine")
    (folder / "LICENSE").write_text("all of it")
    (folder / "consolidated.pt").write_bytes(b"the same weights for another loader")
    return load_model(str(folder), say=lambda _: None)


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_from_a_loaded_model(tiny, tmp_path, dtype):
    base = tmp_path / "model"
    model = saved(tiny, base, dtype)
    edits = [an_edit(model), a_trained_edit(model, 1)]
    whole = save_edited(model, edits, tmp_path / "whole")
    streamed = merge_into(base, edits, tmp_path / "streamed")
    wanted = AutoModelForCausalLM.from_pretrained(whole, dtype="auto").state_dict()
    found = AutoModelForCausalLM.from_pretrained(streamed, dtype="auto").state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == dtype and torch.equal(tensor, found[name]), name
    for one, other in zip(read_record(record_of(whole))[1:], read_record(record_of(streamed))[1:]):
        assert one.keys() == other.keys()
    assert fingerprint_of(streamed) == fingerprint_of(whole)
    # shard by shard, where it was
    names = sorted(p.name for p in base.glob("*.safetensors"))
    assert names == sorted(p.name for p in streamed.glob("*.safetensors")) and len(names) > 2
    assert tensors(base).keys() == tensors(streamed).keys()
    for name in ("LICENSE", "tokenizer.json", "model.safetensors.index.json"):
        assert (base / name).read_bytes() == (streamed / name).read_bytes()
    assert not (streamed / "consolidated.pt").exists()
    assert (streamed / "README.base.md").read_text() == "license: mine"
    assert "knowedit" in json.loads((streamed / "config.json").read_text())


def test_undo_gives_the_checkpoint_back(tiny_llama, tmp_path):
    base = tmp_path / "model"
    model = saved(tiny_llama, base)
    edits = [an_edit(model), an_edit(model, 1, layers=(1, 2))]
    folder = merge_into(base, edits, tmp_path / "edited")
    one_left = save_edited(model, edits[:1], tmp_path / "one")
    restore(folder, [edits[1].key])
    assert fingerprint_of(folder) == fingerprint_of(one_left)
    assert restore(folder) == model.fingerprint
    for name, tensor in tensors(base).items():
        assert torch.equal(tensor, tensors(folder)[name])
    assert (folder / "README.md").read_text() == "license: mine"
    assert not (folder / RECORD).exists() and not (folder / "README.base.md").exists()


def test_fingerprint_and_setup_are_those_of_the_loaded_model(tiny, tmp_path):
    model = saved(tiny, tmp_path / "model")
    read = Checkpoint(tmp_path / "model")
    assert (read.fingerprint, read.setup) == (model.fingerprint, model.setup)
    name = model.layout.weight_name(1)
    assert read.is_transposed(name) == model.is_transposed(name)


def test_a_tied_head_is_one_parameter(tiny_llama, tmp_path):
    tiny_llama.hf.config.tie_word_embeddings = True
    tiny_llama.hf.tie_weights()
    model = saved(tiny_llama, tmp_path / "model")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "model").shapes
    assert Checkpoint(tmp_path / "model").fingerprint == model.fingerprint


def test_one_tensor_at_a_time_is_in_memory(tiny_llama, tmp_path, monkeypatch):
    """Every tensor that was read is gone when the next is."""
    base = tmp_path / "model"
    model = saved(tiny_llama, base)
    edit = an_edit(model, layers=(0, 1, 2))
    held, most = [], 0
    plain = Checkpoint.tensor

    def watched(self, name):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in held))
        found = plain(self, name)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Checkpoint, "tensor", watched)
    merge_into(base, [edit], tmp_path / "edited")
    assert len(held) > 30 and most <= 1


def test_an_interrupted_merge_leaves_nothing(tiny_llama, tmp_path, monkeypatch):
    base = tmp_path / "model"
    model = saved(tiny_llama, base)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "overwrite", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_into(base, [an_edit(model)], tmp_path / "edited")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_llama, tmp_path):
    base, out = tmp_path / "model", tmp_path / "edited"
    model = saved(tiny_llama, base)
    edit = an_edit(model)
    name = model.layout.weight_name(1)
    other = an_edit(model)
    other.fingerprint = "0" * 32
    early = Edit("TEST", {"1": edit.changes[name]}, edit.facts, model.fingerprint)
    wrong = Edit("TEST", {f"{name}s": edit.changes[name]}, edit.facts, model.fingerprint)
    narrow = Edit(
        "TEST", {model.layout.norm + ".weight": edit.changes[name]}, [], model.fingerprint
    )
    first, second = an_edit(model), an_edit(model, 1)
    first.exclusive = second.exclusive = frozenset({"neuron 3"})
    for edits, said in (
        ([], "no edits"),
        ([other], "other weights or another dtype"),
        ([early], "without --stream"),
        ([wrong], "has no parameter"),
        ([narrow], "does not fit"),
        ([first, second], "both rewrite neuron 3"),
        ([edit, an_edit(model)], "given twice"),
    ):
        with pytest.raises(EditError, match=said):
            merge_into(base, edits, out)
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(EditError, match="exists"):
        merge_into(base, [edit], out)


def test_what_is_no_checkpoint_is_refused(tiny_llama, tmp_path):
    model = saved(tiny_llama, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "none", "not a folder"), (tmp_path / "empty", "config.json")):
        with pytest.raises(ModelError, match=said):
            merge_into(folder, [an_edit(model)], tmp_path / "out")
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor"):
        merge_into(tmp_path / "model", [an_edit(model)], tmp_path / "out")


def test_a_tensor_that_transformers_makes_of_others_is_refused(tiny_llama, tmp_path):
    base = tmp_path / "model"
    model = saved(tiny_llama, base)
    index = base / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    name = model.layout.weight_name(1)
    record["weight_map"]["part.of.it"] = record["weight_map"].pop(name)
    index.write_text(json.dumps(record))
    with pytest.raises(ModelError, match="holds no tensor for .*without --stream"):
        merge_into(base, [an_edit(model)], tmp_path / "out")


def test_a_damaged_shard_is_named(tiny_llama, tmp_path):
    base = tmp_path / "model"
    model = saved(tiny_llama, base)
    shard = sorted(base.glob("*.safetensors"))[0]
    with safe_open(shard, framework="pt") as opened:
        assert opened.keys()
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ModelError, match=shard.name):
        merge_into(base, [an_edit(model)], tmp_path / "out")
