"""Training write-outs through the edited model itself.

Every locate-then-edit method writes `Delta_l = R_l A_l`. The read-in `A_l` depends on keys and
metric only, so it can be frozen and the write-out `R_l` trained: the edit is a LoRA pair whose
lora_A is the solver (our derivation). What the solver cannot execute, what it executes at other
tokens, and what several layers do together is then in the loss, while the stock targets only plan.
RoSE, MetaKE and Look-Ahead share this loop.

A step replays the texts from the first edited layer on (`models.partial`); everything below is
cached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from knowedit.facts.fact import Fact
from knowedit.io.config import Config
from knowedit.io.ranges import Bound, Count, NotNegative, Positive
from knowedit.methods.locate.objective import THROUGH, FrozenLayer, Through, TrainedTexts, WriteOuts
from knowedit.methods.locate.values import Problem
from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class TrainingSettings(Config):
    """How write-outs are trained.

    Attributes:
        steps, lr, betas, decay: Adam on the write-outs; `lr` is a step a coordinate in units of the
            hidden state (None: a twentieth of the state's norm a step), and falls linearly to
            `decay` of it over the last 40 % of the steps.
        clamp: largest `|shift| / |h|` a group and layer.
        clamp_realised: the clamp holds for what is realised at the group's key, `R G`; else for
            `R`.
        price: weight of the preservation price `tr(Delta M Delta^T)`, relative to that of the
            start, a group.
        norm: weight of `sum_l (|R_l| / |h_l|)^2`.
        regularise: what `price` and `norm` weigh. "uniform": every group's write-out alike; what a
            key close to ordinary text realises of it is then shrunk most, and what a free key
            realises hardly (MetaKE's third version calls this over-shrinking and
            under-regularising). "request": each group's by the gain that it realises
            (`request_weights`), which shrinks what is realised by one share in all groups.
        through: what a step sees.
    """

    steps: Count = 6
    lr: Positive | None = 0.6
    betas: tuple[float, float] = (0.8, 0.98)
    decay: NotNegative = 0.3
    clamp: Bound = 0.9
    clamp_realised: bool = True
    price: NotNegative = 0.3
    norm: NotNegative = 0.0
    regularise: Literal["uniform", "request"] = "uniform"
    through: Through = "edit"


def over_many_texts(clamp: float) -> TrainingSettings:
    """For objectives of many texts, of which a step sees a share: more and calmer steps, a price on
    the write-outs' length instead of the metric's.
    """
    return TrainingSettings(
        steps=36,
        betas=(0.9, 0.98),
        decay=0.2,
        clamp=clamp,
        clamp_realised=False,
        price=0,
        norm=0.2,
    )


def train_write_outs(
    layers: Mapping[int, FrozenLayer],
    start: WriteOuts,
    plan: Callable[[int], Sequence[tuple[TrainedTexts, float]]],
    settings: TrainingSettings,
    *,
    progress: Callable[[float], None] = lambda steps: None,
) -> WriteOuts:
    """Train the write-outs from `start`, all groups and layers together; where not all outputs may
    be written, every step is projected on those that may.

    Args:
        plan: the texts of step 0, 1, ... and the factors of their losses; each step may bring
            others.

    Returns:
        `{layer: R [groups, hidden]}` float32.
    """
    out = {layer: value.float().clone().requires_grad_() for layer, value in start.items()}
    optimiser = torch.optim.Adam(
        [{"params": [out[layer]], "lr": 1.0, "frozen": layers[layer]} for layer in out],
        betas=settings.betas,
    )
    penalty = Penalty(layers, start, settings)
    for step in range(settings.steps):
        optimiser.zero_grad()
        for texts, factor in plan(step):
            for part in texts.losses(layers, out, settings.through):
                (factor * part.sum()).backward()
        if (extra := penalty(out)).requires_grad:
            extra.backward()
        left = min(1.0, (settings.steps - step) / (0.4 * settings.steps))
        for entry in optimiser.param_groups:
            norm = entry["frozen"].norm
            base = (
                settings.lr
                if settings.lr is not None
                else float(norm.mean()) / (20 * entry["params"][0].shape[1] ** 0.5)
            )
            entry["lr"] = base * (settings.decay + (1 - settings.decay) * left)
        optimiser.step()
        with torch.no_grad():
            for layer, value in out.items():
                if (writable := layers[layer].writable) is not None:
                    value.copy_(value @ writable)
                shift = layers[layer].gain.T @ value if settings.clamp_realised else value
                value *= (
                    settings.clamp * layers[layer].norm / shift.norm(dim=1).clamp(min=1e-30)
                ).clamp(max=1)[:, None]
        progress(1)
    return {layer: value.detach() for layer, value in out.items()}


class Penalty:
    """What write-outs cost beside their texts, as the settings say: a price relative to that of
    the `start`, and their lengths.
    """

    def __init__(
        self, layers: Mapping[int, FrozenLayer], start: WriteOuts, settings: TrainingSettings
    ) -> None:
        self.layers, self.settings = layers, settings
        self.price, self.norm = ({layer: torch.ones(()) for layer in layers} for _ in range(2))
        if settings.regularise == "request":
            for layer, frozen in layers.items():
                self.price[layer] = request_weights(frozen, frozen.price.diagonal())
                self.norm[layer] = request_weights(frozen, torch.ones_like(frozen.norm))
        paid = sum(float(self._prices(layer, value)) for layer, value in start.items())
        groups = len(next(iter(start.values())))
        self.rate = settings.price * groups / paid if settings.price and paid > 0 else 0.0

    def __call__(self, out: WriteOuts) -> Tensor:
        """Of all groups and layers."""
        total = torch.zeros(())
        for layer, value in out.items():
            if self.rate:
                total = total + self.rate * self._prices(layer, value)
            if self.settings.norm:
                lengths = value.square().sum(1) / self.layers[layer].norm ** 2
                total = total + self.settings.norm * (self.norm[layer] * lengths).sum()
        return total

    def _prices(self, layer: int, value: Tensor) -> Tensor:
        weights = self.price[layer]
        scaled = value.to(self.layers[layer].price) * (
            weights.sqrt()[:, None] if weights.dim() else 1
        )
        return (scaled * (self.layers[layer].price @ scaled)).sum()


def request_weights(frozen: FrozenLayer, cost: Tensor) -> Tensor:
    """`[groups]` with the mean 1: what turns a penalty `cost_i |R_i|^2` of each write-out into one
    of what it realises at its own key, `c |g_i R_i|^2` with one c for all:
    `w_i = c g_i^2 / cost_i`, g the diagonal of the solver's frozen gain.

    Where the texts ask for a shift v_i, the best write-out then realises the same share of each,
    whatever its gain; under a uniform weight it realises `g_i^2 / (g_i^2 + cost_i)` of it.

    Args:
        cost: `[groups]` of a write-out of unit length.
    """
    weights = frozen.gain.diagonal().square() / cost.clamp(min=1e-30)
    return weights / weights.mean().clamp(min=1e-30)


@dataclass(frozen=True)
class Disconnect:
    """The semantic-execution disconnect as three mean NLLs of the same answers (nats a token).

    Attributes:
        planned: with the full targets at the lookup tokens; gained: with what the solver realises
            there, `R G`;
        realised: with the edited weights, at every token.
    """

    planned: float
    gained: float
    realised: float


@torch.no_grad()
def disconnect(
    layers: Mapping[int, FrozenLayer], out: WriteOuts, texts: TrainedTexts
) -> Disconnect:
    """Measure it on `texts`, whose weights should add up to 1 a group."""
    found = []
    for through in THROUGH:
        found.append(
            float(sum(part[0].sum() for part in texts.losses(layers, out, through))) / texts.groups
        )
    return Disconnect(*found)


def state_norms(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    layers: Sequence[int],
    problem: type[Problem] = Problem,
) -> dict[int, Tensor]:
    """`{layer: [groups]}` length of the clean hidden state at the lookup tokens of the bare
    prompts, mean over a group; where `problem` plans values at the projection, of what stands for
    it there.
    """
    rows = [model.row(fact.prompt, fact.subject) for group in groups for fact in group]
    owner = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    norms = {}
    for layer in layers:
        lengths = problem.state_lengths(model, rows, layer).float().cpu()
        total = torch.zeros(len(groups)).index_add(0, owner, lengths)
        norms[layer] = total / torch.bincount(owner, minlength=len(groups))
    return norms
