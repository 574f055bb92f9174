"""pytest-benchmark cases against regressions on a CPU; ordinary runs call each once and check the answer.

    pytest tests/kernels/test_speed.py --benchmark-enable --benchmark-autosave
    pytest tests/kernels/test_speed.py --benchmark-enable --benchmark-compare --benchmark-compare-fail=median:15%
"""

from fractions import Fraction

import pytest
import torch

from knowedit_kernels.bench.__main__ import OPERATIONS
from knowedit_kernels.numerics import SOLVE_ERROR
from knowedit_kernels.solver.reference import refined_read_in

CASES = [
    ("moments", {"d": 576, "tokens": 2048, "dtype": "bf16", "precision": "exact"}),
    ("moments", {"d": 576, "tokens": 2048, "dtype": "fp32", "precision": "exact"}),
    ("lowrank", {"rows": 576, "d": 1536, "rank": 8, "dtype": "bf16", "rounding": "nearest"}),
    ("lowrank", {"rows": 576, "d": 1536, "rank": 100, "dtype": "fp32", "rounding": "nearest"}),
    ("solver", {"d": 576, "edits": 8}),
    ("target_loss", {"rows": 8, "d": 64, "vocabulary": 4096, "dtype": "fp32"}),
]


@pytest.mark.parametrize("name, values", CASES, ids=lambda case: str(case).replace("'", ""))
@pytest.mark.parametrize("provider", ["ours", "torch"])
def test_speed(benchmark, name, values, provider):
    operation = OPERATIONS[name]
    problem = operation.make(values, torch.device("cpu"))
    chosen = operation.providers[provider]
    assert chosen.refuse(problem.inputs) is None
    benchmark.group = f"{name} {values}"
    run = chosen.build(problem.inputs)
    checks = problem.judge(run())
    assert all(abs(check.value) <= check.limit * chosen.slack for check in checks), checks
    benchmark(run)


def gauss_jordan(rows):
    """The solution of a positive definite system from its rows [left | right] of rational numbers."""
    n = len(rows)
    for i in range(n):
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(n):
            if j != i and (factor := rows[j][i]):
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i])]
    return torch.tensor([[float(value) for value in row[n:]] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_the_judge_of_the_solver_is_right_where_lapack_is_not(scale):
    n = 10
    index = torch.arange(1.0, n + 1, dtype=torch.float64)
    M = scale / (index[:, None] + index - 1)  # Hilbert's matrix: a condition number of 1.6e13
    K = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale**0.5 * 1e-5
    total = [[Fraction(x) for x in row] for row in M.tolist()]
    keys = [[Fraction(x) for x in row] for row in K.tolist()]
    rows = [
        [total[i][j] + sum(a * b for a, b in zip(keys[i], keys[j])) for j in range(n)] + keys[i] for i in range(n)
    ]
    exact = gauss_jordan(rows).T
    lapack = torch.linalg.solve(M + K @ K.T, K).T
    assert float((lapack - exact).norm() / exact.norm()) > 100 * SOLVE_ERROR
    assert float((refined_read_in(K, M) - exact).norm() / exact.norm()) < 1e-15


def test_the_judge_of_the_solver_refuses_a_singular_system():
    for singular in (torch.full((4, 4), 0.1), torch.zeros(4, 4), torch.full((4, 4), torch.nan)):
        with pytest.raises(ArithmeticError, match="singular"):
            refined_read_in(torch.ones(4, 1), singular)


@pytest.mark.parametrize("provider", ["ours", "torch", "rome"])
def test_a_wrong_solver_is_over_its_budget(provider):
    """Just over the limit for ours; for a peer with its slack, what a matrix rounded to float32 loses."""
    operation = OPERATIONS["solver"]
    problem, chosen = operation.make({"d": 576, "edits": 8}, torch.device("cpu")), operation.providers[provider]
    M, K, _ = problem.inputs
    right = refined_read_in(K, M)
    slight = right * (1 + 2 * SOLVE_ERROR * chosen.slack)
    rounded = refined_read_in(K, (M + K @ K.T).float().double() - K @ K.T)
    no_keys = torch.linalg.solve(M, K).T
    for wrong in (slight, rounded, no_keys, torch.full_like(right, torch.nan)):
        (check,) = problem.judge(wrong)
        assert not abs(check.value) <= check.limit * chosen.slack, check
