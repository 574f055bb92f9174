"""Edits of routed experts: matrices inside one parameter, in both layouts (unit)."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from knowedit.edits.changes import Dense, LowRank, changes_of, read_changes, write_changes
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import RECORD, read_record, restore, save_edited
from knowedit.edits.export.listing import export_format
from knowedit.errors import EditError
from knowedit.evaluation.sequence import total_norms
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from tests.knowedit.methods.helpers import FACTS
from tests.knowedit.models.tiny import build

LAYER = 2


@pytest.fixture(params=["mixtral", "gpt_oss"])  # [E, hidden, d] and [E, d, hidden]
def mixture(request, byte_tokenizer):
    return EditableModel(build(request.param), byte_tokenizer, name=request.param)


def an_edit(model, seed=0, left_out=1):
    """Of all experts but one, of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    experts = model.layout.experts(LAYER)
    left = torch.randn(model.hidden, 2, generator=generator)
    right = torch.randn(experts.count, experts.width, 2, generator=generator)
    right[left_out] = 0
    factors = {LAYER: (left, right.flatten(0, 1))}
    edit = Edit("test", changes_of(model, factors), FACTS, model.fingerprint)
    wanted = torch.einsum("hr,edr->ehd", left, right)
    return edit, wanted.mT if experts.transposed else wanted


def test_an_edit_changes_the_experts_it_names_and_is_undone_to_the_bit(mixture, tmp_path):
    weight = mixture.weight(LAYER)
    before = weight.clone()
    edit, wanted = an_edit(mixture)
    name = mixture.layout.weight_name(LAYER)
    assert list(edit.changes) == [f"{name}[{expert}]" for expert in (0, 2, 3)]
    read = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert read.key == edit.key
    other, more = an_edit(mixture, seed=1, left_out=3)
    with read.applied_to(mixture):
        torch.testing.assert_close(weight.detach(), before + wanted)
        assert torch.equal(weight[1], before[1])
        other.apply(mixture)
        torch.testing.assert_close(weight.detach(), before + wanted + more)
    torch.testing.assert_close(weight.detach(), before + more)
    other.undo(mixture)
    assert torch.equal(weight, before)


def test_a_copied_model_has_the_edits_and_its_own_weights(mixture):
    """An expert's matrix lies in its parameter's memory, in the copy as in the original."""
    before = mixture.weight(LAYER).clone()
    (edit, wanted), (other, more) = an_edit(mixture), an_edit(mixture, seed=1, left_out=3)
    edit.apply(mixture)
    copied = copy.deepcopy(mixture)
    other.apply(copied)
    torch.testing.assert_close(copied.weight(LAYER).detach(), before + wanted + more)
    torch.testing.assert_close(mixture.weight(LAYER).detach(), before + wanted)
    assert EditableModel(copied.hf, copied.tokenizer).ledger.active == (edit.key, other.key)
    edit.undo(copied)
    other.undo(copied)
    assert torch.equal(copied.weight(LAYER), before)
    assert edit.is_applied(mixture) and not edit.is_applied(copied)
    edit.undo(mixture)
    assert torch.equal(mixture.weight(LAYER), before)


def test_a_file_holds_what_experts_share_once(mixture):
    edit, _ = an_edit(mixture)
    name = mixture.layout.weight_name(LAYER)
    tensors = write_changes(edit.changes)
    assert sorted(tensors) == [f"{name}.U", *(f"{name}[{expert}].V" for expert in (0, 2, 3))]
    own = {**edit.changes, f"{name}[3]": LowRank(torch.ones(32, 1), torch.ones(len(tensors), 1))}
    for changes in (edit.changes, own):
        read = read_changes(write_changes(changes))
        assert list(read) == list(changes)
        for at, change in changes.items():
            assert torch.equal(read[at].U, change.U) and torch.equal(read[at].V, change.V)


@pytest.mark.parametrize("mixture", ["mixtral", "gpt_oss", "granitemoe"], indirect=True)
def test_an_edited_folder_is_restored(mixture, tmp_path):
    """Mixtral's files hold a tensor for each expert, gpt-oss's one of all of them, Granite's such a
    one under another name.
    """
    (edit, _), (other, _) = an_edit(mixture), an_edit(mixture, seed=1)
    with edit.applied_to(mixture), other.applied_to(mixture):
        wanted = mixture.next_logprobs(["Rome is"])
    save_edited(mixture, [edit, other], tmp_path / "edited")
    loaded = load_model(tmp_path / "edited", dtype="float32")
    torch.testing.assert_close(loaded.next_logprobs(["Rome is"]), wanted, rtol=1e-4, atol=1e-4)
    _, originals, _ = read_record(tmp_path / "edited" / RECORD)
    assert all(tensor.dim() == 2 for tensor in originals.values()) and len(originals) == 3
    restore(tmp_path / "edited", [other.key])
    with edit.applied_to(mixture):
        wanted = mixture.next_logprobs(["Rome is"])
    loaded = load_model(tmp_path / "edited", dtype="float32")
    torch.testing.assert_close(loaded.next_logprobs(["Rome is"]), wanted, rtol=1e-4, atol=1e-4)
    assert restore(tmp_path / "edited") == mixture.fingerprint


