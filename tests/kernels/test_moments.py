"""Second moments on the CPU: every implementation against float64, on odd shapes, in budget,
bit-repeatable (unit).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_kernels import _native, explain, numerics, testing
from knowedit_kernels.moments import PRECISIONS, second_moment_
from knowedit_kernels.moments.audit import signs
from knowedit_kernels.moments.call import MomentCall, PackCall
from knowedit_kernels.moments.cpu import COMPILED, COMPILED_PACK, EXACT, TORCH, TORCH_PACK
from knowedit_kernels.moments.reference import second_moment
from tests.kernels.isa import skip
from tests.kernels.isa_emulation import instructions_of
from tests.kernels.moment_data import keys as make_keys
from tests.kernels.moment_data import multiplies

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(c, t) for c in (*COMPILED, TORCH) for t in DTYPES if multiplies(c, t)]
PAIR_NAMES = [f"{candidate.name}-{dtype}" for candidate, dtype in PAIRS]
SHAPES = [(1, 1), (3, 31), (33, 32), (64, 33), (257, 129), (1025, 160), (5000, 72)]


def add_(candidate, c, k, precision="exact"):
    """Adds the candidate's moment, with emulated instructions where the processor lacks them; or
    skips with the verifier's reason.
    """
    with instructions_of(candidate):
        call = MomentCall([c], [k], precision)
        if reason := candidate.verify(call):
            skip(candidate.name, reason)
        candidate.run(call)


def run(candidate, k, precision="exact"):
    """The candidate's moment in a guarded, offset, row-padded buffer."""
    dim = k.shape[1]
    guard = testing.guarded(torch.zeros(dim, dim, dtype=torch.float64), row_margin=3)
    add_(candidate, guard.tensor, k, precision)
    guard.check()
    lower = guard.tensor.tril()
    return lower + lower.tril(-1).T


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("candidate, dtype", PAIRS, ids=PAIR_NAMES)
def test_within_budget(candidate, dtype, shape):
    k = make_keys(*shape, dtype)
    budget = numerics.MOMENT_FP64 if candidate is TORCH else numerics.MOMENT
    testing.grade_moment(run(candidate, k), second_moment(k)).check(
        budget, f"{candidate.name} {dtype} {shape}"
    )


@pytest.mark.isa
@pytest.mark.parametrize(
    "candidate", [c for c in COMPILED if multiplies(c, torch.float64)], ids=lambda c: c.name
)
@pytest.mark.parametrize("shape", [(3, 31), (1025, 160), (5000, 72)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_float64_arithmetic_is_float64(candidate, dtype, shape):
    k = make_keys(*shape, dtype)
    grade = testing.grade_moment(run(candidate, k, "fp64"), second_moment(k))
    grade.check(numerics.MOMENT_FP64, f"{candidate.name} {dtype} {shape}")


@pytest.mark.isa
@pytest.mark.parametrize("candidate, dtype", PAIRS[:-3], ids=PAIR_NAMES[:-3])
def test_fast_is_within_its_own_budget(candidate, dtype):
    k = make_keys(5000, 72, dtype)
    grade = testing.grade_moment(run(candidate, k, "fast"), second_moment(k))
    grade.check(numerics.MOMENT_FAST, f"{candidate.name} {dtype}")


@pytest.mark.isa
@pytest.mark.parametrize("candidate, dtype", PAIRS[:-3], ids=PAIR_NAMES[:-3])
def test_only_the_lower_triangle_is_written(candidate, dtype):
    c = torch.zeros(150, 150, dtype=torch.float64)
    add_(candidate, c, make_keys(40, 150, dtype))
    assert not c.triu(1).any() and c.tril().count_nonzero() == 150 * 151 // 2


@pytest.mark.isa
@pytest.mark.parametrize("candidate", COMPILED, ids=lambda c: c.name)
def test_strided_rows(candidate):
    k = make_keys(70, 200)[:, 40:137]
    wide = k.to(torch.bfloat16) if not multiplies(candidate, k.dtype) else k
    testing.grade_moment(run(candidate, wide), second_moment(wide)).check(numerics.MOMENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, threads):
    k, results = make_keys(900, 300, dtype), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        c = torch.zeros(300, 300, dtype=torch.float64)
        results.append(second_moment_(c, k))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_float16_subnormals_and_extremes_are_widened_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    k = finite[:, None].repeat(1, 1)
    for row in (k[:1], k[1023:1024], k[31743:31744]):
        c = second_moment_(torch.zeros(1, 1, dtype=torch.float64), row)
        assert c.item() == row.double().square().sum().item()
    c = second_moment_(torch.zeros(1, 1, dtype=torch.float64), k)
    assert c.item() == pytest.approx(k.double().square().sum().item(), rel=1e-6)


def test_bf16_pairs_and_odd_tails_are_exact_on_integers():
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 2, 3, 63, 65, 129):
        k = torch.randint(-9, 10, (tokens, 45), generator=generator).to(torch.bfloat16)
        c = second_moment_(torch.zeros(45, 45, dtype=torch.float64), k)
        assert torch.equal(c, k.double().T @ k.double())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_masks_batches_and_accumulation(precision):
    k = make_keys(60, 40).reshape(3, 20, 40)
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    c = second_moment(make_keys(9, 40, seed=5))
    expected = c + second_moment(k, mask)
    result = second_moment_(c, k, mask, precision)
    assert result is c and torch.equal(c, c.T)
    budgets = {"fp64": numerics.MOMENT_FP64, "fast": numerics.MOMENT_FAST}
    testing.grade_moment(c, expected).check(budgets.get(precision, numerics.MOMENT))


@pytest.mark.parametrize(
    "mask", [None, torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)]
)
def test_nothing_to_add(mask):
    k = torch.zeros(2, 0 if mask is None else mask.shape[1], 7)
    assert not second_moment_(torch.zeros(7, 7, dtype=torch.float64), k, mask).any()


