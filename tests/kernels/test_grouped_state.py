"""GroupedSecondMoment: routing, weights, streaming, merging, saving, refusing (unit)."""

import pytest
import torch

from knowedit_kernels import numerics, testing
from knowedit_kernels.moments import GroupedSecondMoment, SecondMoment, sort_rows
from knowedit_kernels.moments.reference import grouped_moment
from tests.kernels.moment_data import keys as make_keys

GROUPS, DIM = 4, 24


def routing(n: int, seed: int = 0) -> torch.Tensor:
    """A group for each of n rows, very uneven; group 2 gets none."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([0, 0, 0, 0, 0, 1, 3, 3])[torch.randint(0, 8, (n,), generator=generator)]


def weights_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed + 1))


def expected(k, index, weights=None):
    order, offsets = sort_rows(index, GROUPS)
    return grouped_moment(k[order], offsets, None if weights is None else weights[order])


def check(moment, reference, budget=numerics.MOMENT):
    for group in range(GROUPS):
        graded = testing.grade_moment(moment.matrix(group), reference[group])
        # over few channels a mean scatters like its terms
        graded.check(
            numerics.Budget(2.5 * budget.normwise, budget.elementwise, 2.5 * budget.bias),
            f"group {group}",
        )


@pytest.fixture
def small_log(monkeypatch):
    """A log of 100 rows, so that a few hundred cross several launches."""
    monkeypatch.setattr("knowedit_kernels.moments.grouped.capacity_of", lambda *sizes: 100)


@pytest.mark.usefixtures("small_log")
@pytest.mark.parametrize("batch", [7, 60, 100, 350])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sums_each_groups_rows_however_they_come(dtype, weighted, batch):
    k, index = make_keys(350, DIM, dtype), routing(350)
    weights = weights_of(350) if weighted else None
    moment = GroupedSecondMoment(GROUPS, DIM)
    for part in range(0, 350, batch):
        here = slice(part, part + batch)
        moment.update(k[here], index=index[here], weights=weights[here] if weighted else None)
    reference = expected(k, index, weights)
    check(moment, reference)
    assert torch.equal(moment.counts, torch.bincount(index, minlength=GROUPS))
    assert moment.count == 350 and not moment.matrix(2).any()
    assert torch.equal(moment.matrix(0), moment.matrix(0).T)
    testing.grade_moment(moment.pooled(), reference.sum(0)).check(numerics.MOMENT)
    assert moment.audit().ok() and moment.audit(0).ok() and moment.audit(2).count == 0


def test_sorted_rows_by_counts_and_by_offsets():
    k, index, weights = make_keys(90, DIM), routing(90), weights_of(90)
    order, offsets = sort_rows(index, GROUPS)
    routed = GroupedSecondMoment(GROUPS, DIM).update(k, index=index, weights=weights)
    for given in ({"offsets": offsets}, {"counts": offsets.diff()}):
        by = GroupedSecondMoment(GROUPS, DIM).update(k[order], weights=weights[order], **given)
        assert torch.equal(by.pooled(), routed.pooled()) and torch.equal(by.counts, routed.counts)


def test_all_rows_in_one_group_are_the_dense_moment():
    k = make_keys(700, DIM)
    counts = torch.tensor([0, 0, 700, 0])
    grouped = GroupedSecondMoment(GROUPS, DIM).update(k, counts=counts)
    dense = SecondMoment(DIM).update(k)
    testing.grade_moment(grouped.matrix(2), dense.sum()).check(numerics.MOMENT)
    assert not grouped.matrix(1).any() and grouped.counts.tolist() == [0, 0, 700, 0]


def test_kinds_may_change_on_the_way():
    k, index, weights = make_keys(60, DIM), routing(60), weights_of(60)
    moment = GroupedSecondMoment(GROUPS, DIM)
    moment.update(k, index=index).update(k, index=index, weights=weights)
    moment.update(k.bfloat16(), index=index).update(k[:0], index=index[:0])
    reference = expected(k, index) + expected(k, index, weights) + expected(k.bfloat16(), index)
    check(moment, reference)


def test_float32_storage_halves_the_memory_and_keeps_its_budget():
    k, index = make_keys(900, DIM), routing(900)
    moment = GroupedSecondMoment(GROUPS, DIM, storage="float32")
    for part in range(0, 900, 30):
        here = slice(part, part + 30)
        moment.update(k[here], index=index[here])
        moment.matrix(0)  # launches what is there
    assert moment.state_dict()["lower"].dtype == torch.float32
    check(moment, expected(k, index), numerics.float32_storage(30))


def test_merge_save_load_and_resume(tmp_path):
    k, index, weights = make_keys(200, DIM), routing(200), weights_of(200)
    halves = [
        GroupedSecondMoment(GROUPS, DIM).update(k[h], index=index[h], weights=weights[h])
        for h in (slice(0, 80), slice(80, 200))
    ]
    halves[0].save(tmp_path / "moment.safetensors")
    resumed = GroupedSecondMoment.load(tmp_path / "moment.safetensors")
    rest = slice(80, 200)
    for moment in (resumed, halves[0]):
        moment.update(k[rest], index=index[rest], weights=weights[rest])
    assert torch.equal(resumed.state_dict()["lower"], halves[0].state_dict()["lower"])
    check(resumed, expected(k, index, weights))
    merged = GroupedSecondMoment.load(tmp_path / "moment.safetensors").merge(halves[1])
    check(merged, expected(k, index, weights))
    assert torch.equal(merged.counts, resumed.counts) and merged.audit().ok()


def test_a_damaged_or_foreign_file_is_named(tmp_path):
    path = tmp_path / "moment.safetensors"
    SecondMoment(DIM).save(path)
    with pytest.raises(ValueError, match="is not a second moment .format 'knowedit-second"):
        GroupedSecondMoment.load(path)
    GroupedSecondMoment(GROUPS, DIM).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"moment.safetensors is truncated"):
        GroupedSecondMoment.load(path)


def test_all_reduce_adds_the_other_ranks(monkeypatch):
    """The ranks are one process here: the dense moment's test starts real ones."""
    batches = [(make_keys(100, DIM, seed=rank), routing(100, rank)) for rank in range(2)]
    mine, theirs = (GroupedSecondMoment(GROUPS, DIM).update(k, index=i) for k, i in batches)
    parts = iter(theirs.state_dict().values())
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda part, group: part.add_(next(parts)))
    check(mine.all_reduce(), sum(expected(k, i) for k, i in batches))
    assert mine.count == 200 and mine.audit().ok() and mine.audit(0).ok()


