"""Unit: what differs between two models is told from their files."""

import pytest
import torch

from knowedit.edits.changes import Dense
from knowedit.edits.diff import compare, diff
from knowedit.edits.export.folder import save_edited
from knowedit.errors import EditError
from tests.knowedit.edits.test_edit import an_edit
from tests.knowedit.edits.test_merge import saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_folders(tiny_llama, tmp_path, dtype):
    model = saved(tiny_llama, tmp_path / "model", dtype)
    edit = an_edit(model, layers=(1, 3), rank=3)
    norm = f"{model.layout.norm}.weight"
    edit.changes[norm] = Dense(torch.full((32,), 0.5))
    folder = save_edited(model, [edit], tmp_path / "edited")
    found = diff(tmp_path / "model", folder)
    assert found.parameters == len(list(model.hf.named_parameters())) and not found.notes
    by_name = {one.weight: one for one in found.weights}
    assert by_name.keys() == edit.changes.keys()
    for name in (model.layout.weight_name(1), model.layout.weight_name(3)):
        weight, one = model.stored(name).double(), by_name[name]
        added = edit.delta(name).double()
        assert one.rank == 3 and one.shape == (32, 48)
        slack = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        assert one.norm == pytest.approx(float(added.norm()), rel=slack)
        assert one.relative == pytest.approx(float(added.norm() / weight.norm()), rel=slack)
        assert one.largest == pytest.approx(float(added.abs().max()), rel=slack)
        assert one.changed > 0.9
    assert by_name[norm].rank is None and by_name[norm].largest == pytest.approx(0.5, rel=1e-2)
    assert found.facts == [
        {"method": "TEST", "key": edit.key, "prompt": edit.facts[0].text,
         "target": edit.facts[0].target}
    ]  # fmt: skip
    shown = "\n".join(map(str, found.tables()))
    assert edit.key in shown and model.layout.weight_name(3) in shown


def test_a_model_and_itself(tiny_llama, tmp_path):
    saved(tiny_llama, tmp_path / "model")
    assert diff(tmp_path / "model", tmp_path / "model").equal


@pytest.mark.parametrize("tiny", ["tiny_llama", "tiny_gpt2"])
def test_a_folder_and_an_edit_of_it(request, tiny, tmp_path):
    model = saved(request.getfixturevalue(tiny), tmp_path / "model", torch.float32)
    edit = an_edit(model, rank=2)
    found = diff(tmp_path / "model", edit.save(tmp_path / "edit.safetensors"))
    (one,) = found.weights
    added = edit.delta(1).double()
    assert (one.rank, one.shape) == (2, tuple(model.stored(one.weight).shape))
    assert one.norm == pytest.approx(float(added.norm()), rel=1e-12)
    assert found.facts[0]["key"] == edit.key
    edit.fingerprint = "0" * 32
    with pytest.raises(EditError, match="other weights"):
        diff(tmp_path / "model", edit.save(tmp_path / "other.safetensors"))


def test_other_dtypes_are_said_and_rounding_is_no_change_of_rank(tiny_llama, tmp_path):
    saved(tiny_llama, tmp_path / "exact", torch.float32)
    saved(tiny_llama, tmp_path / "rounded", torch.bfloat16)
    found = diff(tmp_path / "exact", tmp_path / "rounded")
    assert found.notes == [f"{found.parameters} weights are stored as float32 and bfloat16"]
    assert {one.rank for one in found.weights if len(one.shape) == 2} <= {0, 1}
    assert max(one.relative for one in found.weights) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_stands_out_of_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(96, 300, generator=generator).to(dtype)
    for rank in (1, 5, 40):
        left, right = (torch.randn(n, rank, generator=generator) for n in (96, 300))
        after = (before.float() + 0.05 * left @ right.T).to(dtype)
        assert compare("W", before, after).rank == rank
    after = before.clone()
    after[3, 5] += 1
    one = compare("W", before, after)
    assert (one.rank, one.changed) == (1, 1 / before.numel())
