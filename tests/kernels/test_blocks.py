"""The solve of a mixture against the dense stacked formulas in float64, ragged experts (unit)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit_kernels import solver as S
from knowedit_kernels.solver.reference import dense_delta, dense_equality, wide_moment

D, M, EXPERTS, TOKENS = 6, 9, 5, 400


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routed(n: int, active: int, seed: int, experts: int = EXPERTS) -> S.RoutedKeys:
    """Keys of n tokens, each at `active` experts, with gates that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:active] for _ in range(n)])
    gates = torch.softmax(rand(n, active, seed=seed), 1).flatten()
    edit = torch.arange(n).repeat_interleave(active)
    keys = rand(n * active, M, seed=seed + 1) + 0.3
    return S.RoutedKeys.gather(keys, edit, chosen.flatten(), gates, n)


def block_diagonal(metric: S.BlockMetric) -> torch.Tensor:
    """The dense M of a metric whose inverse is a matrix."""
    return torch.linalg.inv(metric.inverse(torch.eye(metric.dim, dtype=torch.float64)))


def covariance(seed: int) -> torch.Tensor:
    rows = rand(4 * M, M, seed=seed) * torch.linspace(1, 0.5, M, dtype=torch.float64)
    return rows.mT @ rows / len(rows)


def metric_of(kind: str, experts: int = EXPERTS) -> S.BlockMetric:
    made = {
        "covariance": lambda j: S.Covariance(covariance(j), 0.3),
        "identity": lambda j: S.Identity(M, 0.5 + j),
        "mixed": lambda j: S.Covariance(covariance(j)) if j % 2 else S.Identity(M, 0.7),
        "null space": lambda j: S.NullSpace(covariance(j), 0.4, rank=2 + j % 5),
    }[kind]
    return S.BlockMetric({j: made(j) for j in range(experts)}, 0.8)


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def wide_delta(solver: S.BlockSolver, R: torch.Tensor) -> torch.Tensor:
    """Delta over all experts side by side, zero where the edit changes nothing."""
    parts = solver.delta(R)
    return torch.cat([parts.get(j, R.new_zeros(len(R), M)) for j in range(EXPERTS)], dim=1)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    active=st.integers(1, EXPERTS),
    kind=st.sampled_from(["covariance", "identity", "mixed"]),
    past=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_equals_the_dense_stacked_formula(n, active, kind, past, seed):
    metric, keys, R = metric_of(kind), routed(n, active, seed), rand(D, n, seed=seed + 2)
    history = routed(past, min(2, active), seed + 5) if past else None
    wide = keys.stacked(range(EXPERTS))
    dense = block_diagonal(metric)
    if history is not None:
        old = history.stacked(range(EXPERTS))
        dense = dense + old @ old.mT
    soft = S.BlockSolver(metric, keys, history=history)
    expected = dense_delta(R, wide, dense)
    assert rel(wide_delta(soft, R), expected) < 1e-12
    assert rel(soft.S, wide.mT @ torch.linalg.solve(dense, wide)) < 1e-12
    assert rel(soft.realised(R), expected @ wide) < 1e-12
    others = routed(7, active, seed + 9)
    assert rel(soft.realised(R, others), expected @ others.stacked(range(EXPERTS))) < 1e-12
    assert float(soft.price(R)) == pytest.approx(
        float((expected @ dense * expected).sum()), rel=1e-10
    )
    if n <= 4:
        exact = S.BlockSolver(metric, keys, "equality", history)
        assert rel(wide_delta(exact, R), dense_equality(R, wide, dense)) < 1e-11
        assert rel(exact.realised(R), R) < 1e-11
        assert rel(wide_delta(soft, soft.compensated(R)), dense_equality(R, wide, dense)) < 1e-11


@pytest.mark.parametrize("constraint", ["soft", "equality"])
@pytest.mark.parametrize("kind", ["covariance", "null space", "mixed"])
def test_equals_the_solver_of_one_wide_layer(kind, constraint):
    keys, history, R = routed(3, 2, 1), routed(4, 2, 7), rand(D, 3, seed=2)
    metric = metric_of(kind)
    old = history.stacked(range(EXPERTS))
    wide = S.EditSolver(
        metric.with_history(old), keys.stacked(range(EXPERTS)), constraint=constraint
    )
    block = S.BlockSolver(metric, keys, constraint, history)
    for name in ("B", "S", "G", "gain"):
        assert rel(getattr(block, name), getattr(wide, name)) < 1e-11, name
    assert rel(wide_delta(block, R), wide.delta(R)) < 1e-11
    assert float(block.price(R)) == pytest.approx(float(wide.price(R)), rel=1e-10)


