"""Metrics: what a write must leave alone, and how much of a planned change it realises.

`Delta = R A` with `A = (K^T M^-1 K + 1)^-1 K^T M^-1` for a soft constraint under the metric `M`, or
`A = (K^T M^-1 K)^-1 K^T M^-1` for an exact one (`knowedit_kernels.EditSolver`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from knowedit.edits.history import History
from knowedit.errors import EditError
from knowedit.io.config import Config
from knowedit.io.ranges import Count, NotNegative, Positive, Whole
from knowedit.methods.locate.entities import entity_moments
from knowedit.methods.locate.gradients import gradient_moments
from knowedit.methods.locate.task import Task
from knowedit.methods.neurons.texts import windows
from knowedit.statistics import KeyStatistics
from knowedit.statistics.corpus.corpus import CorpusLike
from knowedit_kernels import EditSolver, solver, weight_for_gain
from knowedit_kernels.solver.edit_solver import Constraint

M = TypeVar("M", bound="Metric")


class Metric(Config):
    """What to preserve at a layer.

    Attributes:
        constraint: "soft" trades the change for the preservation, "equality" realises all of it.
    """

    family = "metric"
    constraint: ClassVar[Constraint] = "soft"

    @property
    def needs_statistics(self) -> bool:
        """Whether it is made of key statistics."""
        return True

    @property
    def steady(self) -> bool:
        """Whether it stays the same while a history grows, beside the history's own keys."""
        return True

    @property
    def joins(self) -> bool:
        """Whether it can be that of routed experts and of a shared one as one projection."""
        return False

    def prepared(self: M, task: Task) -> M:
        """The metric for one task, with what it must compute from the model first."""
        return self

    def with_gain(self: M, gain: float) -> M:
        """The same metric for another gain, where it has one."""
        return self

    def as_chosen(self: M, chosen: Mapping[str, Any]) -> M:
        """The same metric with what an earlier edit's report says was chosen at a layer."""
        return self

    def writable(self, layer: int) -> Tensor | None:
        """The orthogonal projection `[hidden, hidden]` on the outputs that an edit of `layer` may
        move; None: all of them.
        """
        return None

    @abstractmethod
    def at(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[solver.Metric, dict[str, Any]]:
        """The matrix at `layer`, weighed for `keys` `[d_ff, n]`; and what was chosen, for the
        report.
        """

    def solver(
        self, statistics: KeyStatistics, layer: int, keys: Tensor, history: History | None = None
    ) -> tuple[EditSolver, dict[str, Any]]:
        """The solver for `keys` `[d_ff, n]` under this metric and the history; and what was
        chosen for it.
        """
        metric, chosen = self.at(statistics, layer, keys)
        return EditSolver(
            history.extend(metric, layer) if history else metric, keys, self.constraint
        ), chosen


@dataclass(frozen=True)
class Weighed(Metric, abstract=True):
    """A soft metric whose weight follows from a gain.

    Attributes:
        gain: the weight is set so that an edit alone would realise this share of its planned
            change.
        weight: the weight itself; wins over `gain`.
        symbol: what reports call it.
    """

    gain: float = 0.9
    weight: Positive | None = None

    symbol: ClassVar[str] = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gain < 1:
            raise EditError(
                f"{self.kind}.gain must lie between 0 and 1, got {self.gain}; the metric 'exact' "
                "(ROME, EMMET) writes all of a change"
            )

    def with_gain(self: M, gain: float) -> M:
        return replace(self, gain=gain)  # type: ignore[type-var]

    def as_chosen(self: M, chosen: Mapping[str, Any]) -> M:
        return replace(self, weight=chosen[self.symbol])  # type: ignore[type-var, attr-defined]

    def weigh(self, metric: solver.Metric, keys: Tensor) -> float:
        """The weight for `keys` `[d_ff, n]`."""
        return self.weight if self.weight is not None else weight_for_gain(metric, keys, self.gain)


@dataclass(frozen=True)
class Covariance(Weighed):
    """The keys' second moment C over ordinary text (MEMIT, Meng et al. 2023, eq. 14):
    `Delta = R K^T (lambda C + K K^T)^-1`; `weight` is lambda, `mom2_update_weight` of the published
    code.
    """

    symbol: ClassVar[str] = "lambda"

    @property
    def joins(self) -> bool:
        return True

    def at(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[solver.Metric, dict[str, Any]]:
        metric = statistics.metric(layer)
        weight = self.weigh(metric, keys)
        return metric.with_weight(weight), {self.symbol: weight}


@dataclass(frozen=True)
class Exact(Metric):
    """The covariance under an equality constraint, `Delta K = R` (ROME, Meng et al. 2022, eq. 2;
    EMMET, Gupta et al. 2024).

    Attributes:
        ridge: added to the diagonal of `K^T C^-1 K`, which keys that depend on each other make
            singular (0.1 in EMMET's published code). With a ridge the constraint is soft: it is
            the covariance with weight = ridge.
    """

    ridge: NotNegative = 0.0

    constraint: ClassVar[Constraint] = "equality"

    @property
    def joins(self) -> bool:
        return True

    def at(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[solver.Metric, dict[str, Any]]:
        return statistics.metric(layer), {}

    def solver(
        self, statistics: KeyStatistics, layer: int, keys: Tensor, history: History | None = None
    ) -> tuple[EditSolver, dict[str, Any]]:
        if self.ridge:
            return Covariance(weight=self.ridge).solver(statistics, layer, keys, history)
        try:
            return super().solver(statistics, layer, keys, history)
        except ValueError as error:
            raise EditError(
                f"the exact metric at layer {layer}: {error}; here: merge_subjects=True, or "
                "metric.ridge=0.1"
            ) from error


@dataclass(frozen=True)
class NullSpace(Weighed):
    """The null space of the covariance (AlphaEdit, Fang et al. 2025), beside the keys of earlier
    edits: `Delta = R K^T P (Kp Kp^T P + K K^T P + beta I)^-1`; `weight` is beta, `L2` of the
    published code.

    The published threshold calls every eigenvalue below 0.02 zero, whatever the scale of the keys;
    here it is relative to the mean eigenvalue.

    With BetaEdit's options (Liu et al. 2026) it is
    `Delta = R K^T P (Kp Kp^T P + K K^T P + lambda1 C P + beta I)^-1`: what leaks through a null
    space that is only nearly one has a price, and `P` follows the history.

    Attributes:
        relative: eigenvalues of C below this multiple of their mean count as zero.
        threshold: the same as an absolute number (published: 0.02); wins over `relative`.
        leak: price of C within the null space: `lambda1 = beta * leak / mean eigenvalue of C`.
        refresh: the null space is that of C and of the history's keys together, each of the same
            trace, as they are at every write (published: every 1,000 facts, weighed by their
            number).
    """

    relative: Positive = 1.0
    threshold: NotNegative | None = None
    leak: NotNegative = 0.0
    refresh: bool = False

    symbol: ClassVar[str] = "beta"

    @property
    def steady(self) -> bool:
        return not self.refresh

    def at(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[solver.Metric, dict[str, Any]]:
        return self._at(statistics, layer, keys, None)

    def _at(
        self, statistics: KeyStatistics, layer: int, keys: Tensor, history: History | None
    ) -> tuple[solver.Metric, dict[str, Any]]:
        mean = statistics[layer].energy / len(keys)
        threshold = self.threshold if self.threshold is not None else self.relative * mean
        known = history.keys(layer) if self.refresh and history else None
        space: solver.NullSpace | solver.BlockMetric
        if known is None:
            space = statistics.null_space(layer, self.threshold, self.relative)
        try:
            if known is not None:
                space = self._refreshed(statistics.moment(layer), known, threshold)
            metric = self._leaking(statistics.moment(layer), space, mean) if self.leak else space
            weight = self.weigh(metric, keys)
        except ValueError as error:
            raise EditError(
                f"the null space at layer {layer}: {error}; raise metric.threshold"
            ) from error
        return metric.with_weight(weight), {
            self.symbol: weight,
            "threshold": threshold,
            "null_directions": space.rank
            if isinstance(space, solver.NullSpace)
            else sum(block.rank for block in space.metrics.values()),  # type: ignore[attr-defined]
            **({"lambda1": weight * self.leak / mean} if self.leak else {}),
        }

    def _refreshed(self, moment: Tensor, known: Tensor, threshold: float) -> solver.NullSpace:
        """The null space of C and of the keys `[d_ff, n]` of the history."""
        if moment.dim() != 2:
            raise EditError("null-space.refresh works on dense layers only; leave it out")
        keys = known.to(moment)
        scale = moment.diagonal().sum() / keys.square().sum()
        return solver.NullSpace((moment + scale * (keys @ keys.T)) / 2, threshold=threshold)

    def _leaking(
        self, moment: Tensor, space: solver.NullSpace | solver.BlockMetric, mean: float
    ) -> solver.ScaledMetric:
        """The null space with a price on C within it."""
        leak = self.leak / mean
        if isinstance(space, solver.NullSpace):
            return solver.LeakyNullSpace(moment, space, leak)
        blocks = {
            expert: solver.LeakyNullSpace(moment[expert], block, leak)
            for expert, block in space.metrics.items()
            if isinstance(block, solver.NullSpace)
        }
        return solver.BlockMetric(blocks)

    def solver(
        self, statistics: KeyStatistics, layer: int, keys: Tensor, history: History | None = None
    ) -> tuple[EditSolver, dict[str, Any]]:
        metric, chosen = self._at(statistics, layer, keys, history)
        return EditSolver(history.extend(metric, layer) if history else metric, keys), chosen


@dataclass(frozen=True)
class LowCurvature(NullSpace):
    """The null space of the keys, and that of the outputs too: the directions of low curvature of
    the loss on ordinary text (our implementation of CrispEdit's idea, USC 2026).

    With the moments `C = E[k k^T]` of a layer's keys and `G = E[g g^T]` of the loss' gradients at
    its output, the curvature of that loss in the layer's weight is about `G x C` (Martens and
    Grosse 2015): along `u v^T`, for eigenvectors `u` of G and `v` of C, the product of their
    eigenvalues. An update is kept to the span of those `u v^T` both of whose eigenvalues are low,

        Delta = Pg R K^T P (Kp Kp^T P + K K^T P + beta I)^-1,

    where the published mask also keeps a pair of which one is high and the product low; a span of
    this form leaves an edit at the rank of its facts.

    Attributes:
        curved: eigenvalues of G from this multiple of their mean on are not to be written.
        corpus, tokens: the ordinary text at which the loss is taken, and how much of it.
        gradients: `{layer: G [hidden, hidden]}` float64; None: of the model as it is.
    """

    curved: Positive = 1.0
    corpus: CorpusLike = "self"
    tokens: Count = 4096
    gradients: Mapping[int, Tensor] | None = field(default=None, repr=False)

    def prepared(self, task: Task) -> LowCurvature:
        if self.gradients is not None:
            return self
        model, seed = task.model, task.material.seed
        texts = windows(model, self.corpus, self.tokens, seed=seed, progress=task.progress)
        moments = gradient_moments(model, task.layers, texts, budget=task.runtime.budget)
        return replace(self, gradients=moments)

    def writable(self, layer: int) -> Tensor | None:
        if self.gradients is None:
            return None
        values, vectors = torch.linalg.eigh(self.gradients[layer])
        low = vectors[:, values < self.curved * values.mean()]
        return low @ low.T


@dataclass(frozen=True)
class Blend(Weighed):
    """Covariance + moment of other entities + identity, each of unit trace (RoSE).

    Attributes:
        shares: of the three. (1, 0, 0) is MEMIT's metric, (0, 0, 1) the pure identity (isotropic
            geometric alignment), (1 - g, 0, g) their interpolation.
        entities: `{layer: [d_ff, d_ff]}` the entities' moments (of routed experts `[E, d, d]`);
            None: of the shipped entities.
        pools: so many neighbour prompts a fact are left to the training and are not in the metric.
    """

    gain: float = 0.88
    shares: tuple[NotNegative, NotNegative, NotNegative] = (0.16, 0.45, 0.39)
    entities: Mapping[int, Tensor] | None = field(default=None, repr=False)
    pools: Whole = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.shares):
            raise EditError(f"blend.shares must not be all zero, got {self.shares}")

    @property
    def needs_statistics(self) -> bool:
        """The pure identity needs none."""
        return bool(self.shares[0])

    def prepared(self, task: Task) -> Blend:
        if not self.shares[1] or self.entities is not None:
            return self
        used = [text for texts in task.neighbour_prompts(self.pools) for text in texts]
        tested = [p.prompt for fact in task.facts for p in (*fact.neighbours, *fact.portability)]
        leave_out = "\n".join([fact.subject for fact in task.facts] + used + tested)
        material = task.material
        moments = entity_moments(
            task.model, task.layers, leave_out, material.neighbours, seed=material.seed
        )
        return replace(self, entities=moments)

    def at(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[solver.Metric, dict[str, Any]]:
        covariance, entities, identity = self.shares
        terms = [(covariance, statistics.moment(layer))] if covariance else []
        terms += [(entities, self.entities[layer])] if entities and self.entities else []
        traces = [float(part.diagonal(dim1=-2, dim2=-1).sum()) for _, part in terms]
        scaled = [(share / trace, part) for (share, part), trace in zip(terms, traces)]
        isotropic = identity / len(keys)
        if not scaled:
            metric: solver.Metric = solver.Identity(len(keys))
        elif scaled[0][1].dim() == 2:
            metric = solver.combined(scaled, isotropic)
        else:  # of every expert
            blocks = [
                solver.combined([(share, part[expert]) for share, part in scaled], isotropic)
                for expert in range(len(scaled[0][1]))
            ]
            metric = solver.BlockMetric(dict(enumerate(blocks)))
        weight = self.weigh(metric, keys)
        return metric.with_weight(weight), {self.symbol: weight}
