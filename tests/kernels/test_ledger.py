"""The ledger restores every bit, in any order, and notices what it did not do itself (unit)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_kernels import _native
from knowedit_kernels._memory import copied
from knowedit_kernels.lowrank import LedgerError, WeightLedger, blocked, edited_weight, update
from knowedit_kernels.lowrank import call as call_module
from knowedit_kernels.lowrank import fingerprint as fingerprints
from knowedit_kernels.lowrank import ledger as ledger_module
from knowedit_kernels.lowrank.fingerprint import fingerprint
from tests.interrupting import interrupted
from tests.kernels import isa

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rows, columns, seed, rank=2):
    return rand(rows, rank, seed=seed) * 0.01, rand(columns, rank, seed=seed + 1)


def bits(tensor):
    return tensor.contiguous().view(torch.int8).clone()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@each_dtype
def test_undo_in_any_order_restores_every_bit(dtype, rounding):
    if rounding == "stochastic" and dtype.itemsize != 2:
        with pytest.raises(ValueError, match="16-bit"):
            WeightLedger({"w": torch.zeros(3, 3, dtype=dtype)}, rounding=rounding).add(
                "w", rand(3, 1), rand(3, 1), "a"
            )
        return
    W = rand(37, 53).to(dtype)
    W[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    pristine, edits = bits(W), {key: factors(37, 53, 10 * i + 5) for i, key in enumerate("abc")}
    states: dict[frozenset, torch.Tensor] = {frozenset(): pristine}
    for order, removal in itertools.product(itertools.permutations("abc"), repeat=2):
        ledger = WeightLedger({"w": W}, rounding=rounding, seed=9)
        for key in order:
            ledger.add("w", *edits[key], key)
            # the state depends on the set of active edits alone, whatever came before
            assert torch.equal(states.setdefault(frozenset(ledger.active), bits(W)), bits(W))
        assert ledger.active == order
        for key in removal:
            ledger.remove(key)
            assert torch.equal(states.setdefault(frozenset(ledger.active), bits(W)), bits(W))
        assert torch.equal(bits(W), pristine) and ledger.active == ()
    assert len({state.numpy().tobytes() for state in states.values()}) == 8


@pytest.mark.parametrize("beside", ["float64", "strided"])
def test_bits_do_not_depend_on_what_is_edited_in_the_same_call(beside):
    """Another implementation takes the weights beside it, and would round this one otherwise."""
    W = rand(3, 28)
    other = rand(6, 4).T if beside == "strided" else rand(4, 6).double()
    ledger = WeightLedger({"w": W, "beside": other})
    pristine = bits(W), bits(other)
    ledger.add_many("a", {"w": (rand(3, 2), rand(28, 2)), "beside": factors(4, 6, 3)})
    alone = bits(W)
    ledger.add("w", *factors(3, 28, 5), "b")
    ledger.remove("b")
    assert torch.equal(bits(W), alone)
    ledger.remove("a")
    assert torch.equal(bits(W), pristine[0]) and torch.equal(bits(other), pristine[1])


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)], ids=str)
@each_dtype
def test_a_weight_without_entries_is_edited_and_undone(dtype, shape):
    ledger = WeightLedger({"w": torch.zeros(shape, dtype=dtype)})
    for key in "ab":
        ledger.add("w", *factors(*shape, seed=3), key)
    ledger.verify()
    ledger.remove("a")
    ledger.remove("b")
    assert ledger.active == ()


@each_dtype
def test_dense_and_low_rank_edits_undo_in_any_order(dtype):
    W, bias = rand(37, 53).to(dtype), rand(53, seed=3).to(dtype)
    pristine = bits(W), bits(bias)
    edits = {
        "a": {"w": factors(37, 53, 5)},
        "b": {"w": 0.01 * rand(37, 53, seed=8), "bias": 0.01 * rand(53, seed=9)},
    }
    edits["c"] = {"w": 0.01 * rand(37, 53, seed=10)}
    states: dict[frozenset, torch.Tensor] = {}
    for order, removal in itertools.product(itertools.permutations("abc"), repeat=2):
        ledger = WeightLedger({"w": W, "bias": bias})
        for key in order:
            report = ledger.add_many(key, edits[key])["w"]
            assert torch.equal(states.setdefault(frozenset(ledger.active), bits(W)), bits(W))
        U, V = edits["a"]["w"]
        ideal = pristine[0].view(dtype).view(37, 53).double() + (U.double() @ V.double().T)
        ideal += edits["b"]["w"].double() + edits["c"]["w"].double()
        unit = {2: 2.0**-8, 4: 2.0**-22, 8: 2.0**-22}[
            dtype.itemsize
        ]  # the deltas themselves are float32
        assert (W.double() - ideal).abs().max() <= unit * ideal.abs().max()
        assert report.applied_norm == pytest.approx(
            float((W.double() - pristine[0].view(dtype).double().view(37, 53)).norm())
        )
        for key in removal:
            ledger.remove(key)
            assert torch.equal(states.setdefault(frozenset(ledger.active), bits(W)), bits(W))
        assert torch.equal(bits(W), pristine[0]) and torch.equal(bits(bias), pristine[1])


def test_a_dense_edit_that_overflows_changes_nothing():
    W = rand(5, 7).to(torch.float16)
    before, ledger = bits(W), WeightLedger({"w": W})
    with pytest.raises(LedgerError, match="overflows"):
        ledger.add_many("a", {"w": torch.full((5, 7), 1e6)})
    assert torch.equal(bits(W), before) and not ledger.active
    with pytest.raises(ValueError, match="rounded to nearest"):
        WeightLedger({"w": W}, rounding="stochastic").add_many("a", {"w": torch.zeros(5, 7)})


def test_many_edits_do_not_drift():
    W = rand(64, 48).bfloat16()
    exact, pristine = W.double(), bits(W)
    ledger = WeightLedger({"w": W})
    for i in range(30):
        U, V = factors(64, 48, i)
        ledger.add("w", U, V, f"edit {i}", alpha=0.5)
        exact = exact + 0.5 * U.double() @ V.double().T
    assert (
        float(((W.double() - exact).abs() / exact.abs()).max()) <= 2.0**-8
    )  # one rounding, not thirty
    for i in sorted(range(30), key=lambda i: i * 7 % 30):
        ledger.remove(f"edit {i}")
    assert torch.equal(bits(W), pristine)


def test_transposed_weights_and_several_weights_per_key():
    A, B = rand(8, 6), rand(6, 8)  # B stored [in, out]
    before = bits(A), bits(B)
    ledger = WeightLedger({"a": A, "b": B}, transposed=["b"])
    U, V = factors(8, 6, 3)
    reports = ledger.add_many("x", {"a": (U, V), "b": (U, V)})
    assert reports["a"].ideal_norm == pytest.approx(float((U @ V.T).norm()), rel=1e-5)
    assert torch.allclose(A - B.T, rand(8, 6) - rand(6, 8).T, atol=1e-6) and not torch.equal(
        bits(B), before[1]
    )
    ledger.add(B, U, V, "y")  # by identity
    ledger.remove("x")
    assert torch.equal(bits(A), before[0]) and ledger.active == ("y",)
    ledger.remove("y")
    assert torch.equal(bits(B), before[1])
    with pytest.raises(ValueError, match=r"'b'.*transposed"):
        ledger.add("b", V, U, "z")


@pytest.mark.parametrize("offload", [False, True])
def test_someone_elses_change_is_seen(offload):
    W = rand(20, 30).bfloat16()
    pristine = bits(W)
    ledger = WeightLedger({"w": W}, offload=offload)
    ledger.add("w", *factors(20, 30, 1), "a")
    ledger.verify()
    kept = W.clone()
    W[3, 4] = -W[3, 4]
    for call in (
        ledger.verify,
        lambda: ledger.remove("a"),
        lambda: ledger.add("w", *factors(20, 30, 2), "b"),
    ):
        with pytest.raises(LedgerError, match=r"changed outside.*reset"):
            call()
    assert ledger.active == ("a",)
    W.copy_(kept)
    ledger.remove("a")
    assert torch.equal(bits(W), pristine)
    ledger.add("w", *factors(20, 30, 1), "a")
    W.zero_()
    ledger.reset()
    assert torch.equal(bits(W), pristine) and ledger.active == ()


def test_a_converted_model_is_refused():
    weight = torch.nn.Parameter(rand(6, 8))
    ledger = WeightLedger({"w": weight})
    ledger.add(weight, *factors(6, 8, 1), "a")
    weight.data = weight.data.bfloat16()
    with pytest.raises(LedgerError, match="before converting"):
        ledger.remove("a")
    with pytest.raises(LedgerError, match="before converting"):
        ledger.reset()


def test_a_failed_edit_changes_nothing():
    A, B = rand(8, 6).half(), torch.full((8, 6), 6e4, dtype=torch.float16)
    before = bits(A), bits(B)
    ledger = WeightLedger({"a": A, "b": B})
    U, V = torch.ones(8, 1), torch.full((6, 1), 1e4)
    with pytest.raises(LedgerError, match=r"overflows torch\.float16 in 48 entries of 'b'"):
        ledger.add_many("x", {"a": (U, V), "b": (U, V)})
    with pytest.raises(ValueError, match="NaN"):
        ledger.add_many("x", {"a": (U, V), "b": (U * float("nan"), V)})
    with pytest.raises(ValueError, match="'b'"):
        ledger.add_many("x", {"a": (U, V), "b": (U, V[:3])})
    assert (
        torch.equal(bits(A), before[0]) and torch.equal(bits(B), before[1]) and ledger.active == ()
    )
    ledger.add("a", U * 1e-5, V, "x")  # and it goes on working
    ledger.remove("x")
    assert torch.equal(bits(A), before[0])


def test_wrong_use():
    ledger = WeightLedger({"w": rand(3, 4)})
    ledger.add("w", rand(3, 1), rand(4, 1), "a")
    for call, error, message in (
        (lambda: ledger.add("w", rand(3, 1), rand(4, 1), "a"), LedgerError, "already active"),
        (lambda: ledger.add("v", rand(3, 1), rand(4, 1), "b"), LedgerError, "known: w"),
        (lambda: ledger.add(rand(3, 4), rand(3, 1), rand(4, 1), "b"), LedgerError, "register it"),
        (lambda: ledger.remove("b"), LedgerError, "active: a"),
        (lambda: ledger.register("w", rand(3, 4)), ValueError, "already registered"),
        (
            lambda: ledger.register("v", torch.zeros(3, dtype=torch.int32)),
            ValueError,
            "floating-point",
        ),
        (
            lambda: ledger.add_many("b", {"w": rand(4, 3)}),
            ValueError,
            r"'w': a dense delta of shape \(4, 3\)",
        ),
        (lambda: WeightLedger(transposed=["w"]), ValueError, "unknown"),
        (lambda: WeightLedger(rounding="corrected"), ValueError, "recomputable"),
    ):
        with pytest.raises(error, match=message):
            call()


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    changes=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=3, unique=True
    ),
    seed=st.integers(0, 1000),
)
def test_fingerprint_sees_changes(rows, columns, dtype, changes, seed):
    W = rand(rows, columns, seed=seed).to(dtype)
    before = fingerprint(W)
    assert fingerprint(W.clone()) == before == fingerprint(torch.cat([W, W], 1)[:, :columns])
    changed = W.clone()
    for i, j in {(i % rows, j % columns) for i, j in changes}:
        changed[i, j] = 2 if changed[i, j] == 1 else 1
    assert fingerprint(changed) != before
    if rows > 1 and not torch.equal(W[0], W[1]):
        assert fingerprint(torch.cat([W[1:2], W[:1], W[2:]])) != before


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (13, 511), (6, 512), (100, 1037)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["avx512", "avx2", "generic", "torch"])
def test_an_update_says_the_fingerprint_of_what_it_wrote(implementation, dtype, shape, monkeypatch):
    """Taken strip by strip on the way, of a view beside others' entries too."""
    whole, names = rand(2 * shape[0], shape[1] + 3).to(dtype), ["avx512", "avx2", "generic"]
    strided, whole_row = whole[::2, 1:-2], whole[1::2].contiguous()
    if dtype == torch.float64:
        implementation = "torch"
    elif implementation in names and (
        reason := _native.load().refusal(2 - names.index(implementation))
    ):
        isa.skip(implementation, reason)
    monkeypatch.setenv("KNOWEDIT_IMPL", f"low_rank_update_={implementation}")
    prints = torch.full((2, 2), -1)
    U, V = factors(*shape, 1)
    update.low_rank_update_many_(
        [strided, whole_row], [U, U], [V, torch.cat([V, rand(3, 2)])], prints=prints
    )
    for weight, halves in zip((strided, whole_row), prints.tolist()):
        assert fingerprints.number(*halves) == fingerprint(weight) == fingerprint(weight.clone())
    update.low_rank_update_many_([strided], [-U], [V], prints=prints[:1], dry_run=True)
    assert fingerprints.number(*prints.tolist()[0]) == fingerprint(strided)


