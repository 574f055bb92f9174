"""pytest-benchmark cases against regressions on a CPU; ordinary runs call each once and check the answer.

    pytest tests/kernels/test_speed.py --benchmark-enable --benchmark-autosave
    pytest tests/kernels/test_speed.py --benchmark-enable --benchmark-compare --benchmark-compare-fail=median:15%
"""

import pytest
import torch

from knowedit_kernels.bench.__main__ import OPERATIONS

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
