"""pytest-benchmark cases against regressions on a CPU; ordinary runs call each once and check the
answer (unit).

pytest tests/kernels/test_speed.py --benchmark-enable --benchmark-autosave
pytest tests/kernels/test_speed.py --benchmark-enable --benchmark-compare
--benchmark-compare-fail=median:15%
"""

from fractions import Fraction

import pytest
import torch

from knowedit_kernels.bench.__main__ import OPERATIONS
from knowedit_kernels.solver.reference import dense_delta, refined_delta

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


def test_the_judge_of_a_solve_is_right_where_float64_is_not():
    """Against exact rational arithmetic, at a condition of 1e6, which costs a float64 LU a thousand
    times more.
    """
    random = torch.Generator().manual_seed(0)
    d, n = 12, 3
    root = torch.randn(d, d, generator=random, dtype=torch.float64) * torch.logspace(0, -3, d)
    M, K = root @ root.T, torch.randn(d, n, generator=random, dtype=torch.float64)
    M = 0.5 * (M + M.T)
    R = torch.randn(2, n, generator=random, dtype=torch.float64)
    fractions = rational_delta(R, K, M)
    exact = torch.tensor([[float(x) for x in row] for row in fractions], dtype=torch.float64)
    judged = rel(refined_delta(R, K, M), exact)
    assert judged < 1e-14 < 1e-12 < rel(dense_delta(R, K, M), exact)


def rational_delta(R, K, M):
    """R K^T (M + K K^T)^-1 in fractions, by Gauss-Jordan elimination."""
    R, K, M = ([[Fraction(x) for x in row] for row in t.tolist()] for t in (R, K, M))
    size = range(len(M))
    rows = [
        [M[i][j] + sum(a * b for a, b in zip(K[i], K[j])) for j in size]
        + [sum(a * b for a, b in zip(K[i], r)) for r in R]
        for i in size
    ]
    for i in size:
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in size:
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i])]
    return [[rows[i][len(M) + r] for i in size] for r in range(len(R))]


def rel(value, expected):
    return float((value - expected).norm() / expected.norm())


def _solved_in_float32(inputs):
    return lambda: torch.linalg.solve(
        (inputs.M + inputs.K @ inputs.K.T).float(), inputs.K.float()
    ).T.double()


def _without_the_edits(inputs):
    return lambda: torch.linalg.solve(inputs.M, inputs.K).T


def _one_entry_off(inputs):
    def run():
        A = OPERATIONS["solver"].providers["ours"].build(inputs)().clone()
        A[-1, -1] += 1e-9 * A.abs().max()
        return A

    return run


@pytest.mark.parametrize("wrong", [_solved_in_float32, _without_the_edits, _one_entry_off])
def test_a_wrong_solve_is_not_excused(wrong):
    problem = OPERATIONS["solver"].make({"d": 96, "edits": 8}, torch.device("cpu"))
    assert not all(check.ok for check in problem.judge(wrong(problem.inputs)()))
