"""RoSE: several facts of one subject that survive rephrasing and instructions.

Our implementation of the idea, derived from the public abstract (arXiv 2603.15518; its body was not
available): isotropic geometric alignment is the isotropic part of the metric, hierarchical
knowledge integration goes from a value for each fact over their minimum-norm merge to a refinement
through the edited model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import Form, training_neighbours
from knowedit.io.progress import bar
from knowedit.methods.locate.entities import entity_moments
from knowedit.methods.locate.keys import GroupKeys, keys_at
from knowedit.methods.locate.named.rose_objective import (
    Objective,
    Questions,
    Weights,
    asked_forms,
    merge,
)
from knowedit.methods.locate.recipe import LocateThenEdit
from knowedit.methods.locate.refine import adopt, frozen_layers, told
from knowedit.methods.locate.task import Task, Written
from knowedit.methods.locate.training import Settings, look_ahead
from knowedit.methods.locate.values import Targets, optimise_values
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics
from knowedit_kernels import weight_for_gain
from knowedit_kernels.solver import Identity, Metric, combined


@dataclass(frozen=True)
class RoSE(LocateThenEdit):
    """Metric: covariance + entities + identity. Targets: hierarchical, one a subject. Spread:
    layers share the norm.

    Attributes:
        shares: of the covariance, the entities' moment and the identity in the metric, each of unit
            trace. (1, 0, 0) is MEMIT's, (0, 0, 1) the pure identity (IGA), (1 - g, 0, g) their
            interpolation.
        gain: the metric's weight is set so that an edit alone would realise this share of its
            planned change.
        entities: `{layer: [d_ff, d_ff]}` the entities' moments; None: of the shipped ones.
        integration: what the refinement starts from. "tree" merges a value for each fact, "joint"
            optimises one for all of them (MEMIT-Merge); after the refinement they were equal on
            SmolLM2, within the noise.
        refine: the look-ahead over forms; None leaves it out.
        weights: of the refinement's objective.
        questions: question wordings by fact id, prompt or relation, with "{}" for the subject;
            shipped ones else, and generic forms for unknown relations ("generic": for all, which
            recall less in questions).
        neighbours: other facts that should stay, besides the shipped entities: those of the same
            relations in the refinement's objective, the rest in the metric; what `Fact.neighbours`
            tests is in neither.
        seed: of the choice among them.
    """

    shares: tuple[float, float, float] = (0.16, 0.45, 0.39)
    gain: float = 0.88
    entities: Mapping[int, Tensor] | None = field(default=None, repr=False)
    integration: Literal["tree", "joint"] = "joint"
    refine: Settings | None = field(
        default_factory=lambda: Settings(
            steps=36,
            betas=(0.9, 0.98),
            decay=0.2,
            clamp=0.7,
            clamp_realised=False,
            price=0,
            norm=0.2,
        )
    )
    weights: Weights = field(default_factory=Weights)
    questions: Questions = None
    neighbours: tuple[Fact, ...] = ()
    seed: int = 0

    name: ClassVar[str] = "RoSE"
    shared_layers: ClassVar[bool] = True
    key_forms: ClassVar[tuple[str, ...]] = ("bare", "pre1", "ch1", "gc")

    @property
    def needs_statistics(self) -> bool:  # type: ignore[override]
        """The pure identity needs none."""
        return bool(self.shares[0])

    def metric(
        self, statistics: KeyStatistics, layer: int, keys: Tensor
    ) -> tuple[Metric, dict[str, Any]]:
        covariance, entities, identity = self.shares
        terms = [(covariance, statistics.moment(layer))] if covariance else []
        terms += [(entities, self.entities[layer])] if entities and self.entities else []
        scaled = [(share / float(part.trace()), part) for share, part in terms]
        metric = combined(scaled, identity / len(keys)) if scaled else Identity(len(keys))
        weight = weight_for_gain(metric, keys, self.gain)
        return metric.with_weight(weight), {"weight": weight}

    def targets(self, task: Task) -> Targets:
        if self.integration == "joint" or all(len(group) == 1 for group in task.groups):
            return super().targets(task)
        leaves = [[fact] for fact in task.facts]
        with bar(
            f"{self.name}: a value for each fact", len(leaves), "facts", show=task.progress
        ) as advance:
            found = optimise_values(
                task.model, leaves, task.layers[-1], task.values, progress=advance
            )
        return merge(found, task)

    def keys(self, task: Task, layer: int) -> GroupKeys:
        rows = [
            [
                [
                    f.row(task.model)
                    for f in self.forms(task.model, fact)
                    if f.name in self.key_forms
                ]
                for fact in group
            ]
            for group in task.groups
        ]
        return keys_at(task.model, rows, layer, task.layers[-1], mean=self.mean_keys)

    def forms(self, model: EditableModel, fact: Fact) -> list[Form]:
        """What a fact is trained on, the bare prompt first."""
        return asked_forms(model, fact, self.questions)

    def write(self, task: Task, targets: Targets) -> Written:
        others = training_neighbours(
            task.facts, self.neighbours, count=self.weights.pools, seed=self.seed
        )
        if self.shares[1] and self.entities is None:
            used = [text for texts in others for text in texts]
            tested = [
                probe.prompt
                for fact in task.facts
                for probe in (*fact.neighbours, *fact.portability)
            ]
            leave_out = "\n".join([fact.subject for fact in task.facts] + used + tested)
            entities = entity_moments(
                task.model, task.layers, leave_out, self.neighbours, seed=self.seed
            )
            return replace(self, entities=entities).write(task, targets)
        written = super().write(task, targets)
        if self.refine is None:
            return written
        layers, start = frozen_layers(task, written)
        with bar(
            f"{self.name}: refining over forms", self.refine.steps, "steps", show=task.progress
        ) as advance:
            objective = Objective(self, task, others, self.refine.budget)
            found = look_ahead(layers, start, objective.plan, self.refine, progress=advance)
        report = told(self.refine, layers, start, found, objective.bare)
        written.report["look_ahead"] = report | {"weights": asdict(self.weights)}
        adopt(written, found)
        return written
