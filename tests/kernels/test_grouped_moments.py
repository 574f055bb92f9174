"""Grouped moments on the CPU: every implementation against float64, ragged groups, in budget,
bit-repeatable (unit).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_kernels import _native, explain, numerics, testing
from knowedit_kernels.moments import sort_rows, triangle
from knowedit_kernels.moments.audit import signs
from knowedit_kernels.moments.call import GroupedCall, RowAuditCall
from knowedit_kernels.moments.cpu import (
    COMPILED_GROUPED,
    COMPILED_ROW_AUDIT,
    EXACT,
    GROUPED_TORCH,
    TORCH_ROW_AUDIT,
)
from knowedit_kernels.moments.reference import grouped_moment
from tests.kernels.isa import skip
from tests.kernels.isa_emulation import instructions_of
from tests.kernels.moment_data import keys as make_keys
from tests.kernels.moment_data import multiplies

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(c, t) for c in (*COMPILED_GROUPED, GROUPED_TORCH) for t in DTYPES if multiplies(c, t)]
PAIR_NAMES = [f"{candidate.name}-{dtype}" for candidate, dtype in PAIRS]
# rows of each group, and the dimension: empty groups, odd ones, all in one, more than a wave
CASES = [
    ([1], 1),
    ([0, 3, 0, 33, 64, 1], 31),
    ([0, 0, 257], 129),
    ([5, 600, 0, 131], 72),
    ([2, 5000, 40], 33),
]


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def weights_of(n, seed=3):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def add_(candidate, c, keys, offsets, order=None, weights=None, precision="exact"):
    """Runs the candidate, with emulated instructions where the processor lacks them; or skips."""
    with instructions_of(candidate):
        call = GroupedCall(c, keys, order, offsets, weights, precision)
        if reason := candidate.verify(call):
            skip(candidate.name, reason)
        candidate.run(call)


def run(candidate, keys, offsets, storage=torch.float64, **options):
    """The candidate's moments [groups, d, d] in a guarded buffer."""
    groups, dim = len(offsets) - 1, keys.shape[1]
    guard = testing.guarded(torch.zeros(groups, triangle.size(dim), dtype=storage))
    add_(candidate, guard.tensor, keys, offsets, **options)
    guard.check()
    return torch.stack([triangle.symmetric(c, dim) for c in guard.tensor])


def check(result, reference, budget=numerics.MOMENT):
    for group, (ours, exact) in enumerate(zip(result, reference)):
        # over few channels a mean scatters like its terms
        scatter = budget.elementwise / len(exact) ** 0.5 / 2
        graded = testing.grade_moment(ours, exact)
        limits = numerics.Budget(
            budget.normwise + scatter, budget.elementwise, budget.bias + scatter
        )
        graded.check(limits, f"group {group}")


@pytest.mark.isa
@pytest.mark.parametrize("counts, dim", CASES, ids=str)
@pytest.mark.parametrize("candidate, dtype", PAIRS, ids=PAIR_NAMES)
def test_within_budget(candidate, dtype, counts, dim):
    k, offsets = make_keys(sum(counts), dim, dtype), offsets_of(counts)
    budget = numerics.MOMENT_FP64 if candidate is GROUPED_TORCH else numerics.MOMENT
    check(run(candidate, k, offsets), grouped_moment(k, offsets), budget)


@pytest.mark.isa
@pytest.mark.parametrize("candidate, dtype", PAIRS, ids=PAIR_NAMES)
def test_weights_and_an_order_of_strided_rows(candidate, dtype):
    n, counts = 300, [120, 0, 7, 173]
    k = make_keys(n, 60, dtype)[:, 3:50]
    index = torch.repeat_interleave(torch.tensor(counts))
    index = index[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    order, offsets = sort_rows(index, 4)
    weights = weights_of(n)
    result = run(candidate, k, offsets, order=order, weights=weights)
    check(result, grouped_moment(k[order], offsets, weights[order]))


@pytest.mark.isa
@pytest.mark.parametrize("candidate, dtype", PAIRS, ids=PAIR_NAMES)
def test_float32_storage_rounds_once(candidate, dtype):
    k, offsets = make_keys(500, 40, dtype), offsets_of([100, 400])
    result = run(candidate, k, offsets, torch.float32)
    check(result, grouped_moment(k, offsets), numerics.float32_storage(1))


def test_integers_are_exact_and_sums_are_added_to():
    generator = torch.Generator().manual_seed(1)
    offsets = offsets_of([3, 0, 65, 129])
    for dtype in (torch.bfloat16, torch.float32):
        k = torch.randint(-9, 10, (197, 45), generator=generator).to(dtype)
        c = torch.ones(4, triangle.size(45), dtype=torch.float64)
        for weights in (None, torch.full((197,), 2.0)):
            torch.ops.knowedit.grouped_moment_(c, k, None, offsets, weights, "exact")
        for group, exact in zip(c, grouped_moment(k, offsets)):
            assert torch.equal(triangle.symmetric(group, 45), 1 + 5 * exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, threads):
    k, offsets = make_keys(1500, 140, dtype), offsets_of([700, 0, 30, 770])
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        c = torch.zeros(4, triangle.size(140), dtype=torch.float64)
        torch.ops.knowedit.grouped_moment_(c, k, None, offsets, None, "exact")
        results.append(c)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_group_does_not_depend_on_its_neighbours():
    k, c = make_keys(900, 50), torch.zeros(3, triangle.size(50), dtype=torch.float64)
    torch.ops.knowedit.grouped_moment_(c, k, None, offsets_of([400, 200, 300]), None, "exact")
    alone = torch.zeros(1, triangle.size(50), dtype=torch.float64)
    torch.ops.knowedit.grouped_moment_(alone, k[400:600], None, offsets_of([200]), None, "exact")
    assert torch.equal(c[1], alone[0])


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 80), min_size=1, max_size=6),
    dim=st.integers(1, 140),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_within_budget_for_any_ragged_groups(counts, dim, dtype, weighted, seed):
    n, offsets = sum(counts), offsets_of(counts)
    k = make_keys(n, dim, dtype, seed=seed)
    weights = weights_of(n, seed) if weighted else None
    c = torch.zeros(len(counts), triangle.size(dim), dtype=torch.float64)
    torch.ops.knowedit.grouped_moment_(c, k, None, offsets, weights, "exact")
    check([triangle.symmetric(x, dim) for x in c], grouped_moment(k, offsets, weights))