K = make_keys(6, DIM)
INDEX = torch.tensor([0, 3, 1, 0, 0, 1])


@pytest.mark.parametrize(
    "rows, given, error, says",
    [
        (K, {}, ValueError, "exactly one of counts=, offsets= or index="),
        (K, {"index": INDEX, "counts": INDEX}, ValueError, "exactly one of"),
        (K, {"index": INDEX[:5]}, ValueError, r"6 rows need \[6\]"),
        (K, {"index": INDEX + 1}, ValueError, r"index\[1\] is 4; the groups are 0 to 3"),
        (K, {"index": INDEX.float()}, TypeError, "whole numbers"),
        (K, {"counts": torch.tensor([1, 2, 3])}, ValueError, r"need whole numbers \[4\]"),
        (K, {"counts": torch.tensor([1, 2, 3, 1])}, ValueError, "ends at 7"),
        (K, {"counts": torch.tensor([7, -2, 0, 1])}, ValueError, "must rise"),
        (K, {"offsets": torch.tensor([0, 4, 2, 5, 6])}, ValueError, "must rise"),
        (K, {"offsets": torch.tensor([1, 2, 2, 5, 6])}, ValueError, "must rise from row 0"),
        (K[:, :5], {"index": INDEX}, ValueError, "last dimension must be 24"),
        (K.reshape(2, 3, DIM), {"index": INDEX}, ValueError, r"must be \[n, 24\]"),
        (K, {"index": INDEX, "weights": torch.ones(5)}, ValueError, "one floating-point weight"),
        (
            torch.full_like(K, torch.inf),
            {"index": INDEX},
            ValueError,
            r"rows\[0\] of group 0 is NaN or infinite in 24 channels",
        ),
        (
            K,
            {"index": INDEX, "weights": torch.tensor([1, torch.nan, 1, 1, 1, 1])},
            ValueError,
            r"rows\[1\] of group 3 times its weight is too large or NaN; 1 such",
        ),
        (K * 1e25, {"index": INDEX}, ValueError, r"rows\[0\] of group 0 is too large"),
    ],
)
def test_bad_input_is_named_and_nothing_is_added(rows, given, error, says):
    moment = GroupedSecondMoment(GROUPS, DIM).update(K, index=INDEX)
    before = moment.pooled()
    with pytest.raises(error, match=says):
        moment.update(rows, **given)
    assert moment.count == 6 and torch.equal(moment.pooled(), before) and moment.audit().ok()


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: GroupedSecondMoment(0, 3), "at least 1"),
        (lambda: GroupedSecondMoment(2, 3, storage="half"), "choose one of: float64, float32"),
        (lambda: GroupedSecondMoment(2, 3).matrix(2), "the groups are 0 to 1"),
        (lambda: GroupedSecondMoment(2, 3).merge(GroupedSecondMoment(3, 3)), "cannot merge"),
        (
            lambda: GroupedSecondMoment(2, 3).load_state_dict(
                GroupedSecondMoment(2, 4).state_dict()
            ),
            "state's lower is",
        ),
        (lambda: GroupedSecondMoment(2, 3).load_state_dict({}), "lacks lower, sums, counts"),
    ],
)
def test_wrong_use_is_named(build, says):
    with pytest.raises(ValueError, match=says):
        build()
