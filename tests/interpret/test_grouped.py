"""The Triton moments of groups under the interpreter: ragged, weighted, packed, guarded (unit)."""

import dataclasses
import re

import pytest
import torch

from knowedit_kernels import numerics, testing
from knowedit_kernels.moments import audit, gpu, grouped_gpu, schedule, sort_rows, triangle
from knowedit_kernels.moments.call import GroupedCall, RowAuditCall
from knowedit_kernels.moments.reference import grouped_moment
from tests.kernels.moment_data import keys as make_keys

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
COUNTS = [0, 3, 130, 0, 61, 17]


@pytest.fixture
def few_rows(monkeypatch):
    """Limits so low that sixty rows are many: the interpreter takes milliseconds per iteration."""
    monkeypatch.setattr(schedule, "FEW_ROWS", 16)
    monkeypatch.setattr(schedule, "FEW_TOKENS", 100)


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def weights_of(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(0))


def run(keys, offsets, order=None, weights=None, precision="exact", storage=torch.float64):
    size = triangle.size(keys.shape[1])
    guard = testing.guarded(torch.zeros(len(offsets) - 1, size, dtype=storage))
    grouped_gpu.accumulate_(GroupedCall(guard.tensor, keys, order, offsets, weights, precision))
    guard.check()
    return torch.stack([triangle.symmetric(c, keys.shape[1]) for c in guard.tensor])


def check(result, exact, budget=numerics.MOMENT):
    for group, (ours, reference) in enumerate(zip(result, exact)):
        graded = testing.grade_moment(ours, reference)
        limit = dataclasses.replace(
            budget, normwise=2.5 * budget.normwise, bias=2.5 * budget.bias
        )  # as the gate's: few channels scatter
        graded.check(limit, f"group {group}")


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    "dtype, weighted, dim",
    [
        *((dtype, weighted, 24) for dtype in DTYPES for weighted in (False, True)),
        (torch.bfloat16, True, 136),
        (torch.float16, False, 136),
    ],
    ids=str,
)
def test_within_budget(dtype, dim, weighted):
    keys, offsets = make_keys(sum(COUNTS), dim, dtype), offsets_of(COUNTS)
    weights = weights_of(len(keys)) if weighted else None
    budget = numerics.MOMENT_FP64 if dtype == torch.float64 else numerics.MOMENT
    check(run(keys, offsets, weights=weights), grouped_moment(keys, offsets, weights), budget)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unsorted_rows_of_odd_width_and_float32_sums(dtype):
    n = sum(COUNTS)
    keys = make_keys(n, 45, dtype)[:, 4:41]  # rows that do not start on 16 bytes
    index = torch.repeat_interleave(torch.tensor(COUNTS))
    index = index[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    order, offsets = sort_rows(index, len(COUNTS))
    weights = weights_of(n)
    result = run(keys, offsets, order, weights, storage=torch.float32)
    exact = grouped_moment(keys[order], offsets, weights[order])
    check(result, exact, numerics.float32_storage(1))


@pytest.mark.usefixtures("few_rows")
def test_groups_with_most_rows_are_cut_and_added_in_order(monkeypatch):
    monkeypatch.setattr(schedule, "cut_rows", lambda rows, *sizes: [1 + (n > 50) for n in rows])
    keys, offsets = make_keys(sum(COUNTS), 40, torch.bfloat16), offsets_of(COUNTS)
    check(run(keys, offsets), grouped_moment(keys, offsets))


def test_other_precisions_and_nothing():
    keys, offsets = make_keys(60, 24, torch.bfloat16), offsets_of([40, 0, 20])
    check(run(keys, offsets, precision="fp64"), grouped_moment(keys, offsets), numerics.MOMENT_FP64)
    assert not run(keys[:0], offsets_of([0, 0])).any()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_audit(dtype, copy):
    keys, signs = make_keys(37, 200, dtype)[:, 5:150], audit.signs(145)
    out = testing.guarded(testing.poisoned_empty(37, 145, dtype=dtype))
    sums = testing.guarded(testing.poisoned_empty(37, 5, dtype=torch.float64))
    grouped_gpu.row_audit_(RowAuditCall(out.tensor if copy else None, sums.tensor, keys, signs))
    out.check()
    sums.check()
    wide = keys.double()
    exact = torch.cat([wide.square().sum(1, keepdim=True), (wide @ signs.T).square()], 1)
    assert torch.allclose(sums.tensor, exact, rtol=1e-11)
    assert not copy or torch.equal(out.tensor, keys)


@pytest.fixture
def short_gate(few_rows, monkeypatch):
    monkeypatch.setattr(gpu, "VARIANTS", gpu.VARIANTS[:1])
    monkeypatch.setattr(grouped_gpu, "_GATE_DIM", 40)


@pytest.mark.usefixtures("short_gate")
def test_the_gate_passes_the_kernels():
    assert grouped_gpu.gate(torch.device("cpu")) is None


@pytest.mark.usefixtures("short_gate")
@pytest.mark.parametrize("fault", ["lost row", "weights once", "last tile", "rows"])
def test_the_gate_rejects_wrong_kernels(fault, monkeypatch):
    launch = grouped_gpu.launch_

    def wrong(c, keys, weights, pieces, config):
        if fault == "lost row":
            pieces = [dataclasses.replace(piece, stop=piece.stop - 1) for piece in pieces]
        if fault == "weights once" and weights is not None:
            weights = weights.sqrt()
        launch(c, keys, weights, pieces, config)

    if fault == "last tile":
        table = schedule.tile_table
        monkeypatch.setattr(schedule, "tile_table", lambda *sizes: table(*sizes)[:-1])
    elif fault == "rows":
        monkeypatch.setattr(grouped_gpu, "row_audit_", lambda call: call.sums.zero_())
    monkeypatch.setattr(grouped_gpu, "launch_", wrong)
    found = grouped_gpu.gate(torch.device("cpu")) or "passed"
    assert re.search("second moment of|audit of rows", found)