def test_derivatives_are_those_of_the_dense_write():
    keys, tokens, R = routed(4, 2, 1), routed(6, 3, 5), rand(D, 4, seed=2)
    block = S.BlockSolver(metric_of("covariance"), keys, history=routed(2, 2, 8))
    g, dR = rand(D, 6, seed=3), rand(D, 4, seed=4)
    seen = tokens.stacked(range(EXPERTS))
    gamma = g @ seen.mT  # what the output gradients are of the wide weight
    parts = {j: gamma[:, j * M : (j + 1) * M] for j in range(EXPERTS)}
    assert rel(block.vjp(g, tokens), block.vjp(parts)) < 1e-12
    assert float((block.jvp(dR, tokens) * g).sum()) == pytest.approx(
        float((block.vjp(g, tokens) * dR).sum()), rel=1e-12
    )
    free = R.clone().requires_grad_()
    (block.realised(free, tokens) * g).sum().backward()
    assert rel(free.grad, block.vjp(g, tokens)) < 1e-12
    assert rel(block.vjp(rand(D, 4, seed=6)), rand(D, 4, seed=6) @ block.G) < 1e-12


@pytest.mark.parametrize("constraint", ["soft", "equality"])
@pytest.mark.parametrize("past", [0, 4])
def test_gain_price_and_derivatives_are_those_of_the_dense_stacked_formula(constraint, past):
    """Of `BlockSolver`, and of `EditSolver` on the wide keys, which is what the methods call."""
    metric, keys, tokens = metric_of("covariance"), routed(3, 2, 1), routed(6, 3, 5)
    history = routed(past, 2, 8) if past else None
    R, dR, g = rand(D, 3, seed=2), rand(D, 3, seed=4), rand(D, 6, seed=3)
    K, X = keys.stacked(range(EXPERTS)), tokens.stacked(range(EXPERTS))
    dense = block_diagonal(metric)
    wide_metric = metric
    if history is not None:
        old = history.stacked(range(EXPERTS))
        dense, wide_metric = dense + old @ old.mT, metric.with_history(old)
    read = (dense_delta if constraint == "soft" else dense_equality)(torch.eye(3), K, dense)
    delta = R @ read
    price = float((delta @ dense * delta).sum())
    gamma = g @ X.mT  # what gradients g of the outputs at X are of the wide weight
    block = S.BlockSolver(metric, keys, constraint, history)
    wide = S.EditSolver(wide_metric, K, constraint=constraint)
    for solver, at in ((block, tokens), (wide, X)):
        assert rel(solver.gain, (read @ K).diagonal()) < 1e-12
        assert float(solver.price(R)) == pytest.approx(price, rel=1e-12)
        assert rel(solver.jvp(dR, at), dR @ read @ X) < 1e-12
        assert rel(solver.vjp(g, at), gamma @ read.mT) < 1e-12
    assert rel(wide.vjp(gamma), gamma @ read.mT) < 1e-12
    parts = {j: gamma[:, j * M : (j + 1) * M] for j in range(EXPERTS)}
    assert rel(block.vjp(parts), gamma @ read.mT) < 1e-12


@pytest.mark.parametrize("kind", ["covariance", "null space", "mixed"])
def test_blocks_that_a_key_does_not_reach_cost_nothing_and_have_derivatives(kind):
    """Only reached columns are whitened; the derivatives of the others are not lost with them."""
    metric, keys = metric_of(kind), routed(6, 2, 1).stacked(range(EXPERTS))
    whole = (
        torch.block_diag(
            *(part.whiten(torch.eye(M, dtype=torch.float64)) for part in metric.metrics.values())
        )
        * metric.weight**-0.5
    )
    assert rel(metric.whiten(keys), whole @ keys) < 1e-12
    assert rel(metric.inverse(keys), whole.mT @ (whole @ keys)) < 1e-12
    free, along = keys.clone().requires_grad_(), rand(*keys.shape, seed=3)
    metric.quadratic(free).sum().backward()
    assert rel(free.grad, 2 * whole.mT @ (whole @ keys)) < 1e-12
    assert rel(torch.func.jvp(metric.whiten, (keys,), (along,))[1], whole @ along) < 1e-12
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(keys, along)
        tangent = torch.autograd.forward_ad.unpack_dual(metric.whiten(dual)).tangent
    assert rel(tangent, whole @ along) < 1e-12
    columns = []

    class Seen(S.Identity):
        def _whiten(self, X):
            columns.append(X.shape[1])
            return X

    S.BlockMetric({j: Seen(M) for j in range(EXPERTS)}).whiten(keys)
    assert sum(columns) == 6 * 2 and bool(metric.whiten(keys * torch.nan).isnan().any())


def test_cross_terms_are_what_the_block_metric_leaves_out():
    tokens = routed(TOKENS, 2, 11)
    full = wide_moment(tokens, range(EXPERTS))
    blocks = torch.block_diag(
        *(full[j * M : (j + 1) * M, j * M : (j + 1) * M] for j in range(EXPERTS))
    )
    assert rel(full, blocks) > 0.05
    metric = S.BlockMetric(
        {j: S.Covariance(full[j * M : (j + 1) * M, j * M : (j + 1) * M]) for j in range(EXPERTS)}
    )
    keys, R = routed(3, 2, 1), rand(D, 3, seed=2)
    wide = keys.stacked(range(EXPERTS))
    ours = wide_delta(S.BlockSolver(metric, keys), R)
    assert rel(ours, dense_delta(R, wide, blocks)) < 1e-12
    best = dense_delta(R, wide, full)

    def objective(delta):
        return float((delta @ wide - R).square().sum() + (delta @ full * delta).sum())

    assert objective(best) < objective(ours) < 1.1 * objective(best)


