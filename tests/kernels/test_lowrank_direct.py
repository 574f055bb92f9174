"""Updates without a report, and the direct way to the CPU kernels: the bits of the long way with a
report, and what is out of the ordinary declined before anything is written (unit).
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knowedit_kernels import _native, explain, numerics, testing
from knowedit_kernels.lowrank import direct, low_rank_update_, low_rank_update_many_
from knowedit_kernels.lowrank.blocked import TORCH
from knowedit_kernels.lowrank.cpu import COMPILED
from knowedit_kernels.lowrank.fingerprint import sums_of
from knowedit_kernels.lowrank.reference import grade_update
from knowedit_kernels.moments.cpu import GENERIC
from tests.kernels.isa import skip
from tests.kernels.test_lowrank import problem

ROUNDINGS = {
    torch.bfloat16: ("nearest", "stochastic", "compensated"),
    torch.float16: ("nearest", "stochastic", "compensated"),
    torch.float32: ("nearest",),
}
CASES = [(dtype, rounding) for dtype, names in ROUNDINGS.items() for rounding in names]
SHAPES = [(1, 1), (1, 200), (3, 15), (6, 64), (49, 321), (130, 1100)]
RANKS = [0, 1, 8, 19]


@pytest.fixture(autouse=True)
def kernels():
    """Without compiled kernels there is no direct way."""
    if reason := _native.load().refusal(GENERIC):
        skip("generic", reason)


@pytest.fixture
def answers(monkeypatch):
    """What the direct way said, call by call."""
    said, add_ = [], direct.add_
    monkeypatch.setattr(direct, "add_", lambda *given: said.append(add_(*given)) or said[-1])
    return said


def carried(W, rounding):
    """A residual plane for a rounding that wants one."""
    g = torch.Generator().manual_seed(1)
    plane = (torch.rand(W.shape, generator=g) * 1e-5).bfloat16()
    return {"residual": plane} if rounding == "compensated" else {}


def written(W, U, V, rounding, report, alpha=1.0, **options):
    """(W, residual, report) after an update of guarded copies, what lies between rows poisoned."""
    given = {"W": W, **carried(W, rounding)}
    guards = {name: testing.guarded(x.clone(), row_margin=3) for name, x in given.items()}
    tensors = {name: guard.tensor for name, guard in guards.items()}
    made = low_rank_update_(
        U=U, V=V, alpha=alpha, rounding=rounding, seed=7, report=report, **tensors, **options
    )
    for guard in guards.values():
        guard.check()
    return tensors["W"].clone(), tensors.get("residual", torch.zeros(0)).clone(), made


def figures(report):
    return [report.ideal_norm, report.applied_norm, report.error_norm, report.changed]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, rounding", CASES, ids=str)
def test_the_bits_and_the_report_are_those_of_the_long_way(
    dtype, rounding, shape, rank, answers, monkeypatch
):
    W, U, V = problem(*shape, dtype, rank)
    plain = written(W, U, V, rounding, False, alpha=-1.5)
    reported = written(W, U, V, rounding, True, alpha=-1.5)
    assert answers == [True, True] and plain[2] is None
    fast = explain("low_rank_update_")
    monkeypatch.setenv("KNOWEDIT_IMPL", fast.chosen)
    long = written(W, U, V, rounding, True, alpha=-1.5)
    long_plain = written(W, U, V, rounding, False, alpha=-1.5)
    assert answers == [True, True, False, False]
    assert explain("low_rank_update_").chosen == fast.chosen
    for weight, plane, _ in (plain, reported, long_plain):
        assert torch.equal(weight, long[0]) and torch.equal(plane, long[1])
    assert figures(reported[2]) == figures(long[2]) and reported[2].total == W.numel()
    largest = numerics.UPDATE_NEAREST[dtype].largest
    if rounding == "nearest":
        assert grade_update(plain[0], W, U, V, -1.5).largest <= largest


@pytest.mark.parametrize("candidate", [*COMPILED, TORCH], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype, rounding", CASES, ids=str)
def test_every_implementation_writes_the_same_bits_without_a_report(
    candidate, dtype, rounding, monkeypatch
):
    if reason := _native.load().refusal({"avx512": 2, "avx2": 1}.get(candidate.name, 0)):
        skip(candidate.name, reason)
    monkeypatch.setenv("KNOWEDIT_IMPL", candidate.name)
    W, U, V = problem(70, 331, dtype, 9, ratio=0.3)
    weight, plane, _ = written(W, U, V, rounding, True)
    plain, plain_plane, nothing = written(W, U, V, rounding, False)
    assert explain("low_rank_update_").chosen == candidate.name and nothing is None
    assert torch.equal(weight, plain) and torch.equal(plane, plain_plane)
    assert not torch.equal(weight, W)


def test_a_double_weight_and_strided_rows_are_updated_without_a_report(answers):
    W, U, V = problem(30, 40, torch.float64)
    reported = W.clone()
    low_rank_update_(reported, U, V)
    low_rank_update_(W, U, V, report=False)
    assert torch.equal(W, reported)
    strided, U, V = problem(40, 30, torch.bfloat16)
    reported, strided = strided.T.contiguous(), strided.T
    low_rank_update_(reported, V, U)
    assert low_rank_update_(strided, V, U, report=False) is None
    assert torch.equal(strided, reported) and answers == [False, False, True, False]


def test_corrected_updates_and_several_weights_write_the_same_bits_without_a_report():
    W, U, V = problem(40, 70, torch.bfloat16, rank=4)
    probe = torch.randn(70, 3, generator=torch.Generator().manual_seed(4))
    one, other = W.clone(), W.clone()
    low_rank_update_(one, U, V, rounding="corrected", probe=probe)
    assert low_rank_update_(other, U, V, rounding="corrected", probe=probe, report=False) is None
    assert torch.equal(one, other) and not torch.equal(one, W)
    pairs = [[W.clone(), W.clone().float()] for _ in range(2)]
    prints = torch.zeros(2, 2, dtype=torch.int64)
    low_rank_update_many_(pairs[0], [U, U], [V, V], 2.0)
    assert low_rank_update_many_(pairs[1], [U, U], [V, V], 2.0, prints=prints, report=False) is None
    for a, b, halves in zip(*pairs, prints):
        assert torch.equal(a, b) and torch.equal(halves, sums_of(b))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_an_empty_weight_is_left_alone(shape, rank, answers):
    rows, columns = shape
    factors = torch.ones(rows, rank), torch.ones(columns, rank)
    for dtype, rounding in CASES:
        weight = torch.zeros(shape, dtype=dtype)
        plane = {"residual": weight.bfloat16()} if rounding == "compensated" else {}
        report = low_rank_update_(weight, *factors, rounding=rounding, **plane)
        assert low_rank_update_(weight, *factors, rounding=rounding, report=False, **plane) is None
        assert figures(report) == [0.0, 0.0, 0.0, 0] and report.survived == 1.0
    assert answers == [True] * (2 * len(CASES))


def test_bits_do_not_depend_on_the_number_of_threads(threads):
    W, U, V = problem(600, 2000, torch.bfloat16, rank=40)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(W.clone())
        low_rank_update_(results[-1], U, V, report=False)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class Own(torch.Tensor):
    """A subclass that adds nothing."""


W, U, V = problem(6, 10, torch.bfloat16, rank=2)
#: Out of the ordinary, but right: a function of W that gives (W, U, V, options).
UNUSUAL = {
    "double": lambda W: (W.double(), U, V, {}),
    "bf16 factor": lambda W: (W, U.bfloat16(), V, {}),
    "strided factor": lambda W: (W, U.T.contiguous().T, V, {}),
    "strided rows": lambda W: (W.T.contiguous().T, U, V, {}),
    "a factor in W": lambda W: (W.float(), None, V, {}),
    "base": lambda W: (W, U, V, {"base": W.clone() * 2}),
    "tensor of a subclass": lambda W: (W.as_subclass(Own), U, V, {}),
    "negated factors": lambda W: (W, torch._neg_view(U), torch._neg_view(V), {}),
}
REFUSED = {
    "expanded": lambda W: (W[:1].expand(6, 10), U, V, {}),
    "transposed": lambda W: (W, V, U, {}),
    "vector": lambda W: (W[0], U, V, {}),
    "integers": lambda W: (W, U.int(), V, {}),
    "integers and alpha": lambda W: (W, U.int(), V, {"alpha": 0.5}),
    "not a number": lambda W: (W, U / 0, V, {}),
    "infinite alpha": lambda W: (W, U, V, {"alpha": float("inf")}),
    "not finite keys": lambda W: (W, U, V * float("nan"), {}),
    "rounding": lambda W: (W, U, V, {"rounding": "up"}),
    "stochastic float": lambda W: (W.float(), U, V, {"rounding": "stochastic"}),
    "no residual": lambda W: (W, U, V, {"rounding": "compensated"}),
    "short residual": lambda W: (W, U, V, {"rounding": "compensated", "residual": W[:3].clone()}),
    "negated": lambda W: (torch._neg_view(W), U, V, {}),
    "negated column": lambda W: (torch.complex(*2 * [W[:, :1].float()]).conj().imag, U, V[:1], {}),
    "no tensor": lambda W: (W, U.tolist(), V, {}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_goes_the_long_way(name, answers):
    results = []
    for report in (True, False):
        weight, left, right, options = UNUSUAL[name](W.clone())
        left = weight[:, :2] if left is None else left
        low_rank_update_(weight, left, right, report=report, **options)
        results.append(weight)
    assert torch.equal(*results) and not any(answers)
    assert not torch.equal(results[0], W.to(results[0].dtype))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_with_the_same_words(name, answers):
    words = []
    for report in (True, False):
        weight, left, right, options = REFUSED[name](W.clone())
        before = weight.clone()
        with pytest.raises((ValueError, TypeError)) as caught:
            low_rank_update_(weight, left, right, report=report, **options)
        words.append(str(caught.value))
        assert torch.equal(weight, before)
    assert words[0] == words[1] and not any(answers)


@pytest.mark.parametrize("freed", ["W", "U", "V", "residual"])
def test_memory_that_was_freed_is_not_touched(freed, answers):
    """As torch says of its own operators, and the process lives."""
    for report in (True, False):
        given = {"W": W.clone(), "U": U.clone(), "V": V.clone(), **carried(W, "compensated")}
        given[freed].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="memory is not there|not allocated"):
            low_rank_update_(**given, rounding="compensated", report=report)
        if freed != "W":
            assert torch.equal(given["W"], W)
    assert answers == [False, False]


@pytest.mark.parametrize(
    "options, message",
    [({"dry_run": True}, "dry_run=True writes nothing"), ({"probe": V}, "probe= is measured")],
)
def test_what_a_report_is_for_is_refused_without_one(options, message):
    weight = W.clone()
    with pytest.raises(ValueError, match=message):
        low_rank_update_(weight, U, V, report=False, **options)
    assert torch.equal(weight, W)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_a_write_is_counted_and_not_tracked(rounding, answers):
    weight = torch.nn.Parameter(W.clone())
    options = carried(W, rounding)
    versions = [x._version for x in (weight, *options.values())]
    left = U.clone().requires_grad_()
    low_rank_update_(weight, left, V, 0.5, rounding, report=False, **options)
    assert [x._version for x in (weight, *options.values())] == [v + 1 for v in versions]
    assert answers == [True] and weight.is_leaf and not torch.equal(weight, W)
    with torch.inference_mode():
        inside = W.clone()
        low_rank_update_(inside, U, V, 0.5, report=False)
    low_rank_update_(inside, U, V, -0.5, report=False)  # an inference tensor, outside
    assert answers == [True] * 3


class Listener(TorchDispatchMode):
    """Keeps the names of the ops that pass."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("report", [True, False])
