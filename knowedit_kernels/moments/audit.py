"""Measured accumulation error of a second moment, on the user's own data and device.

Two identities hold for the exact C = sum of k k^T: trace(C) = sum |k|^2 and z^T C z = sum (k . z)^2
for any sign vector z. The right-hand sides are collected in float64 while the keys stream by, at
O(tokens d) cost; the differences measure what the O(tokens d^2) kernel lost (algorithm-based fault
tolerance, Huang and Abraham 1984, made quantitative).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from knowedit_kernels.numerics import MOMENT, Budget

PROBES = 4
# The four-probe estimate of a norm exceeds 2.5 times the truth with a chance below 1e-4
# (chi-square, 4 degrees).
_ESTIMATE_SLACK = 2.5


@dataclass(frozen=True)
class AuditResult:
    """`bias`: signed relative error of the trace. `normwise`: estimate of |E|_F / |C|_F off the
    diagonal.
    """

    bias: float
    normwise: float
    count: int

    def ok(self, budget: Budget = MOMENT) -> bool:
        """Whether both measures are within budget (the estimate with slack for its own scatter);
        NaN is not.
        """
        return abs(self.bias) <= budget.bias and self.normwise <= _ESTIMATE_SLACK * budget.normwise

    def __str__(self) -> str:
        verdict = "within budget" if self.ok() else "OUTSIDE THE BUDGET"
        return (
            f"{self.count} tokens: bias {self.bias:+.1e}, normwise {self.normwise:.1e} ({verdict})"
        )


def signs(dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The audit's sign vectors [PROBES, dim], float64 +-1: a hash of the index, the same under
    every torch version.
    """
    x = torch.arange(1, PROBES * dim + 1, dtype=torch.int64, device="cpu") * -0x61C8864680B583EB
    for _ in range(2):
        x = (x ^ ((x >> 31) & 0xFFFFFFFF)) * -0x40A7B892E31B1A47
    return (1.0 - 2.0 * ((x >> 40) & 1)).double().reshape(PROBES, dim).to(device)


def compare(c: torch.Tensor, sums: torch.Tensor, count: int) -> AuditResult:
    """Audits the symmetric float64 `c` [d, d] against the collected `sums` [1 + PROBES]."""
    if count == 0:
        return AuditResult(0.0, 0.0, 0)
    z = signs(c.shape[0], c.device)
    trace = c.diagonal().sum()
    trace_error = trace - sums[0]
    # z_i^2 = 1: what remains of z^T E z without the trace has variance 2 |E_off|_F^2
    off_diagonal = ((z @ c) * z).sum(1) - sums[1:] - trace_error
    bias = trace_error / sums[0] if sums[0] else trace_error
    norm = c.norm()
    normwise = (
        (off_diagonal.square().mean() / 2).sqrt() / norm if norm else off_diagonal.abs().max()
    )
    return AuditResult(bias.item(), normwise.item(), count)
