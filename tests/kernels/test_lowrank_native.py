"""The compiled CPU kernels of the low-rank update: every instruction set against the
specification (unit).
"""

from dataclasses import replace

import pytest
import torch

from knowedit_kernels import _native, explain, numerics, testing
from knowedit_kernels.lowrank import low_rank_update_, low_rank_update_many_
from knowedit_kernels.lowrank.blocked import TORCH
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.cpu import COMPILED
from knowedit_kernels.lowrank.fingerprint import keys_of, sums_of
from knowedit_kernels.lowrank.reference import grade_update, updated
from knowedit_kernels.moments.cpu import GENERIC
from tests.kernels.isa import skip
from tests.kernels.isa_emulation import instructions_of
from tests.kernels.test_lowrank import problem

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 15), (6, 64), (7, 65), (48, 128), (49, 321), (130, 1000)]
KEYS = {0: 1, 1: 8, 2: 3, 9: 19, 100: 2}  # probed at a rank; what is taken at a time, and less
pytestmark = pytest.mark.isa
each_kernel = pytest.mark.parametrize("candidate", [*COMPILED, TORCH], ids=lambda c: c.name)


def run(
    candidate, W, U, V, rounding="nearest", plane=None, probe=None, write=True, base=None, seed=5
):
    """Runs on one weight with poisoned outputs, or skips with the verifier's reason; (sums [5],
    probe error or None).
    """

    def one(x):
        return [] if x is None else [x]

    sums = testing.poisoned_empty(1, 5, dtype=torch.float64)
    error = None if probe is None else testing.poisoned_empty(len(W), probe.shape[1])
    call = UpdateCall(
        [W],
        one(base),
        [U],
        [V],
        rounding,
        seed,
        one(plane),
        one(probe),
        write,
        sums,
        one(error),
    )
    with instructions_of(candidate):
        if reason := candidate.verify(call):
            skip(candidate.name, reason)
        candidate.run(call)
    return sums[0], error


@pytest.mark.parametrize("rank", KEYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_within_budget(candidate, dtype, shape, rank):
    W, U, V = problem(*shape, dtype, rank, ratio=0.3)
    probe = torch.randn(shape[1], KEYS[rank], generator=torch.Generator().manual_seed(9))
    guard = testing.guarded(W, row_margin=3)
    sums, error = run(candidate, guard.tensor, U, V, probe=probe)
    guard.check()
    largest = numerics.UPDATE_NEAREST[dtype].largest
    assert not grade_update(guard.tensor, W, U, V).failures(numerics.UpdateBudget(largest, 1.0))
    ideal, applied = U.double() @ V.double().T, guard.tensor.double() - W.double()
    tallies = [ideal.square().sum(), applied.square().sum(), (applied - ideal).square().sum()]
    expected = torch.tensor(
        [*map(float, tallies), float((applied != 0).sum()), 0.0], dtype=torch.float64
    )
    exact = (
        dtype.itemsize == 2
    )  # of a float32 weight the arithmetic's own rounding is as large as what is measured
    assert torch.allclose(sums, expected, rtol=1e-4 if exact else 2e-2)
    off = (applied - ideal) @ probe.double()
    arithmetic = (1e-6 if exact else 1e-5) * float(W.double().norm())
    assert float((error - off).norm()) <= 1e-3 * float(off.norm()) + arithmetic


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_kernel
def test_equal_bits_on_exact_arithmetic(candidate, dtype, rounding):
    g = torch.Generator().manual_seed(0)
    W = (torch.randint(-512, 512, (97, 203), generator=g) / 64).to(dtype)
    U, V = (torch.randint(-16, 16, (size, 6), generator=g) / 64.0 for size in W.shape)
    carried = (torch.randint(-2, 2, W.shape, generator=g) / 2048).bfloat16()
    plane = carried.clone() if rounding == "compensated" else None
    result = W.clone()
    run(candidate, result, U, V, rounding, plane)
    if plane is None:
        assert torch.equal(result, updated(W, U, V, 1.0, rounding, seed=5))
    else:
        exact = W.double() + U.double() @ V.double().T + carried.double()
        assert torch.equal(result, exact.to(dtype)) and torch.equal(
            plane, (exact - result.double()).bfloat16()
        )
        assert not torch.equal(plane, carried)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_kernel
def test_every_value_survives_an_empty_update(candidate, dtype):
    every = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32)
        .to(torch.int16)
        .view(dtype)
        .reshape(256, 256)
    )
    finite = torch.where(every.isfinite(), every, torch.zeros_like(every))
    for rounding in ("nearest", "stochastic"):
        kept = finite.clone()
        sums, _ = run(candidate, kept, torch.zeros(256, 1), torch.zeros(256, 1), rounding)
        assert torch.equal(kept.float(), finite.float()) and not sums.any()
    kept = every.clone()
    sums, _ = run(candidate, kept, torch.zeros(256, 1), torch.zeros(256, 1))
    assert torch.equal(kept.isnan(), every.isnan()) and torch.equal(kept.isinf(), every.isinf())
    assert int(sums[4]) == int((~every.isfinite()).sum())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_kernel
