"""Locate-then-edit as one recipe made of values: metric x target x spread x keys (x training).

facts -> groups -> target (values to write)
      -> for each layer: keys K, residual R, metric M -> solver: Delta = R A
      -> training (where there is one): the write-outs R go on through the edited model
      -> Edit

Every named method is one small file in `named/`; any other combination is a `Recipe` of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from knowedit.edits.changes import changes_of
from knowedit.edits.edit import Edit
from knowedit.edits.history import History, Place
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, as_facts, check_facts
from knowedit.io.config import fields_of
from knowedit.io.lines import named
from knowedit.methods.base import Method, Self, check_kinds
from knowedit.methods.locate.checks import (
    first_token_warnings,
    origin_warnings,
    outcome,
    planned,
    sink_warnings,
)
from knowedit.methods.locate.keys import group_by_subject
from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.metrics import Covariance, Metric
from knowedit.methods.locate.removal import removal
from knowedit.methods.locate.spreads import Even, Spread
from knowedit.methods.locate.targets import HiddenState, Target
from knowedit.methods.locate.task import Material, Runtime, Task, WrittenLayers
from knowedit.methods.locate.trainings.base import Training
from knowedit.methods.locate.values import Problem, Targets, problem_of
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.presets import preset_for
from knowedit.models.structure import Which
from knowedit.statistics import KeyStatistics


@dataclass(frozen=True)
class Recipe(Method):
    """A locate-then-edit method. What is None comes from the model's calibration or preset;
    `Edit.report` has the choice.

    Attributes:
        metric: what the write must leave alone.
        target: which values are written, one a group of facts.
        spread: which layers write them, and how much each.
        keys: at which keys they are written.
        training: how the write-outs are trained on; None: they are not.
        layers: edited layers; values are optimised at the last one. None: the spread's choice.
        merge_subjects: facts of one subject get one value.
        allow_sinks: edit a layer that carries an attention sink, or a subject that is the very
            first token.
        material: texts beside the facts that the parts may use.
        runtime: how much is computed at once, and on what.
        experts: which are edited where a layer has some: those that tokens are "routed" to, all
            together; the "shared" one that every token passes; or "both" as one projection.
    """

    metric: Metric = field(default_factory=Covariance)
    target: Target = field(default_factory=HiddenState)
    spread: Spread = field(default_factory=Even)
    keys: Keys = field(default_factory=ContextKeys)
    training: Training | None = None
    layers: tuple[int, ...] | None = None
    merge_subjects: bool = True
    allow_sinks: bool = False
    material: Material = field(default_factory=Material)
    runtime: Runtime = field(default_factory=Runtime)
    experts: Which = "routed"

    name = "Recipe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            self.spread.check([], self.layers)

    @property
    def needs_statistics(self) -> bool:  # type: ignore[override]
        return self.metric.needs_statistics

    def with_corpus(self: Self, corpus: Any, tokens: int | None = None) -> Self:
        """A metric that reads ordinary text itself reads it from `corpus`; how much of it is its
        own setting.
        """
        metric = vars(self)["metric"]
        reads = "corpus" in fields_of(type(metric)) and corpus is not None
        return self.with_settings({"metric.corpus": corpus}) if reads else self

    def view(self, model: EditableModel) -> EditableModel:
        return model.editing(self.experts)

    @accepts_model
    def statistics_layers(self, model: EditableModel) -> tuple[int, ...]:
        """The layers that it edits. Raises EditError for none, ModelError for one that is not
        there.
        """
        model = self.view(model)
        chosen = self.spread.layers(preset_for(model)) if self.layers is None else self.layers
        layers = tuple(sorted(set(chosen)))
        if not layers:
            raise EditError("layers is empty; name at least one layer")
        model.check_layers(layers)
        return layers

    def check_together(self, model: EditableModel, facts: Sequence[Fact]) -> None:
        groups = group_by_subject(list(facts), self.merge_subjects)
        self.spread.check(groups, self.statistics_layers(model))

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        groups = group_by_subject(facts, self.merge_subjects)
        self.spread.check(groups, self.statistics_layers(model))
        task = self.prepare(model, groups, statistics, history, progress)
        return self.finish(task, self.target.values(task))

    @accepts_model
    def compute_each(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        statistics: KeyStatistics | None = None,
        *,
        which: Sequence[int] | None = None,
        progress: bool = True,
    ) -> Iterable[Edit]:
        """One independent edit a fact; the values of all of them are optimised together, which is
        much faster, also where the edits of some are not wanted (`which`).
        """
        check_kinds(statistics)
        model = self.view(model)
        groups = [check_facts([fact]) for fact in as_facts(facts)]
        if not groups:
            return []
        whole = self.prepare(model, groups, statistics, progress=progress)
        targets = self.target.values(whole)

        def made(i: int) -> Edit:
            task = self.prepare(model, [whole.groups[i]], statistics, progress=progress)
            return self.recorded(self.finish(task, targets.select([i])), model, statistics)

        return map(made, range(len(groups)) if which is None else which)

    def removal(
        self,
        model: EditableModel,
        places: Sequence[Place],
        statistics: KeyStatistics | None,
        history: History,
    ) -> Edit:
        return removal(self, self.view(model), places, statistics, history)

    def prepare(
        self,
        model: EditableModel,
        groups: list[list[Fact]],
        statistics: KeyStatistics | None,
        history: History | None = None,
        progress: bool = True,
    ) -> Task:
        """The task of writing `groups` with these settings, or the preset's where there are none.

        Raises:
            EditError: no layers, no statistics, a layer on an attention sink, a history of
                another model.
            StatisticsError: statistics of another model or other layers.
            ModelError: a layer that does not exist.
        """
        model = self.view(model)
        preset, layers = preset_for(model), self.statistics_layers(model)
        problem = problem_of(model, layers)
        values, warnings = self.target.resolved(preset, self.runtime, problem), []
        if self.layers is None or not self.target.complete:
            warnings += origin_warnings(model, preset, layers)
        warnings += sink_warnings(model, layers, self.allow_sinks)
        if self.experts == "both" and not self.metric.joins:
            raise EditError(
                f"metric {self.metric.kind} with these settings is not offered for experts='both'; "
                "take covariance or exact, or edit experts='routed', or 'shared'"
            )
        if statistics is not None:
            statistics.check(model, layers)
        elif self.needs_statistics:
            raise EditError(
                f"{self.name} needs key statistics of {named('layer', layers)}: pass "
                "key_statistics(model, ...)"
            )
        facts = [fact for group in groups for fact in group]
        warnings += first_token_warnings(model, facts, values.contexts, self.allow_sinks)
        return Task(
            name=self.name,
            model=model,
            groups=groups,
            layers=layers,
            values=values,
            statistics=statistics or KeyStatistics({}),
            of_mlp=self.target.of_mlp or problem is not Problem,
            material=self.material,
            runtime=self.runtime,
            history=history,
            warnings=tuple(warnings),
            progress=progress,
        )

    def finish(self, task: Task, targets: Targets) -> Edit:
        """Write the values, train them on where the recipe says so, and report."""
        metric = self.metric.prepared(task)

        def write(metric: Metric, targets: Targets) -> WrittenLayers:
            return self.write(task, metric, targets)

        written = write(metric, targets)
        if self.training is not None:
            written = self.training.trained(task, metric, targets, written, write)
        settings = {
            "layers": list(task.layers),
            "values": task.values.to_dict(),
            "merge_subjects": self.merge_subjects,
        }
        report = outcome(settings, task, targets, written)
        return Edit(
            method_name=self.name,
            changes=changes_of(task.model, written.factors),
            facts=task.facts,
            fingerprint=task.model.fingerprint,
            report=report,
            keys=written.keys,
            groups=tuple(number for number, group in enumerate(task.groups) for _ in group),
            owners=written.owners,
            plan=planned(task, targets, written),
        )

    def write(self, task: Task, metric: Metric, targets: Targets) -> WrittenLayers:
        """From values to factors, layer by layer; each layer sees what those below it have written.

        It writes its own value where it has one, else its share of what is still missing at the
        last layer.
        """
        written = WrittenLayers()
        for i, layer in enumerate(task.layers):
            with task.model.virtual(written.factors):
                found = self.keys.at(task, layer, of_mlp=task.of_mlp)
            if targets.lower is not None:
                residual = targets.of_layers()[:, i].double().to(found.outputs.device)
            else:
                missing = targets.wanted.to(found.outputs.device) - found.outputs
                residual = self.spread.share(missing, len(task.layers) - i)
            solver, chosen = metric.solver(task.statistics, layer, found.keys.T, task.history)
            if (writable := metric.writable(layer)) is not None:
                written.writable[layer] = writable
                residual = residual.double() @ writable.to(residual.device)
            written.add(layer, residual, solver, found, chosen)
        return written
