"""Targets: which values to write, one a group of facts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from knowedit.errors import EditError
from knowedit.io.config import Config
from knowedit.io.progress import bar
from knowedit.io.ranges import Bound, Count, NotNegative, Positive
from knowedit.methods.locate.keys import group_keys
from knowedit.methods.locate.optimisers import Adam, Optimiser
from knowedit.methods.locate.task import Runtime, Task
from knowedit.methods.locate.values import (
    AtModules,
    Problem,
    Targets,
    ValueSettings,
    optimise_values,
    preset_numbers,
)
from knowedit.models.editable import EditableModel
from knowedit.models.families.preset import Preset
from knowedit.models.structure import attention_of

H = TypeVar("H", bound="HiddenState")


class Target(Config):
    """How the values are found.

    Attributes:
        of_mlp: the value is the MLP's output, not the layer's.
    """

    family = "target"
    of_mlp: ClassVar[bool] = False

    @property
    def complete(self) -> bool:
        """Whether it says everything by itself, without the model's preset."""
        return all(value is not None for value in vars(self).values())

    @abstractmethod
    def resolved(
        self, preset: Preset, runtime: Runtime, problem: type[Problem] = Problem
    ) -> ValueSettings:
        """The numbers to optimise with; what is None is the preset's, or what suits values at the
        MLP's projection on a model where they are planned there.
        """

    @abstractmethod
    def values(self, task: Task) -> Targets:
        """One value a group of the task, at its last layer."""


