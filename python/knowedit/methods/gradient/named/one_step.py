"""One-Step (our own): one curvature-scaled step at the tokens that answer, written through MEMIT's
solve with the key statistics.

UltraEdit's idea, one forward and backward pass and no search, with two things of this package. What
a late layer's MLP adds at the token after which a token of the answer is scored acts nearly
linearly on that token's log-odds, `log(p / (1 - p))`, so that one Gauss-Newton step says how far to
go, with `g` the gradient of the NLL by that output:

    v = -g (1 - p) (wanted log-odds - log-odds) / |g|^2.

The steps are written at the layer's keys under the second moment `C` of ordinary text's keys, and
the keys of earlier edits, instead of the identity: `Delta = V K^T (lambda C + K K^T)^-1`.

It is not the subject's token: a value there must be taken up by the attention of later layers, and
one step of it leaves most facts unsaid, whatever the layer and its length (docs/gradient.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from knowedit.edits.changes import changes_of, relative_norms
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.ranges import Positive, Share, Whole
from knowedit.methods.base import Method
from knowedit.methods.locate.optimisers import log_odds
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.partial import probed
from knowedit.models.texts import AnswerLoss, Texts
from knowedit.statistics import KeyStatistics
from knowedit_kernels import EditSolver, weight_for_gain

FACTS_AT_ONCE = 64  # in a backward pass


@dataclass(frozen=True)
class OneStep(Method):
    """One layer, one pass: many prompts answered as they stand, in little time; other wordings and
    neighbours are nobody's care.

    Attributes:
        layer: whose MLP output projection is changed; None: after nine tenths of the layers.
        aim: the NLL, nats, that every token of an answer is brought to, to first order.
        radius: the longest step, relative to the state that enters the layer.
        gain: the weight of the covariance is set so that a key alone would realise this share of
            its step.
        weight: that weight itself; wins over `gain`.
    """

    layer: Whole | None = None
    aim: Positive = 0.004
    radius: Positive = 1.0
    gain: Share = 0.9
    weight: Positive | None = None

    name: ClassVar[str] = "One-Step"
    needs_statistics: ClassVar[bool] = True

    @accepts_model
    def statistics_layers(self, model: EditableModel) -> tuple[int, ...]:
        """The layer that it edits.

        Raises:
            EditError: the first one, or one with routed experts. ModelError: it is not there.
        """
        layer = max(1, 9 * len(model.layers) // 10) if self.layer is None else self.layer
        model.check_layers([layer])
        if layer == 0:
            raise EditError("the first layer cannot be changed by one step; choose a later one")
        if model.layout.experts(layer) is not None:
            raise EditError(f"layer {layer} has routed experts, which One-Step does not write")
        return (layer,)

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        begun, (layer,) = time.perf_counter(), self.statistics_layers(model)
        if statistics is None:
            raise EditError(
                f"One-Step needs key statistics of layer {layer}: pass key_statistics(model, ...)"
            )
        statistics.check(model, [layer])
        keys, gradients, nll, lengths = at_answers(model, facts, layer)
        steps = curvature_scaled(gradients, nll, self.aim, self.radius * lengths)
        metric = statistics.metric(layer)
        weight = self.weight or weight_for_gain(metric, keys.T, self.gain)
        metric = metric.with_weight(weight)
        solver = EditSolver(history.extend(metric, layer) if history else metric, keys.T)
        left, right = solver.apply(steps.T, torch.float32)
        factors = {layer: (left.contiguous(), right.T.contiguous())}
        norms = relative_norms(model, factors)
        report = EditReport(
            relative_norm={str(layer): norms[layer]},
            layers={str(layer): {"lambda": weight, "gain": float(solver.gain.mean())}},
            steps=1,
            seconds=time.perf_counter() - begun,
            details={"settings": self.to_dict()},
        )
        changes = changes_of(model, factors)
        held = {layer: keys.float()}
        return Edit(self.name, changes, facts, model.fingerprint, report, keys=held)


def at_answers(
    model: EditableModel, facts: Sequence[Fact], layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every token after which a token of an answer is scored, fact by fact, float64: the layer's
    key `[n, d_ff]`; the gradient `[n, hidden]`, by the MLP's output there, of the NLL of the fact's
    answer from that token on; the NLL `[n]` of the very next one, in nats; and the length `[n]` of
    the state that enters the layer.
    """
    rows = [model.row(fact.text, answer=fact.new_answer) for fact in facts]
    texts = Texts(model, rows, layer, clean=False)
    name = model.layout.weight_name(layer).removesuffix(".weight")
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, len(rows), FACTS_AT_ONCE):
        batch = texts.batch(range(start, min(start + FACTS_AT_ONCE, len(rows))))
        at = batch.places.line, batch.places.place
        with model.evaluating(), torch.enable_grad(), probed(model, [name]) as seen:
            nll = AnswerLoss(batch.places)(texts.logits(batch))
            (gradient,) = torch.autograd.grad(nll.sum(), [seen[name][1]])
        lengths = batch.states[at].double().norm(dim=1)
        found.append((seen[name][0][at], gradient[at], nll.detach(), lengths))
    keys, gradients, nlls, lengths = (torch.cat(column).double() for column in zip(*found))
    return keys, gradients, nlls, lengths


def curvature_scaled(gradients: Tensor, nll: Tensor, aim: float, longest: Tensor) -> Tensor:
    """`[n, hidden]` the shortest steps that bring each token's log-odds to those of the NLL `aim`,
    to first order; none for a token that has them, and none longer than `longest` `[n]`.

    Args:
        gradients: `[n, hidden]` of the NLL; nll: `[n]` nats.
    """
    slopes = gradients / torch.expm1(-nll.clamp(min=1e-6))[:, None]  # d log-odds / d NLL
    short = (log_odds(torch.full_like(nll, aim)) - log_odds(nll)).clamp(min=0)
    steps = slopes * (short / slopes.square().sum(1).clamp(min=1e-30))[:, None]
    return steps * (longest / steps.norm(dim=1).clamp(min=1e-30)).clamp(max=1)[:, None]
