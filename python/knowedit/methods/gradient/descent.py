"""The training loop of the gradient methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.io.progress import bar
from knowedit.methods.gradient.terms import Found, Term
from knowedit.methods.gradient.trainable import Trainable

if TYPE_CHECKING:
    from knowedit.methods.gradient.recipe import GradientEditor


def descend(
    editor: GradientEditor, part: Trainable, terms: Mapping[str, Term], progress: bool = True
) -> int:
    """Train the leaves of `part` in place on the terms, of which "answers" are the facts; returns
    the steps taken.

    Raises:
        EditError: a loss is not finite.
    """
    optimiser = torch.optim.AdamW(
        list(part.leaves.values()), lr=editor.lr, weight_decay=editor.decay
    )
    resting = torch.zeros(
        len(terms["answers"].rows), dtype=torch.bool
    )  # facts, when they were last drawn
    with bar(f"{editor.name}: training", editor.steps, "steps", show=progress) as advance:
        for step in range(editor.steps):
            optimiser.zero_grad()
            for name, term in terms.items():
                texts = term.drawn(step, editor.seed)
                for found in term.evaluate(part, texts):
                    loss = found.loss
                    if not bool(loss.isfinite().all()):
                        raise EditError(
                            f"{editor.name}: the loss of the {name} is {float(loss.sum())} at "
                            f"step {step} of {editor.steps}; "
                            f"nothing was changed: lower lr (now {editor.lr})"
                        )
                    if name == "answers":
                        rest = _rest(editor, found)
                        resting[found.texts] = rest.cpu()
                        loss = loss[~rest]
                    if len(loss):
                        (term.weight / len(texts) * loss.sum()).backward()
            if len(terms) == 1 and bool(resting.all()):
                return step
            optimiser.step()
            part.constrain_()
            advance(1, note=f"{int(resting.sum())} of {len(resting)} facts learned")
    return editor.steps


def _rest(editor: GradientEditor, found: Found) -> Tensor:
    """Which answers are good enough; none without a criterion."""
    fine = torch.full_like(
        found.lead, editor.stop is not None or editor.margin is not None, dtype=torch.bool
    )
    if editor.stop is not None:
        fine &= found.loss.detach() < editor.stop
    return fine if editor.margin is None else fine & (found.lead >= editor.margin)


@torch.no_grad()
def measured(part: Trainable, term: Term) -> tuple[float, float]:
    """Mean loss over all texts of a term, and the smallest lead."""
    found = list(term.evaluate(part, range(len(term.rows))))
    return float(torch.cat([f.loss for f in found]).mean()), float(
        torch.cat([f.lead for f in found]).min()
    )
