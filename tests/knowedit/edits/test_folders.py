"""An edited folder is a plain model for every loader, says what was edited, and gives back any
of its edits (unit).
"""

import functools
import itertools
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from knowedit import EditableModel, load_model
from knowedit.edits.export import folder as export
from knowedit.edits.export.folder import EARLIER_RECORD, RECORD, record_of, restore, save_edited
from knowedit.errors import EditError, ModelError
from knowedit.io.tensors import read_file, write_file
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.edits.test_edit import a_trained_edit, an_edit


@pytest.fixture
def saved(request, tmp_path) -> EditableModel:
    tiny = request.getfixturevalue(getattr(request, "param", "tiny_llama"))
    tiny.hf.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    return load_model(str(tmp_path / "model"))


def weights(model, edits):
    """The model's parameters with some edits, as they are in memory."""
    for edit in edits:
        edit.apply(model)
    found = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    for edit in edits:
        edit.undo(model)
    return found


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_same_bits(found, wanted):
    assert set(wanted) <= set(found)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def every_safetensors(folder):
    """As servers and converters read a folder without an index, whatever the files' order."""
    for order in itertools.permutations(sorted(folder.rglob("*.safetensors"))):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        for file in order:
            model.load_state_dict(load_file(file), strict=False)
        yield dict(model.named_parameters())


def by_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in index.items()}


@pytest.mark.parametrize("saved", ["tiny_llama", "tiny_gpt2"], indirect=True)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_loader_finds_the_edit(saved, tmp_path, monkeypatch, sharded):
    edits = [an_edit(saved), a_trained_edit(saved, 1)]
    wanted = weights(saved, edits)
    if sharded:
        save = functools.partial(saved.hf.save_pretrained, max_shard_size="40KB")
        monkeypatch.setattr(saved.hf, "save_pretrained", save)
    folder = save_edited(saved, edits, tmp_path / "edited")
    edited = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert_same_bits(dict(edited.named_parameters()), wanted)
    if sharded:
        in_memory = by_index(folder)
        assert len(in_memory) > 3 and len({*folder.glob("*.safetensors")}) > 2
        assert_same_bits(
            {n.removeprefix("transformer."): t for n, t in in_memory.items()},
            {n.removeprefix("transformer."): t for n, t in wanted.items()},
        )
    else:
        for found in every_safetensors(folder):
            assert_same_bits(found, {n: t.float() for n, t in wanted.items()})
    assert restore(folder) == saved.fingerprint


def test_files_are_for_everybody_whom_the_umask_lets_in(saved, tmp_path):
    before = os.umask(0o027)
    try:
        folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
        adapter = an_edit(saved).export(tmp_path / "adapter", saved)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (*folder.iterdir(), *adapter.iterdir())}
    assert modes == {0o640} and stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_the_folder_says_what_was_edited_until_it_is_undone(saved, tmp_path):
    plain = files(tmp_path / "model")
    folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
    card = (folder / "README.md").read_text()
    fact = an_edit(saved).facts[0]
    assert f"| {fact.text} | {fact.target} |" in card and "tags: [knowedit]" in card
    entry = AutoConfig.from_pretrained(folder).knowedit
    assert entry["edits"] == [{"key": an_edit(saved).key, "method": "TEST", "facts": 1}]
    assert load_model(str(folder)).fingerprint != saved.fingerprint
    restore(folder)
    assert files(folder)["config.json"] == plain["config.json"] and set(files(folder)) == set(plain)


def test_a_card_that_was_changed_is_left(saved, tmp_path):
    folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
    (folder / "README.md").write_text("My own words.")
    restore(folder)
    assert (folder / "README.md").read_text() == "My own words."


@pytest.mark.parametrize("saved, taken", [("tiny_llama", 0), ("tiny_gpt2", 2)], indirect=["saved"])
def test_one_of_several_edits_is_taken_back(saved, tmp_path, taken):
    edits = [an_edit(saved), a_trained_edit(saved, 1), an_edit(saved, seed=7, layers=(1, 2))]
    left = edits[:taken] + edits[taken + 1 :]
    folder = save_edited(saved, edits, tmp_path / "edited")
    restore(folder, [edits[taken].key])
    again = save_edited(saved, left, tmp_path / "again")
    assert_same_bits(
        load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    )
    here, there = files(folder), files(again)
    assert here["README.md"] == there["README.md"] and here["config.json"] == there["config.json"]
    assert read_file(folder / RECORD, "knowedit-undo/2", "a record")[0]["edits"] == [
        {"method": e.method_name, "key": e.key, "facts": [f.to_dict() for f in e.facts]}
        for e in left
    ]
    restore(folder, [left[1].key])
    with pytest.raises(EditError, match=f"no edits called 'x'.*{left[0].key}"):
        restore(folder, ["x"])
    assert restore(folder, [left[0].key[:-4]]) == saved.fingerprint
    assert not (folder / RECORD).exists() and not (folder / "README.md").exists()


@pytest.mark.parametrize("after", ["the same", "all", "the other"])
def test_an_undo_of_one_edit_that_was_interrupted_goes_on(saved, tmp_path, monkeypatch, after):
    edits = [an_edit(saved), an_edit(saved, seed=7, layers=(1, 2))]
    folder = save_edited(saved, edits, tmp_path / "edited")
    with monkeypatch.context() as patch:
        stop = pytest.raises(KeyboardInterrupt)
        write = export._write_record
        patch.setattr(
            "knowedit.edits.export.folder._write_record",
            lambda where, header, *args: (
                write(where, header, *args) if len(header["edits"]) > 1 else _interrupt()
            ),
        )
        with stop:
            restore(folder, [edits[0].key])
    assert_same_bits(load_file(folder / "model.safetensors"), weights(saved, edits[1:]))
    if after != "all":
        left = edits[1:] if after == "the same" else edits[:1]
        restore(folder, [edit.key for edit in edits if edit not in left])
        assert_same_bits(load_file(folder / "model.safetensors"), weights(saved, left))
    assert restore(folder) == saved.fingerprint


