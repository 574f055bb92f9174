"""W += alpha U V^T: budgets against float64, roundings, the report, and refusals (unit)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_kernels import _device, numerics, testing
from knowedit_kernels.lowrank import gpu, low_rank_update_, low_rank_update_many_
from knowedit_kernels.lowrank.reference import grade_update, updated
from knowedit_kernels.lowrank.rounding import philox, random_bits, round_stochastic

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
HALVES = DTYPES[:2]
SHAPES = [(1, 1), (3, 7), (300, 200), (129, 1537)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def problem(rows, columns, dtype, rank=5, ratio=0.1, seed=0):
    """W ~ 0.02, and factors of an update about ``ratio`` its size."""
    g = torch.Generator().manual_seed(seed)
    W = (torch.randn(rows, columns, generator=g) * 0.02).to(dtype)
    U = torch.randn(rows, rank, generator=g) * (0.02 * ratio / max(rank, 1) ** 0.5)
    return W, U, torch.randn(columns, rank, generator=g)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
def test_nearest_is_within_budget(dtype, shape):
    W, U, V = problem(*shape, dtype)
    guard = testing.guarded(W, row_margin=3)
    report = low_rank_update_(guard.tensor, U, V, alpha=-1.5)
    guard.check()
    budget = numerics.UPDATE_NEAREST[dtype]
    grade = grade_update(guard.tensor, W, U, V, -1.5)
    if W.numel() < 1e4:
        budget = numerics.UpdateBudget(budget.largest, 1.0)
    assert not grade.failures(budget), grade
    ideal, applied = -1.5 * U.double() @ V.double().T, guard.tensor.double() - W.double()
    assert report.ideal_norm == pytest.approx(float(ideal.norm()), rel=1e-5)
    assert report.applied_norm == pytest.approx(float(applied.norm()), rel=1e-5)
    assert report.survived == pytest.approx(
        float((applied * ideal).sum() / ideal.square().sum()), rel=1e-4
    )
    assert (
        report.changed == int((guard.tensor != W).sum())
        and report.total == W.numel()
        and report.nonfinite == 0
    )
    if dtype.itemsize == 2:
        assert report.error_norm == pytest.approx(float((applied - ideal).norm()), rel=1e-3)


@each_dtype
def test_matches_the_reference_exactly_on_exact_arithmetic(dtype):
    # small integers over powers of two: every sum is exact in float32, so only rounding acts, ties
    # included
    g = torch.Generator().manual_seed(0)
    W = (torch.randint(-512, 512, (97, 130), generator=g) / 64).to(dtype)
    U, V = (torch.randint(-16, 16, (size, 6), generator=g) / 64.0 for size in W.shape)
    for rounding in ("nearest", "stochastic") if dtype in HALVES else ("nearest",):
        result = W.clone()
        low_rank_update_(result, U, V, 0.5, rounding, seed=11)
        assert torch.equal(result, updated(W, U, V, 0.5, rounding, seed=11))


def test_philox_known_answers():
    # Random123's kat_vectors: philox4x32 10
    def words(*values):
        return tuple(torch.tensor([v]) for v in values)

    zero, ones = words(0, 0, 0, 0), words(*[0xFFFFFFFF] * 4)
    pi = words(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, expected in (
        (zero, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0x299F31D0_A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(w) for w in philox(counter, key, rounds=10)) == expected


def test_random_bits_depend_on_position_alone():
    whole = random_bits(slice(0, 40), 50, 5, 0)
    assert torch.equal(random_bits(slice(13, 21), 50, 5, 0), whole[13:21])
    assert torch.equal(random_bits(slice(0, 40), 33, 5, 0), whole[:, :33])
    others = [
        random_bits(slice(0, 40), 50, seed, stream)
        for seed, stream in ((6, 0), (5, 1), (2**40 + 5, 0))
    ]
    assert all(float((other == whole).float().mean()) < 0.01 for other in others)
    counts = torch.bincount(
        random_bits(slice(0, 800), 800, 1, 0).flatten() >> 8, minlength=256
    ).double()
    assert (
        float(((counts - 2500) ** 2 / 2500).sum()) < 255 + 6 * (2 * 255) ** 0.5
    )  # chi-squared, 6 sigma


@each_half
def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour(dtype):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(400, generator=g) * torch.logspace(-9, 4, 400)
    bits = torch.arange(0, 65536, 8, dtype=torch.int32)  # every value of the bits float16 uses
    rounded = round_stochastic(
        x[:, None].expand(-1, len(bits)).contiguous(), bits.expand(400, -1).contiguous(), dtype
    )
    place = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(x.double().abs())))
    place = place.clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    error = (rounded.double() - x.double()[:, None]) / place[:, None]
    assert float(error.abs().max()) < 1
    assert float(error.mean(1).abs().max()) < 2.0**-12
    exact = x.to(dtype)
    assert torch.equal(
        round_stochastic(exact.float(), torch.full((400,), 65535, dtype=torch.int32), dtype), exact
    )
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    kept = round_stochastic(odd, torch.full((5,), 65535, dtype=torch.int32), dtype)
    assert (
        torch.equal(kept.isnan(), odd.isnan())
        and torch.equal(kept[:2].float(), odd[:2])
        and not kept[3:].any()
    )


@each_half
def test_small_edits_survive_only_unbiased_rounding(dtype):
    W, U, V = problem(400, 500, dtype, ratio=3e-2 * torch.finfo(dtype).eps)
    nearest, stochastic = (
        low_rank_update_(W.clone(), U, V, rounding=r, seed=3) for r in ("nearest", "stochastic")
    )
    assert nearest.survived < 0.8 and nearest.changed < 0.1 * W.numel()
    assert (
        stochastic.survived == pytest.approx(1, abs=0.3)
        and stochastic.error_norm > nearest.error_norm
    )
    total = (
        sum(
            low_rank_update_(W.clone(), U, V, rounding="stochastic", seed=s).survived
            for s in range(20)
        )
        / 20
    )
    assert total == pytest.approx(1, abs=0.06)
    again = [
        low_rank_update_(w := W.clone(), U, V, rounding="stochastic", seed=3) and w
        for _ in range(2)
    ]
    assert torch.equal(*again)


@each_half
def test_compensated_carries_what_was_cut_off(dtype):
    W, U, V = problem(64, 80, dtype, ratio=3e-2 * torch.finfo(dtype).eps)
    plain, kept, plane = W.clone(), W.clone(), torch.zeros_like(W, dtype=torch.bfloat16)
    for _ in range(100):
        low_rank_update_(plain, U, V)
        low_rank_update_(kept, U, V, rounding="compensated", residual=plane)
    exact = W.double() + 100 * U.double() @ V.double().T
    lost, carried = (
        (w - exact).norm() / (exact - W).norm() for w in (plain.double(), kept.double() + plane)
    )
    assert float(carried) < 0.02 < 0.3 < float(lost)


def test_corrected_restores_the_output_at_the_keys():
    W, _, _ = problem(512, 768, torch.bfloat16)
    g = torch.Generator().manual_seed(4)
    keys = torch.randn(768, 3, generator=g)
    V = torch.linalg.pinv(keys).T.contiguous()  # V^T keys = I
    U = torch.randn(512, 3, generator=g)
    U *= 1e-3 * W.float().norm() / (U @ V.T).norm()

    def error(rounding):
        w = W.clone()
        report = low_rank_update_(w, U, V, rounding=rounding, probe=keys)
        off = (w.double() - W.double() - U.double() @ V.double().T) @ keys.double()
        assert torch.allclose(report.probe_error.double(), off, atol=2e-3 * float(off.norm()))
        return float(off.norm() / U.norm())

    nearest, corrected = error("nearest"), error("corrected")
    assert corrected < 0.6 * nearest, (nearest, corrected)


def test_dry_run_base_and_many():
    W, U, V = problem(50, 60, torch.bfloat16)
    before = W.clone()
    report = low_rank_update_(W, U, V, dry_run=True)
    assert torch.equal(W, before) and report.changed > 0
    target = torch.full_like(W, float("nan"))
    assert low_rank_update_(target, U, V, base=W).changed == report.changed
    low_rank_update_(W, U, V)
    assert torch.equal(W, target)
    Ws, Us, Vs = zip(
        *[problem(20 + i, 30, dtype, rank=i, seed=i) for i, dtype in enumerate(DTYPES)]
    )
    expected = [updated(*args, 2.0, "nearest") for args in zip(Ws, Us, Vs)]
    reports = low_rank_update_many_(Ws, Us, Vs, 2.0)
    assert reports[0].changed == 0 and reports[0].survived == 1.0  # rank 0
    for result, exact in zip(Ws, expected):
        assert (result.double() - exact.double()).norm() <= 1e-3 * exact.double().norm()
    halves = [torch.zeros(20, 30, dtype=torch.bfloat16) for _ in range(2)]
    low_rank_update_many_(
        halves, [torch.ones(20, 1)] * 2, [torch.ones(30, 1) * 0.3] * 2, rounding="stochastic"
    )
    assert not torch.equal(*halves)  # each weight has its own stream of bits
    assert low_rank_update_many_([], [], []) == []


@each_dtype
def test_the_same_weight_twice_in_a_call_is_refused(dtype):
    W, U, V = problem(7, 5, dtype)
    before = W.clone()
    with pytest.raises(ValueError, match="occurs twice"):
        low_rank_update_many_([W, W], [U, U], [V, V])
    assert torch.equal(W, before)
    low_rank_update_many_([W, W], [U, U], [V, V], dry_run=True)


@each_dtype
def test_empty_operands_may_have_any_strides(dtype):
    """What is empty counts as contiguous whatever its strides: none is refused half-way."""
    for rows, columns in ((0, 5), (5, 0), (0, 0)):
        W, U, V = torch.randn(7, 5).to(dtype), torch.randn(7, 3), torch.randn(5, 3)
        before = W.clone()
        empty = [
            torch.zeros(size, rank).T.contiguous().T  # strides (1, rows)
            for size, rank in ((rows, 3), (columns, 3), (columns, 2))
        ]
        weight = torch.zeros(columns, rows, dtype=dtype).T
        reports = low_rank_update_many_(
            [W, weight], [U, empty[0]], [V, empty[1]], probes=[torch.randn(5, 2), empty[2]]
        )
        assert reports[1].total == 0 and reports[1].survived == 1.0
        assert reports[1].probe_error.shape == (rows, 2) and not reports[1].probe_error.any()
        assert not torch.equal(W, before)


def test_empty_and_overflow():
    empty = torch.zeros(0, 5, dtype=torch.bfloat16)
    assert low_rank_update_(empty, torch.zeros(0, 2), torch.zeros(5, 2)).total == 0
    W = torch.full((4, 4), 6e4, dtype=torch.float16)
    assert (
        low_rank_update_(W, torch.ones(4, 1), torch.ones(4, 1) * 1e4, dry_run=True).nonfinite == 16
    )
    assert bool(torch.isfinite(W).all())


def test_parameters_are_written_and_not_tracked():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    low_rank_update_(weight, torch.ones(3, 1, requires_grad=True), torch.ones(4, 1))
    assert torch.equal(weight.detach(), torch.ones(3, 4)) and weight.is_leaf


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(0, 9),
    ratio=st.floats(1e-4, 10),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(HALVES),
    rounding=st.sampled_from(["nearest", "stochastic"]),
)
def test_every_entry_is_a_neighbour(rows, columns, rank, ratio, seed, dtype, rounding):
    W, U, V = problem(rows, columns, dtype, rank, ratio, seed)
    result = W.clone()
    low_rank_update_(result, U, V, rounding=rounding, seed=seed)
    largest = (
        numerics.UPDATE_NEAREST[dtype].largest
        if rounding == "nearest"
        else numerics.UPDATE_STOCHASTIC.largest
    )
    assert grade_update(result, W, U, V).largest <= largest


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_opcheck(rounding):
    W, U, V = problem(6, 10, torch.bfloat16, rank=2)
    plane = [torch.zeros_like(W, dtype=torch.bfloat16)] if rounding == "compensated" else []
    prints = torch.zeros(1, 2, dtype=torch.int64)
    outputs = torch.zeros(1, 5, dtype=torch.float64), [torch.zeros(6, 2)], prints
    args = ([W], [W.clone()], [U], [V], rounding, 3, plane, [torch.randn(10, 2)], True, *outputs)
    torch.library.opcheck(torch.ops.knowedit.low_rank_update_.default, args)


W, U, V = problem(6, 10, torch.bfloat16, rank=2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: low_rank_update_(W, V, U), "transposed"),
        (lambda: low_rank_update_(W, U, V[:, :1]), r"\[6, r\]"),
        (lambda: low_rank_update_(W[0], U, V), "2-D"),
        (lambda: low_rank_update_(W.int(), U, V), "int32"),
        (lambda: low_rank_update_(W, U.int(), V), "floating"),
        (lambda: low_rank_update_(W, U, V, rounding="up"), "nearest, stochastic"),
        (lambda: low_rank_update_(W.float(), U, V, rounding="stochastic"), "16-bit"),
        (lambda: low_rank_update_(W, U, V, rounding="compensated"), "residual"),
        (lambda: low_rank_update_(W, U, V, residual=W.clone()), "residual"),
        (lambda: low_rank_update_(W, U, V, rounding="compensated", residual=W.float()), "bfloat16"),
        (lambda: low_rank_update_(W, U, V, rounding="corrected"), "probe"),
        (lambda: low_rank_update_(W, U, V, probe=U), r"\[10, p\]"),
        (lambda: low_rank_update_(W, U, V, base=W[:3]), "base"),
        (lambda: low_rank_update_(W, U * float("nan"), V), "NaN"),
        (lambda: low_rank_update_(W, U, V, alpha=float("inf")), "infinity"),
        (lambda: low_rank_update_many_([W, W], [U], [V, V]), "2 weights but 1 of U"),
        (lambda: low_rank_update_many_([W, W], [U, V], [V, V]), "weight 1"),
    ],
)
def test_refusals_leave_the_weight_alone(call, message):
    before = W.clone()
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.equal(W, before)


def test_a_write_is_counted_and_a_dry_run_is_not():
    W, U, V = problem(6, 8, torch.float32)
    W.requires_grad_()
    x = torch.randn(8, requires_grad=True)
    y = (W @ x).square().sum()
    low_rank_update_(W, U, V, dry_run=True)
    torch.autograd.grad(y, x, retain_graph=True)
    low_rank_update_(W, U, V)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)


def test_the_tables_of_a_launch_are_made_once_and_sent_in_one_copy():
    """What the Triton launch tells its programs, without a GPU."""
    cpu, shapes = torch.device("cpu"), ((130, 1100), (1, 1), (64, 512))
    table = gpu.program_table(shapes, 64, 512, cpu)
    tiles = [
        [weight, i, j]
        for weight, (rows, columns) in enumerate(shapes)
        for i in range(-(-rows // 64))
        for j in range(-(-columns // 512))
    ]
    assert table.tolist() == tiles and table.dtype == torch.int32
    assert gpu.program_table(shapes, 64, 512, cpu) is table
    first, second = _device.tables(cpu, (torch.int64, [2**40, -1, 7]), (torch.int32, [3, -4]))
    assert first.tolist() == [2**40, -1, 7] and second.tolist() == [3, -4]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.data_ptr() % 16 == second.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    "W",
    [
        torch.zeros(1, 8).expand(6, 8),
        torch.zeros(6, 1).expand(6, 8),
        torch.zeros(40).as_strided((6, 8), (4, 1)),
    ],
    ids=["rows", "columns", "windows"],
)
def test_a_weight_whose_entries_share_memory_is_refused(W):
    with pytest.raises(ValueError, match="entries of W share memory"):
        low_rank_update_(W, torch.ones(6, 2), torch.ones(8, 2))
    assert not W.any()
    strided = torch.zeros(20, 20)[::3, ::2][:6, :8]
    low_rank_update_(strided, torch.ones(6, 2), torch.ones(8, 2))
    assert bool((strided == 2).all())
