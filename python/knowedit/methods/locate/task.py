"""What is worked on, once settings and input have been checked, and what has been written so
far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from knowedit.edits.history import History
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import training_neighbours
from knowedit.io.config import Config
from knowedit.io.ranges import Count, Whole
from knowedit.methods.locate.keys import GroupKeys
from knowedit.methods.locate.values import Problem, ValueSettings, problem_of
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics
from knowedit_kernels import EditSolver

#: Wordings by fact id, prompt or relation; or "generic" for all; None: the shipped ones.
Questions = Mapping[str, Sequence[str]] | Literal["generic"] | None


@dataclass(frozen=True)
class Material(Config):
    """Texts beside the facts that the parts of a method may use.

    Attributes:
        neighbours: other facts that should stay, besides the shipped entities.
        questions: question wordings by fact id, prompt or relation, with "{}" for the subject;
            shipped ones else, and generic forms for unknown relations ("generic": for all).
        preserve: texts after, and within, which the model should go on as before, besides shipped
            ones.
        seed: of every choice among them.
    """

    neighbours: tuple[Fact, ...] = ()
    questions: Questions = None
    preserve: tuple[str, ...] = ()
    seed: Whole = 0


@dataclass(frozen=True)
class Runtime(Config):
    """How much is computed at once, and on what.

    Attributes:
        budget: tokens run at once (memory).
        draft: optimise values on a bfloat16 copy of the model (`EditableModel.draft`): up to three
            times as fast on CPUs with bfloat16 units.
    """

    budget: Count = 2048
    draft: bool = False


@dataclass(frozen=True)
class Task:
    """One edit to be computed.

    Attributes:
        name: of the method, for progress and reports.
        groups: facts that share a value.
        layers: edited layers, ascending; values are optimised at the last one.
        of_mlp: values are outputs of the MLP's projection, not of the layer.
        values: numbers of the value optimisation.
        statistics: of `layers`; empty for a metric that needs none.
        material, runtime: as in the recipe.
        history: of earlier edits, all applied to `model`.
        warnings: so far.
        progress: show bars.
    """

    name: str
    model: EditableModel
    groups: list[list[Fact]]
    layers: tuple[int, ...]
    values: ValueSettings
    statistics: KeyStatistics
    of_mlp: bool = False
    material: Material = field(default_factory=Material)
    runtime: Runtime = field(default_factory=Runtime)
    history: History | None = None
    warnings: tuple[str, ...] = ()
    progress: bool = True

    @property
    def facts(self) -> list[Fact]:
        return [fact for group in self.groups for fact in group]

    @property
    def problem(self) -> type[Problem]:
        """Where values are planned, as the model requires."""
        return problem_of(self.model, self.layers)

    def neighbour_prompts(self, count: int) -> list[list[str]]:
        """For each fact up to `count` prompts on other subjects of the same relation."""
        material = self.material
        return training_neighbours(self.facts, material.neighbours, count=count, seed=material.seed)


@dataclass
class WrittenLayers:
    """What a write has made, layer by layer.

    Attributes:
        factors: `{layer: (U [hidden, groups], V [d_ff, groups])}`, float32.
        keys: `{layer: [n, d_ff]}` where it was written, float32.
        owners: `[n]` the group of each of those keys, alike at every layer.
        layers: what was chosen and measured at each layer: `gain`, `lowest_gain`, ...
        report: the same for the whole edit.
        solved: the layers' solvers and group keys, for what goes on from a write.
        writable: `{layer: [hidden, hidden]}` projections on the outputs that may be written, where
            not all may.
    """

    factors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    owners: tuple[int, ...] = ()
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    solved: dict[int, tuple[EditSolver, GroupKeys]] = field(default_factory=dict)
    writable: dict[int, Tensor] = field(default_factory=dict)

    def add(
        self,
        layer: int,
        residual: Tensor,
        solver: EditSolver,
        found: GroupKeys,
        chosen: dict[str, Any],
    ) -> None:
        """One layer, `residual` `[groups, hidden]`: keys of a group share it, so the rank is the
        number of groups.
        """
        read_in = found.add_up(solver.A)
        gain = found.gain(read_in)
        self.factors[layer] = residual.T.to(read_in).float(), read_in.T.contiguous().float()
        self.keys[layer], self.solved[layer] = found.keys.float(), (solver, found)
        self.owners = tuple(found.owner.tolist())
        self.layers[str(layer)] = {
            **chosen,
            "gain": float(gain.mean()),
            "lowest_gain": float(gain.min()),
        }

    def with_write_outs(self, out: Mapping[int, Tensor]) -> WrittenLayers:
        """The same read-ins with trained write-outs `{layer: [groups, hidden]}`."""
        self.factors = {
            layer: (out[layer].T.contiguous(), right) for layer, (_, right) in self.factors.items()
        }
        return self
