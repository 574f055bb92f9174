"""Edits: written, taken back bit for bit in any order, saved, refused where they do not belong
(unit).
"""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from knowedit.edits.changes import Dense, LowRank, relative_norm, relative_norms
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import FORMAT, RECORD, restore, save_edited
from knowedit.edits.merging import merged
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.tensors import read_file, write_file
from knowedit.methods.locate.keys import group_by_subject
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.load import load_model
from tests.knowedit.models.tiny import build

FACT = Fact(prompt="The capital of {} is", subject="France", target="Lyon", true="Paris")


def an_edit(model, seed=0, layers=(1,), rank=2, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    changes = {
        model.layout.weight_name(layer): LowRank(
            size * torch.randn(model.hidden, rank, generator=generator),
            torch.randn(model.d_ff, rank, generator=generator),
        )
        for layer in layers
    }
    report = EditReport(
        layers={str(k): {"gain": 0.9} for k in layers},
        relative_norm={str(k): 0.1 for k in layers},
    )
    return Edit("TEST", changes, [FACT], model.fingerprint, report, key_layers=layers)


EMBEDDING = "model.embed_tokens.weight"


def a_change(shape, rank=1):
    """A low-rank change of a matrix `[out, in]`."""
    generator = torch.Generator().manual_seed(0)
    return LowRank(*(0.3 * torch.randn(size, rank, generator=generator) for size in shape))


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


def a_trained_edit(model, seed=0):
    """An edit as gradient methods make them: low-rank changes anywhere, dense ones of any
    parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    edit = an_edit(model, seed)
    conv = model.layout.transposed
    attention = f"{model.layout.layers}.2." + (
        "attn.c_attn.weight" if conv else "self_attn.q_proj.weight"
    )
    shape = model.hf.get_parameter(attention).shape[:: -1 if conv else 1]
    edit.changes[model.layout.weight_name(2)] = edit.changes[model.layout.weight_name(1)]
    edit.changes[attention] = LowRank(
        *(0.3 * torch.randn(n, 3, generator=generator) for n in shape)
    )
    for name in (model.layout.weight_name(1), f"{model.layout.norm}.weight"):
        edit.changes[name] = Dense(
            0.1 * torch.randn(model.hf.get_parameter(name).shape, generator=generator)
        )
    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_undo_restores_every_bit_in_any_order(tiny, dtype, order):
    model = EditableModel(tiny.hf.to(dtype), tiny.tokenizer)
    before = weights_fingerprint(model.hf)
    edits = [an_edit(model, seed, layers) for seed, layers in enumerate([(1,), (1, 2), (0, 1)])]
    for edit in edits:
        edit.apply(model)
    assert weights_fingerprint(model.hf) != before
    for i in order:
        edits[i].undo(model)
    assert weights_fingerprint(model.hf) == before


def test_apply_writes_the_factors(tiny):
    edit = an_edit(tiny)
    weight = tiny.weight(1).clone()
    edit.apply(tiny)
    change = tiny.weight(1) - weight
    torch.testing.assert_close(
        change.T if tiny.layout.transposed else change, edit.delta(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_parameter_can_be_changed_and_taken_back(tiny, dtype, tmp_path):
    model = EditableModel(tiny.hf.to(dtype), tiny.tokenizer)
    before = weights_fingerprint(model.hf)
    trained = Edit.load(a_trained_edit(model).save(tmp_path / "a.edit"))
    clean = {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}
    trained.apply(model)
    for name, change in trained.changes.items():
        moved = model.hf.get_parameter(name).float() - clean[name].float()
        if isinstance(change, LowRank) and model.layout.transposed:
            moved = moved.T
        torch.testing.assert_close(
            moved, change.dense(), rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.02
        )
    both = an_edit(model, 3, (1, 2))
    both.apply(model)
    trained.undo(model)
    both.undo(model)
    assert weights_fingerprint(model.hf) == before


def test_a_parameter_that_does_not_exist_is_refused(tiny_llama):
    edit = an_edit(tiny_llama)
    edit.changes["model.nothing.weight"] = Dense(torch.zeros(2))
    with pytest.raises(EditError, match=r"no parameter model\.nothing\.weight"):
        edit.apply(tiny_llama)


def test_applied_to_undoes_after_an_error(tiny_llama):
    before = weights_fingerprint(tiny_llama.hf)
    with pytest.raises(RuntimeError, match="boom"), an_edit(tiny_llama).applied_to(tiny_llama):
        raise RuntimeError("boom")
    assert weights_fingerprint(tiny_llama.hf) == before and not tiny_llama.ledger.active


def test_apply_twice_and_undo_without_apply_are_refused(tiny_llama):
    edit = an_edit(tiny_llama)
    with pytest.raises(EditError, match="not applied"):
        edit.undo(tiny_llama)
    edit.apply(tiny_llama)
    with pytest.raises(EditError, match="already applied"):
        edit.apply(tiny_llama)


def test_another_model_is_refused(tiny_llama):
    edit = an_edit(tiny_llama)
    edit.fingerprint = "0" * 32
    with pytest.raises(EditError, match="made for a model with fingerprint 000000000000"):
        edit.apply(tiny_llama)


def test_a_weight_changed_behind_our_back_is_noticed(tiny_llama):
    edit = an_edit(tiny_llama)
    edit.apply(tiny_llama)
    tiny_llama.weight(1).data[0, 0] += 1
    with pytest.raises(EditError, match="changed outside"):
        edit.undo(tiny_llama)


def test_relative_norm_equals_the_dense_one(tiny):
    edit = an_edit(tiny)
    wanted = float(edit.delta(1).norm() / tiny.weight(1).norm())
    assert relative_norms(tiny, {1: edit.changes[tiny.layout.weight_name(1)].raw})[
        1
    ] == pytest.approx(wanted, rel=1e-5)


def test_a_weight_of_zeros_has_no_relative_norm(tiny_llama):
    edit = an_edit(tiny_llama)
    (change,) = edit.changes.values()
    with torch.no_grad():
        tiny_llama.weight(1).zero_()
    with pytest.raises(EditError, match="layer 1: the MLP's output projection is all zeros"):
        relative_norms(tiny_llama, {1: change.raw})
    with pytest.raises(EditError, match=r"a weight \[\d+, \d+\] to be edited is all zeros"):
        relative_norm(tiny_llama.weight(1), change)


def test_changes_of_biases_that_are_zeros_are_merged(byte_tokenizer):
    model = EditableModel(build("gpt2"), byte_tokenizer)
    name = model.layout.weight_name(1).replace("weight", "bias")
    with torch.no_grad():
        model.stored(name).zero_()
    edits = [an_edit(model, seed=seed) for seed in range(2)]
    for edit in edits:
        edit.changes[name] = Dense(torch.ones(model.hidden))
    one = merged(edits, [FACT], model)
    assert torch.equal(one.changes[name].raw, torch.full((model.hidden,), 2.0))
    assert [*one.report.relative_norm] == [model.layout.weight_name(1)]


def test_save_and_load(tiny_llama, tmp_path):
    edit = an_edit(tiny_llama, layers=(1, 3))
    loaded = Edit.load(edit.save(tmp_path / "a.edit.safetensors"))
    assert (loaded.method_name, loaded.facts, loaded.fingerprint, loaded.report, loaded.key) == (
        edit.method_name,
        edit.facts,
        edit.fingerprint,
        edit.report,
        edit.key,
    )
    edit.apply(tiny_llama)
    loaded.undo(tiny_llama)


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "not safetensors"])
def test_a_bad_file_is_refused(tiny_llama, tmp_path, damage):
    path = an_edit(tiny_llama).save(tmp_path / "a.safetensors")
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.write_text("hello")
    with pytest.raises(EditError, match=r"a\.safetensors"):
        Edit.load(path)


def test_a_folder_is_no_edit(tmp_path):
    with pytest.raises(EditError, match="is a folder; name one of our files in it"):
        Edit.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(tiny_llama, tmp_path, monkeypatch):
    path = an_edit(tiny_llama).save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("knowedit.io.tensors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        an_edit(tiny_llama, seed=5).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_gives_the_same_model(tiny, tmp_path):
    from peft import PeftModel

    edit = a_trained_edit(tiny)
    with pytest.raises(EditError, match="2 parameters densely"):
        edit.export(tmp_path / "adapter", tiny)
    edit.changes = {
        name: change for name, change in edit.changes.items() if isinstance(change, LowRank)
    }
    folder = edit.export(tmp_path / "adapter", tiny)
    ids = torch.tensor([[5, 6, 7, 8]])
    clean = tiny.hf(input_ids=ids).logits
    with edit.applied_to(tiny):
        written = tiny.hf(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(tiny.hf, folder)(input_ids=ids).logits
    torch.testing.assert_close(adapted, written, rtol=1e-4, atol=1e-4)
    assert (written - clean).abs().max() > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_an_embedding_gives_the_same_model(tiny_llama, tied, tmp_path):
    from peft import PeftModel

    hf = tiny_llama.hf
    if tied:
        hf.config.tie_word_embeddings = True
        hf.tie_weights()
    tiny = EditableModel(hf, tiny_llama.tokenizer)
    edit = Edit("TEST", {EMBEDDING: a_change((258, 32), rank=3)}, [FACT], tiny.fingerprint)
    edit.changes |= an_edit(tiny).changes  # at another rank
    folder = edit.export(tmp_path / "adapter", tiny)
    ids = torch.tensor([[5, 6, 7, 8]])
    clean = hf(input_ids=ids).logits
    with edit.applied_to(tiny):
        written = hf(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(hf, folder)
    torch.testing.assert_close(adapted(input_ids=ids).logits, written, rtol=1e-4, atol=1e-4)
    if not tied:  # peft merges one matrix at two places twice: server_notes
        merged = adapted.merge_and_unload()(input_ids=ids).logits
        torch.testing.assert_close(merged, written, rtol=1e-4, atol=1e-4)
    assert (written - clean).abs().max() > 0.01


def test_an_embedding_that_peft_does_not_tie_is_refused(tiny_gpt2, tmp_path):
    name = "transformer.wte.weight"
    edit = Edit("TEST", {name: a_change((258, 32))}, [FACT], tiny_gpt2.fingerprint)
    with pytest.raises(EditError, match=r"shared by input and output.*knowedit apply"):
        edit.export(tmp_path / "adapter", tiny_gpt2)


def test_group_by_subject_keeps_the_order():
    a, b = FACT, Fact(prompt="In {} they speak", subject="Spain", target="Latin")
    c = Fact(prompt="In {} they speak", subject="France", target="Latin")
    assert group_by_subject([a, b, c], True) == [[a, c], [b]]
    assert group_by_subject([a, b, c], False) == [[a], [b], [c]]


class TestFolders:
    @pytest.fixture
    def saved(self, tiny_llama, tmp_path):
        tiny_llama.hf.save_pretrained(tmp_path / "model")
        tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
        return load_model(str(tmp_path / "model"))

    def test_apply_and_undo_a_folder(self, saved, tmp_path):
        edits = [an_edit(saved), a_trained_edit(saved, 1)]
        before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
        folder = save_edited(saved, edits, tmp_path / "edited")
        assert weights_fingerprint(saved.hf) == saved.fingerprint
        edited = load_model(str(folder))
        for edit in edits:
            edit.apply(saved)
        assert weights_fingerprint(edited.hf) == weights_fingerprint(saved.hf)
        assert restore(folder) == saved.fingerprint
        back = load_file(folder / "model.safetensors")
        for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
            assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32)), name
        assert not (folder / RECORD).exists() and set(before) == {p.name for p in folder.iterdir()}

    def test_an_existing_folder_is_refused(self, saved, tmp_path):
        with pytest.raises(EditError, match="exists"):
            save_edited(saved, [an_edit(saved)], tmp_path / "model")
        assert not saved.ledger.active

    def test_a_model_with_active_edits_is_refused(self, saved, tmp_path):
        first, second = an_edit(saved), a_trained_edit(saved, 1)
        with first.applied_to(saved), pytest.raises(EditError, match=f"active edits .*{first.key}"):
            save_edited(saved, [second], tmp_path / "edited")
        assert not (tmp_path / "edited").exists()

    def test_a_float16_folder_can_be_undone(self, saved, tmp_path, monkeypatch):
        """As a GPU writes it; nothing is multiplied for a fingerprint."""
        with monkeypatch.context() as guard:
            guard.setattr(EditableModel, "dtype", torch.float32)  # float16 is refused on a CPU
            # and rounded by some CPUs as no GPU does: the self-check is not for it
            guard.setattr("knowedit.models.editable.check_parts", lambda model: (True, []))
            model = EditableModel(saved.hf.half(), saved.tokenizer, name="half")
        folder = save_edited(model, [an_edit(model)], tmp_path / "edited")
        assert restore(folder) == model.fingerprint

    def test_undo_of_a_foreign_folder_is_refused(self, saved, tmp_path):
        with pytest.raises(EditError, match="holds no"):
            restore(tmp_path / "model")

    def test_undo_notices_other_changes(self, saved, tmp_path):
        folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        before = (folder / "model.safetensors").read_bytes()
        with pytest.raises(EditError, match="other weights were changed too, and nothing was writ"):
            restore(folder)
        assert (folder / RECORD).exists()
        assert (folder / "model.safetensors").read_bytes() == before

    def test_an_undo_of_one_edit_whose_record_does_not_fit_touches_nothing(self, saved, tmp_path):
        first, second = an_edit(saved), an_edit(saved, 1)
        folder = save_edited(saved, [first, second], tmp_path / "edited")
        before = (folder / "model.safetensors").read_bytes()
        header, tensors = read_file(folder / RECORD, FORMAT, "an undo record")
        name = next(name for name in tensors if name.startswith("1.") and name.endswith(".U"))
        write_file(folder / RECORD, {**tensors, name: tensors[name][:1].clone()}, header)
        with pytest.raises(EditError, match="is not an undo record of this version"):
            restore(folder, [first.key])
        assert (folder / "model.safetensors").read_bytes() == before

    def test_an_interrupted_undo_is_finished_by_the_next(self, saved, tmp_path, monkeypatch):
        folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
        monkeypatch.setattr(
            "knowedit.edits.export.folder.fingerprint_of",
            lambda *_a: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            restore(folder)
        monkeypatch.undo()
        assert restore(folder) == saved.fingerprint

    def test_the_record_says_what_was_written(self, saved, tmp_path):
        from safetensors import safe_open

        folder = save_edited(saved, [an_edit(saved)], tmp_path / "edited")
        with safe_open(folder / RECORD, framework="pt") as file:
            header = json.loads(file.metadata()["knowedit"])
        assert header["edits"][0]["facts"] == [FACT.to_dict()]


def test_edits_that_contradict_each_other_say_so(tiny_llama, caplog):
    one, other = an_edit(tiny_llama), an_edit(tiny_llama, 1)
    other.facts = [replace(FACT, prompt="the capital  of {} is", target="Nice")]
    one.apply(tiny_llama)
    assert not caplog.text
    other.apply(tiny_llama)
    assert f"'Nice', and the edit {one.key}, which is in force too, says 'Lyon'" in caplog.text
    caplog.clear()
    for edit in (one, other):
        edit.undo(tiny_llama)
    other.apply(tiny_llama)
    assert not caplog.text
