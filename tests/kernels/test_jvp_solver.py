"""Derivatives of the editing solve against differentiating a dense solve, and the spread over
layers against its loop (unit).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp, vjp, vmap

from knowedit_kernels.jvp import (
    Factors,
    edit_jvp,
    edit_vjp,
    effective_gain,
    spread_jvp,
    spread_shares,
    spread_vjp,
)
from knowedit_kernels.solver import Covariance, EditSolver, Identity, NullSpace
from knowedit_kernels.solver.reference import dense_delta, dense_equality

EXACT = 1e-11
M, D, N, T = 20, 7, 4, 5
WEIGHT = 1.5


def draw(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def covariance(m=M, seed=9):
    (X,) = draw((3 * m, m), seed=seed)
    return X.T @ X / len(X)


def close(value, truth, tolerance=EXACT):
    return value.shape == truth.shape and float((value - truth).norm()) <= tolerance * float(
        truth.norm()
    )


def layers(count=2, constraint="soft", n=N):
    C = covariance()
    keys = draw(*[(M, n)] * count, seed=1)
    return [EditSolver(Covariance(C, WEIGHT), K, constraint) for K in keys], draw(
        *[(D, n)] * count, seed=2
    )


def dense(constraint):
    return {"soft": dense_delta, "equality": dense_equality}[constraint], WEIGHT * covariance()


@pytest.mark.parametrize("moving", ["both", "residuals", "keys"])
@pytest.mark.parametrize("constraint", ["soft", "equality"])
def test_jvp_is_forward_mode_through_a_dense_solve(constraint, moving):
    solvers, residuals = layers(constraint=constraint)
    formula, metric = dense(constraint)
    dR, dK = draw(*[(T, D, N)] * 2, seed=3), draw(*[(T, M, N)] * 2, seed=4)
    got = edit_jvp(
        solvers, residuals, dR if moving != "keys" else None, dK if moving != "residuals" else None
    )
    for solver, R, a, b, factors in zip(solvers, residuals, dR, dK, got, strict=True):
        a, b = a * (moving != "keys"), b * (moving != "residuals")
        wanted = vmap(
            lambda a, b, R=R, K=solver.K: jvp(lambda R, K: formula(R, K, metric), (R, K), (a, b))[1]
        )(a, b)
        assert close(factors.dense(), wanted)
        assert factors.left.shape[2] == (N if moving == "residuals" else 2 * N)
        X = draw((M, 3), seed=5)[0]
        assert close(factors.at(X), wanted @ X)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("constraint", ["soft", "equality"])
def test_vjp_is_reverse_mode_through_a_dense_solve(constraint, shared):
    solvers, residuals = layers(constraint=constraint)
    formula, metric = dense(constraint)
    cotangents = [Factors(*draw((T, D, 3), (1 if shared else T, 3, M), seed=i)) for i in range(2)]
    got = edit_vjp(solvers, residuals, cotangents)
    frozen = edit_vjp(solvers, residuals, cotangents, keys=False)
    for solver, R, factors, found, proxy in zip(
        solvers, residuals, cotangents, got, frozen, strict=True
    ):
        pull = vjp(lambda R, K: formula(R, K, metric), R, solver.K)[1]
        wanted = vmap(pull)(factors.dense())
        assert close(found.residual, wanted[0]) and close(found.keys, wanted[1])
        assert torch.equal(proxy.residual, found.residual) and proxy.keys is None


@pytest.mark.parametrize(
    "metric",
    [Identity(M, 2.0), NullSpace(covariance(), rank=12), None],
    ids=["I", "null", "history"],
)
def test_the_two_are_transposes_for_every_metric(metric):
    C, previous = covariance(), draw((M, 6), seed=6)[0]
    metric = Covariance(C).with_history(previous) if metric is None else metric
    K, R, dR, dK, left, right = draw(
        (M, N), (D, N), (T, D, N), (T, M, N), (T, D, 2), (T, 2, M), seed=7
    )
    solver = EditSolver(metric, K)
    (pushed,) = edit_jvp([solver], [R], [dR], [dK])
    (pulled,) = edit_vjp([solver], [R], [Factors(left, right)])
    forward = (pushed.dense() * (left @ right)).sum((1, 2))
    backward = (dR * pulled.residual).sum((1, 2)) + (dK * pulled.keys).sum((1, 2))
    assert torch.allclose(forward, backward, rtol=1e-10)


def test_it_is_the_single_derivative_of_the_solver_many_times():
    solvers, residuals = layers()
    dK, Gamma = draw((T, M, N), (T, D, M), seed=8)
    (pushed,) = edit_jvp(solvers[:1], residuals[:1], None, [dK])
    (pulled,) = edit_vjp(
        solvers[:1], residuals[:1], [Factors(Gamma, torch.eye(M, dtype=torch.float64)[None])]
    )
    for i in range(T):
        assert close(pushed.dense()[i], residuals[0] @ solvers[0].key_jvp(dK[i]))
        assert close(pulled.residual[i], solvers[0].vjp(Gamma[i]))
        assert close(pulled.keys[i], solvers[0].key_vjp(residuals[0].T @ Gamma[i]))


def test_one_solve_whatever_the_number_of_directions(monkeypatch):
    (solver,), (R,) = layers(1)
    solved = []
    inverse = solver.metric.inverse
    monkeypatch.setattr(solver.metric, "inverse", lambda X: solved.append(X.shape[1]) or inverse(X))
    edit_jvp([solver], [R], None, [draw((T, M, N))[0]])
    edit_vjp([solver], [R], [Factors(*draw((T, D, 3), (1, 3, M)))])
    edit_vjp([solver], [R], [Factors(*draw((T, D, 3), (1, 3, M)))], keys=False)
    assert solved == [T * N, 3]


def loop(solvers, R, how, maps):
    """Several layers in turn with dense updates, as MEMIT's code does it: write, look what is
    missing, go on.
    """
    missing, count = R.clone(), len(solvers)
    divisors = {
        "linear": lambda i: count - i,
        "sqrt": lambda i: (count - i) ** 0.5,
        "full": lambda i: 1,
    }
    for i, (solver, J) in enumerate(zip(solvers, maps)):
        shift = ((missing / divisors[how](i)) @ solver.A) @ solver.K
        missing = missing - (shift if J is None else torch.einsum("nab,bn->an", J, shift))
    return R - missing


def jacobians(count, seed=10):
    """How a layer's output moves the last one's, per edit: [N, D, D]; the last layer's own is the
    identity.
    """
    eye = torch.eye(D, dtype=torch.float64)
    return [*(eye + 0.3 * J for J in draw(*[(N, D, D)] * (count - 1), seed=seed)), None]


def applied(maps, transpose=False):
    rule = "nba,...bn->...an" if transpose else "nab,...bn->...an"
    return [None if J is None else (lambda x, J=J: torch.einsum(rule, J, x)) for J in maps]


@pytest.mark.parametrize("how", ["linear", "sqrt", "full"])
@pytest.mark.parametrize("count", [1, 3])
def test_spread_is_the_loop_over_layers(count, how):
    solvers, _ = layers(count)
    maps = jacobians(count)
    (R,) = draw((T, D, N), seed=11)
    got = spread_jvp(solvers, R, how, applied(maps))
    assert close(got.realised, torch.stack([loop(solvers, r, how, maps) for r in R]))
    assert close(got.residuals[0], R * spread_shares(count, how)[0])
    plain = spread_jvp(solvers, R, how)
    assert close(plain.realised, R @ effective_gain(solvers, how))
    assert count > 1 or close(plain.realised, R @ solvers[0].G)


@pytest.mark.parametrize("how", ["linear", "sqrt", "full"])
def test_spread_vjp_is_the_transpose(how):
    solvers, _ = layers(3)
    maps = jacobians(3)
    R, realised, *gradients = draw((T, D, N), (T, D, N), *[(T, D, N)] * 3, seed=12)
    pushed = spread_jvp(solvers, R, how, applied(maps))
    for parts, arrived in (
        (gradients, realised),
        (gradients, None),
        (None, realised),
        ([None, gradients[1], None], None),
    ):
        back = spread_vjp(solvers, parts, arrived, how, applied(maps, transpose=True))
        left = sum((g * r).sum() for g, r in zip(parts or [], pushed.residuals) if g is not None)
        left = left + (0 if arrived is None else (arrived * pushed.realised).sum())
        assert torch.allclose(left, (R * back).sum(), rtol=1e-11)


def test_several_layers_realise_more_than_one():
    """The published table's rule, I - (I - G/L) ... (I - G), with equal scalar gains."""
    for gain, wanted in ((0.3, 0.534), (0.5, 0.754), (0.7, 0.894), (0.9, 0.976), (0.99, 0.998)):
        key = torch.zeros(M, 1, dtype=torch.float64)
        key[0] = (gain / (1 - gain)) ** 0.5
        assert float(effective_gain([EditSolver(Identity(M), key)] * 5)) == pytest.approx(
            wanted, abs=6e-4
        )


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 5), count=st.integers(0, 4), d=st.integers(0, 4), seed=st.integers(0, 10**6)
)
def test_properties(n, count, d, seed):
    K, R, dR, other, dK, moved = draw(
        (M, n), (d, n), (count, d, n), (count, d, n), (count, M, n), (count, M, n), seed=seed
    )
    solver = EditSolver(Identity(M), K)

    def go(dR, dK):
        return edit_jvp([solver], [R], [dR], [dK])[0].dense()

    assert go(dR, dK).shape == (count, d, M)
    assert torch.allclose(
        go(2 * dR - other, 2 * dK - moved), 2 * go(dR, dK) - go(other, moved), atol=1e-10
    )
    assert not go(0 * dR, 0 * dK).any()
    pulled = edit_vjp([solver], [R], [Factors(dR, K.T[None])])[0]
    assert pulled.residual.shape == (count, d, n) and pulled.keys.shape == (count, M, n)
    assert spread_jvp([solver] * 3, dR).realised.shape == dR.shape