def test_prints_of_another_kind_are_refused_before_anything_is_written():
    W, (U, V) = rand(3, 4), factors(3, 4, 1)
    kept = W.clone()
    for prints in (torch.zeros(1, 2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2).long()):
        with pytest.raises(ValueError, match=r"prints must be int64 \[1, 2\]"):
            update.low_rank_update_many_([W], [U], [V], prints=prints)
    with pytest.raises(TypeError, match="prints must be a tensor"):
        update.low_rank_update_many_([W], [U], [V], prints=True)
    assert torch.equal(W, kept)


def test_fingerprint_of_a_weight_larger_than_a_block():
    W = rand(2100, 300).bfloat16()
    before = fingerprint(W)
    W[2099, 299] += 1
    assert fingerprint(W) != before


DOING = {  # with the edits in force before
    "add": ((), lambda ledger, change: ledger.add_many("a", change)),
    "add another": (("b",), lambda ledger, change: ledger.add_many("a", change)),
    "remove": (("a",), lambda ledger, _: ledger.remove("a")),
    "remove one of two": (("a", "b"), lambda ledger, _: ledger.remove("a")),
    "reset": (("a", "b"), lambda ledger, _: ledger.reset()),
}


@pytest.mark.parametrize("implementation", ["", "torch"], ids=["compiled", "torch"])
@pytest.mark.parametrize("doing", DOING)
def test_ctrl_c_at_any_line_leaves_the_bits_of_the_edits_in_force(
    doing, implementation, monkeypatch
):
    """Never half of one, and every later call works as if it had not come."""
    monkeypatch.setenv("KNOWEDIT_IMPL", implementation)
    modules = ledger_module, edited_weight, update, call_module, blocked
    files = {module.__file__ for module in modules}
    changes = {
        "a": {name: factors(5, 6, i) for i, name in enumerate("vw", 1)},
        "b": {"v": 0.01 * rand(5, 6, seed=9), "w": factors(5, 6, 7)},
    }

    def made(keys):
        weights = {name: rand(5, 6, seed=i).bfloat16() for i, name in enumerate("vw")}
        ledger = WeightLedger(weights)
        for key in keys:
            ledger.add_many(key, changes[key])
        return ledger, weights

    states = {keys: made(keys)[1] for keys in ((), ("a",), ("b",), ("a", "b"))}
    before, action = DOING[doing]
    n, seen = 0, set()
    while True:
        n += 1
        ledger, weights = made(before)
        if interrupted(lambda: action(ledger, changes["a"]), files, n) < n:  # noqa: B023
            break
        if doing == "reset":
            ledger.reset()
        ledger.verify()
        now = tuple(sorted(ledger.active))
        seen.add(now)
        for name in "vw":
            assert torch.equal(bits(weights[name]), bits(states[now][name])), (n, now)
        for key in now:
            ledger.remove(key)
        for name in "vw":
            assert torch.equal(bits(weights[name]), bits(states[()][name])), (n, now)
    assert n > 30 and len(seen) <= 2 and (before in seen or doing == "reset")
    assert seen == {before} or not doing.startswith("add")  # an interrupted edit is not in force


