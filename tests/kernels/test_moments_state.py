"""SecondMoment: streaming, audit, merging, saving, resuming, refusing (unit)."""

import copy
import dataclasses
import math
import os

import pytest
import torch

from knowedit_kernels import _dispatch, numerics, testing
from knowedit_kernels.moments import GroupedSecondMoment, SecondMoment, cpu, update_together
from knowedit_kernels.moments.audit import compare, signs
from knowedit_kernels.moments.reference import second_moment
from tests.kernels.moment_data import keys as make_keys
from tests.processes import side_by_side

DIM = 48


def moment(k, batch=None, **options):
    result = SecondMoment(k.shape[-1], **options)
    for part in k.split(batch or len(k)):
        result.update(part)
    return result


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 256 rows, so that a few hundred tokens cross several."""
    monkeypatch.setattr("knowedit_kernels.moments.state._capacity", lambda dim, device: 256)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_bits_do_not_depend_on_the_batching(dtype):
    k = make_keys(1000, DIM, dtype)
    whole = moment(k)
    for batch in (1000, 256, 100, 7):
        parts = moment(k, batch)
        assert parts.count == 1000 and torch.equal(parts.sum(), whole.sum())
    testing.grade_moment(whole.sum(), second_moment(k)).check(numerics.MOMENT)


@pytest.mark.usefixtures("small_blocks")
def test_sum_does_not_disturb_the_stream():
    k = make_keys(700, DIM)
    looked = SecondMoment(DIM)
    for part in k.split(90):
        looked.update(part)
        looked.sum()
    assert torch.equal(looked.sum(), moment(k).sum())


@pytest.mark.usefixtures("small_blocks")
def test_dtypes_may_change_on_the_way():
    first, second = make_keys(300, DIM), make_keys(300, DIM, torch.bfloat16, seed=1)
    mixed = SecondMoment(DIM).update(first).update(second)
    testing.grade_moment(mixed.sum(), second_moment(first) + second_moment(second)).check(
        numerics.MOMENT
    )


def test_the_callers_tensor_is_not_kept():
    k = make_keys(10, DIM)
    held = SecondMoment(DIM).update(k)
    expected = second_moment(k)
    k.zero_()
    testing.grade_moment(held.sum(), expected).check(numerics.MOMENT)


def test_mask_count_and_moment():
    k, mask = make_keys(40, DIM).reshape(4, 10, DIM), torch.arange(40).reshape(4, 10) % 3 != 0
    masked = SecondMoment(DIM).update(k, mask).update(k, torch.ones(4, 10, dtype=torch.bool))
    kept = int(mask.sum())
    assert masked.count == kept + 40
    expected = (second_moment(k, mask) + second_moment(k)) / (kept + 40)
    testing.grade_moment(masked.moment(), expected).check(numerics.MOMENT)
    assert masked.moment(torch.float32).dtype == torch.float32


def test_masked_out_rows_may_hold_anything():
    k, mask = make_keys(20, DIM), torch.arange(20) != 5
    k[5] = float("nan")
    assert SecondMoment(DIM).update(k, mask).sum().isfinite().all()


def test_moment_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no tokens seen"):
        SecondMoment(DIM).update(make_keys(3, DIM), torch.zeros(3, dtype=torch.bool)).moment()


@pytest.mark.parametrize(
    "bad, says",
    [(float("nan"), r"NaN or infinite in 1 channel \(first"), (float("inf"), "NaN or inf")],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_non_finite_keys_are_located_and_nothing_is_added(bad, says, dtype):
    k = make_keys(30, DIM, dtype).reshape(3, 10, DIM)
    good = SecondMoment(DIM).update(k)
    before, count = good.sum(), good.count
    k[1, 4, 7] = bad
    with pytest.raises(ValueError, match=r"keys\[1, 4\] is " + says):
        good.update(k)
    assert good.count == count and torch.equal(good.sum(), before) and good.audit().ok()


def test_overflowing_keys_are_refused_unless_float64_is_asked_for():
    k = torch.full((2, DIM), 1e19)
    with pytest.raises(ValueError, match=r"keys\[0\] is too large"):
        SecondMoment(DIM).update(k)
    assert SecondMoment(DIM, precision="fp64").update(k).sum()[0, 0].item() == pytest.approx(
        2e38, rel=1e-6
    )


def test_together_is_all_or_nothing_and_equals_one_by_one():
    a, b = make_keys(20, DIM), make_keys(20, 30, seed=1)
    layers = [SecondMoment(DIM), SecondMoment(30)]
    update_together(layers, [a, b])
    assert torch.equal(layers[1].sum(), moment(b).sum())
    b[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"keys\[3\]"):
        update_together(layers, [a, b])
    assert [layer.count for layer in layers] == [20, 20] and torch.equal(
        layers[0].sum(), moment(a).sum()
    )
    with pytest.raises(ValueError, match="occurs twice"):
        update_together([layers[0], layers[0]], [a, a])


def test_audit_measures_the_true_error():
    k = make_keys(3000, DIM, torch.bfloat16)
    held = moment(k)
    total, audit = held.finalize(audit=True)
    graded = testing.grade_moment(total, second_moment(k))
    assert audit.ok() and audit == held.audit()
    # the trace weighs each diagonal entry by its size, so it agrees with the mean only roughly
    assert audit.bias == pytest.approx(graded.bias, abs=2e-8)
    # plant a known error: the audit must read it off
    noise = torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise = 1e-5 * total.norm() / noise.norm() * (noise.tril(-1) + noise.tril(-1).T)
    planted = compare(total + noise, held._sums, held.count)
    assert not planted.ok() and planted.normwise == pytest.approx(
        (noise.norm() / total.norm()).item(), rel=0.8
    )
    assert "OUTSIDE" in str(planted)
    assert compare(total * (1 - 1e-6), held._sums, held.count).bias == pytest.approx(
        -1e-6, abs=1e-7
    )
    assert not compare(total * math.nan, held._sums, held.count).ok()


def test_audit_signs_are_balanced_and_fixed():
    z = signs(1536)
    assert z.abs().eq(1).all() and (z @ z.T / 1536 - torch.eye(4)).abs().max() < 0.1
    assert signs(8)[0].tolist() == [-1, 1, 1, -1, 1, -1, 1, 1]  # saved audits depend on them


def test_merge_equals_the_union():
    k = make_keys(500, DIM)
    both = moment(k[:200]).merge(moment(k[200:], device="cpu"))
    assert both.count == 500 and both.audit().ok()
    testing.grade_moment(both.sum(), second_moment(k)).check(numerics.MOMENT)
    with pytest.raises(ValueError, match="dimension 7 and 48"):
        both.merge(SecondMoment(7))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_run_resumes_to_the_same_bits(tmp_path, dtype):
    k, path = make_keys(900, DIM, dtype), tmp_path / "layer.safetensors"
    moment(k[:333]).save(path)
    resumed = SecondMoment.load(path).update(k[333:])
    whole = moment(k)
    assert resumed.count == 900 and torch.equal(resumed.sum(), whole.sum())
    assert torch.allclose(resumed._sums, whole._sums, rtol=1e-14)
    assert [entry.name for entry in tmp_path.iterdir()] == ["layer.safetensors"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "layer.safetensors"
    moment(make_keys(9, DIM)).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"layer.safetensors is truncated"):
        SecondMoment.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a second moment"):
        SecondMoment.load(path)
    with pytest.raises(FileNotFoundError):
        SecondMoment.load(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="lacks sums, count"):
        SecondMoment(2).load_state_dict({"lower": torch.zeros(2, 2), "pending": torch.zeros(0, 2)})
    with pytest.raises(ValueError, match=r"expected \[2, 2\]"):
        SecondMoment(2).load_state_dict(moment(make_keys(9, DIM)).state_dict())


def test_one_flipped_bit_anywhere_is_seen(tmp_path):
    path = tmp_path / "layer.safetensors"
    moment(make_keys(9, 3)).save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"layer\.safetensors"):
            SecondMoment.load(path)
    path.write_bytes(whole)
    assert SecondMoment.load(path).count == 9


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    moment(make_keys(9, DIM)).save(path)
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        moment(make_keys(10, DIM)).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def _rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    k = make_keys(101, DIM)
    held = moment(k[rank::2]).all_reduce()
    testing.grade_moment(held.sum(), second_moment(k)).check(numerics.MOMENT)
    assert held.count == 101 and held.audit().ok()
    torch.save(held.sum(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_reduce_over_two_processes(tmp_path):
    side_by_side(_rank, 2, str(tmp_path))
    assert torch.equal(
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    )


@pytest.mark.parametrize("dim", [0, -3])
def test_bad_dim(dim):
    with pytest.raises(ValueError, match="at least 1"):
        SecondMoment(dim)


@pytest.mark.parametrize("rows", [255, 256, 1000])
def test_a_state_with_more_pending_rows_than_a_block_is_restored_whole(rows, monkeypatch):
    """As saved on a GPU, whose blocks are larger than a CPU's."""
    k = make_keys(rows, DIM)
    saved = moment(k).state_dict()
    monkeypatch.setattr("knowedit_kernels.moments.state._capacity", lambda dim, device: 256)
    restored = SecondMoment(DIM).load_state_dict(saved)
    assert restored.count == rows
    testing.grade_moment(restored.sum(), second_moment(k)).check(numerics.MOMENT)
    assert torch.equal(restored.update(k).sum(), moment(torch.cat([k, k])).sum())