SOLVERS, RESIDUALS = layers()
DK = draw(*[(T, M, N)] * 2)
FACTORS = [Factors(*draw((T, D, 3), (1, 3, M)))] * 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: edit_jvp(SOLVERS, RESIDUALS), "give d_residuals or d_keys"),
        (lambda: edit_jvp(SOLVERS, RESIDUALS[:1], None, DK), "2 solvers, but 1 residuals"),
        (lambda: edit_jvp(SOLVERS, RESIDUALS, None, DK[:1]), "2 solvers, but 1 d_keys"),
        (
            lambda: edit_jvp(SOLVERS, [RESIDUALS[0].T] * 2, None, DK),
            r"residuals\[0\] must have shape \[any, 4\]",
        ),
        (
            lambda: edit_jvp(SOLVERS, RESIDUALS, None, [DK[0], DK[1][0]]),
            r"d_keys\[1\] must have shape",
        ),
        (
            lambda: edit_jvp(SOLVERS, RESIDUALS, [R[None] for R in RESIDUALS], DK),
            "1 directions of residuals and 5 of keys",
        ),
        (lambda: edit_vjp(SOLVERS, RESIDUALS, FACTORS[:1]), "but 1 cotangents"),
        (
            lambda: edit_vjp(
                SOLVERS, RESIDUALS, [Factors(f.left, f.right[:, :2]) for f in FACTORS]
            ),
            "right must have shape",
        ),
        (
            lambda: edit_vjp(
                SOLVERS, RESIDUALS, [Factors(f.left, f.right.repeat(2, 1, 1)) for f in FACTORS]
            ),
            "2 right factors",
        ),
        (lambda: spread_shares(3, "half"), "linear, sqrt, full"),
        (lambda: effective_gain([]), "no layers"),
        (
            lambda: effective_gain([*SOLVERS, *layers(1, n=3)[0]]),
            r"different numbers of edits: \[3, 4\]",
        ),
        (lambda: spread_jvp(SOLVERS, RESIDUALS[0].T), "d_residual must have shape"),
        (lambda: spread_jvp(SOLVERS, RESIDUALS[0], through=[None]), "1 maps for 2 layers"),
        (lambda: spread_vjp(SOLVERS), "nothing to pull back"),
        (lambda: spread_vjp(SOLVERS, RESIDUALS[:1]), "gradients of 1 residuals"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