@pytest.mark.parametrize("dim", [1, 2, 1030])
def test_packed_triangles_and_squares(dim):
    square = torch.arange(dim * dim, dtype=torch.float64).reshape(dim, dim)
    packed = triangle.add_lower_(torch.zeros(triangle.size(dim), dtype=torch.float64), square)
    i, j = torch.tril_indices(dim, dim)
    assert torch.equal(packed, square[i, j])
    both = square.tril() + square.tril(-1).T
    assert torch.equal(triangle.symmetric(packed, dim), both)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("candidate", [COMPILED_ROW_AUDIT, TORCH_ROW_AUDIT], ids=lambda c: c.name)
def test_row_audit_copies_and_sums_every_row(candidate, dtype, copy):
    k = make_keys(1100, 61, dtype)[:, 3:58]
    z = signs(55)
    out = testing.guarded(testing.poisoned_empty(1100, 55, dtype=dtype))
    sums = testing.guarded(testing.poisoned_empty(1100, 5, dtype=torch.float64))
    call = RowAuditCall(out.tensor if copy else None, sums.tensor, k, z)
    if reason := candidate.verify(call):
        skip(candidate.name, reason)
    candidate.run(call)
    out.check()
    sums.check()
    assert not copy or torch.equal(out.tensor, k)
    wide = k.double()
    expected = torch.cat([wide.square().sum(1, keepdim=True), (wide @ z.T).square()], 1)
    assert torch.allclose(sums.tensor, expected, rtol=1e-11, atol=1e-12)


def test_opcheck():
    k, offsets, order = make_keys(40, 24), offsets_of([30, 10]), torch.arange(40).flip(0)
    utils = ("test_schema", "test_faketensor")
    c = torch.zeros(2, triangle.size(24), dtype=torch.float64)
    args = (c, k, order, offsets, weights_of(40))
    audit = (torch.zeros(40, 24), torch.zeros(40, 5, dtype=torch.float64), k, signs(24))
    ops = torch.ops.knowedit
    torch.library.opcheck(ops.grouped_moment_, (*args, "exact"), test_utils=utils)
    torch.library.opcheck(ops.row_audit_, audit, test_utils=utils)
    if (native := _native.load()).path:
        torch.library.opcheck(ops.grouped_syrk_cpu_, (*args, EXACT, native.isa), test_utils=utils)
        torch.library.opcheck(ops.row_audit_cpu_, (*audit, native.isa), test_utils=utils)


@pytest.mark.skipif(_native.load().path is None, reason="no compiled kernels")
def test_what_would_read_or_write_elsewhere_is_refused():
    k, c, isa = make_keys(4, 8), torch.zeros(2, 36, dtype=torch.float64), _native.load().isa
    good, order = offsets_of([3, 1]), torch.arange(4)
    for args, says in (
        ((c, k, torch.tensor([0, 1, 2, 4]), good, None), "row 4 is not among the keys"),
        ((c, k, order[:3], good, None), r"order must be int64 \[n\]"),
        ((c, k, None, offsets_of([3, 2]), None), "run from 0 to the number of rows"),
        ((c, k, None, torch.tensor([0, 5, 4]), None), "offsets must rise"),
        ((c, k, None, good[:2], None), "offsets must be int64"),
        ((c, k, None, good, torch.ones(3)), "weights must be float32"),
        ((c[:, :20], k, None, good, None), "c must be"),
    ):
        with pytest.raises(RuntimeError, match=says):
            torch.ops.knowedit.grouped_syrk_cpu_(*args, EXACT, isa)


def test_explain_says_why():
    c, k = torch.zeros(1, 36, dtype=torch.float64), make_keys(4, 8)
    decision = explain("grouped_moment_", c, k, None, offsets_of([4]), None, "fp64")
    assert decision.chosen == "torch"
    assert ("avx2", "groups are summed in float32 only") in decision.refused