@pytest.mark.usefixtures("small_blocks")
def test_a_launch_that_fails_leaves_no_wrong_sum(monkeypatch):
    k = make_keys(300, DIM)
    first, second = (SecondMoment(DIM).update(k) for _ in range(2))
    saved = first.state_dict()

    def fails(call):
        raise MemoryError

    with monkeypatch.context() as patch:
        failing = [dataclasses.replace(c, run=fails) for c in cpu.COMPILED + (cpu.TORCH,)]
        patch.setitem(_dispatch._candidates, "second_moment_", failing)
        with pytest.raises(MemoryError):
            update_together([first, second], [k, k])
    for broken in (first, second):
        for use in (broken.sum, broken.flush, broken.state_dict, lambda b=broken: b.update(k)):
            with pytest.raises(RuntimeError, match="a launch failed"):
                use()
    restored = first.load_state_dict(saved).update(k)
    assert torch.equal(restored.sum(), moment(torch.cat([k, k])).sum()) and restored.count == 600


def test_a_copy_is_another_moment():
    k = make_keys(300, DIM)
    original = SecondMoment(DIM).update(k)
    copied = copy.deepcopy(original)
    copied.update(k)
    assert (original.count, copied.count) == (300, 600)
    assert torch.equal(original.sum(), moment(k).sum())


def test_a_grouped_launch_that_fails_leaves_no_wrong_sum(monkeypatch):
    k = make_keys(300, DIM)
    grouped = GroupedSecondMoment(2, DIM).update(k, counts=torch.tensor([100, 200]))

    def fails(call):
        raise MemoryError

    monkeypatch.setitem(
        _dispatch._candidates, "grouped_moment_", [dataclasses.replace(cpu.TORCH, run=fails)]
    )
    with pytest.raises(MemoryError):
        grouped.pooled()
    for use in (grouped.pooled, grouped.state_dict, grouped.audit):
        with pytest.raises(RuntimeError, match="a launch failed"):
            use()


def test_what_is_no_tensor_is_said_plainly():
    moment = SecondMoment(2)
    for given in ([[1.0, 2.0]], torch.ones(1, 2).numpy()):
        with pytest.raises(TypeError, match=f"not {type(given).__name__}; torch.as_tensor"):
            moment.update(given)
    assert moment.count == 0
