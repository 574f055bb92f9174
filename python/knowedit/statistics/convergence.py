"""Are these enough tokens? What an edit is made of, computed from two halves of them.

Windows go alternately into two halves A and B, which are two independent estimates of C. Half of
the difference between what follows from A and what follows from B is one standard error of what
follows from both together, because the sum of two estimates has half the variance of one. Measured
are the two things that methods take from C, at real keys k (those of the package's own facts at
their subjects' last tokens):

    solve       the read-in a = C^-1 k / (k' C^-1 k), which ROME writes with and MEMIT's tends to:
                the relative error of a in the norm a' C a, the mean square of what the edit adds to
                ordinary tokens. sqrt(d_ff / tokens) for independent Gaussian keys; twice that on
                SmolLM2, whose keys are neither.
    null_space  the projection P k onto eigenvectors of C below the mean eigenvalue, which AlphaEdit
                writes with: the relative error of P k in length.

Each is the median over the keys, with quartiles. `ConvergenceChecks` says after which windows they
are estimated, and spreads the layers over the ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knowedit.errors import EditError, StatisticsError
from knowedit.facts.sets import load
from knowedit.io.ranks import Ranks
from knowedit.models.editable import EditableModel
from knowedit.models.experts import Experts
from knowedit.statistics.distributed.checkpoints import CollectionState
from knowedit.statistics.files.store import CollectionRecipe
from knowedit.statistics.memory import spare
from knowedit.statistics.sums import Sums
from knowedit.statistics.throughput import Meter
from knowedit_kernels import Covariance, NullSpace

logger = logging.getLogger(__name__)

PROBES = 48  # keys that are solved for
MIN_TOKENS = 2  # of a half, for each of C's rows: below, its inverse says little
GROWTH = 1.4  # tokens from one check to the next while waiting for convergence
#: What must have converged for each `until`.
MEASURES = {"tokens": (), "solve": ("solve",), "converged": ("solve", "null_space")}


@dataclass(frozen=True)
class ErrorEstimate:
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
    rows = []
    for fact in load("embedded"):
        try:
            row = model.row(fact.prompt, fact.subject)
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


def enough_tokens(counts: Sequence[int], size: int) -> bool:
    """Whether both halves are large enough to be compared."""
    return min(counts) >= MIN_TOKENS * size


def compare_halves(
    sums: Sequence[Tensor], counts: Sequence[int], keys: Tensor, *, null_space: bool
) -> dict[str, ErrorEstimate]:
    """The relative errors of what follows from both halves together.

    Args:
        sums: sum(k kᵀ) of the halves, two `[d_ff, d_ff]` float64.
        counts: their tokens.
        keys: `[n, d_ff]`.
        null_space: whether to compare null spaces, which takes two eigendecompositions.

    Raises:
        StatisticsError: C is singular.
    """
    # nothing below depends on the scale of C: the sums serve as they are, without copies of them
    columns = keys.to(sums[0]).T
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


def _compare(
    experts: Experts | None,
    sums: Sequence[Tensor],
    counts: Sequence[int],
    keys: Tensor,
    null_space: bool,
) -> dict[str, ErrorEstimate]:
    """`compare_halves`; where a layer has routed experts, the worst of those that some key is
    given to.

    Raises:
        StatisticsError: C is singular, for one expert that was given too few tokens it may be.
    """
    if experts is None:
        return compare_halves(sums, counts, keys, null_space=null_space)
    found: list[dict[str, ErrorEstimate]] = []
    for expert, own in enumerate(experts.by_expert(keys).unbind(1)):
        reached = own[own.any(1)]
        if len(reached):
            halves = [total[expert] for total in sums]
            found.append(compare_halves(halves, counts, reached, null_space=null_space))
    return {name: max((e[name] for e in found), key=lambda e: e.median) for name in found[0]}


def worst(found: dict[int, dict[str, ErrorEstimate]], measure: str) -> float:
    """The largest median over layers; infinite when nothing was measured."""
    return max(
        (errors[measure].median for errors in found.values() if measure in errors),
        default=float("inf"),
    )


def record(tokens: int, found: dict[int, dict[str, ErrorEstimate]], layer: int) -> dict[str, Any]:
    """One check of one layer, for a file's header."""
    return {
        "tokens": tokens,
        **{name: [e.median, e.low, e.high] for name, e in found[layer].items()},
    }


def _read_in(C: Tensor, columns: Tensor) -> Tensor:
    solved = Covariance(C).inverse(columns)
    return solved / (columns * solved).sum(0)