def test_float64_keys_keep_float64():
    k = make_keys(300, 50).double() * (1 + 1e-9)
    c = second_moment_(torch.zeros(50, 50, dtype=torch.float64), k)
    testing.grade_moment(c, second_moment(k)).check(numerics.MOMENT_FP64)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 200),
    dim=st.integers(1, 140),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    scale=st.floats(1e-4, 1e3),
    seed=st.integers(0, 2**31),
)
def test_symmetric_positive_and_within_budget_for_any_shape(tokens, dim, dtype, scale, seed):
    k = (make_keys(tokens, dim, seed=seed) * scale).to(dtype)
    k = torch.where(k.isfinite(), k, torch.ones_like(k))
    c = second_moment_(torch.zeros(dim, dim, dtype=torch.float64), k)
    assert torch.equal(c, c.T)
    reference = second_moment(k)
    graded = testing.grade_moment(c, reference)
    # over few entries a mean still scatters like its terms
    scatter = numerics.MOMENT.elementwise / math.sqrt(dim) / 2
    assert graded.elementwise <= numerics.MOMENT.elementwise
    assert graded.normwise <= numerics.MOMENT.normwise + scatter
    assert abs(graded.bias) <= numerics.MOMENT.bias + scatter
    if tokens:
        top = torch.linalg.eigvalsh(c)
        assert top[0] >= -1e-6 * max(top[-1].item(), 1e-300)


@pytest.mark.parametrize(
    "c, k, mask, error, says",
    [
        (torch.zeros(3, 3), torch.zeros(2, 3), None, ValueError, "c must be a square float64"),
        (
            torch.zeros(3, 4).double(),
            torch.zeros(2, 3),
            None,
            ValueError,
            "c must be a square float64",
        ),
        (
            torch.zeros(3, 3).double(),
            torch.zeros(2, 4),
            None,
            ValueError,
            "last dimension must be 3",
        ),
        (
            torch.zeros(3, 3).double(),
            torch.zeros(2, 3).int(),
            None,
            TypeError,
            "keys must be a float64",
        ),
        (
            torch.zeros(3, 3).double(),
            torch.zeros(2, 3),
            torch.ones(2),
            TypeError,
            "use mask.bool()",
        ),
        (
            torch.zeros(3, 3).double(),
            torch.zeros(2, 3),
            torch.ones(3).bool(),
            ValueError,
            r"keys need \[2\]",
        ),
    ],
)
def test_bad_input_is_named(c, k, mask, error, says):
    with pytest.raises(error, match=says):
        second_moment_(c, k, mask)


