"""Locate-then-edit as one recipe of three parts: a metric, a target optimiser, a spread over
layers.

facts -> groups -> targets (values to write) -> for each layer: keys K, residual R -> solver: R A ->
Edit
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, check_facts
from knowedit.io.progress import bar
from knowedit.methods.base import Method
from knowedit.methods.locate.checks import outcome
from knowedit.methods.locate.keys import GroupKeys, group_by_subject, group_keys
from knowedit.methods.locate.task import Task, Written, layers_of, prepare
from knowedit.methods.locate.values import Targets, ValueSettings, optimise_values
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics
from knowedit_kernels import EditSolver
from knowedit_kernels.solver import Metric
from knowedit_kernels.solver.edit_solver import Constraint


@dataclass(frozen=True)
class LocateThenEdit(Method, abstract=True):
    """A method is a subclass that fills in the parts; `memit.py` is a short one. Settings that are
    None come from the model's preset, or are calibrated; `Edit.report` has the choice.

    Attributes:
        layers: edited layers; values are optimised at the last one.
        values: of the value optimisation.
        merge_subjects: facts of one subject get one value and one key.
        mean_keys: one mean key over contexts a subject, as published; else one key a context, all
            with the same value.
        allow_sinks: edit a layer that carries the attention sink, or a subject that is the very
            first token.
    """

    layers: tuple[int, ...] | None = None
    values: ValueSettings | None = None
    merge_subjects: bool = True
    mean_keys: bool = True
    allow_sinks: bool = False
    needs_statistics: ClassVar[bool] = True
    one_layer: ClassVar[bool] = False
    shared_layers: ClassVar[bool] = False
    constraint: ClassVar[Constraint] = "soft"

    def __post_init__(self) -> None:
        super().__post_init__()
        gain, weight = getattr(self, "gain", None), getattr(self, "weight", None)
        if gain is not None and not 0 < gain < 1:
            raise EditError(
                f"{self.name}: gain must lie between 0 and 1, got {gain}; ROME and EMMET write "
                f"all of a change"
            )
        if weight is not None and not weight > 0:
            raise EditError(f"{self.name}: weight must be positive, got {weight}")

    @abstractmethod
    def metric(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[Metric, dict[str, Any]]:
        """What to preserve at `layer`, weighed for `keys` `[d_ff, n]`; and what was chosen, for the
        report.
        """

    def targets(self, task: Task) -> Targets:
        """Which values to write, one a group."""
        with bar(
            f"{self.name}: optimising values", len(task.groups), "values", show=task.progress
        ) as advance:
            return optimise_values(
                task.model, task.groups, task.layers[-1], task.values, progress=advance
            )

    def statistics_layers(self, model: EditableModel) -> tuple[int, ...]:
        """The layers that it edits. Raises EditError for none, ModelError for one that is not
        there.
        """
        return layers_of(self, model)

    def keys(self, task: Task, layer: int) -> GroupKeys:
        """The keys to write at."""
        return group_keys(
            task.model,
            task.groups,
            layer,
            task.layers[-1],
            task.values.contexts,
            mean=self.mean_keys,
        )

    def spread(self, residual: Tensor, remaining: int) -> Tensor:
        """The share of the residual this layer writes when `remaining` layers, this one included,
        are left.
        """
        return residual / remaining

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        """As `Method.compute`, for `statistics` of the edited layers. Raises also EditError,
        StatisticsError: see `prepare`.
        """
        task = prepare(
            self, model, group_by_subject(facts, self.merge_subjects), statistics, history, progress
        )
        return self.finish(task, self.targets(task))

    def compute_each(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        statistics: KeyStatistics | None = None,
        *,
        progress: bool = True,
    ) -> list[Edit]:
        """One independent edit a fact; the values of all of them are optimised together, which is
        much faster.
        """
        whole = prepare(
            self, model, [check_facts([fact]) for fact in facts], statistics, progress=progress
        )
        targets = self.targets(whole)
        tasks = (
            prepare(self, model, [group], statistics, progress=progress) for group in whole.groups
        )
        return [self.finish(task, targets.select([i])) for i, task in enumerate(tasks)]

    def write(self, task: Task, targets: Targets) -> Written:
        """From values to factors, layer by layer; each layer sees what those below it have
        written.
        """
        written = Written()
        for i, layer in enumerate(task.layers):
            with task.model.virtual(written.factors):
                found = self.keys(task, layer)
            residual = self.spread(
                targets.wanted.to(found.outputs.device) - found.outputs, len(task.layers) - i
            )
            solver, chosen = self.solve(task.statistics, layer, found.keys.T, task.history)
            written.add(layer, residual, solver, found, chosen)
        return written

    def solve(
        self, statistics: KeyStatistics, layer: int, keys: Tensor, history: History | None = None
    ) -> tuple[EditSolver, dict[str, Any]]:
        """The solver for `keys` `[d_ff, n]` at `layer` under the metric and the history; and what
        was chosen for it.
        """
        metric, chosen = self.metric(statistics, layer, keys)
        return EditSolver(
            history.extend(metric, layer) if history else metric, keys, self.constraint
        ), chosen

    def finish(self, task: Task, targets: Targets) -> Edit:
        """Write the values and report."""
        written = self.write(task, targets)
        report = outcome(self, task, targets, written)
        return Edit(
            self.name, written.factors, task.facts, task.model.fingerprint, report, written.keys
        )
