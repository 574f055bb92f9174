"""Are these enough tokens? What an edit is made of, computed from two halves of them.

Windows go alternately into two halves A and B, which are two independent estimates of C. Half of
the difference between what follows from A and what follows from B is one standard error of what
follows from both together, because the sum of two estimates has half the variance of one. Measured
are the two things that editors take from C, at real keys k (those of the package's own facts at
their subjects' last tokens):

    solve       the read-in a = C^-1 k / (k' C^-1 k), which ROME writes with and MEMIT's tends to:
    the relative error of a
                in the norm a' C a, the mean square of what the edit adds to ordinary tokens.
                sqrt(d_ff / tokens) for independent Gaussian keys; twice that on SmolLM2, whose keys
                are neither.
    null_space  the projection P k onto eigenvectors of C below the mean eigenvalue, which AlphaEdit
    writes with: the
                relative error of P k in length.

Each is the median over the keys, with quartiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knowedit.errors import EditError, StatisticsError
from knowedit.models.editable import EditableModel
from knowedit_kernels import Covariance, NullSpace

PROBES = 48  # keys that are solved for
LEAST = 2  # tokens of a half for each of C's rows: below, its inverse says little
GROWTH = 1.4  # tokens from one look to the next while waiting for convergence


@dataclass(frozen=True)
class Error:
    """A relative error: median over the probe keys, lower and upper quartile."""

    median: float
    low: float
    high: float


def probe_keys(model: EditableModel, layers: Sequence[int]) -> dict[int, Tensor]:
    """Keys of the package's own facts at the last tokens of their subjects, `{layer: [n, d_ff]}`
    float64.

    Raises:
        StatisticsError: the model's tokenizer can make nothing of any of them.
    """
    from knowedit.facts.sets import load

    rows = []
    for fact in load("embedded"):
        try:
            row = model.row(fact.text, fact.subject)
        except EditError:  # a subject that ends inside a token of this tokenizer
            continue
        if row.subject:  # not the first token: its key is the attention sink's
            rows.append(row)
        if len(rows) == PROBES:
            break
    if not rows:
        raise StatisticsError(
            f"{model.name}: none of the package's facts can be tokenised with their subjects; "
            f"use tokens="
        )
    return {layer: keys.double() for layer, keys in model.keys(rows, layers)[0].items()}


def enough(counts: Sequence[int], size: int) -> bool:
    """Whether both halves are large enough to be compared."""
    return min(counts) >= LEAST * size


def compare(
    sums: Sequence[Tensor], counts: Sequence[int], keys: Tensor, *, null_space: bool
) -> dict[str, Error]:
    """The relative errors of what follows from both halves together.

    Args:
        sums: sum(k kᵀ) of the halves, two `[d_ff, d_ff]` float64.
        counts: their tokens.
        keys: `[n, d_ff]`.
        null_space: whether to compare null spaces, which takes two eigendecompositions.

    Raises:
        StatisticsError: C is singular.
    """
    columns = keys.to(
        sums[0]
    ).T  # nothing below depends on the scale of C: the sums do, without copies of them
    try:
        first, second = (_read_in(total, columns) for total in sums)
    except ValueError as error:
        raise StatisticsError(str(error)) from error
    found = {"solve": _error(_norm(first - second, sums) / _norm(first + second, sums))}
    if null_space:
        energy = sum(total.diagonal().mean().item() for total in sums) / sum(counts)
        thresholds = (energy * count for count in counts)
        first, second = (
            NullSpace(C, threshold=limit).inverse(columns) for C, limit in zip(sums, thresholds)
        )
        found["null_space"] = _error((first - second).norm(dim=0) / (first + second).norm(dim=0))
    return found


def worst(found: dict[int, dict[str, Error]], measure: str) -> float:
    """The largest median over layers; infinite when nothing was measured."""
    return max(
        (errors[measure].median for errors in found.values() if measure in errors),
        default=float("inf"),
    )


def record(tokens: int, found: dict[int, dict[str, Error]], layer: int) -> dict[str, Any]:
    """One look at one layer, for a file's header."""
    return {
        "tokens": tokens,
        **{name: [e.median, e.low, e.high] for name, e in found[layer].items()},
    }


def _read_in(C: Tensor, columns: Tensor) -> Tensor:
    solved = Covariance(C).inverse(columns)
    return solved / (columns * solved).sum(0)


def _norm(columns: Tensor, sums: Sequence[Tensor]) -> Tensor:
    return (columns * (sums[0] @ columns + sums[1] @ columns)).sum(0).clamp_min(0).sqrt()


def _error(values: Tensor) -> Error:
    low, median, high = (float(values.quantile(q)) for q in (0.25, 0.5, 0.75))
    return Error(median, low, high)
