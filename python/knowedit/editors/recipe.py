"""Locate-then-edit as one recipe of three parts: a metric, a target optimiser, a spread over layers.

    facts -> groups -> values (targets.py) -> for each layer: keys K, residual R -> solver: R A -> Edit

A method is a subclass that fills in the parts; see `memit.py` for the shortest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from knowedit_kernels import EditSolver

from ..edit import Edit, relative_norms
from ..errors import EditError
from ..facts import Fact, check_facts
from ..groups import group_by_subject, group_keys
from ..model import EditableModel
from ..presets import preset_for
from ..progress import bar
from ..statistics import SINK_RATIO, KeyStatistics
from ..targets import Targets, ValueSettings, optimise_values
from .notes import first_token_warnings, outcome_warnings


@dataclass(frozen=True)
class LocateThenEdit(ABC):
    """Common settings. None means: from the model's preset, or calibrated (the choice is stored in `Edit.report`).

    Attributes:
        layers: edited layers, ascending; values are optimised at the last one.
        values: of the value optimisation.
        merge_subjects: facts of one subject get one value and one key.
        mean_keys: one mean key over contexts a subject, as published; else one key a context, all with the same value.
        allow_sinks: edit a layer that carries the attention sink, or a subject that is the very first token.
    """

    layers: tuple[int, ...] | None = None
    values: ValueSettings | None = None
    merge_subjects: bool = True
    mean_keys: bool = True
    allow_sinks: bool = False

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = True

    @abstractmethod
    def solve(self, statistics: KeyStatistics | None, layer: int, keys: Tensor) -> tuple[EditSolver, dict[str, Any]]:
        """The solver for `keys` `[d_ff, n]` at `layer`, and what was chosen for it (for the report)."""

    def spread(self, residual: Tensor, remaining: int) -> Tensor:
        """The share of the residual this layer writes when `remaining` layers, this one included, are left."""
        return residual / remaining

    def compute(
        self, model: EditableModel, facts: Sequence[Fact], statistics: KeyStatistics | None = None, *, progress: bool = True
    ) -> Edit:
        """Compute the edit; the model is not touched.

        Args:
            statistics: key statistics of the edited layers (`key_statistics`).

        Raises:
            FactError: duplicate or contradictory facts. StatisticsError: missing, or of another model.
            EditError: a layer or subject on the attention sink; a subject the tokenizer splits oddly.
        """
        facts = check_facts(list(facts))
        layers, values, warnings = self._settings(model, statistics, facts)
        groups = group_by_subject(facts, self.merge_subjects)
        with bar(f"{self.name}: optimising values", len(groups), "subjects", show=progress) as advance:
            targets = optimise_values(model, groups, layers[-1], values, progress=advance)
        return self._write(model, groups, targets, statistics, layers, values, warnings)

    def compute_each(
        self, model: EditableModel, facts: Sequence[Fact], statistics: KeyStatistics | None = None, *, progress: bool = True
    ) -> list[Edit]:
        """One independent edit a fact; the values of all of them are optimised together, which is much faster."""
        layers, values, _ = self._settings(model, statistics, facts)
        groups = [check_facts([fact]) for fact in facts]
        with bar(f"{self.name}: optimising values", len(groups), "facts", show=progress) as advance:
            targets = optimise_values(model, groups, layers[-1], values, progress=advance)
        edits = []
        for i, group in enumerate(groups):
            warnings = self._settings(model, statistics, group)[2]
            edits.append(self._write(model, [group], targets.select([i]), statistics, layers, values, warnings))
        return edits

    def _write(
        self,
        model: EditableModel,
        groups: Sequence[Sequence[Fact]],
        targets: Targets,
        statistics: KeyStatistics | None,
        layers: tuple[int, ...],
        values: ValueSettings,
        warnings: list[str],
    ) -> Edit:
        """From optimised values to factors, layer by layer."""
        factors: dict[int, tuple[Tensor, Tensor]] = {}
        solved: dict[str, Any] = {}
        for i, layer in enumerate(layers):
            with model.virtual(factors):
                found = group_keys(model, groups, layer, layers[-1], values.contexts, mean=self.mean_keys)
            residual = targets.delta if len(layers) == 1 else targets.value + targets.delta - found.outputs
            solver, chosen = self.solve(statistics, layer, found.keys.T)
            # keys of one group share their residual, so their read-ins add up: the rank is the number of groups
            read_in = torch.zeros(len(groups), model.d_ff, dtype=solver.A.dtype, device=solver.A.device)
            read_in.index_add_(0, found.owner.to(read_in.device), solver.A)
            left = self.spread(residual, len(layers) - i).T.to(read_in)
            factors[layer] = left.float(), read_in.T.contiguous().float()
            gain = (read_in @ found.keys.T.to(read_in)).gather(0, found.owner[None].to(read_in.device))[0]
            solved[str(layer)] = {**chosen, "gain": float(gain.mean()), "lowest_gain": float(gain.min())}
        report = {
            "settings": {"layers": list(layers), "values": asdict(values), "merge_subjects": self.merge_subjects},
            "layers": solved,
            "gain": min(entry["gain"] for entry in solved.values()),
            "relative_norm": {str(k): v for k, v in relative_norms(model, factors).items()},
            "planned_nll": float(targets.nll.mean()),
            "steps": targets.steps.tolist(),
        }
        report["warnings"] = warnings + outcome_warnings(report, targets, groups)
        facts = [fact for group in groups for fact in group]
        return Edit(self.name, factors, facts, model.fingerprint, report)

    def _settings(
        self, model: EditableModel, statistics: KeyStatistics | None, facts: Sequence[Fact]
    ) -> tuple[tuple[int, ...], ValueSettings, list[str]]:
        preset = preset_for(model)
        layers = tuple(sorted(self.layers)) if self.layers is not None else preset.layers
        if not layers:
            raise EditError("layers is empty; name at least one layer")
        model.check_layers(layers)
        values, warnings = self.values or preset.values, []
        if not preset.measured and (self.layers is None or self.values is None):
            warnings.append(
                f"{model.name} has no measured preset: layer(s) {list(layers)} and the step size were chosen by calibration"
            )
        if statistics is None:
            if self.needs_statistics:
                raise EditError(f"{self.name} needs key statistics of layers {list(layers)}: pass key_statistics(model, ...)")
        else:
            statistics.check(model, layers)
            for layer in layers:
                if statistics.is_sink(layer):
                    said = (
                        f"layer {layer} carries the attention sink (first-token keys are {statistics.sink_ratio(layer):.0f}x "
                        f"longer than the others, limit {SINK_RATIO:.0f}x)"
                    )
                    if not self.allow_sinks:
                        raise EditError(f"{said}; choose another layer, or pass allow_sinks=True")
                    warnings.append(said)
        return layers, values, warnings + first_token_warnings(model, facts, values.contexts)