def in_files(folder):
    """Every tensor of a folder, by its name there."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def of_what_is_read(model, expert, seed=0):
    """An edit of the rows of one expert's gate, none of what multiplies it, and of its output."""
    generator, changes = torch.Generator().manual_seed(seed), {}
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.{LAYER}.mlp.experts.{leaf}[{expert}]"
        left, right = (torch.randn(n, 2, generator=generator) for n in model.stored(name).shape)
        left[model.layout.experts(LAYER).width :] = 0
        changes[name] = LowRank(left, right)
    return Edit("test", changes, FACTS, model.fingerprint)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_folder_holds_what_experts_read(family, byte_tokenizer, tmp_path):
    """`gate_up_proj[1]` is two tensors of the files, and gets its bits back in both; experts that
    are alike are told apart by their numbers.
    """
    hf = build(family)
    for parameter in hf.model.layers[LAYER].mlp.experts.parameters():
        parameter.copy_(parameter[:1].expand_as(parameter))
    model = EditableModel(hf, byte_tokenizer, name=family)
    model.hf.save_pretrained(tmp_path / "plain")
    plain = in_files(tmp_path / "plain")
    edits, folder = [of_what_is_read(model, 1), of_what_is_read(model, 1, seed=1)], tmp_path / "one"
    save_edited(model, edits, folder)
    edited = in_files(folder)
    changed = {name for name in plain if not torch.equal(plain[name], edited[name])}
    assert len(changed) == 2 and all(".experts.1." in name for name in changed)
    parts = read_record(folder / RECORD)[0]["weights"][next(iter(edits[0].changes))]["parts"]
    assert all(".experts.1." in part["tensor"] for part in parts) and len(parts) == 2
    restore(folder, [edits[1].key])
    save_edited(model, edits[:1], tmp_path / "other")
    left, wanted = in_files(folder), in_files(tmp_path / "other")
    assert all(torch.equal(left[name], wanted[name]) for name in plain)
    assert restore(folder) == model.fingerprint
    back = in_files(folder)
    assert back.keys() == plain.keys() and all(torch.equal(back[n], plain[n]) for n in plain)