def test_every_magnitude_rounds_as_specified(candidate, dtype, rounding):
    # one float32 addend per entry, from below the smallest subnormal to beyond the largest number
    g = torch.Generator().manual_seed(1)
    top = 3.5 if dtype == torch.float16 else 37
    U = torch.randn(4000, 1, generator=g) * torch.logspace(-10, top + 1, 4000)[:, None]
    W = torch.zeros(4000, 16, dtype=dtype)
    V = torch.ones(16, 1)
    result = W.clone()
    run(candidate, result, U, V, rounding)
    expected = updated(W, U, V, 1.0, rounding, seed=5)
    assert torch.equal(result.isinf(), expected.isinf()) and torch.equal(result, expected)
    assert bool((result != 0).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, threads):
    W, U, V = problem(300, 500, dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        w = W.clone()
        report = low_rank_update_(w, U, V, probe=torch.ones(500, 2))
        results.append((w, report.ideal_norm, report.error_norm, report.probe_error.tolist()))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and result[1:] == results[0][1:]


def test_fingerprints_do_not_depend_on_the_number_of_threads(threads):
    W, U, V = problem(600, 3000, torch.bfloat16)  # as large as is shared among them
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        w, prints = W.clone(), torch.full((1, 2), -1)
        low_rank_update_many_([w], [U], [V], prints=prints)
        assert torch.equal(prints[0], sums_of(w)) and not torch.equal(prints[0], sums_of(W))


@each_kernel
def test_base_residual_and_weight_may_have_different_strides(candidate):
    W, U, V = problem(20, 70, torch.bfloat16)
    expected, plane = W.clone(), torch.zeros(20, 70, dtype=torch.bfloat16)
    run(candidate, expected, U, V, "compensated", plane)
    out, base = (
        testing.guarded(torch.zeros_like(W), row_margin=5),
        testing.guarded(W, row_margin=11),
    )
    carried = testing.guarded(torch.zeros_like(plane), row_margin=2)
    run(candidate, out.tensor, U, V, "compensated", carried.tensor, base=base.tensor)
    assert (
        torch.equal(out.tensor, expected)
        and torch.equal(carried.tensor, plane)
        and torch.equal(base.tensor, W)
    )
    for guard in (out, base, carried):
        guard.check()


@each_kernel
def test_dry_run_writes_nothing(candidate):
    W, U, V = problem(20, 70, torch.bfloat16)
    before, plane = W.clone(), torch.zeros(20, 70, dtype=torch.bfloat16)
    sums, _ = run(candidate, W, U, V, "compensated", plane, write=False)
    assert torch.equal(W, before) and not plane.any() and sums[3] > 0


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_entries_that_overflow_are_counted(candidate, dtype, rank, write):
    """Also where the squares of those that do not overflow float32."""
    W = torch.full((13, 70), torch.finfo(dtype).max / 2, dtype=dtype)
    U = torch.zeros(13, rank)
    U[3], U[7] = torch.finfo(dtype).max / rank, torch.finfo(dtype).max / 4 / rank
    V = torch.ones(70, rank)
    V[66] = 0
    sums, _ = run(candidate, W.clone(), U, V, write=write)
    assert sums[3:].tolist() == [2 * 69, 69]


def test_columns_that_are_not_dense_fall_back_to_torch():
    W, U, V = problem(30, 40, torch.bfloat16)
    strided = torch.zeros(40, 30, dtype=torch.bfloat16).T
    strided.copy_(W)
    low_rank_update_(strided, U, V)
    assert explain("low_rank_update_").chosen == "torch"
    low_rank_update_(W, U, V)
    difference = (strided.float() - W.float()).abs().max() / W.float().abs().max()
    assert float(difference) <= 2.0**-8


def test_opcheck():
    isa = {candidate.name: i for candidate, i in zip(COMPILED, (2, 1, 0))}
    W, U, V = problem(6, 10, torch.bfloat16, rank=2)
    if reason := _native.load().refusal(GENERIC):
        skip("generic", reason)
    sums, error = torch.zeros(5, dtype=torch.float64), torch.zeros(6, 2)
    args = (
        W,
        W.clone(),
        U,
        V,
        2,
        3,
        0,
        torch.zeros_like(W),
        torch.randn(10, 2),
        True,
        sums,
        error,
        torch.zeros(1, 2, dtype=torch.int64),
        keys_of(W),
        isa["generic"],
    )
    torch.library.opcheck(torch.ops.knowedit.low_rank_cpu_.default, args)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@each_kernel
def test_one_broken_factor_leaves_all_weights_of_a_call_alone(candidate, broken):
    first, second = (problem(20, 70, torch.float32, seed=seed) for seed in (0, 1))
    second[2][33, 4] = broken
    weights = [first[0].clone(), second[0].clone()]
    sums = testing.poisoned_empty(2, 5, dtype=torch.float64)
    factors = [first[1], second[1]], [first[2], second[2]]
    call = UpdateCall(weights, [], *factors, "nearest", 0, [], [], True, sums, [])
    with instructions_of(candidate):
        if reason := candidate.verify(call):
            skip(candidate.name, reason)
        with pytest.raises(ValueError, match="nothing was written"):
            candidate.run(call)
        with pytest.raises(ValueError, match="nothing was written"):
            candidate.run(replace(call, w=[weights[1]], u=[second[1]], v=[second[2]]))
    assert torch.equal(weights[0], first[0]) and torch.equal(weights[1], second[0])


@pytest.mark.parametrize("n", [40, 600])
@each_kernel
def test_what_is_read_may_lie_in_memory_that_is_written(candidate, n):
    """As if it had been read first: U, V, the probe keys, another weight, a part of a base."""
    g = torch.Generator().manual_seed(0)
    start, other, right = (torch.randn(n, n, generator=g).double() / n**0.5 for _ in range(3))

    def fresh(x):
        return x.float().clone()

    def near(x, y):
        assert float((x.double() - y).norm() / y.norm()) < 1e-6

    W = fresh(start)
    run(candidate, W, W, fresh(right))
    near(W, start + start @ right.T)
    W = fresh(start)
    run(candidate, W, fresh(right), W)
    near(W, start + right @ start.T)
    W, U = fresh(start), fresh(right) / 8
    _, error = run(candidate, W, U, fresh(other), probe=W)
    _, apart = run(candidate, fresh(start), U, fresh(other), probe=fresh(start))
    assert torch.equal(error, apart)
    for write, read in ((slice(0, n - 3), slice(3, n)), (slice(3, n), slice(0, n - 3))):
        W = fresh(start)
        run(candidate, W[write], fresh(right)[write], fresh(other), base=W[read])
        near(W[write], start[read] + right[write] @ other.T)
    A, B, sums = fresh(start), fresh(other), torch.empty(2, 5, dtype=torch.float64)
    both = UpdateCall([A, B], [], [B, A], [fresh(right)] * 2, "nearest", 0, [], [], True, sums, [])
    swap = UpdateCall(
        [A, B], [B, A], [A, B], [fresh(right)] * 2, "nearest", 0, [], [], True, sums, []
    )
    with instructions_of(candidate):
        candidate.run(both)
        near(A, start + other @ right.T)
        near(B, other + start @ right.T)
        A.copy_(start), B.copy_(other)
        candidate.run(replace(swap, w=[A, B]))
    near(A, other + start @ right.T)
    near(B, start + other @ right.T)


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_every_column_meets_its_own_factor(candidate, dtype, rank):
    """Which column of V lies where in a panel: row k of W becomes column k of V."""
    V = torch.arange(1.0, 1 + 150 * rank).view(150, rank) / 4096
    W = torch.zeros(rank, 150, dtype=dtype)
    run(candidate, W, torch.eye(rank), V)
    assert torch.equal(W, V.T.to(dtype))
