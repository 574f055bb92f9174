"""The training loop of the gradient methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.io.progress import bar
from knowedit.methods.gradient.terms import LossTerm, TextLosses
from knowedit.methods.gradient.trainable import Trainable

if TYPE_CHECKING:
    from knowedit.methods.gradient.method import GradientMethod


def descend(
    method: GradientMethod, part: Trainable, terms: Mapping[str, LossTerm], progress: bool = True
) -> int:
    """Train the leaves of `part` in place on the terms, of which "answers" are the facts; returns
    the steps taken.

    Raises:
        EditError: a loss is not finite.
    """
    optimiser = torch.optim.AdamW(
        list(part.leaves.values()), lr=method.lr, weight_decay=method.decay
    )
    # facts that were learned when they were last drawn
    learned = torch.zeros(len(terms["answers"].rows), dtype=torch.bool)
    with bar(f"{method.name}: training", method.steps, "steps", show=progress) as advance:
        for step in range(method.steps):
            optimiser.zero_grad()
            for name, term in terms.items():
                texts = term.drawn(step, method.seed)
                for found in term.evaluate(part, texts):
                    loss = found.loss
                    if not bool(loss.isfinite().all()):
                        raise EditError(
                            f"{method.name}: the loss of the {name} is {float(loss.sum())} at "
                            f"step {step} of {method.steps}; "
                            f"nothing was changed: lower lr (now {method.lr})"
                        )
                    if name == "answers":
                        enough = _learned(method, found)
                        learned[found.texts] = enough.cpu()
                        loss = loss[~enough]
                    if len(loss):
                        (term.weight / len(texts) * loss.sum()).backward()
            if len(terms) == 1 and bool(learned.all()):
                return step
            optimiser.step()
            part.constrain_()
            advance(1, note=f"{int(learned.sum())} of {len(learned)} facts learned")
    return method.steps


def _learned(method: GradientMethod, found: TextLosses) -> Tensor:
    """Which answers are good enough; none without a criterion."""
    fine = torch.full_like(
        found.lead, method.stop is not None or method.margin is not None, dtype=torch.bool
    )
    if method.stop is not None:
        fine &= found.loss.detach() < method.stop
    return fine if method.margin is None else fine & (found.lead >= method.margin)


@torch.no_grad()
def measured(part: Trainable, term: LossTerm) -> tuple[float, float]:
    """Mean loss over all texts of a term, and the smallest lead."""
    found = list(term.evaluate(part, range(len(term.rows))))
    return float(torch.cat([f.loss for f in found]).mean()), float(
        torch.cat([f.lead for f in found]).min()
    )