def _norm(columns: Tensor, sums: Sequence[Tensor]) -> Tensor:
    return (columns * (sums[0] @ columns + sums[1] @ columns)).sum(0).clamp_min(0).sqrt()


def _error(values: Tensor) -> ErrorEstimate:
    low, median, high = (float(values.quantile(q)) for q in (0.25, 0.5, 0.75))
    return ErrorEstimate(median, low, high)


class ConvergenceChecks:
    """Estimates of how well the two halves of some sums have converged, spread over the ranks."""

    def __init__(self, sums: Sums, recipe: CollectionRecipe, ranks: Ranks) -> None:
        self.sums, self.recipe, self.ranks = sums, recipe, ranks
        self._probes: dict[int, Tensor] = {}

    def schedule(self, until: int) -> list[int]:
        """The numbers of windows after which to check, up to the first beyond `until`; rarely when
        the collection does not stop by them.
        """
        often = self.recipe.until != "tokens"
        numbers = [2 if often else 8]
        while (last := numbers[-1]) <= until:
            numbers.append(max(last + 1, int(last * GROWTH)) if often else 4 * last)
        return numbers

    def next_after(self, windows: int) -> int:
        """The first number of windows after `windows` at which to check."""
        return self.schedule(windows)[-1]

    def is_due(self, state: CollectionState) -> bool:
        """Whether to check now; when the collection does not stop by it only during the first half,
        for there is one more check at the end.
        """
        early = self.recipe.until != "tokens" or 2 * state.count <= self.recipe.tokens
        return early and state.windows in self.schedule(state.windows)

    def check_at_end(self, state: CollectionState, meter: Meter) -> None:
        """Check, unless the last check was of all tokens that are here."""
        checks = next(iter(state.checks.values()), [])
        if not checks or checks[-1]["tokens"] != state.count:
            self.check(state, meter)

    def check(self, state: CollectionState, meter: Meter) -> None:
        """Estimate the error of each layer, where there are enough tokens and memory, and record it
        in `state`, which may be converged then.
        """
        model, layers, recipe = self.sums.model, self.sums.layers, self.recipe
        if not enough_tokens(state.counts, max(map(model.layout.tokens_a_rank, layers))):
            return
        if not all(self.ranks.gather(self._has_room())):
            logger.warning(
                "no estimate after %d tokens: too little memory for it beside the sums", state.count
            )
            return
        self._probes = self._probes or probe_keys(model, layers)
        own: dict[int, dict[str, ErrorEstimate]] = {}
        size = self.ranks.size
        for start in range(0, len(layers), size):  # a layer for each rank, then all of them compute
            added = self._added(layers[start : start + size], state.windows // size)
            for layer, sums in added.items():
                null_space = recipe.until == "converged"
                try:
                    own[layer] = _compare(
                        model.layout.experts(layer),
                        sums,
                        state.counts,
                        self._probes[layer],
                        null_space,
                    )
                except StatisticsError as error:
                    logger.info("layer %d: no estimate yet: %s", layer, error)
        found = {layer: errors for part in self.ranks.gather(own) for layer, errors in part.items()}
        for layer in found:
            state.checks.setdefault(str(layer), []).append(record(state.count, found, layer))
        if recipe.tolerance is not None and len(found) == len(layers):
            state.converged = all(
                worst(found, measure) <= recipe.tolerance for measure in MEASURES[recipe.until]
            )
        shown = MEASURES[recipe.until] or ("solve",)
        meter.on_check({measure: worst(found, measure) for measure in shown} if found else {})

    def _added(self, layers: Sequence[int], turn: int) -> dict[int, list[Tensor]]:
        """The halves of one of the layers, added up over all ranks; each rank has another layer, or
        none. `turn` changes who begins, for where there are fewer layers than ranks.
        """
        own: dict[int, list[Tensor]] = {}
        for number, layer in enumerate(layers, turn):
            owner = number % self.ranks.size
            sums = [self.ranks.add(self.sums.moment(half, layer).sum(), owner) for half in (0, 1)]
            if owner == self.ranks.rank:
                own[layer] = sums
        return own

    def _has_room(self) -> bool:
        """Whether this rank can estimate: both halves' sums, and the factor and workspace of one of
        them.
        """
        model = self.sums.model
        free = min(spare(model.weight(layer).device) for layer in self.sums.layers)
        return free > 6 * 8 * max(map(model.layout.moment_size, self.sums.layers))
