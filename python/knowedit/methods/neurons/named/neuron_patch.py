"""NeuronPatch: store each fact in two rewritten neurons, which fire at the fact's own tokens only
(in three, where the activation is a square).

A linear update answers every key a little, and that is what drifts; a neuron is silent below its
threshold. Adding a neuron for a mistake is the idea of Transformer-Patcher (Huang et al. 2023, "One
mistake worth one neuron"). Here the model keeps its shape: existing neurons are rewritten, chosen
for how well the others can do their work, as in pruning.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from knowedit.edits.changes import change_of, relative_norms, side_by_side
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, as_facts, check_facts
from knowedit.facts.wordings.ordinary import openings, sentences
from knowedit.io.lines import named, number_of
from knowedit.io.progress import bar
from knowedit.io.ranges import Count, NotNegative, Positive, Whole
from knowedit.methods.base import Method, check_kinds
from knowedit.methods.locate.checks import (
    first_token_warnings,
    origin_warnings,
    outcome_warnings,
    sink_warnings,
)
from knowedit.methods.locate.keys import group_by_wording
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.task import Runtime
from knowedit.methods.locate.values import (
    Targets,
    ValueSettings,
    optimise_values,
    problem_of,
    prompt_rows,
)
from knowedit.methods.neurons.parts import (
    Switch,
    free_neurons,
    patched,
    rewritten,
    room,
    step_of,
)
from knowedit.methods.neurons.scores import separate
from knowedit.methods.neurons.texts import Inputs, at_lookup, chosen, everywhere, windows
from knowedit.methods.neurons.wiring import Wiring
from knowedit.methods.neurons.written import Home, Written, experts_of, together
from knowedit.models.editable import EditableModel
from knowedit.models.experts import slice_name
from knowedit.models.load import accepts_model
from knowedit.models.presets import preset_for
from knowedit.models.tokens import Row
from knowedit.statistics import KeyStatistics
from knowedit.statistics.corpus.corpus import Corpus, CorpusLike

#: A switch that closes where it should not adds its value to a state of ordinary length, so that a
#: value is held to that sooner than elsewhere (`ValueSettings.sink`).
SINK = 3.0


@dataclass(frozen=True)
class NeuronPatch(Method):
    """Facts with one id or one subject are wordings of one thing: one switch, one value trained on
    all of them. In a layer with routed experts it has a switch in every expert that fires at one of
    them, and what they write is divided by their gates there: whichever of them the router chooses,
    an unseen wording gets its value.

    Attributes:
        layers: None: the calibration's, or about a quarter up (8 of 30), where wordings of one
            thing were best told apart from other texts. Several, for more facts than one layer's
            neurons can hold, are filled from below: switches above a value that is new may close at
            it, and a value that must avoid them is hard to find.
        experts: which are written where a layer has some: those that tokens are "routed" to, or the
            "shared" one, which every token passes: one switch a fact, in a larger MLP.
        target: how the values are found. A clamp and steps of None are the preset's, but at least
            2 and 30 (nothing else feels the value).
        runtime: of the value optimisation.
        contrast: texts at whose tokens the switches must stay open, besides shipped ones and the
            corpus.
        corpus, tokens: what else must keep them open, and what the rewritten neurons' old work is
            measured on.
        recalled: so many facts of a history, drawn for each edit, must keep them open too.
        sharpness, width: of the switches (`parts.Switch`); ridge: of their scores.
        seed: of the shipped texts and of the model's own samples.
    """

    layers: tuple[int, ...] | None = None
    experts: Literal["routed", "shared"] = "routed"
    target: HiddenState = field(default_factory=HiddenState)
    runtime: Runtime = field(default_factory=lambda: Runtime(draft=True))
    contrast: tuple[str, ...] = ()
    corpus: CorpusLike = "self"
    tokens: Count = 30_000
    recalled: Whole = 1000
    sharpness: Positive = 50.0
    width: Positive = 0.25
    ridge: NotNegative = 1e-5
    seed: Whole = 0

    name: ClassVar[str] = "Neuron-Patch"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.target) is not HiddenState:
            raise EditError(
                f"{self.name} writes one value into one layer: target must be hidden-state, not "
                f"{self.target.kind}"
            )

    @classmethod
    def migrate(cls, record: dict[str, Any], version: int) -> dict[str, Any]:
        """Version 1 had the target and the runtime as one field, `values`."""
        if (values := record.pop("values", None)) is not None:
            numbers = ValueSettings.from_dict(values)
            record["target"] = HiddenState.of(numbers)
            record["runtime"] = Runtime(numbers.budget, numbers.draft)
        return record

    def view(self, model: EditableModel) -> EditableModel:
        return model.editing(self.experts)

    def read_ahead(self, model: EditableModel, progress: bool = True) -> None:
        if Corpus.parse(self.corpus).is_self:
            windows(model, self.corpus, self.tokens, seed=self.seed, progress=progress)

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        parts = self._shared_out(model, group_by_wording(facts))
        gates = {layer: self._gates(model, layer, groups) for layer, groups in parts.items()}
        for layer, groups in parts.items():
            self._check_experts(model, layer, groups, gates[layer])
        experts = {layer: experts_of(own) for layer, own in gates.items()}
        sets = [
            self._ordinary(model, experts, progress),
            everywhere(model, self._near(model, facts), experts),
        ]
        if history and (recalled := self._recalled(model, facts, history.facts)):
            sets.append(everywhere(model, recalled, experts))
        edits: list[Edit] = []
        with ExitStack() as applied:  # what a layer writes changes what those above it are given
            for layer, groups in parts.items():
                others = [found[layer] for found in sets]
                beside = [part for at, part in parts.items() if at != layer]
                if rows := [row.ids for part in beside for row in self._rows(model, layer, part)]:
                    others.append(everywhere(model, rows, {layer: (None,)})[layer])
                homes = [Home.of(own, others[0], layer) for own in gates[layer]]
                targets = self._targets(model, layer, groups, progress)
                edits.append(self._edit(model, layer, groups, homes, targets, others))
                if len(edits) < len(parts):
                    applied.enter_context(edits[-1].applied_to(model))
        return edits[0] if len(edits) == 1 else together(edits)

    @accepts_model
    def compute_each(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        statistics: KeyStatistics | None = None,
        *,
        which: Sequence[int] | None = None,
        progress: bool = True,
    ) -> Iterator[Edit]:
        """One independent edit a fact, in the first layer; the corpus is read once and the values
        are optimised together, also where the edits of some are not wanted (`which`).
        """
        check_kinds(statistics)
        model = self.view(model)
        groups = [check_facts([fact]) for fact in as_facts(facts)]
        if not groups:
            return iter(())
        layer = self._layers(model)[0]
        gates = self._gates(model, layer, groups)
        targets = self._targets(model, layer, groups, progress)
        ordinary = self._ordinary(model, {layer: experts_of(gates)}, progress)[layer]
        homes = [Home.of(own, ordinary, layer) for own in gates]

        def made(i: int) -> Edit:
            near = everywhere(model, self._near(model, groups[i]), {layer: homes[i].experts})
            others = [ordinary, near[layer]]
            edit = self._edit(model, layer, [groups[i]], [homes[i]], targets.select([i]), others)
            return self.recorded(edit, model, statistics)

        return map(made, range(len(groups)) if which is None else which)

    def _shared_out(
        self, model: EditableModel, groups: list[list[Fact]]
    ) -> dict[int, list[list[Fact]]]:
        """Which layer writes which groups: from below, each until a quarter of its neurons is
        written; what is left over, the emptiest first.

        Raises:
            EditError: the layers have no room for all of them; several layers, one of which has
                routed experts.
        """
        layers = self._layers(model)
        if mixed := [layer for layer in layers if model.layout.experts(layer) is not None]:
            if len(layers) > 1:
                raise EditError(
                    f"{self.name} writes routed experts in one layer, got {list(layers)}; take "
                    f"layer {mixed[0]} alone"
                )
            return {layers[0]: groups}  # the room is that of each expert
        rooms = {layer: self._rooms(model, layer, groups[:1]) for layer in layers}
        total = sum(whole for _, whole in rooms.values())
        if len(groups) > total:
            raise EditError(
                f"{len(groups)} subjects are more than the neurons of {named('layer', layers)} "
                f"hold beside what is written there: {total}, a quarter of those that are free "
                "and at most half of all; "
                "name more layers (layers=, --layer 6-12), or write fewer facts"
            )
        shares, left = dict.fromkeys(layers, 0), len(groups)
        emptiest = sorted(layers, key=lambda layer: -rooms[layer][1])
        for part, order in enumerate((layers, emptiest)):
            for layer in order:
                more = min(rooms[layer][part] - shares[layer], left)
                shares[layer] += more
                left -= more
        rest = iter(groups)  # from below upwards, so that the facts of an edit keep their order
        return {layer: list(islice(rest, n)) for layer, n in shares.items() if n}

    def _check_experts(
        self,
        model: EditableModel,
        layer: int,
        groups: list[list[Fact]],
        gates: Sequence[Mapping[int | None, Tensor]],
    ) -> None:
        """Raise EditError where more groups fire a routed expert than it has room for."""
        for expert in experts_of(gates):
            if expert is None:
                continue
            own = [group for group, fired in zip(groups, gates) if expert in fired]
            _, most = self._rooms(model, layer, own[:1], expert)
            if len(own) > most:
                shared = ', or into the shared expert (experts="shared")'
                raise EditError(
                    f"{len(own)} of {number_of(len(groups), 'subject')} are given to expert "
                    f"{expert} of layer {layer}, whose neurons have room for {most}; write fewer "
                    f"facts{shared if layer in model.layout.shared else ''}"
                )

    def _rooms(
        self,
        model: EditableModel,
        layer: int,
        groups: list[list[Fact]],
        expert: int | None = None,
    ) -> tuple[int, int]:
        """How many subjects the layer's MLP, or one expert, can take until a quarter of its neurons
        is written, and how many at most; its wiring is found at those of `groups`.
        """
        seen = at_lookup(model, self._rows(model, layer, groups), layer, expert)
        wiring = Wiring.of(model, layer, seen.inputs, seen.keys, expert)
        neurons = len(step_of(wiring.act, self.sharpness, self.width, seen.inputs)[0])
        width, taken = wiring.gate.count, len(patched(wiring))
        most = room(width, taken) // neurons
        return min(most, max(0, room(width, 0) - taken) // neurons), most

    def _rows(
        self, model: EditableModel, layer: int, groups: Sequence[Sequence[Fact]]
    ) -> list[Row]:
        """The wordings of some groups in the values' contexts."""
        contexts = self._values(model, layer).contexts
        return [row for g in groups for fact in g for row in prompt_rows(model, fact, contexts)]

    def _targets(
        self, model: EditableModel, layer: int, groups: Sequence[Sequence[Fact]], progress: bool
    ) -> Targets:
        title = f"{self.name}: optimising values"
        with bar(title, len(groups), "values", show=progress) as advance:
            return optimise_values(
                model, groups, layer, self._values(model, layer), progress=advance
            )

    def _ordinary(
        self,
        model: EditableModel,
        experts: Mapping[int, Collection[int | None]],
        progress: bool,
    ) -> dict[int, Inputs]:
        """What the layers' MLPs are given in ordinary text."""
        texts = windows(model, self.corpus, self.tokens, seed=self.seed, progress=progress)
        with bar(f"{self.name}: reading texts", len(texts), "texts", show=progress) as advance:
            return everywhere(model, texts, experts, advance)

    def _near(self, model: EditableModel, facts: Sequence[Fact]) -> list[list[int]]:
        """Texts that are like the facts', and at which their switches must stay open."""
        near = [*self.contrast, *sentences(), *openings(facts, count=200, seed=self.seed)]
        return [model.row(text).ids for text in near]

    def _recalled(
        self, model: EditableModel, facts: Sequence[Fact], told: Sequence[Fact]
    ) -> list[list[int]]:
        """The same of facts on other subjects that the model was told before: their prompts, up to
        the subject.
        """
        subjects = {fact.subject for fact in facts}
        others = [fact for fact in told if fact.subject not in subjects]
        drawn = random.Random(self.seed).sample(others, min(self.recalled, len(others)))
        rows = [row for fact in drawn for row in prompt_rows(model, fact, ["{}"])]
        return [row.ids[: (row.subject or 0) + 1] for row in rows]

    def _gates(
        self, model: EditableModel, layer: int, groups: Sequence[Sequence[Fact]]
    ) -> list[dict[int | None, Tensor]]:
        """For each group, the gates `[wordings]` of the routed experts that fire at any of its
        wordings; `{None: ones}`: the layer's MLP is dense.
        """
        rows = [self._rows(model, layer, [group]) for group in groups]
        if model.layout.experts(layer) is None:
            return [{None: torch.ones(len(own))} for own in rows]
        found = chosen(model, [row for own in rows for row in own], layer)
        return [
            {int(expert): own[:, expert] for expert in own.sum(0).nonzero()[:, 0]}
            for own in found.split([len(own) for own in rows])
        ]

    def _edit(
        self,
        model: EditableModel,
        layer: int,
        groups: list[list[Fact]],
        homes: list[Home],
        targets: Targets,
        others: Sequence[Inputs],
    ) -> Edit:
        """The groups in their layer; `others`: what its MLP is given in texts at which the switches
        must stay open.
        """
        facts = [fact for group in groups for fact in group]
        values = self._values(model, layer)
        experts = list(dict.fromkeys(expert for home in homes for expert in home.experts))
        written = [
            self._written(
                model,
                layer,
                expert,
                {i: groups[i] for i, home in enumerate(homes) if expert in home.experts},
                targets.delta
                / torch.tensor([home.gate for home in homes]).to(targets.delta)[:, None],
                [texts[expert] for texts in others if expert in texts],
            )
            for expert in experts
        ]
        closed = torch.cat(
            [
                sum(one.closed[i] for one in written if i in one.closed) / home.gate  # type: ignore[misc]
                for i, home in enumerate(homes)
            ]
        )
        reported = {
            "gain": float(closed.mean()),
            "lowest_gain": float(closed.min()),
            "freed": max(one.freed.loss for one in written),
            "leak": max(one.leak for one in written),
        }
        factors = {layer: side_by_side(*(one.wide(model, layer) for one in written))}
        report = self._report(model, layer, values, targets, factors, reported)
        report.details["neurons"] = {one.place(layer): one.freed.neurons for one in written}
        report.warnings = [
            *([] if self.layers else origin_warnings(model, preset_for(model), [layer])),
            *sink_warnings(model, [layer], True),
            *first_token_warnings(model, facts, values.contexts, False),
            *outcome_warnings(report, targets, groups),
        ]
        return Edit(
            self.name,
            {name: change_of(raw) for one in written for name, raw in one.changes.items()},
            facts,
            model.fingerprint,
            report,
            model.keys(self._rows(model, layer, groups), [layer])[0],
            frozenset(
                f"{one.place('layer ' + str(layer))} neuron {neuron}"
                for one in written
                for neuron in one.freed.neurons
            ),
            plan={layer: targets.delta[[i for i, group in enumerate(groups) for _ in group]]},
        )

    def _written(
        self,
        model: EditableModel,
        layer: int,
        expert: int | None,
        groups: Mapping[int, list[Fact]],
        values_of: Tensor,
        others: Sequence[tuple[Tensor, Tensor]],
    ) -> Written:
        """Some of the groups, by number, in one MLP: the layer's, or one expert's.

        Args:
            values_of: `[groups, hidden]` what each group's switches write, for a gate of 1.
            others: inputs and moment of ordinary text, and of each other set of texts.
        """
        owned = [
            (row, place)
            for place, group in enumerate(groups.values())
            for row in self._rows(model, layer, [group])
        ]
        seen = at_lookup(model, [row for row, _ in owned], layer, expert)
        own, owner = seen.inputs, torch.tensor([i for _, i in owned], device=seen.inputs.device)
        wiring = Wiring.of(model, layer, own, seen.keys, expert)
        inputs, moments = zip(*others)
        switch = Switch.of(
            wiring,
            separate(own, owner, inputs, self.ridge),
            [*inputs, own],
            self.sharpness,
            self.width,
        )
        name = model.layout.weight_name(layer)
        name = name if expert is None else slice_name(name, expert)
        weight = model.stored(name)
        freed = free_neurons(
            weight.T if model.is_transposed(name) else weight,
            torch.stack(moments).mean(0),
            switch.neurons * len(groups),
            patched(wiring),
        )
        factors, reads = rewritten(wiring, switch, freed, values_of[list(groups)].to(own))
        closed = switch.at(own).gather(1, owner[:, None])[:, 0] * seen.gates
        return Written(
            expert,
            freed,
            closed={i: closed[owner == place] for place, i in enumerate(groups)},
            leak=max(float(switch.at(x).abs().max()) for x in inputs),
            factors=factors,
            changes={name: factors, **reads},
        )

    def _values(self, model: EditableModel, layer: int) -> ValueSettings:
        """The numbers to optimise with."""
        problem = problem_of(model, [layer])
        found = self.target.resolved(preset_for(model), self.runtime, problem)
        return replace(
            found,
            clamp=max(2.0, found.clamp) if self.target.clamp is None else found.clamp,
            sink=SINK,
            steps=max(30, found.steps) if self.target.steps is None else found.steps,
        )

    def _layers(self, model: EditableModel) -> tuple[int, ...]:
        """Where it writes, ascending."""
        layers = tuple(sorted(set(self.layers or (preset_for(model).neuron_layer,))))
        model.check_layers(layers)
        return layers

    def _report(
        self,
        model: EditableModel,
        layer: int,
        values: ValueSettings,
        targets: Targets,
        factors: dict[int, tuple[Tensor, Tensor]],
        chosen: dict[str, float],
    ) -> EditReport:
        settings = {
            "layers": [layer],
            "values": values.to_dict(),
            "sharpness": self.sharpness,
            "width": self.width,
        }
        return EditReport(
            gain=chosen["gain"],
            relative_norm={str(k): norm for k, norm in relative_norms(model, factors).items()},
            layers={str(layer): chosen},
            planned_nll=float(targets.nll.mean()),
            steps=targets.steps.tolist(),
            details={"settings": settings},
        )
