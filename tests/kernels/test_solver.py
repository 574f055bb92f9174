"""The editing solver against dense float64 formulas, the identities of its algebra, and finite
differences (unit).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_kernels import solver as S
from knowedit_kernels.solver.reference import dense_delta, dense_equality, dense_null_space

D, M, N = 7, 23, 5


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(m: int = M, seed: int = 1) -> torch.Tensor:
    X = rand(m, 3 * m, seed=seed) * torch.linspace(3, 0.3, m, dtype=torch.float64)[:, None]
    return X @ X.mT / (3 * m)


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


C, K, KP, R = covariance(), rand(M, N, seed=2), rand(M, 6, seed=3), rand(D, N, seed=4)
EYE = torch.eye(M, dtype=torch.float64)
METRICS = {
    "covariance": (S.Covariance(C, 0.7), 0.7 * C),
    "ridge": (S.Covariance(C, 0.7, ridge=0.1), 0.7 * (C + 0.1 * C.diagonal().mean() * EYE)),
    "float32 factor": (S.Covariance(C, 0.7, dtype=torch.float32), 0.7 * C),
    "shrunk": (S.ShrunkCovariance(C, 2.0, gamma=0.3), 2.0 * (0.7 * C + 0.3 * C.trace() / M * EYE)),
    "identity": (S.Identity(M, 1.3), 1.3 * EYE),
    "combined": (
        S.combined([(20.0, C), (50.0, covariance(seed=9))], 1.0),
        20 * C + 50 * covariance(seed=9) + EYE,
    ),
    "history": (S.Covariance(C, 0.7).with_history(KP), 0.7 * C + KP @ KP.mT),
    "two histories": (
        S.Identity(M, 2.0).with_history(KP[:, :2]).with_history(KP[:, 2:]),
        2 * EYE + KP @ KP.mT,
    ),
}
each_metric = pytest.mark.parametrize("metric,dense", METRICS.values(), ids=METRICS.keys())


@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_factor_of_a_matrix_of_several_tiles(dtype, layout):
    """Larger than what is checked, scaled and filled at a time."""
    big = covariance(700).to(dtype)
    if layout == "columns":
        big = big.mT.contiguous().mT
    elif layout == "every other":
        big = big.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    dense = 0.3 * big.double()
    dense.diagonal().add_(0.15 * big.double().diagonal().mean())
    metric = S.Covariance(big, 0.3, ridge=0.5)
    X = rand(700, 3, seed=8)
    assert rel(metric.inverse(X), torch.linalg.solve(dense, X)) < 1e-12
    assert torch.equal(metric.factor.lower, metric.factor.lower.tril())
    assert metric.factor.lower.is_contiguous()


@pytest.mark.parametrize("at", [(0, 1), (3, 650), (650, 3), (300, 699), (699, 300)])
def test_a_wrong_entry_is_seen_anywhere(at):
    big = covariance(700)
    for value, message in ((1e3, "not symmetric"), (torch.nan, "NaN"), (torch.inf, "NaN or inf")):
        wrong = big.clone()
        wrong[at] = value
        with pytest.raises(ValueError, match=message):
            S.Covariance(wrong)
    big[at] = big[at[::-1]] = torch.inf
    with pytest.raises(ValueError, match="infinity"):
        S.Covariance(big)


@each_metric
def test_delta_agrees_with_the_dense_formulas(metric, dense):
    assert rel(S.EditSolver(metric, K).delta(R), dense_delta(R, K, dense)) < 1e-12
    assert rel(S.EditSolver(metric, K, "equality").delta(R), dense_equality(R, K, dense)) < 1e-12
    k, r = K[:, :1], R[:, :1]  # ROME: one key
    rome = r @ (torch.linalg.solve(dense, k) / (k.mT @ torch.linalg.solve(dense, k))).mT
    assert rel(S.EditSolver(metric, k, "equality").delta(r), rome) < 1e-12
    assert rel(metric.inverse(K), torch.linalg.solve(dense, K)) < 1e-12
    assert rel(metric.quadratic(K), (K * torch.linalg.solve(dense, K)).sum(0)) < 1e-12


@pytest.mark.parametrize("rank", [6, 14, 22, M])  # both the thin and the complement form
@pytest.mark.parametrize("history", [False, True])
def test_null_space_agrees_with_alphaedit(rank, history):
    beta = 1.3
    values, vectors = torch.linalg.eigh(C)
    P = vectors[:, :rank] @ vectors[:, :rank].mT
    metric = S.NullSpace(C, beta, rank=rank)
    assert min(rank, M - rank) == metric.basis.shape[1]
    Kp = KP if history else KP[:, :0]
    if history:
        metric = metric.with_history(KP)
    edit = S.EditSolver(metric, K)
    assert rel(edit.delta(R), dense_null_space(R, K, Kp, P, beta)) < 1e-12
    paper = R @ K.mT @ P @ torch.linalg.inv(Kp @ Kp.mT @ P + K @ K.mT @ P + beta * EYE)
    assert rel(edit.delta(R), paper) < 1e-12
    if rank < M:
        protected = vectors[:, rank:]
        assert (
            float((edit.A @ protected).abs().max()) < 1e-13
        )  # keys outside the null space are untouched
        same = [S.NullSpace(C, beta, threshold=float(values[rank - 1 : rank + 1].mean()))]
        same.append(S.NullSpace(C, beta, energy=float(values[:rank].sum() / values.sum()) + 1e-9))
        assert all(rel(s.inverse(K), P @ K / beta) < 1e-12 for s in same)
    if not history:
        pk = P @ K[:, 0]
        alone = S.EditSolver(metric, K[:, :1])
        assert float(alone.gain[0]) == pytest.approx(float(pk @ pk / (beta + pk @ pk)), rel=1e-12)


@pytest.mark.parametrize("rank", [6, 14])  # thin, complement
def test_edits_spare_the_protected_space_when_their_keys_lie_almost_wholly_in_it(rank):
    vectors = torch.linalg.eigh(C)[1]
    protected = vectors[:, rank:]
    metric = S.NullSpace(C, 0.01, rank=rank).with_history(
        KP + 1e3 * protected @ (protected.mT @ KP)
    )
    Delta = S.EditSolver(metric, K + 1e3 * protected @ (protected.mT @ K)).delta(R)
    assert float((Delta @ protected).norm()) < 1e-14 * float(
        Delta.norm()
    )  # one projection alone would leak 2e-11


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["covariance", "identity", "null space"])
def test_a_chain_of_batches_agrees_with_the_dense_formulas(name, parallel):
    metric = S.NullSpace(C, 1.3, rank=14) if name == "null space" else METRICS[name][0]
    vectors = torch.linalg.eigh(C)[1][:, :14]
    keys = rand(M, 10 * N, seed=17)
    # every batch nearly repeats the first: each root shrinks what the ones before it have shrunk
    if parallel:
        keys = keys[:, :N].repeat(1, 10) + 0.1 * keys
    for step in range(10):
        Kp, now = keys[:, : step * N], keys[:, step * N : (step + 1) * N]
        if name == "null space":
            expected = dense_null_space(R, now, Kp, vectors @ vectors.mT, 1.3)
        else:
            expected = dense_delta(R, now, METRICS[name][1] + Kp @ Kp.mT)
        assert rel(S.EditSolver(metric, now).delta(R), expected) < 1e-12
        metric = metric.with_history(now)


@each_metric
def test_identities(metric, dense):
    edit = S.EditSolver(metric, K)
    eye = torch.eye(N, dtype=torch.float64)
    Delta, H = edit.delta(R), dense + K @ K.mT
    assert torch.equal(edit.G, edit.G.mT)
    assert rel(edit.B, torch.linalg.inv(eye + edit.S)) < 1e-12
    assert rel(edit.G, edit.B @ edit.S) < 1e-12 and rel(edit.G, eye - edit.B) < 1e-12
    assert rel(edit.gain, edit.G.diagonal()) < 1e-15
    assert rel(edit.realised(R), Delta @ K) < 1e-12
    drifted = K[:, :1] + 0.1
    assert rel(edit.realised(R, drifted), Delta @ drifted) < 1e-12
    # price: three forms, and what it means
    price, U = float(edit.price(R)), edit.realised(R)
    assert price == pytest.approx(float((Delta @ dense * Delta).sum()), rel=1e-11)
    assert price == pytest.approx(float((R @ (edit.G - edit.G @ edit.G) * R).sum()), rel=1e-11)
    assert price == pytest.approx(
        float((U * torch.linalg.solve(edit.S, U, left=False)).sum()), rel=1e-11
    )
    hard = S.EditSolver(metric, K, "equality")
    assert rel(hard.G, eye) < 1e-12 and rel(hard.realised(R), R) < 1e-12
    assert float(hard.price(R)) == pytest.approx(
        float((hard.delta(R) @ dense * hard.delta(R)).sum()), rel=1e-11
    )
    # full compensation turns the soft write into the exact one
    assert rel(edit.realised(edit.compensated(R)), R) < 1e-11
    assert rel(edit.delta(edit.compensated(R)), hard.delta(R)) < 1e-11
    # committing K and down-dating = the inverse of the sum
    assert rel(metric.with_history(K).inverse(drifted), torch.linalg.solve(H, drifted)) < 1e-12
    # one key alone
    s = float(metric.quadratic(K[:, :1])[0])
    assert float(S.EditSolver(metric, K[:, :1]).gain[0]) == pytest.approx(s / (1 + s), rel=1e-12)


def test_optimality_of_the_soft_write():
    edit = S.EditSolver(S.Covariance(C, 0.7), K)
    Delta = edit.delta(R)

    def cost(X):
        return float((X @ K - R).square().sum() + (X @ (0.7 * C) * X).sum())

    assert all(cost(Delta + 1e-3 * rand(D, M, seed=i)) > cost(Delta) for i in range(20))


def test_weight_changes_do_not_refactor(monkeypatch):
    calls = []
    for name in ("cholesky_ex", "cholesky", "solve", "inv", "eigh"):
        original = getattr(torch.linalg, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls.append((_name, args[0].shape[-1]))
            return _original(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    metric = S.Covariance(C, 1.0)
    assert calls == [("cholesky_ex", M)]
    calls.clear()
    for step in range(3):  # weights, edits, history: no m x m factorisation or solve ever again
        edit = S.EditSolver(metric.with_weight(2.0 + step), K)
        (
            edit.delta(R),
            edit.price(R),
            edit.G,
            edit.key_jvp(K),
            edit.key_vjp(edit.A),
            edit.log_weight_jvp(),
        )
        S.EditSolver(metric.with_history(KP), K, "equality").delta(R)
    assert calls and all(size <= N for _, size in calls)
    assert metric.with_weight(5.0).factor is metric.factor
    assert rel(metric.with_weight(5.0).inverse(K), metric.inverse(K) / 5) < 1e-15


def test_weight_for_gain():
    metric = S.Covariance(C, 123.0)
    weight = S.weight_for_gain(metric, K[:, :1], 0.9)
    assert float(S.EditSolver(metric.with_weight(weight), K[:, :1]).gain[0]) == pytest.approx(
        0.9, rel=1e-12
    )
    C1 = torch.linalg.inv(C)
    s = (K * (C1 @ K)).sum(0).mean()
    assert S.weight_for_gain(metric, K) == pytest.approx(float(s) * 0.02 / 0.98, rel=1e-12)
    for bad in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="gain"):
            S.weight_for_gain(metric, K, bad)
    with pytest.raises(ValueError, match="at least one key"):
        S.weight_for_gain(metric, K[:, :0])
    with pytest.raises(ValueError, match="zero"):
        S.weight_for_gain(metric, torch.zeros(M, 1))


# derivatives
# --------------------------------------------------------------------------------------------------


def test_vjp_and_jvp_in_the_target():
    edit = S.EditSolver(S.Covariance(C, 0.7), K)
    W, X, T = rand(D, M, seed=5), rand(M, 9, seed=6), rand(D, 9, seed=7)

    def loss(R):
        return 0.5 * ((W + edit.delta(R)) @ X - T).tanh().square().sum()

    Rg = R.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(Rg), Rg)
    y = ((W + edit.delta(R)) @ X - T).tanh()
    g = y * (1 - y * y)
    assert rel(edit.vjp(g @ X.mT), expected) < 1e-12
    assert rel(edit.vjp(g, X), expected) < 1e-12  # the LoRA form: Gamma is never built
    gu = rand(D, N, seed=8)
    assert rel(edit.vjp(gu, K), gu @ edit.G) < 1e-12
    dR = rand(D, N, seed=9)
    assert rel(edit.jvp(dR), edit.delta(R + dR) - edit.delta(R)) < 1e-12
    assert rel(edit.jvp(dR, X), edit.jvp(dR) @ X) < 1e-12


@pytest.mark.parametrize("constraint", ["soft", "equality"])
@each_metric
def test_key_derivatives(metric, dense, constraint):
    def formula(K):
        Mi = torch.linalg.inv(dense)
        eye = torch.eye(N, dtype=torch.float64) if constraint == "soft" else 0
        return torch.linalg.solve(eye + K.mT @ Mi @ K, K.mT @ Mi)

    edit, dK, A_bar = S.EditSolver(metric, K, constraint), rand(M, N, seed=10), rand(N, M, seed=11)
    _, tangent = torch.func.jvp(formula, (K,), (dK,))
    _, pullback = torch.func.vjp(formula, K)
    assert rel(edit.key_jvp(dK), tangent) < 1e-10
    assert rel(edit.key_vjp(A_bar), pullback(A_bar)[0]) < 1e-10


def test_log_weight_jvp():
    h, metric = 1e-5, S.Covariance(C)
    up, down = (S.EditSolver(metric.with_weight(0.7 * f), K).A for f in (1 + h, 1 - h))
    assert (
        rel(S.EditSolver(metric.with_weight(0.7), K).log_weight_jvp(), (up - down) / (2 * h)) < 1e-8
    )


@pytest.mark.parametrize("constraint", ["soft", "equality"])
@pytest.mark.parametrize("name", ["covariance", "float32 factor", "history", "null space"])
def test_torch_func_composes(name, constraint):
    metric = S.NullSpace(C, 1.3, rank=14) if name == "null space" else METRICS[name][0]

    def read(K):
        return S.read_in(metric, K, constraint)

    small, tangent = K[:, :2], rand(M, 2, seed=12)
    leaf = small.clone().requires_grad_()
    assert torch.autograd.gradcheck(read, leaf, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(read, leaf)
    forward, reverse = (
        torch.func.jacfwd(lambda K: read(K)[0])(small),
        torch.func.jacrev(lambda K: read(K)[0])(small),
    )
    assert rel(forward, reverse) < 1e-11
    _, value = torch.func.jvp(lambda K: read(K)[0], (small,), (tangent,))
    assert rel((forward * tangent).sum((-2, -1)), value) < 1e-11

    def cost(K):  # the whole object, not only its core
        edit = S.EditSolver(metric, K, constraint)
        return edit.price(R[:, :2]) + edit.realised(R[:, :2], drift).tanh().sum()

    drift = rand(M, 3, seed=13)
    hessian = torch.func.hessian(cost)(small).reshape(2 * M, 2 * M)
    assert rel(hessian, hessian.mT) < 1e-10 and float(hessian.norm()) > 0
    gradient = torch.func.grad(cost)
    step = 1e-5 * tangent
    difference = (gradient(small + step) - gradient(small - step)).flatten() / 2
    assert rel(hessian @ step.flatten(), difference) < 1e-6
    batch = torch.stack([small, small + 0.1 * tangent])
    mapped = torch.func.vmap(read)(batch)[0]
    assert rel(mapped, torch.stack([read(k)[0] for k in batch])) == 0
    assert rel(torch.func.vmap(gradient)(batch)[1], gradient(batch[1])) < 1e-12


# properties
# --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(0, 16),
    seed=st.integers(0, 10**6),
    weight=st.floats(-6, 6),
    duplicate=st.booleans(),
    previous=st.integers(0, 9),
)
def test_properties(m, n, seed, weight, duplicate, previous):
    C, K, Kp = covariance(m, seed), rand(m, n, seed=seed + 1), rand(m, previous, seed=seed + 2)
    if duplicate and n > 1:
        K[:, 1] = K[:, 0]
    base = S.Covariance(C, 10.0**weight)
    metric = base.with_history(Kp)
    edit, R = S.EditSolver(metric, K), rand(3, n, seed=seed + 3)
    values = torch.linalg.eigvalsh(edit.G) if n else edit.G.new_zeros(1)
    assert float(values.min()) >= -1e-12 and float(values.max()) <= 1 + 1e-12
    tolerance = 1e-9 * float(R.square().sum())
    assert float(edit.price(R)) >= -tolerance
    dense = 10.0**weight * C + Kp @ Kp.mT
    Delta = edit.delta(R)
    assert float(edit.price(R)) == pytest.approx(
        float((Delta @ dense * Delta).sum()), rel=1e-6, abs=tolerance
    )
    probe = rand(m, 2, seed=seed + 4)
    chain = metric.with_history(K).inverse(
        probe
    )  # sequential down-dates = one joint history, in any order
    joint = base.with_history(torch.cat([K, Kp], 1)).inverse(probe)
    assert torch.allclose(chain, joint, rtol=1e-7, atol=1e-9 * float(base.inverse(probe).norm()))


def test_duplicate_keys_share_the_mean_of_their_residuals():
    k = K[:, :1]
    edit = S.EditSolver(S.Covariance(C, 0.7), torch.cat([k, k], 1))
    s = float(edit.S[0, 0])
    assert rel(edit.G, torch.full((2, 2), s / (1 + 2 * s), dtype=torch.float64)) < 1e-12
    with pytest.raises(ValueError, match=r"closest: 0 and 1, cosine 1\.0.*merge"):
        S.EditSolver(S.Covariance(C), torch.cat([k, k], 1), "equality")
    with pytest.raises(ValueError, match="merge"):
        edit.compensated(R[:, :2])


def test_many_more_keys_than_dimensions_cost_no_square_of_their_number():
    """40 GB each for B and G, were they formed."""
    n = 70_000
    K, R = rand(6, n, seed=1), rand(3, n, seed=2)
    edit = S.EditSolver(S.Covariance(covariance(6, seed=3)), K)
    H = covariance(6, seed=3) + K @ K.mT
    Delta = R @ torch.linalg.solve(H, K).mT
    assert rel(edit.delta(R), Delta) < 1e-12
    assert rel(edit.realised(R), Delta @ K) < 1e-12
    assert rel(edit.gain, (K * torch.linalg.solve(H, K)).sum(0)) < 1e-12
    assert float(edit.price(R)) == pytest.approx(
        float((Delta @ covariance(6, seed=3) * Delta).sum()), rel=1e-8
    )


@pytest.mark.parametrize("n", [5, 9])
def test_derivatives_with_more_keys_than_dimensions(n):
    keys, small = rand(4, n, seed=20), covariance(4, seed=5)
    metric = S.Covariance(small)

    def formula(K):
        return torch.linalg.solve(small + K @ K.mT, K).mT

    def cost(K):
        return S.EditSolver(metric, K).A.tanh().sum() + S.EditSolver(metric, K).B.sin().sum()

    def dense_cost(K):
        A = formula(K)
        return A.tanh().sum() + (torch.eye(n, dtype=torch.float64) - A @ K).sin().sum()

    edit, dK, A_bar = S.EditSolver(metric, keys), rand(4, n, seed=21), rand(n, 4, seed=22)
    assert rel(edit.B, torch.linalg.inv(torch.eye(n) + edit.S)) < 1e-11
    assert rel(edit.key_jvp(dK), torch.func.jvp(formula, (keys,), (dK,))[1]) < 1e-10
    assert rel(edit.key_vjp(A_bar), torch.func.vjp(formula, keys)[1](A_bar)[0]) < 1e-10
    for derivative in (torch.func.grad, torch.func.hessian):
        assert rel(derivative(cost)(keys), derivative(dense_cost)(keys)) < 1e-9
    batch = torch.stack([keys, dK])
    mapped = torch.func.vmap(lambda K: S.read_in(metric, K)[0])(batch)
    assert rel(mapped, torch.stack([formula(k) for k in batch])) < 1e-10


def test_edges():
    metric = S.Covariance(C)
    empty = S.EditSolver(metric, K[:, :0])
    assert empty.A.shape == (0, M) and empty.G.shape == (0, 0)
    assert torch.equal(empty.delta(R[:, :0]), torch.zeros(D, M, dtype=torch.float64))
    assert float(empty.price(R[:, :0])) == 0
    assert S.EditSolver(metric, K[:, :0], "equality").A.shape == (0, M)
    assert rel(metric.with_history(K[:, :0]).inverse(K), metric.inverse(K)) == 0
    many, Rm = rand(M, 3 * M, seed=14), rand(D, 3 * M, seed=15)
    assert rel(S.EditSolver(metric, many).delta(Rm), dense_delta(Rm, many, C)) < 1e-12
    with pytest.raises(ValueError, match="merge"):
        S.EditSolver(metric, many, "equality")
    zero = S.EditSolver(metric, torch.cat([K[:, :1], torch.zeros(M, 1)], 1))
    assert float(zero.gain[1]) == 0
    with pytest.raises(ValueError, match=r"keys \[1\] are zero"):
        S.EditSolver(metric, torch.cat([K[:, :1], torch.zeros(M, 1)], 1), "equality")
    near = torch.cat([K, K[:, :1] + 1e-6], 1)  # near-parallel keys are well posed in the soft write
    assert (
        rel(S.EditSolver(metric, near).delta(rand(D, N + 1)), dense_delta(rand(D, N + 1), near, C))
        < 1e-12
    )
    U, V = S.EditSolver(metric, K.bfloat16()).apply(R.half(), dtype=torch.float32)
    assert U.dtype == V.dtype == torch.float32 and U.shape == (D, N) and V.shape == (N, M)
    assert rel((U @ V).double(), dense_delta(R.half(), K.bfloat16(), C)) < 1e-6


def test_ill_scaled_statistics_keep_their_digits():
    # cond 1e10 from units of very different size: Jacobi scaling makes it harmless, also for the
    # float32 factor
    scale = torch.logspace(-2.5, 2.5, M, dtype=torch.float64)
    bad = C * scale[:, None] * scale
    keys = K * scale[:, None]
    expected = dense_delta(R, K, C) / scale
    for dtype in (torch.float64, torch.float32):
        assert rel(S.EditSolver(S.Covariance(bad, dtype=dtype), keys).delta(R), expected) < 1e-11


def test_float32_factor_spans_panels():
    m = 1300  # more than one float64 panel
    X = rand(m, 2 * m, seed=20)
    big = X @ X.mT / (2 * m)
    keys = rand(m, 2, seed=21)
    refined, exact = (S.Covariance(big, dtype=t) for t in (torch.float32, torch.float64))
    assert refined.factor.lower.dtype == torch.float32
    assert rel(refined.inverse(keys), exact.inverse(keys)) < 1e-12
    assert rel(refined.quadratic(keys), exact.quadratic(keys)) < 1e-13
    hard = big - (1 - 1e-9) * torch.linalg.eigvalsh(big)[0] * torch.eye(m, dtype=torch.float64)
    assert float(S.Covariance(hard).quadratic(keys).min()) > 0
    with pytest.raises(S.NotPositiveDefiniteError, match="float64"):
        S.Covariance(hard, dtype=torch.float32)


def test_factor_round_trip(tmp_path):
    from safetensors.torch import load_file, save_file

    metric = S.Covariance(C, 3.0, ridge=0.01)
    save_file(metric.state_dict(), tmp_path / "factor.safetensors")
    again = S.Covariance.from_state(load_file(tmp_path / "factor.safetensors"), weight=3.0)
    assert rel(again.inverse(K), metric.inverse(K)) < 1e-14
    state = metric.state_dict()
    for damage in (
        {"cholesky": state["cholesky"]},
        {**state, "scaling": state["scaling"][1:]},
        {**state, "cholesky": state["cholesky"] * float("nan")},
        {**state, "cholesky": state["cholesky"].float()},
    ):
        with pytest.raises(ValueError, match="recompute"):
            S.Covariance.from_state(damage)
    with pytest.raises(ValueError, match="needs C"):
        S.Covariance(C, dtype=torch.float32).state_dict()


# bad input
# --------------------------------------------------------------------------------------------------


def few_tokens() -> torch.Tensor:
    X = rand(M, M - 3, seed=16)
    return X @ X.mT


def dead_unit() -> torch.Tensor:
    bad = C.clone()
    bad[3], bad[:, 3] = 0, 0
    return bad


BAD_STATISTICS = {
    "too few tokens": (few_tokens, "collect more, pass ridge"),
    "dead unit": (dead_unit, "never fired.*ridge"),
    "indefinite": (lambda: C - 2 * C.diagonal().min() * EYE, "non-positive diagonal|singular"),
    "asymmetric": (lambda: C + torch.triu(C, 1), "not symmetric"),
    "NaN": (lambda: C * float("nan"), "NaN"),
    "bfloat16": (lambda: C.bfloat16(), "float32 or float64"),
    "not square": (lambda: C[:5], "square"),
    "vector": (lambda: C[0], "square"),
    "empty": (lambda: C[:0, :0], "square"),
}


@pytest.mark.parametrize("make,message", BAD_STATISTICS.values(), ids=BAD_STATISTICS.keys())
def test_bad_statistics_are_refused_with_a_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        S.Covariance(make())


def test_ridge_rescues_singular_statistics():
    for make in (few_tokens, dead_unit):
        dense = make() + 1e-3 * make().diagonal().mean() * EYE
        assert (
            rel(
                S.EditSolver(S.Covariance(make(), ridge=1e-3), K).delta(R), dense_delta(R, K, dense)
            )
            < 1e-9
        )


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: S.EditSolver(S.Covariance(C), K.mT), "transpose it"),
        (lambda: S.EditSolver(S.Covariance(C), K[:5]), r"\[23, n\]"),
        (lambda: S.EditSolver(S.Covariance(C), K.long()), "floating"),
        (
            lambda: S.EditSolver(S.Covariance(C), K.index_fill(1, torch.tensor([2]), float("nan"))),
            r"edits \[2\].*NaN",
        ),
        (lambda: S.EditSolver(S.Covariance(C), K, "hard"), "constraint"),  # type: ignore[arg-type]
        (lambda: S.EditSolver(S.Covariance(C), K).delta(R.mT), "one column per edit"),
        (lambda: S.EditSolver(S.Covariance(C), K).vjp(R), "cotangent"),
        (lambda: S.Covariance(C, weight=0.0), "weight"),
        (lambda: S.Covariance(C, ridge=-1.0), "ridge"),
        (lambda: S.Covariance(C, dtype=torch.float16), "factor"),
        (lambda: S.ShrunkCovariance(C, gamma=1.5), "gamma"),
        (lambda: S.Covariance(0 * C), "covariance is all zeros.*Identity"),
        (lambda: S.Covariance(0 * C, ridge=1e-3), "covariance is all zeros"),
        (lambda: S.ShrunkCovariance(0 * C, gamma=0.5), "covariance is all zeros"),
        (lambda: S.NullSpace(C), "exactly one"),
        (lambda: S.NullSpace(C, threshold=1.0, rank=2), "exactly one"),
        (lambda: S.NullSpace(C, threshold=1e-9), "empty"),
        (lambda: S.NullSpace(C, rank=M + 1), "too large"),
        (lambda: S.Identity(0), "dim"),
        (lambda: S.combined([]), "at least one"),
        (lambda: S.combined([(1.0, C), (1.0, C[:4, :4])]), "differ in shape"),
        (lambda: S.combined([(-1.0, C)]), "negative"),
        (lambda: S.Covariance(C).with_history(K).with_weight(2.0), "before with_history"),
        (lambda: S.Covariance(C).with_history(K * float("inf")), "history keys"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rank", [3, 9])
def test_the_leaky_null_space_is_its_dense_inverse(rank):
    """Whichever side of the eigenvectors is kept, and for another matrix than the space's own."""
    draw = torch.Generator().manual_seed(rank)
    C, other = (torch.randn(40, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    C, other = C.mT @ C / 40, other.mT @ other / 40
    space = S.NullSpace(C, rank=rank)
    metric = S.LeakyNullSpace(other, space, 2.5, weight=3.0)
    Q = torch.linalg.eigh(C).eigenvectors[:, :rank]
    inner = torch.eye(rank, dtype=torch.float64) + 2.5 * Q.mT @ other @ Q
    X = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(metric.inverse(X), Q @ torch.linalg.solve(inner, Q.mT @ X) / 3)
    free = S.LeakyNullSpace(other, space, 0.0, weight=3.0)
    torch.testing.assert_close(free.inverse(X), space.with_weight(3.0).inverse(X))
    with pytest.raises(ValueError, match="leak must not be negative"):
        S.LeakyNullSpace(C, space, -1.0)
