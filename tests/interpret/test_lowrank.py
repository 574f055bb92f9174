"""The low-rank update kernel, run on the CPU: budgets, exact agreement, margins, probes (unit)."""

import pytest
import torch
import triton
import triton.language as tl

from knowedit_kernels import numerics, testing
from knowedit_kernels.lowrank import blocked, gpu
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.reference import grade_update, updated
from knowedit_kernels.lowrank.rounding import philox
from knowedit_kernels.triton_lib.rounding import random_halves

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 70), (64, 64), (65, 130), (130, 577), (70, 1096)]
RANKS = [0, 1, 11, 40]
#: Every shape that one row of tiles covers with every rank in bfloat16; the two larger ones, which
#: take a second each, and the other types with every other rank.
NEAREST = [
    (dtype, shape, rank)
    for dtype in DTYPES
    for i, shape in enumerate(SHAPES)
    for rank in (RANKS if dtype == torch.bfloat16 and shape[1] < 512 else RANKS[i % 2 :: 2])
]


@triton.jit
def _bits(out, seed, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.arange(0, ROWS)
    bits = random_halves(seed, row[:, None] + 3, tl.arange(0, GROUPS)[None, :], 7, 10)
    tl.store(
        out + row[:, None] * (8 * GROUPS) + tl.arange(0, 8 * GROUPS)[None, :], bits.to(tl.int32)
    )


def problem(rows, columns, dtype, rank, ratio=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = (torch.randn(rows, columns, generator=g) * 0.02).to(dtype)
    U = torch.randn(rows, rank, generator=g) * (0.02 * ratio / max(rank, 1) ** 0.5)
    return W, U, torch.randn(columns, rank, generator=g), torch.randn(columns, 5, generator=g)


def run(
    implementation,
    W,
    U,
    V,
    rounding="nearest",
    base=None,
    plane=None,
    probe=None,
    write=True,
    seed=5,
):
    """Runs on one weight with poisoned outputs; returns (sums [5], probe error or None)."""
    sums = testing.poisoned_empty(1, 5, dtype=torch.float64)
    errors = [] if probe is None else [testing.poisoned_empty(len(W), probe.shape[1])]

    def one(x):
        return [] if x is None else [x]

    with testing.poisoned_allocations():
        implementation(
            UpdateCall(
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
                errors,
            )
        )
    return sums[0], errors[0] if errors else None


def test_the_gate_passes(monkeypatch):
    monkeypatch.delitem(gpu.PARTS, torch.float16)  # it is read as bfloat16 is; its tests are below
    assert gpu.gate(torch.device("cpu")) is None


@pytest.mark.parametrize("dtype, shape, rank", NEAREST, ids=str)
def test_nearest_is_within_budget(dtype, shape, rank):
    W, U, V, keys = problem(*shape, dtype, rank)
    # 8 elements keep the view aligned; the kernel must not touch what lies between rows
    guard = testing.guarded(W, margin=64, row_margin=8 - shape[1] % 8)
    sums, error = run(gpu.update_, guard.tensor, U, V, probe=keys)
    guard.check()
    budget = numerics.UPDATE_NEAREST[dtype]
    assert not grade_update(guard.tensor, W, U, V).failures(
        numerics.UpdateBudget(budget.largest, 1.0)
    )
    ideal, applied = U.double() @ V.double().T, guard.tensor.double() - W.double()
    expected = [ideal.square().sum(), applied.square().sum(), (applied - ideal).square().sum()]
    expected = torch.stack(
        [*expected, torch.tensor(float((applied != 0).sum())), torch.tensor(0.0)]
    ).double()
    assert torch.allclose(sums, expected, rtol=1e-2 if dtype == torch.float32 else 2e-3)
    if dtype.itemsize == 2:
        off = (applied - ideal) @ keys.double()
        assert float((error - off).norm()) <= 1e-2 * float(off.norm())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_equal_bits_on_exact_arithmetic(dtype, rounding):
    g = torch.Generator().manual_seed(0)
    W = (torch.randint(-512, 512, (97, 641), generator=g) / 64).to(dtype)
    U, V = (torch.randint(-16, 16, (size, 6), generator=g) / 64.0 for size in W.shape)
    carried = (torch.randint(-2, 2, W.shape, generator=g) / 2048).bfloat16()
    results = []
    for implementation in (gpu.update_, blocked.update_):
        w, plane = W.clone(), carried.clone() if rounding == "compensated" else None
        run(implementation, w, U, V, rounding, plane=plane)
        results.append((w, plane))
    assert torch.equal(results[0][0], results[1][0])
    if rounding == "compensated":
        assert torch.equal(results[0][1], results[1][1]) and not torch.equal(results[0][1], carried)
    else:
        assert torch.equal(results[0][0], updated(W, U, V, 1.0, rounding, seed=5))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_stochastic_bits_do_not_depend_on_tiling(dtype, monkeypatch):
    W, U, V, _ = problem(150, 700, dtype, 3)
    results = []
    for rows, columns, tiles in ((64, 64, 8), (32, 128, 2), (128, 32, 1)):
        monkeypatch.setattr(gpu, "BM", rows)
        monkeypatch.setattr(gpu, "BN", columns)
        monkeypatch.setattr(gpu, "TILES", tiles)
        w = W.clone()
        run(gpu.update_, w, U, V, "stochastic")
        results.append(w)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_probe_wider_than_a_launch_writes_once():
    W, U, V, _ = problem(70, 90, torch.bfloat16, 4)
    keys, w = torch.randn(90, 150, generator=torch.Generator().manual_seed(3)), W.clone()
    _, error = run(gpu.update_, w, U, V, probe=keys)
    off = (w.double() - W.double() - U.double() @ V.double().T) @ keys.double()
    assert float((error - off).norm()) <= 1e-2 * float(off.norm())
    assert not grade_update(w, W, U, V).failures(numerics.UpdateBudget(0.52, 1.0))


def test_grouped_launch_base_and_dry_run():
    problems = [
        problem(40 + 30 * i, 70 + 64 * i, dtype, i + 1, seed=i)
        for i, dtype in enumerate([*DTYPES, *DTYPES])
    ]
    Ws, Us, Vs, keys = map(list, zip(*problems))
    outputs = [testing.poisoned_empty(*W.shape, dtype=W.dtype) for W in Ws]
    sums, alone = torch.empty(6, 5, dtype=torch.float64), torch.empty(6, 5, dtype=torch.float64)
    errors = [testing.poisoned_empty(len(W), 5) for W in Ws]
    gpu.update_(UpdateCall(outputs, Ws, Us, Vs, "nearest", 0, [], keys, True, sums, errors))
    for i, W in enumerate(Ws):
        single, error = W.clone(), [torch.empty(len(W), 5)]
        args = ([single], [], [Us[i]], [Vs[i]], "nearest", 0, [], [keys[i]])
        gpu.update_(UpdateCall(*args, False, alone[i : i + 1], error))
        assert torch.equal(single, W) and torch.equal(alone[i], sums[i])
        gpu.update_(UpdateCall(*args, True, alone[i : i + 1], error))
        assert torch.equal(single, outputs[i]) and torch.equal(error[0], errors[i])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_sums_the_same_bits_are_written_and_nothing_else(dtype, rounding):
    if dtype == torch.float32 and rounding != "nearest":
        return
    W, U, V, _ = problem(70, 577, dtype, 11)
    results = []
    for sums in (torch.empty(1, 5, dtype=torch.float64), None):
        guard = testing.guarded(W.clone(), margin=64, row_margin=8 - 577 % 8)
        plane = [torch.zeros(70, 577).bfloat16()] if rounding == "compensated" else []
        with testing.poisoned_allocations():
            gpu.update_(
                UpdateCall([guard.tensor], [], [U], [V], rounding, 5, plane, [], True, sums, [])
            )
        guard.check()
        results.append([guard.tensor.clone(), *plane])
    assert all(map(torch.equal, *results)) and not torch.equal(results[0][0], W)


def test_infinities_are_counted():
    W = torch.full((5, 70), 6e4, dtype=torch.float16)
    V = torch.zeros(70, 1)
    V[:3] = 1e4
    sums, _ = run(gpu.update_, W, torch.ones(5, 1), V)
    assert int(sums[4]) == 15 and int(W.isinf().sum()) == 15


def test_device_philox_is_philox():
    out = torch.zeros(4, 16, dtype=torch.int32)
    _bits[(1,)](out, 2**40 + 3, ROWS=4, GROUPS=2)
    for row in range(4):
        for group in range(2):
            counter = tuple(torch.tensor([c]) for c in (group, row + 3, 7, 0))
            words = [int(w) for w in philox(counter, 2**40 + 3, rounds=10)]
            expected = [half for word in words for half in (word & 0xFFFF, word >> 16)]
            assert out[row, 8 * group : 8 * group + 8].tolist() == expected
