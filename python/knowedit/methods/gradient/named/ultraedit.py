"""UltraEdit (Gu et al. 2025): one forward and backward pass, a running normalisation, one ridge
solve.

Our implementation of the idea: no optimisation, no subject, no covariance. At the tokens after
which an answer is scored, a linear module has inputs `x` and the loss has gradients `y` with
respect to its outputs. Both are normalised, feature by feature, by the mean and the deviation of
all that was seen in the sequence so far, and each token's planned shift is

    v = -lr |x^|^2 y^,        Delta = V^T X (X^T X + ridge I)^-1,

the least change that realises the shifts (rows of `X`, `V` are tokens; the keys of the solve are
the inputs as they are). It differs from the published code where that depends on the model's scale:
the step is a share of the module's own output, the ridge follows from a gain, every weight has a
normalisation of its own instead of one for all of its shape, and the layers are the last third with
the whole MLP, which did best on SmolLM2. `lr`, `ridge`, `layers` and `modules` take other numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from knowedit.edits.changes import LowRank, relative_norm
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.ranges import Positive, Share
from knowedit.methods.base import Method
from knowedit.methods.gradient.trainable import linear_names
from knowedit.models.editable import EditableModel
from knowedit.models.partial import probed
from knowedit.models.structure import linears
from knowedit.models.texts import Texts
from knowedit.statistics import KeyStatistics
from knowedit_kernels import EditSolver, weight_for_gain
from knowedit_kernels.solver import Identity

FACTS_AT_ONCE = 64  # in a backward pass
TINY = 1e-7  # added to a deviation, as published


@dataclass(frozen=True)
class UltraEdit(Method):
    """One step of several linear modules, from the gradients of all facts at once.

    Attributes:
        layers: whose modules are changed; None: the last third.
        modules: names within a layer, or their ends; None: those of the MLP (published: some of
            gate and up).
        step: mean length of a planned shift, as a share of the mean length of the module's output.
        lr: of the formula (published: 1e-6); wins over `step`.
        gain: the ridge is set so that a token alone would realise this share of its shift.
        ridge: itself (published: 1); wins over `gain`.
    """

    layers: tuple[int, ...] | None = None
    modules: tuple[str, ...] | None = None
    step: Positive = 0.04
    lr: Positive | None = None
    gain: Share = 0.95
    ridge: Positive | None = None

    name: ClassVar[str] = "UltraEdit"

    def weights(self, model: EditableModel) -> list[str]:
        """The linear modules that it changes, by their names below `model.hf`.

        Raises:
            EditError: there are none. ModelError: a layer that is not there, or routed experts.
        """
        depth = len(model.layers)
        layers = range(max(1, 2 * depth // 3), depth) if self.layers is None else self.layers
        model.check_layers(list(layers))
        if self.modules is not None:
            return linear_names(model, list(layers), self.modules)
        found = [name for layer in layers for name in linears(model, layer, mlp=True)]
        if not found:
            raise EditError("there is no layer to change; name at least one layer")
        return found

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        begun, names = time.perf_counter(), self.weights(model)
        carried = _carried(history)
        changes: dict[str, LowRank] = {}
        moments: dict[str, Tensor] = {}
        layers: dict[str, dict[str, float]] = {}
        for name, (x, y) in token_gradients(model, facts, names).items():
            x, y = x.double(), y.double()
            before = carried.get(f"{name}.weight", x.new_zeros(3, x.shape[1] + y.shape[1]))
            both, moments[f"{name}.weight"] = normalised(torch.cat([x, y], 1), before.to(x))
            shift = both[:, : x.shape[1]].square().sum(1, keepdim=True) * both[:, x.shape[1] :]
            with torch.no_grad():
                output = model.hf.get_submodule(name)(x.to(model.dtype)).double()
            lengths = output.norm(dim=1).mean(), shift.norm(dim=1).mean()
            lr = self.lr if self.lr is not None else float(self.step * lengths[0] / lengths[1])
            identity = Identity(x.shape[1], device=x.device)
            ridge = self.ridge or weight_for_gain(identity, x.T, self.gain)
            solver = EditSolver(identity.with_weight(ridge), x.T)
            left, right = solver.apply(-lr * shift.T, torch.float32)
            changes[f"{name}.weight"] = LowRank(left.contiguous(), right.T.contiguous())
            layers[name] = {"lr": lr, "ridge": ridge, "gain": float(solver.gain.mean())}
        parameters = dict(model.hf.named_parameters())
        report = EditReport(
            relative_norm={n: relative_norm(parameters[n], c) for n, c in changes.items()},
            seconds=time.perf_counter() - begun,
            details={"settings": self.to_dict(), "modules": layers},
        )
        return Edit(self.name, dict(changes), facts, model.fingerprint, report, carried=moments)


def token_gradients(
    model: EditableModel, facts: Sequence[Fact], names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """`{module: (inputs [tokens, in], gradients of the output [tokens, out])}` at the tokens after
    which the facts' answers are scored; the loss of a fact is the mean NLL of its answer's tokens.
    """
    rows = [model.row(fact.text, answer=fact.new_answer) for fact in facts]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    first = min(_layer_of(model, name) for name in names)
    if first == 0:
        raise EditError("the first layer cannot be changed by one step; choose layers from 1 on")
    texts = Texts(model, rows, first, clean=False)
    for start in range(0, len(rows), FACTS_AT_ONCE):
        which = range(start, min(start + FACTS_AT_ONCE, len(rows)))
        batch = texts.batch(which)
        with model.evaluating(), torch.enable_grad(), probed(model, names) as seen:
            loss = texts.nll(batch)
            found = torch.autograd.grad(loss, [seen[name][1] for name in names])
        line, place = batch.places.line, batch.places.place
        for name, gradient in zip(names, found):
            inputs[name].append(seen[name][0][line, place])
            gradients[name].append(gradient[line, place])
    return {name: (torch.cat(inputs[name]), torch.cat(gradients[name])) for name in names}


def normalised(rows: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` `[n, width]` less the mean and over the deviation of all rows so far, themselves
    included; and the moments `[3, width]` of those (count, sum, sum of squares), which `before` has
    without them.

    Raises:
        EditError: one row alone has no deviation.
    """
    own = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
    count, total, squares = moments = before + own
    if float(count[0]) < 2:
        raise EditError(
            "one answer token alone cannot be normalised: write several facts at once, or a longer "
            "answer"
        )
    mean = total / count
    variance = (squares - count * mean * mean).clamp(min=0) / (count - 1)
    return (rows - mean) / (variance.sqrt() + TINY), moments


def _carried(history: History | None) -> dict[str, Tensor]:
    """What the last edit of the sequence that normalised anything has seen."""
    return next((e.carried for e in reversed(history.edits) if e.carried), {}) if history else {}


def _layer_of(model: EditableModel, name: str) -> int:
    return int(name.removeprefix(f"{model.layout.layers}.").partition(".")[0])