def _interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("one", [True, False], ids=["one", "all"])
def test_a_folder_that_was_changed_since_is_left_as_it_is(saved, tmp_path, monkeypatch, one):
    """Sharded, with the change in the file that would be written last."""
    edits = [an_edit(saved), an_edit(saved, seed=7)]
    save = functools.partial(saved.hf.save_pretrained, max_shard_size="40KB")
    monkeypatch.setattr(saved.hf, "save_pretrained", save)
    folder = save_edited(saved, edits, tmp_path / "edited")
    only = [edits[0].key] if one else []
    *_, name = sorted(edits[0].by_parameter(saved))
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / where[name]
    tensors = load_file(file)
    tensors[name] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    before = files(folder)
    with pytest.raises(
        EditError, match=rf"{name} changed since.*nothing was written: undo .*force"
    ):
        restore(folder, only)
    assert files(folder) == before
    restore(folder, only, force=True)
    wanted = weights(saved, edits[1:] if one else [])
    assert_same_bits(by_index(folder), wanted)
    assert restore(folder) == saved.fingerprint if one else not (folder / RECORD).exists()


@pytest.mark.parametrize("one", [True, False], ids=["one", "all"])
def test_a_configuration_that_was_changed_since_is_noticed(saved, tmp_path, one):
    edits = [an_edit(saved), an_edit(saved, seed=7)]
    folder = save_edited(saved, edits, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    changed = config | {"rms_norm_eps": 1e-3, "use_cache": False}
    (folder / "config.json").write_text(json.dumps(changed))
    before = files(folder)
    only = [edits[0].key] if one else []
    with pytest.raises(
        EditError, match=r"config\.json was changed .*: rms_norm_eps \(.*; now 0.001"
    ):
        restore(folder, only)
    assert files(folder) == before
    restore(folder, only, force=True)
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-3
    assert_same_bits(
        load_file(folder / "model.safetensors"), weights(saved, edits[1:] if one else [])
    )


def test_what_computes_the_same_may_change(saved, tmp_path):
    folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert restore(folder) == saved.fingerprint


def test_a_folder_of_an_earlier_version_is_read_and_brought_up_to_date(saved, tmp_path):
    """Its record lay among the weights, and held the original bits alone."""
    edit = an_edit(saved)
    folder = save_edited(saved, [edit], tmp_path / "edited")
    header, tensors = read_file(folder / RECORD, "knowedit-undo/2", "a record")
    old = {k: header[k] for k in ("fingerprint", "model", "edits")} | {"format": "knowedit-undo/1"}
    originals = {n.removeprefix("original."): t for n, t in tensors.items()}
    write_file(folder / EARLIER_RECORD, originals, old)
    (folder / RECORD).unlink()
    (folder / "README.md").unlink()
    edited = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert record_of(folder).name == RECORD and not (folder / EARLIER_RECORD).exists()
    assert weights_fingerprint(edited) != saved.fingerprint
    with pytest.raises(EditError, match="no edits called"):
        restore(folder, ["nothing"])
    assert restore(folder) == saved.fingerprint


def test_weights_that_the_files_hold_under_other_names_are_found(saved, tmp_path, monkeypatch):
    """As with models that transformers puts together from parts with names of their own."""
    save = type(saved.hf).save_pretrained

    def renamed(folder, **kwargs):
        save(saved.hf, folder, **kwargs)
        file = next(folder.glob("*.safetensors"))
        tensors = {n.replace("mlp", "feed_forward"): t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(saved.hf, "save_pretrained", renamed)
    monkeypatch.setattr("knowedit.edits.export.folder.fingerprint_of", lambda *_: saved.fingerprint)
    original = {n.replace("mlp", "feed_forward"): t for n, t in weights(saved, []).items()}
    folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
    restore(folder)
    assert_same_bits(load_file(folder / "model.safetensors"), original)


def test_weights_that_the_files_do_not_hold_are_not_written(saved, tmp_path, monkeypatch):
    save = type(saved.hf).save_pretrained

    def split(folder, **kwargs):
        save(saved.hf, folder, **kwargs)
        file = next(folder.glob("*.safetensors"))
        tensors = {n: t for n, t in load_file(file).items() if "mlp" not in n}
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(saved.hf, "save_pretrained", split)
    with pytest.raises(EditError, match=r"writes .*mlp.* together with other"):
        save_edited(saved, [an_edit(saved)], tmp_path / "edited")
    assert not (tmp_path / "edited").exists() and not saved.ledger.active


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_folder_with_code_of_its_own_is_undone_where_that_may_run(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(str(folder), trust_remote_code=True)
    first, second = an_edit(model), an_edit(model, 1)
    edited = save_edited(model, [first, second], tmp_path / "edited")
    before = files(edited)
    for force in (False, True):
        with pytest.raises(ModelError, match="code of its own.*restore"):
            restore(edited, force=force)
    assert files(edited) == before
    restore(edited, [second.key], trust_remote_code=True)
    assert restore(edited, trust_remote_code=True) == model.fingerprint
    assert_same_bits(
        load_file(edited / "model.safetensors"), load_file(folder / "model.safetensors")
    )