def test_unknown_precision():
    with pytest.raises(ValueError, match="choose one of: exact, fp32, fp64, fast"):
        second_moment_(torch.zeros(3, 3).double(), torch.zeros(2, 3), precision="half")


def test_opcheck_and_compile():
    k = make_keys(40, 24)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    c = torch.zeros(24, 24, dtype=torch.float64)
    torch.library.opcheck(torch.ops.knowedit.second_moment_, ([c], [k], "exact"), test_utils=utils)
    audit, rows = torch.zeros(5, dtype=torch.float64), torch.tensor([3, 1])
    args = (torch.zeros(2, 24), audit, k, rows, signs(24))
    torch.library.opcheck(torch.ops.knowedit.moment_pack_, args, test_utils=utils)
    if (native := _native.load()).path:
        syrk = torch.ops.knowedit.syrk_cpu_
        torch.library.opcheck(syrk, (c, k, EXACT, native.isa), test_utils=utils)
        torch.library.opcheck(torch.ops.knowedit.pack_cpu_, (*args, native.isa), test_utils=utils)


@pytest.mark.parametrize("pick", [None, [], [3, 0, 3, 699]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("candidate", [COMPILED_PACK, TORCH_PACK], ids=lambda c: c.name)
def test_pack_copies_and_audits(candidate, dtype, pick, threads):
    k = make_keys(3000, 61, dtype)[:, 3:58]
    rows = None if pick is None else torch.tensor(pick, dtype=torch.int64)
    kept = k if rows is None else k[rows]
    z, results = signs(55), []
    for count in (1, 2):
        torch.set_num_threads(count)
        guard, audit = (
            testing.guarded(testing.poisoned_empty(*kept.shape, dtype=dtype)),
            torch.ones(5).double(),
        )
        call = PackCall(guard.tensor, audit, k, rows, z)
        if reason := candidate.verify(call):
            skip(candidate.name, reason)
        candidate.run(call)
        guard.check()
        assert torch.equal(guard.tensor, kept)
        results.append(audit)
    expected = torch.cat(
        [kept.double().square().sum()[None], (kept.double() @ z.T).square().sum(0)]
    )
    assert torch.allclose(results[0] - 1, expected, rtol=1e-12)
    assert candidate is TORCH_PACK or torch.equal(*results)


@pytest.mark.skipif(_native.load().path is None, reason="no compiled kernels")
def test_a_row_index_out_of_range_is_refused():
    audit, k = torch.zeros(5, dtype=torch.float64), make_keys(4, 8)
    for bad in (4, -1):
        with pytest.raises(RuntimeError, match=f"row {bad} is not among the keys"):
            torch.ops.knowedit.pack_cpu_(
                None, audit, k, torch.tensor([bad]), signs(8), _native.load().isa
            )


def test_explain_names_the_instruction_set_and_the_reasons(monkeypatch):
    c, k = torch.zeros(8, 8, dtype=torch.float64), make_keys(4, 8)
    monkeypatch.setenv("KNOWEDIT_IMPL", "second_moment_=torch")
    assert explain("second_moment_", [c], [k], "exact").chosen == "torch"
    monkeypatch.delenv("KNOWEDIT_IMPL")
    decision = explain("second_moment_", [c], [k.bfloat16()], "fp64")
    assert {"amx", "avx512_bf16"} <= dict(decision.refused).keys()  # multiply 16 bits only


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_that_hardly_change_are_within_budget(dtype, precision):
    """A constant makes the same rounding error in every addition: no averaging helps."""
    constants = torch.linspace(0.5, 1.0, 96) ** 2
    k = constants.repeat(4096, 1)
    k[:, 32:64] += 1e-4 * torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    k[:, 64:] *= torch.arange(4096).remainder(2).mul(2).sub(1)[:, None]
    k = k.to(dtype)
    c = second_moment_(torch.zeros(96, 96, dtype=torch.float64), k, precision=precision)
    grade = testing.grade_moment(c, second_moment(k))
    budget = numerics.MOMENT if precision == "exact" else numerics.MOMENT_FAST
    assert grade.elementwise <= budget.elementwise, grade