@dataclass(frozen=True)
class HiddenState(Target):
    """The layer's output at the subject's last token, optimised until the model says the new
    object (ROME, Meng et al. 2022, eq. 4). What is None comes from the model's preset.

    Where something stands between an MLP's projection and the layer's output (a norm, a gate, a
    factor), the value is the projection's output instead, and every edited layer has its own,
    planned together; `z0` is that output, or what stands for the layer's behind a gate or a factor.

    Attributes:
        steps: gradient evaluations, the last of which only measures.
        lr: Adam's step a coordinate, in units of the hidden state; "calibrated": about a tenth of
            the clean state's norm a step.
        clamp: largest `|delta| / |z0|`.
        weight_decay: weight of `|delta| / |z0|^2`.
        kl: weight of KL(edited || clean) at the subject's last token of "{subject} is a".
        stop: a fact is finished once its loss is below this.
        contexts: templates around the prompt; the first is "{}".
        optimiser: how the values are moved from one evaluation to the next.
    """

    steps: Count | None = None
    lr: Positive | Literal["calibrated"] | None = None
    clamp: Bound | None = None
    weight_decay: NotNegative | None = None
    kl: NotNegative | None = None
    stop: NotNegative | None = None
    contexts: tuple[str, ...] | None = None
    optimiser: Optimiser = field(default_factory=Adam)

    problem: ClassVar[type[Problem] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ValueSettings(**self._given())  # its checks

    @classmethod
    def of(cls: type[H], values: ValueSettings) -> H:
        """The target that optimises with these numbers on every model."""
        names = ("steps", "clamp", "weight_decay", "kl", "stop", "contexts", "optimiser")
        numbers = {name: getattr(values, name) for name in names}
        return cls(lr="calibrated" if values.lr is None else values.lr, **numbers)

    def _given(self) -> dict[str, Any]:
        """The numbers that are not the preset's."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return given | ({"lr": None} if self.lr == "calibrated" else {})

    def resolved(
        self, preset: Preset, runtime: Runtime, problem: type[Problem] = Problem
    ) -> ValueSettings:
        chosen = preset_numbers(preset, problem)
        return ValueSettings(**{**chosen, **self._given(), **vars(runtime)})

    def values(self, task: Task) -> Targets:
        return self._optimised(task, task.groups, "optimising values", "values")

    def _optimised(self, task: Task, groups: Any, title: str, unit: str) -> Targets:
        with bar(f"{task.name}: {title}", len(groups), unit, show=task.progress) as advance:
            return optimise_values(
                task.model,
                groups,
                task.layers,
                task.values,
                problem=self.problem,
                progress=advance,
            )


@dataclass(frozen=True)
class MergedFacts(HiddenState):
    """A value for each fact, merged to the smallest one a subject that reaches as far as each
    (RoSE's tree; after its training it equals the joint value on SmolLM2, within the noise).
    """

    def values(self, task: Task) -> Targets:
        if all(len(group) == 1 for group in task.groups):
            return super().values(task)
        leaves = [[fact] for fact in task.facts]
        return merge(self._optimised(task, leaves, "a value for each fact", "facts"), task)


def merge(leaves: Targets, task: Task) -> Targets:
    """The smallest delta a subject that reaches as far as each fact's own in its direction,
    `delta . d_t = |d_t|^2`, then within the clamp.

    (Constraining the facts' gains instead does not help: at optimised values their gradients are
    noise.)
    """
    owner = torch.tensor([number for number, group in enumerate(task.groups) for _ in group])

    def mean(x: Tensor) -> Tensor:
        rows = [x[owner == number].float().mean(0) for number in range(len(task.groups))]
        return torch.stack(rows)

    def reaching(delta: Tensor) -> Tensor:
        return torch.stack([_reaching(delta[owner == n]) for n in range(len(task.groups))])

    value, delta = mean(leaves.value), reaching(leaves.delta)
    longest = task.values.clamp * value.norm(dim=1)
    delta = delta * (longest / delta.norm(dim=1).clamp(min=1e-30)).clamp(max=1)[:, None]
    below = leaves.lower
    lower = None if below is None else torch.stack([reaching(x) for x in below.unbind(1)], 1)
    return Targets(delta, value, mean(leaves.loss), mean(leaves.nll), mean(leaves.steps), lower)


def _reaching(deltas: Tensor) -> Tensor:
    """The smallest vector that reaches as far as each of `deltas` `[n, hidden]` in its
    direction.
    """
    rows = deltas.double()
    length = rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    unit = rows / length
    gram = unit @ unit.T + 1e-3 * torch.eye(len(unit), dtype=unit.dtype)
    return (unit.T @ torch.linalg.solve(gram, length))[:, 0].float()


@dataclass(frozen=True)
class AnchoredState(HiddenState):
    """The hidden state, with the MLP's part of it brought to one length: norm-anchor scaling (NAS,
    Liu et al. 2026), which breaks the loop of longer values and larger weights in a sequence,
    `v* <- norm v* / |v*|` with `v* = v0 + delta` and `v0` the MLP's output.

    The published code leaves out facts whose `v*` is more than twice the norm; here all are scaled.

    Attributes:
        norm: the length; None: the mean over the first edit of the history, whose values were
            found on the unedited model, or over these facts where they are the first (published:
            the mean over other facts).
    """

    norm: Positive | None = None

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in super()._given().items() if name != "norm"}

    @property
    def complete(self) -> bool:
        return all(value is not None for name, value in vars(self).items() if name != "norm")

    def values(self, task: Task) -> Targets:
        found = super().values(task)
        if found.lower is not None:
            raise EditError(
                "norm anchoring scales one value a fact, and here every edited layer has its own: "
                "name one layer"
            )
        clean = group_keys(
            task.model, task.groups, task.layers[-1], task.layers[-1], ("{}",), of_mlp=True
        ).outputs.to(found.delta)
        value = (clean + found.delta).double()
        length = value.norm(dim=1, keepdim=True)
        norm = self._norm(task) or float(length.mean())
        anchored = value * (norm / length.clamp(min=1e-30))
        return replace(
            found, delta=(anchored - clean).float(), norm=torch.full_like(found.nll, norm)
        )

    def _norm(self, task: Task) -> float | None:
        """The length that is given, or that the history began with."""
        if self.norm is not None:
            return self.norm
        earlier = task.history.edits if task.history is not None else []
        known = (edit.report.details.get("anchored_norm") for edit in earlier)
        return next((norm for norm in known if norm is not None), None)


class TwoDeltas(AtModules):
    """Two deltas a group, `[groups, 2, hidden]`: of the attention's and the MLP's output of the
    last layer.
    """

    @classmethod
    def at(cls, layers: tuple[int, ...], model: EditableModel, plans: Sequence[Any]) -> Problem:
        return super().at(layers[-1:], model, plans)

    def modules(self) -> Sequence[nn.Module]:
        (layer,) = self.layers
        return [attention_of(self.model, layer), self.model.projection(layer)]


@dataclass(frozen=True)
class AttentionAndMLP(HiddenState):
    """The MLP's output, optimised together with the attention's, which takes up what does not
    belong into the MLP and is thrown away (PMET, Li et al. 2024).

    Attributes:
        clamp: largest `|delta|` of either, relative to its own clean output. The preset's is meant
            for the much longer hidden state: with 0.75 SmolLM2 says few of the new answers.
    """

    clamp: Bound | None = 4.0

    of_mlp: ClassVar[bool] = True
    problem: ClassVar[type[Problem] | None] = TwoDeltas