def test_what_others_change_in_one_part_is_seen(byte_tokenizer, tmp_path):
    """In the second of the two tensors that an expert's matrix is in the files."""
    model = EditableModel(build("mixtral"), byte_tokenizer, name="mixtral")
    edits = [of_what_is_read(model, 1), of_what_is_read(model, 1, seed=1)]
    save_edited(model, edits, tmp_path / "edited")
    (file,) = (tmp_path / "edited").glob("*.safetensors")
    name = f"model.layers.{LAYER}.block_sparse_moe.experts.1.w3.weight"
    tensors = load_file(file)
    tensors[name][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    before = file.read_bytes()
    with pytest.raises(EditError, match=r"experts\.1\.w3.* changed since the edit was written"):
        restore(tmp_path / "edited", [edits[0].key])
    assert file.read_bytes() == before
    assert restore(tmp_path / "edited", force=True) == model.fingerprint


def test_a_weight_that_files_hold_among_others_is_refused(byte_tokenizer, tmp_path):
    """Inkling's gate and up alternate row by row in the model and in no file."""
    model = EditableModel(build("inkling2_text"), byte_tokenizer, name="inkling")
    name = "model.layers.3.mlp.experts.gate_up_proj[0]"
    pair = (torch.ones(size, 1) for size in model.stored(name).shape)
    edit = Edit("test", {name: LowRank(*pair)}, FACTS, model.fingerprint)
    with pytest.raises(EditError, match=r"gate_up_proj\[0\] together with other .* keep the edit"):
        save_edited(model, [edit], tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


def test_what_does_not_fit_is_refused(mixture, tmp_path):
    name = mixture.layout.weight_name(LAYER)
    change = LowRank(torch.ones(32, 1), torch.ones(7, 1))
    edit = Edit("test", {f"{name}[0]": change}, FACTS, mixture.fingerprint)
    with pytest.raises(EditError, match=r"\[0\]: a change of shape .* does not fit"):
        edit.apply(mixture)
    change = LowRank(torch.ones(32, 1), torch.ones(mixture.layout.experts(LAYER).width, 1))
    edit = Edit("test", {f"{name}[9]": change}, FACTS, mixture.fingerprint)
    with pytest.raises(EditError, match=r"no parameter .*\[9\]"):
        edit.apply(mixture)


def test_edits_of_all_experts_and_of_single_ones_are_undone_in_any_order(mixture, tmp_path):
    """A dense change of the whole parameter and low-rank ones of its slices met under other names:
    the undo of the first took the second with it, or was refused.
    """
    weight, name = mixture.weight(LAYER), mixture.layout.weight_name(LAYER)
    before = weight.clone()
    some, wanted = an_edit(mixture)
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    whole = Edit("test", {name: Dense(delta)}, FACTS, mixture.fingerprint)
    assert torch.equal(whole.delta(LAYER, mixture), delta)
    for first, second in ((some, whole), (whole, some)):
        first.apply(mixture)
        second.apply(mixture)
        torch.testing.assert_close(weight.detach(), before + delta + wanted)
        first.undo(mixture)
        torch.testing.assert_close(weight.detach(), before + (delta if second is whole else wanted))
        second.undo(mixture)
        assert torch.equal(weight, before)
    save_edited(mixture, [whole, some], tmp_path / "edited")
    restore(tmp_path / "edited", [whole.key])
    left = load_model(tmp_path / "edited", dtype="float32").weight(LAYER)
    torch.testing.assert_close(left.detach(), before + wanted)
    assert restore(tmp_path / "edited") == mixture.fingerprint


def test_edits_of_what_experts_read_meet_too(mixture):
    """`gate_up_proj` as a whole (fine-tuning) and of one expert (NeuronPatch)."""
    name = mixture.layout.weight_name(LAYER).rpartition(".")[0] + ".gate_up_proj"
    weight = mixture.stored(name)
    before, generator = weight.detach().clone(), torch.Generator().manual_seed(4)
    delta = torch.randn(weight.shape, generator=generator)
    pair = torch.randn(weight.shape[1], 2, generator=generator), torch.randn(weight.shape[2], 2)
    whole = Edit("test", {name: Dense(delta)}, FACTS, mixture.fingerprint)
    some = Edit("test", {f"{name}[1]": LowRank(*pair)}, FACTS, mixture.fingerprint)
    wanted = torch.zeros_like(before)
    wanted[1] = pair[0] @ pair[1].T
    for first, second, left in ((some, whole, delta), (whole, some, wanted)):
        first.apply(mixture)
        second.apply(mixture)
        torch.testing.assert_close(weight.detach(), before + delta + wanted)
        first.undo(mixture)
        torch.testing.assert_close(weight.detach(), before + left)
        second.undo(mixture)
        assert torch.equal(weight, before)


def of_layer(model, layer, rank, seed=0):
    """An edit of one layer: of all its experts but the first, or of its dense MLP."""
    generator = torch.Generator().manual_seed(seed)
    width, experts = model.layout.width(layer), model.layout.experts(layer)
    left = torch.randn(model.hidden, rank, generator=generator)
    right = torch.randn(width, rank, generator=generator)
    right[: experts.width if experts else 0] = 0
    return Edit("test", changes_of(model, {layer: (left, right)}), FACTS, model.fingerprint)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_peft_loads_the_adapter_as_the_edited_model(family, byte_tokenizer, tmp_path):
    """Edits of two layers at two ranks, as peft itself reads them."""
    from peft import PeftModel

    model = EditableModel(build(family), byte_tokenizer, name=family)
    edits = [of_layer(model, LAYER, 2), of_layer(model, LAYER, 1, seed=1), of_layer(model, 1, 2)]
    folder = export_format("peft")(model, edits, tmp_path / "adapter")
    ids = torch.tensor([model.row("The capital of France is").ids])
    plain = model.hf(input_ids=ids).logits
    for edit in edits:
        edit.apply(model)
    wanted = model.hf(input_ids=ids).logits
    for edit in reversed(edits):
        edit.undo(model)
    loaded = PeftModel.from_pretrained(model.hf, folder).eval()
    found = loaded(input_ids=ids).logits
    assert (wanted - plain).abs().max() > 0.05 * plain.abs().max()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_an_older_peft_is_told_from_one_that_holds_experts(mixture, tmp_path, monkeypatch):
    from peft import LoraConfig

    fields = {n: f for n, f in LoraConfig.__dataclass_fields__.items() if n != "target_parameters"}
    monkeypatch.setattr(LoraConfig, "__dataclass_fields__", fields)
    with pytest.raises(EditError, match="several experts, .* update peft"):
        an_edit(mixture)[0].export(tmp_path / "adapter", mixture)


def test_a_sequence_says_how_far_each_expert_was_moved(mixture):
    """The sum of both edits over the weight without them, of every changed expert's matrix."""
    edits = [an_edit(mixture), an_edit(mixture, seed=1, left_out=3)]
    before, total = mixture.weight(LAYER).clone(), edits[0][1] + edits[1][1]
    with edits[0][0].applied_to(mixture), edits[1][0].applied_to(mixture):
        found = total_norms(mixture, [edit for edit, _ in edits])
    name = mixture.layout.weight_name(LAYER)
    wanted = {f"{name}[{e}]": float(total[e].norm() / before[e].norm()) for e in range(4)}
    assert found == pytest.approx(wanted, rel=1e-4)