def test_who_listens_hears_the_update_once_and_it_is_done_once(report, answers):
    expected = W.clone()
    low_rank_update_(expected, U, V, report=report)
    heard, traced, mapped = W.clone(), W.clone(), W.clone()
    with Listener() as listener:
        low_rank_update_(heard, U, V, report=report)
    names = [name for name in listener.heard if "low_rank" in name]
    assert names == ["knowedit.low_rank_update_.default"] and torch.equal(heard, expected)
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda w, u, v: (low_rank_update_(w, u, v, report=report), w)[1]
    )(W.clone(), U, V)
    assert graph.code.count("ops.knowedit.") == 1 and torch.equal(graph(traced, U, V), expected)
    torch.func.grad(lambda x: (low_rank_update_(mapped, U, V, report=report), x)[1].sum())(U)
    assert torch.equal(mapped, expected) and answers == [True, False, False, False]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "corrected"])
def test_compiled_autocast_and_a_default_device_change_nothing(rounding):
    probe = {"probe": V[:, :1].clone()} if rounding == "corrected" else {}

    def update(w):
        low_rank_update_(w, U, V, 0.5, rounding, report=False, **probe)
        return w

    expected = update(W.clone())
    torch._dynamo.reset()
    whole = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(W.clone()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(update(W.clone()), expected)
    weight = W.clone()
    with torch.device("meta"):
        low_rank_update_(weight, U, V, report=True)
        low_rank_update_(weight, -U, V, report=False)
    assert weight.device.type == "cpu"


WRONG = {
    "writes and declines": lambda add: lambda W, U, V: add(W, U, V) and False,
    "leaves the last row": lambda add: lambda W, U, V: add(W[:-1], U[:-1], V),
    "writes nothing": lambda add: lambda W, U, V: True,
    "takes what it should decline": lambda add: lambda W, U, V: add(W, U.T.reshape(U.shape), V),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_direct_way_misses_the_budget(wrong, monkeypatch):
    """The same comparison that the right one passes rejects what is deliberately wrong."""
    W, U, V = problem(40, 70, torch.bfloat16, rank=4)
    if "should decline" in wrong:
        U = U.T.contiguous().T
    monkeypatch.setattr(direct, "_ADD", WRONG[wrong](direct._ADD))
    result = W.clone()
    low_rank_update_(result, U, V, report=False)
    budget = numerics.UpdateBudget(numerics.UPDATE_NEAREST[W.dtype].largest, 1.0)
    assert grade_update(result, W, U, V).failures(budget)
