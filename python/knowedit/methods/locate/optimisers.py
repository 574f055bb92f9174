"""Optimisers: how values are moved from one evaluation of the model to the next.

An evaluation runs the rows of all facts that have not arrived through the upper layers, forwards
and backwards, and is nearly all that a value costs; what an optimiser makes of it is cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from knowedit.io.config import Config
from knowedit.io.ranges import Count, Positive


@dataclass(frozen=True)
class Scale:
    """The sizes of a batch of values.

    Attributes:
        norm: `[groups, parts, 1]` the clean states' lengths.
        lr: `[groups, parts, 1]` a step a coordinate.
        clamp: largest `|delta| / norm`.
        stop: a loss below which a value need not move, in nats.
    """

    norm: Tensor
    lr: Tensor
    clamp: float
    stop: float


@dataclass(frozen=True)
class Seen:
    """One evaluation, differentiable.

    Attributes:
        step: its number, from 1.
        live: `[n]` the groups that were evaluated, among all.
        delta: `[n, parts, hidden]` where.
        each: `[rows, parts, hidden]` the same for every row, from `delta`.
        owner: `[rows]` each row's group, of the `n`; ascending.
        nll: `[rows]` mean NLL of each row's answer, nats a token; 0 where it has none.
        loss: `[n]` the whole objective.
    """

    step: int
    live: Tensor
    delta: Tensor
    each: Tensor
    owner: Tensor
    nll: Tensor
    loss: Tensor


class Moves(ABC):
    """An optimiser at work on one batch."""

    @abstractmethod
    def moving(self, seen: Seen) -> Tensor:
        """`[n]` bool, the groups that have not arrived."""

    @abstractmethod
    def update(self, seen: Seen) -> Tensor:
        """`[n, parts, hidden]` what is to be added to the deltas."""


class Optimiser(Config):
    """How values are moved by what an evaluation says.

    Attributes:
        keeps_best: a value is the best of those that were evaluated; else the last.
    """

    family = "optimiser"
    keeps_best: ClassVar[bool] = False

    def evaluations(self, steps: int) -> int:
        """The most evaluations that are made where `steps` are allowed."""
        return steps

    @abstractmethod
    def begin(self, scale: Scale) -> Moves:
        """Its moves for one batch."""


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam's steps along the gradient of the whole objective (ROME, MEMIT and those after them)."""

    def begin(self, scale: Scale) -> Moves:
        return _AdamMoves(scale)


class _AdamMoves(Moves):
    """By hand: torch.optim.Adam rounds otherwise in the last bit, has one step size for a whole
    tensor, and cannot leave finished groups out.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def moving(self, seen: Seen) -> Tensor:
        return seen.loss.detach() >= self.scale.stop

    def update(self, seen: Seen) -> Tensor:
        (gradient,) = torch.autograd.grad(seen.loss.sum(), seen.delta)
        if self.first is None or self.second is None:
            shape = len(self.scale.norm), *gradient.shape[1:]
            self.first, self.second = gradient.new_zeros(shape), gradient.new_zeros(shape)
        live, step = seen.live, seen.step
        self.first[live] = 0.9 * self.first[live] + 0.1 * gradient
        self.second[live] = 0.999 * self.second[live] + 0.001 * gradient**2
        return -(
            self.scale.lr[live]
            * (self.first[live] / (1 - 0.9**step))
            / ((self.second[live] / (1 - 0.999**step)).sqrt() + 1e-8)
        )


@dataclass(frozen=True)
class GaussNewton(Optimiser):
    """The shortest step that brings every row's answer to the wanted probability, to first order.

    A row's log-odds of saying its answer, `log(p / (1 - p))` with `p = exp(-NLL)`, are far closer
    to linear in the value than its NLL. Rows do not see each other, so that one backward pass
    gives each row's own slope: `J` `[rows, hidden]`. The step is `J^T (J J^T + damping)^-1 r` with
    `r` what is missing of the log-odds; rows that have enough ask for nothing. No clean step is
    longer than `radius`. The weight decay and the KL of the objective choose among the points
    (the best one is kept) and do not direct the steps, which are the shortest anyway. A step that
    has made matters worse is not taken back: on SmolLM2 that costs evaluations and saves none.

    Attributes:
        most: evaluations, the last of which only measures; `steps` may allow fewer.
        aim: the NLL, nats a token, that a row is brought to.
        enough: a fact has arrived once the NLL of each of its rows is below this.
        radius: the longest step, relative to the longest delta (`clamp`), or to the clean state
            where that has no bound.
        damping: relative to the trace of `J J^T`.
    """

    most: Count = 12
    aim: Positive = 0.004
    enough: Positive = 0.015
    radius: Positive = 0.5
    damping: Positive = 0.003

    keeps_best: ClassVar[bool] = True

    def evaluations(self, steps: int) -> int:
        return min(self.most, steps)

    def begin(self, scale: Scale) -> Moves:
        return _GaussNewtonMoves(self, scale)


class _GaussNewtonMoves(Moves):
    """In units of the clean states' lengths, so that parts of different lengths move alike."""

    def __init__(self, settings: GaussNewton, scale: Scale) -> None:
        self.settings, self.scale = settings, scale
        bound = scale.clamp if scale.clamp < float("inf") else 1.0
        self.longest = settings.radius * bound

    def moving(self, seen: Seen) -> Tensor:
        nll = seen.nll.detach()
        worst = nll.new_zeros(len(seen.live)).scatter_reduce(0, seen.owner, nll, "amax")
        return worst >= self.settings.enough

    def update(self, seen: Seen) -> Tensor:
        (slopes,) = torch.autograd.grad(seen.nll.sum(), seen.each)
        norm, nll = self.scale.norm[seen.live].double(), seen.nll.detach().double()
        # d log-odds / d NLL = -1 / (1 - p)
        slopes = -slopes.double() * norm[seen.owner] / _missing(nll)[:, None, None]
        wanted = log_odds(torch.full_like(nll, self.settings.aim))
        short = (wanted - log_odds(nll)).clamp(min=0)
        jacobian, rows = (_by_group(x, seen.owner) for x in (slopes.flatten(1), short))
        step = shortest(jacobian, rows, self.settings.damping)
        step = step * (self.longest / step.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        return (step.view_as(seen.delta) * norm).to(seen.delta.dtype)


def _missing(nll: Tensor) -> Tensor:
    """`1 - exp(-nll)`, the probability of anything else; never 0."""
    return -torch.expm1(-nll.clamp(min=1e-6))


def log_odds(nll: Tensor) -> Tensor:
    """`log(p / (1 - p))` of what has the probability `p = exp(-nll)`."""
    return -nll - _missing(nll).log()


def shortest(jacobian: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """The shortest steps `x` `[n, width]` with `jacobian x = wanted`, damped.

    Args:
        jacobian: `[n, rows, width]`; a row of zeros asks for nothing.
        wanted: `[n, rows]`.
        damping: relative to the trace of `jacobian jacobian^T`.
    """
    gram = jacobian @ jacobian.mT
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30)
    ridge = damping * trace[:, None, None] * torch.eye(gram.shape[1]).to(gram)
    return (jacobian.mT @ torch.linalg.solve(gram + ridge, wanted[..., None]))[..., 0]


def _by_group(rows: Tensor, owner: Tensor) -> Tensor:
    """`[groups, most, ..]` of rows `[rows, ..]` that are in the order of their groups; zeros where
    a group has fewer.
    """
    count = torch.bincount(owner)
    place = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    found = rows.new_zeros(len(count), int(count.max()), *rows.shape[1:])
    found[owner, place] = rows
    return found
