"""The metric of a mixture's wide key: that of every expert, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from knowedit_kernels.solver.metrics import Metric, ScaledMetric


class BlockMetric(ScaledMetric):
    """M = weight * diag_j(M_j): expert -> its metric, any of `solver`'s, each with its own weight.

    It is a metric of the wide key too, the concatenation over its experts in rising order
    (`RoutedKeys.stacked`), so `EditSolver` and `with_history` take it; `BlockSolver` does the same
    without the zeros. Cross terms between experts that fire together are left out.
    """

    def __init__(self, metrics: Mapping[int, Metric], weight: float = 1.0) -> None:
        if not metrics:
            raise ValueError("BlockMetric needs the metric of at least one expert")
        self.metrics = dict(sorted(metrics.items()))
        devices = {metric.device for metric in metrics.values()}
        if len(devices) > 1:
            raise ValueError(f"the experts' metrics are on several devices: {devices}")
        dims = [metric.dim for metric in self.metrics.values()]
        super().__init__(sum(dims), weight, devices.pop())
        empty = [
            metric.whiten(torch.zeros(metric.dim, 0, device=metric.device))
            for metric in self.metrics.values()
        ]
        self._dims, self._ranks = dims, [len(whitened) for whitened in empty]

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that have a metric, in rising order."""
        return tuple(self.metrics)

    def restricted(self, experts: Iterable[int]) -> BlockMetric:
        """The metric of some of the experts. Raises ValueError naming those that have none."""
        experts = sorted(set(experts))
        if missing := [j for j in experts if j not in self.metrics]:
            raise ValueError(
                f"experts {missing[:10]} receive keys but have no metric; there are metrics for "
                f"{list(self.metrics)[:10]}: collect their statistics, or give them Identity"
            )
        return BlockMetric({j: self.metrics[j] for j in experts}, self.weight)

    def whiten_block(self, expert: int, X: Tensor) -> Tensor:
        """F_j X of one expert: [m, n] -> [r, n]."""
        return self.metrics[expert].whiten(X) * self.weight**-0.5

    def unwhiten_block(self, expert: int, Z: Tensor) -> Tensor:
        """F_j^T Z of one expert: [r, n] -> [m, n]."""
        return self.metrics[expert].unwhiten(Z) * self.weight**-0.5

    def _whiten(self, X: Tensor) -> Tensor:
        return self._each(X, self._dims, self._ranks, lambda metric, x: metric.whiten(x))

    def _unwhiten(self, Z: Tensor) -> Tensor:
        return self._each(Z, self._ranks, self._dims, lambda metric, z: metric.unwhiten(z))

    def _each(
        self,
        X: Tensor,
        sizes: list[int],
        made: list[int],
        change: Callable[[Metric, Tensor], Tensor],
    ) -> Tensor:
        """`change` of every expert's block of X [sum(sizes), n] -> [sum(made), n]. A column that
        does not reach an expert is zero there, and stays so at no cost: of 128 experts a key
        reaches 8. Where derivatives are taken it is not left out, as zeros have them too.
        """
        blocks = zip(self.metrics.values(), X.split(sizes))
        if _differentiated(X):
            return torch.cat([change(metric, x) for metric, x in blocks])
        found = X.new_zeros(sum(made), X.shape[1])
        for (metric, x), part in zip(blocks, found.split(made)):
            reached = (x != 0).any(0).nonzero().flatten()
            if len(reached):
                part[:, reached] = change(metric, x[:, reached])
        return found


def _differentiated(X: Tensor) -> bool:
    """Whether a derivative, or a transform of torch.func, may pass through X."""
    return (
        X.requires_grad
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def shrunk_by_count(
    moment: Tensor, pooled: Tensor, rows: int, tokens: int, prior: float | None = None
) -> Tensor:
    """C_j = (moment + prior * pooled / rows) / tokens, [m, m] float64: what to factor for expert j.

    moment: sum of w^2 k k^T over the expert's own count_j rows; pooled: the same over the `rows`
    rows of all experts; tokens: all that passed the layer, so C_j is the mean over them. It is as
    if the expert had also seen `prior` (default m) rows of the pooled kind: its mean is shrunk
    towards the pooled one by prior / (count_j + prior). An expert with few rows, or none, gets a
    metric that is not singular, and one with many its own.

    Raises ValueError for shapes that differ or numbers that are not positive.
    """
    if moment.shape != pooled.shape or moment.ndim != 2:
        raise ValueError(
            f"moment {list(moment.shape)} and pooled {list(pooled.shape)} must both be [m, m]"
        )
    prior = float(len(moment)) if prior is None else prior
    if rows < 1 or tokens < 1 or not 0 <= prior < float("inf"):
        raise ValueError(
            f"rows={rows} and tokens={tokens} must be at least 1 and prior={prior} not negative: "
            "were statistics collected?"
        )
    return (moment.double() + pooled.double() * (prior / rows)) / tokens