def test_experts_without_rows_cost_nothing_and_top_1_is_one_layer():
    class Refusing(S.Identity):
        def whiten(self, X):
            assert X.shape[1] == 0, "an expert without rows was touched"
            return super().whiten(X)

    one = rand(3, M, seed=3)
    keys = S.RoutedKeys.gather(one, torch.arange(3), torch.full((3,), 2))
    metric = S.BlockMetric({0: Refusing(M), 1: Refusing(M), 2: S.Covariance(covariance(2))})
    block, R = S.BlockSolver(metric, keys), rand(D, 3, seed=1)
    assert block.experts == (2,)
    U, A = block.apply(R, torch.float32)[2]
    assert U.shape == (D, 3) and A.shape == (3, M) and A.dtype == torch.float32
    dense = S.EditSolver(S.Covariance(covariance(2), 1.0), one.mT)
    assert rel(block.delta(R)[2], dense.delta(R)) < 1e-12


def test_slots_of_one_edit_at_one_expert_are_summed():
    keys, edit = rand(4, M), torch.tensor([0, 0, 1, 0])
    gates = torch.tensor([0.25, 0.5, 1.0, 0.5]).double()
    gathered = S.RoutedKeys.gather(keys, edit, torch.tensor([3, 3, 3, 1]), gates)
    assert gathered.experts == (1, 3) and gathered.edits == 2
    assert torch.allclose(gathered.keys[3][:, 0], 0.25 * keys[0] + 0.5 * keys[1])
    assert gathered.rows[1].tolist() == [0]


def test_nothing_to_write_changes_nothing():
    empty = S.RoutedKeys.gather(torch.zeros(0, M), *(torch.zeros(0).long() for _ in range(2)))
    block = S.BlockSolver(metric_of("identity"), empty)
    assert block.experts == () and block.delta(torch.zeros(D, 0)) == {}


def test_shrinking_by_count_is_a_prior_of_pooled_rows():
    own, others = rand(3, M, seed=1), rand(200, M, seed=2)
    pooled = own.mT @ own + others.mT @ others
    shrunk = S.shrunk_by_count(own.mT @ own, pooled, 203, 100)
    assert rel(shrunk, (own.mT @ own + M * pooled / 203) / 100) < 1e-14
    S.Covariance(shrunk)  # three rows alone are singular
    unseen = S.shrunk_by_count(torch.zeros(M, M), pooled, 203, 100, prior=2)
    assert rel(unseen, 2 * pooled / 203 / 100) < 1e-14
    assert rel(S.shrunk_by_count(pooled, pooled, 203, 203, prior=0), pooled / 203) < 1e-14


EYE = torch.eye(M, dtype=torch.float64)


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: S.BlockMetric({}), "at least one expert"),
        (
            lambda: S.BlockSolver(S.BlockMetric({0: S.Identity(M)}), routed(2, 2, 1)),
            "receive keys but have no metric",
        ),
        (
            lambda: S.RoutedKeys.gather(rand(2, M), torch.tensor([0]), torch.tensor([0, 1])),
            r"must be \[slots\]",
        ),
        (
            lambda: S.RoutedKeys.gather(rand(1, M), torch.tensor([3]), torch.tensor([0]), edits=2),
            "edit 3 occurs",
        ),
        (
            lambda: S.RoutedKeys.gather(rand(1, M), torch.tensor([0]), torch.tensor([-1])),
            "a number is negative",
        ),
        (
            lambda: S.BlockSolver(metric_of("identity"), routed(2, 2, 1)).apply(rand(D, 3)),
            r"\[d, 2\]",
        ),
        (lambda: S.shrunk_by_count(EYE, EYE, 0, 4), "were statistics collected"),
        (
            lambda: S.BlockSolver(
                metric_of("identity"),
                S.RoutedKeys.gather(
                    rand(1, M).repeat(2, 1), torch.arange(2), torch.zeros(2).long()
                ),
                "equality",
            ),
            "keys are dependent .closest: 0 and 1",
        ),
        (
            lambda: S.BlockSolver(
                metric_of("identity"),
                S.RoutedKeys.gather(rand(1, M), torch.tensor([1]), torch.tensor([0])),
                "equality",
            ),
            r"keys \[0\] are zero in the metric, or reach no expert",
        ),
        (
            lambda: S.BlockSolver(
                metric_of("identity"),
                S.RoutedKeys.gather(rand(1, M) / 0, torch.tensor([0]), torch.tensor([4])),
            ),
            "expert 4: keys of edits .0. contain NaN",
        ),
        (lambda: S.Covariance(S.shrunk_by_count(0 * EYE, EYE, 9, 9, 0)), "is all zeros"),
    ],
)
def test_bad_input_is_named(build, says):
    with pytest.raises(ValueError, match=says):
        build()