def test_reset_of_overlapping_views_goes_back_to_before_the_first():
    """The second one's own bits have the first one's edit."""
    W = rand(6, 8)
    pristine = bits(W)
    for first, second in (("low", "high"), ("high", "low")):
        ledger = WeightLedger({"low": W[:4], "high": W[2:]})
        ledger.add(first, *factors(4, 8, 1), "a")
        ledger.add(second, *factors(4, 8, 2), "b")
        ledger.reset()
        assert torch.equal(bits(W), pristine) and ledger.active == ()


def test_an_interruption_of_the_mending_is_mended_by_the_next_call(monkeypatch):
    """Ctrl-C twice: in the second weight of an edit, and while the first is put back."""
    v, w = rand(5, 6), rand(5, 6, seed=1)
    original, ledger = (bits(v), bits(w)), WeightLedger({"v": v, "w": w})
    write, calls = ledger_module.write, []

    def interrupted_write(entries, *rest):
        write(entries, *rest)
        calls.extend(entry.name for entry in entries)
        if entries:
            entries[-1].settled = False  # as before its last line
            raise KeyboardInterrupt

    def interrupted_drop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "write", interrupted_write)
        patch.setattr(WeightLedger, "_drop", interrupted_drop)
        with pytest.raises(KeyboardInterrupt):
            ledger.add_many("a", {"v": factors(5, 6, 3), "w": factors(5, 6, 4)})
    assert calls == ["v", "w"] and ledger.active == ("a",)
    ledger.remove("a")
    assert (bits(v) == original[0]).all() and (bits(w) == original[1]).all()


