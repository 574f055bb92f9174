"""Scores that tell each group's inputs from all others: what a switch goes by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit_kernels import second_moment_

#: Groups that are looked at together: what is kept of each grows with the others' inputs.
TOGETHER = 64
#: The search starts on every eighth input of the other sets, where a step costs an eighth.
START = 8
#: It ends when a step takes less than this part of a group's loss away, or after so many steps.
ENOUGH, STEPS = 1e-5, 50


def separate(own: Tensor, owner: Tensor, others: Sequence[Tensor], ridge: float) -> Tensor:
    """One direction a group, `w.x >= 1` at its own inputs and `<= -1` at all others, by least
    squared hinge losses: what a linear support vector machine minimises. The loss is quadratic
    where the same inputs are inside the margin, so Newton's method ends at its least value after
    some ten steps (Mangasarian 2002, "A finite Newton method for classification").

    Args:
        own: `[n, hidden]` float32; owner: `[n]` the group of each. Another group's inputs count as
            others.
        others: `[m, hidden]` each; every set counts as much as a group's own.
        ridge: weight of `|w|^2`, in units of the others' mean square.

    Returns:
        `[groups, hidden]` float32.

    Raises:
        EditError: the others' mean square is 0 or not finite.
    """
    scale = float(torch.cat(list(others)).square().sum(1).mean())
    if not 0 < scale < math.inf:
        raise EditError(
            f"others (the layer's inputs in other texts) have a mean square of {scale}: all zeros, "
            "or not finite; check the model's weights, or edit another layer"
        )
    found = []
    for groups in torch.arange(int(owner.max()) + 1, device=owner.device).split(TOGETHER):
        best = own.new_zeros(len(groups), own.shape[1])
        for part in (START, 1):
            thinned = [x[::part] for x in others]
            best = _Hinges.of(own, owner, groups, thinned, ridge * scale).least(best)
        found.append(best)
    return torch.cat(found)


@dataclass(frozen=True)
class _Hinges:
    """The losses `sum_i weight_i max(0, 1 - sign_i w.x_i)^2 + ridge |w|^2`, one a group.

    Attributes:
        inputs: `[n, hidden]`. signs: `[n, groups]` 1 for a group's own, -1 for others. weights:
            `[n, groups]`.
    """

    inputs: Tensor
    signs: Tensor
    weights: Tensor
    ridge: float

    @classmethod
    def of(
        cls, own: Tensor, owner: Tensor, groups: Tensor, others: Sequence[Tensor], ridge: float
    ) -> _Hinges:
        mine = (owner[:, None] == groups).to(own)
        theirs = 1 - mine
        weights = [mine / mine.sum(0) + theirs / theirs.sum(0).clamp(min=1)]
        weights += [x.new_full((len(x), len(groups)), 1 / len(x)) for x in others]
        signs = [mine - theirs] + [x.new_full((len(x), len(groups)), -1.0) for x in others]
        return cls(torch.cat([own, *others]), torch.cat(signs), torch.cat(weights), ridge)

    def least(self, start: Tensor) -> Tensor:
        """`[groups, hidden]` where each group's loss is least, found from `start`."""
        w, margins = start, self._margins(start)
        loss = self._losses(margins, w)
        live = loss.nonzero()[:, 0].tolist()
        for _ in range(STEPS):
            step = torch.zeros_like(w)
            for group in live:
                step[group] = self._newton(w[group], margins[:, group], group)
            along = self._margins(step)
            best, taken = loss, torch.zeros_like(loss)
            for part in (1.0, 0.5, 0.25, 0.125, 0.03, 0.01):
                there = self._losses(margins + part * along, w + part * step)
                taken = torch.where(there < best, part, taken)
                best = torch.minimum(there, best)
            w, margins = w + taken[:, None] * step, margins + taken * along
            live = [i for i in live if loss[i] - best[i] > ENOUGH * loss[i] and best[i] > 0]
            loss = best
            if not live:
                break
        return w

    def _margins(self, w: Tensor) -> Tensor:
        """`[n, groups]` sign w.x."""
        return self.inputs @ w.T * self.signs

    def _losses(self, margins: Tensor, w: Tensor) -> Tensor:
        """`[groups]`."""
        missed = (1 - margins).clamp(min=0).square() * self.weights
        return missed.sum(0) + self.ridge * w.square().sum(1)

    def _newton(self, w: Tensor, margins: Tensor, group: int) -> Tensor:
        """`[hidden]` from w to where the loss would be least if no input crossed the margin."""
        inside = (margins < 1).nonzero()[:, 0]
        weights = self.weights[inside, group]
        x = self.inputs[inside]
        curvature = torch.zeros(len(w), len(w), dtype=torch.float64, device=w.device)
        second_moment_(curvature, x * weights.sqrt()[:, None])
        pull = x.T @ (weights * self.signs[inside, group] * (1 - margins[inside]))
        # What float32 inputs cannot tell from 0 is kept from making the curvature singular.
        steady = self.ridge + 1e-7 * float(curvature.trace())
        curvature.diagonal().add_(steady)
        downhill = pull.double() - self.ridge * w.double()
        return torch.cholesky_solve(downhill[:, None], torch.linalg.cholesky(curvature))[:, 0].to(w)
