"""Means with 95 % intervals: the percentile bootstrap over clusters (records, subjects, facts,
prompts), whose parts stay together (Efron and Tibshirani 1993, sections 8.5 and 13.3).

The bootstrap cannot tell what it has not seen: from 6 successes of 6 it draws only successes. A
share that is the same 0 or 1 in every cluster has the exact binomial interval of that many trials
instead (Clopper and Pearson 1934).
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knowedit.io.tables import figure

RESAMPLES = 2000
TAILS = (0.025, 0.975)
Random = int | np.random.Generator


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval; rates are shares between 0 and 1.

    Attributes:
        records: how many values it is the mean of.
    """

    mean: float
    low: float
    high: float
    records: int

    def __format__(self, spec: str) -> str:
        """The mean and its interval, each number formatted by `spec` (default ".3f"); the mean
        alone where one value, or several equal ones, tell nothing of an interval.
        """
        spec = spec or ".3f"
        if self.low == self.high:
            return figure(self.mean, spec)
        mean, low, high = (figure(number, spec) for number in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of a difference lies on one side of 0."""
        return self.low > 0 or self.high < 0


def draws(clusters: int, rng: Random = 0) -> NDArray[np.intp]:
    """How often each cluster is in each bootstrap sample: `[RESAMPLES, clusters]`, a row sums to
    `clusters`.
    """
    drawn = np.random.default_rng(rng).integers(clusters, size=(RESAMPLES, clusters))
    drawn += clusters * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * clusters).reshape(RESAMPLES, clusters)


def ratio(
    above: ArrayLike, below: ArrayLike, rng: Random = 0, *, records: int | None = None
) -> Estimate:
    """``sum(above) / sum(below)``, both `[clusters]`, with its interval over whole clusters.

    A cluster's sum over the number of its values gives their mean. The interval is the mean itself
    where there is one cluster, or all have the same ratio.

    Args:
        rng: a seed, or a generator that several estimates draw from in turn.
        records: default: `sum(below)`, the number of values where `below` counts them.
    """
    above, below = np.asarray(above, float), np.asarray(below, float)
    mean, count = float(above.sum() / below.sum()), int(below.sum()) if records is None else records
    if len(above) < 2 or np.ptp(above * below[0] - below * above[0]) == 0:
        return Estimate(mean, mean, mean, count)
    drawn = draws(len(above), rng)
    low, high = np.quantile(drawn @ above / (drawn @ below), TAILS)
    return Estimate(mean, float(low), float(high), count)


def mean(
    values: ArrayLike,
    clusters: Iterable[Hashable] | None = None,
    rng: Random = 0,
    *,
    share: bool = False,
) -> Estimate:
    """The mean of `values`, each counted once, with its interval over whole clusters (None: every
    value is one).

    Args:
        share: the values are yes (1) or no (0), or shares of such: their mean is never certain.
    """
    values = np.asarray(values, float)
    sums, counts = (
        by_cluster(values, clusters) if clusters is not None else (values, 1 + 0 * values)
    )
    found = ratio(sums, counts, rng)
    if share and (values == values[0]).all() and values[0] in (0, 1):
        return unanimous(bool(values[0]), len(sums), found.records)
    return found


def unanimous(yes: bool, trials: int, records: int) -> Estimate:
    """The share of successes where all of `trials` independent trials said the same: the other end
    of its interval is the share under which that happens with probability 2.5 % (Clopper and
    Pearson 1934).
    """
    other_end = TAILS[0] ** (1 / trials)
    return (
        Estimate(1.0, other_end, 1.0, records)
        if yes
        else Estimate(0.0, 0.0, 1 - other_end, records)
    )


def by_cluster(
    values: Sequence[float] | NDArray[np.float64], clusters: Iterable[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of each cluster's values, clusters in the order they first occur."""
    grouped: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters):
        grouped.setdefault(cluster, []).append(value)
    pairs = [(np.sum(part), len(part)) for part in grouped.values()]
    sums, counts = np.array(pairs, dtype=float).T
    return sums, counts


def estimates(
    values: Iterable[tuple[str, str, Hashable, float]],
    seed: int = 0,
    shares: Container[str] = (),
) -> dict[str, dict[str, Estimate]]:
    """(kind, measure, cluster, value) to `{kind: {measure: Estimate}}`; NaN values are left out.
    Every estimate draws the same samples.

    Args:
        shares: the measures whose values are yes or no, or shares of such (see `mean`).
    """
    columns: dict[tuple[str, str], tuple[list[float], list[Hashable]]] = {}
    for kind, measure, cluster, value in values:
        if value == value:
            numbers, clusters = columns.setdefault((kind, measure), ([], []))
            numbers.append(value)
            clusters.append(cluster)
    table: dict[str, dict[str, Estimate]] = {}
    for (kind, measure), (numbers, clusters) in columns.items():
        table.setdefault(kind, {})[measure] = mean(numbers, clusters, seed, share=measure in shares)
    return table