def test_adopts_a_copy_with_the_edits_in_force_and_nothing_else():
    weight = rand(6, 4)
    clean = weight.clone()
    ledger = WeightLedger({"w": weight})
    ledger.add("w", *factors(6, 4, 1), "one")
    copied = weight.clone()
    with pytest.raises(LedgerError, match="no copy"):
        ledger.adopt({"w": clean})
    ledger.adopt({"w": copied})
    kept = weight.clone()
    ledger.remove("one")
    assert torch.equal(copied, clean) and torch.equal(weight, kept)


def test_the_tensors_that_a_model_has_now_are_edited():
    old, new = rand(4, 4), rand(4, 4, seed=1)
    kept, ledger = bits(new), WeightLedger({"w": old})
    ledger.follow({"w": new, "unknown": old})
    ledger.add("w", *factors(4, 4, 2), "a")
    assert torch.equal(old, rand(4, 4)) and not torch.equal(bits(new), kept)
    ledger.follow({"w": new})
    with pytest.raises(LedgerError, match="another tensor than the one that was edited"):
        ledger.follow({"w": old})
    ledger.remove("a")
    assert torch.equal(bits(new), kept)


@each_dtype
def test_a_large_pristine_copy_keeps_bits_and_strides(dtype):
    """Beyond the size from which it lies in pages of its own."""
    whole = rand(3, 1500, 1100).to(dtype)
    for weight in (whole[1], whole[2].T, whole[0, :, ::2]):
        copy, plain = copied(weight, "cpu"), weight.to("cpu", copy=True)
        assert torch.equal(copy, weight) and copy.stride() == plain.stride()
        copy.zero_()
        assert torch.equal(weight, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprint_sees_signs_in_pairs(dtype):
    W = rand(64, 24).to(dtype)
    before = fingerprint(W)
    for column in range(W.shape[1]):
        flipped = W.clone()
        flipped[:, column] *= -1
        assert fingerprint(flipped) != before
    for row in range(len(W)):
        flipped = W.clone()
        flipped[row] *= -1
        assert fingerprint(flipped) != before


@pytest.mark.parametrize("columns", [1, 3, 24, 127, 128, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprint_is_the_same_without_the_compiled_kernel(dtype, columns, monkeypatch):
    W = rand(9, columns + 5).to(dtype)
    for weight in (W[:, :columns].contiguous(), W[:, 2 : columns + 2], W[:, :columns].T):
        expected = fingerprint(weight)
        with monkeypatch.context() as patch:
            patch.setattr(fingerprints, "_compiled", lambda flat: False)
            assert fingerprint(weight) == expected
            patch.setattr(fingerprints, "_BLOCK", 64)
            assert fingerprint(weight) == expected


def test_a_weight_whose_entries_share_memory_is_refused():
    with pytest.raises(ValueError, match="share memory"):
        WeightLedger({"W": torch.zeros(1, 8).expand(6, 8)})


@pytest.mark.parametrize("transposed", [False, True], ids=["[E, out, in]", "[E, in, out]"])
@each_dtype
def test_matrices_of_experts_are_edited_and_undone_each_by_itself(dtype, transposed, monkeypatch):
    shape = (5, 12, 8) if transposed else (5, 8, 12)
    whole = rand(*shape).to(dtype)
    pristine, calls = bits(whole), []
    ledger = WeightLedger()
    for j in range(5):
        ledger.register(f"down[{j}]", whole[j], transposed)
    update = edited_weight.low_rank_update_many_
    monkeypatch.setattr(
        edited_weight,
        "low_rank_update_many_",
        lambda weights, *rest, **options: (
            calls.append(len(weights)) or update(weights, *rest, **options)
        ),
    )
    one = {f"down[{j}]": factors(8, 12, 3 * j) for j in (0, 3, 4)}
    two = {f"down[{j}]": factors(8, 12, 7 * j + 1) for j in (3, 1)}
    ledger.add_many("one", one)
    first = whole.clone()
    for j in range(5):
        U, V = one.get(f"down[{j}]", (torch.zeros(8, 1), torch.zeros(12, 1)))
        moved = (U.double() @ V.double().mT).to(torch.float64)
        start = pristine.view(dtype).view(shape)[j].double()
        expected = start + (moved.mT if transposed else moved)
        assert torch.allclose(first[j].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-9)
    ledger.add_many("two", two)
    assert calls == [3, 2]  # one call for all that an edit touches
    ledger.remove("one")
    alone = whole.clone()
    ledger.remove("two")
    assert torch.equal(bits(whole), pristine) and ledger.edited == ()
    ledger.add_many("two", two)
    assert torch.equal(bits(whole), bits(alone))
    whole[2, 0, 0] += 1  # nobody's business: no edit is in force there
    ledger.verify()
    whole[3, 0, 0] += 1
    with pytest.raises(LedgerError, match=r"'down\[3\]' was changed outside"):
        ledger.add_many("one", {"down[3]": factors(8, 12, 1)})
    ledger.reset()
    assert torch.equal(bits(whole[3]), bits(pristine.view(dtype).view(shape)[3]))


def test_what_is_no_weight_is_said_plainly():
    layer = torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match="must be a tensor, not Linear; give its .weight"):
        WeightLedger({"layer": layer})
    with pytest.raises(TypeError, match="names and tensors.*not list"):
        WeightLedger([layer.weight])
