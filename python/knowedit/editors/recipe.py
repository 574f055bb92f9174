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

from knowedit_kernels.solver import EditSolver

from ..edit import Edit, as_float32, group_by_subject, relative_norms
from ..errors import EditError
from ..facts import Fact, check_facts
from ..model import EditableModel, Row
from ..presets import preset_for
from ..progress import bar
from ..statistics import SINK_RATIO, KeyStatistics
from ..targets import Targets, ValueSettings, optimise_values, prompt_rows

LOW_GAIN = 0.9
LARGE_NORM = 0.8


@dataclass(frozen=True)
class LocateThenEdit(ABC):
    """Common settings. None means: from the model's preset, or calibrated (the choice is stored in `Edit.report`).

    Attributes:
        layers: edited layers, ascending; values are optimised at the last one.
        values: of the value optimisation.
        merge_subjects: facts of one subject get one value and one key.
        allow_sinks: edit a layer that carries the attention sink, or a subject that is the very first token.
    """

    layers: tuple[int, ...] | None = None
    values: ValueSettings | None = None
    merge_subjects: bool = True
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
                keys, now = group_keys(model, groups, layer, layers[-1], values.contexts)
            residual = targets.delta if len(layers) == 1 else targets.value + targets.delta - now
            solver, chosen = self.solve(statistics, layer, keys.T.double())
            left, right = solver.apply(self.spread(residual, len(layers) - i).T.double())
            factors[layer] = as_float32((left, right.T.contiguous()))
            gain = solver.gain
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


def group_keys(
    model: EditableModel, groups: Sequence[Sequence[Fact]], layer: int, last: int, contexts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Each group's mean key at `layer` over facts and contexts `[g, d_ff]`, and the mean output of layer `last` at the
    bare prompts `[g, hidden]`, in one pass."""
    rows: list[Row] = []
    owner: list[int] = []
    bare: list[int] = []
    for g, group in enumerate(groups):
        for fact in group:
            found = prompt_rows(model, fact, contexts)
            bare.append(len(rows))
            rows += found
            owner += [g] * len(found)
    keys, outputs = model.keys(rows, sorted({layer, last}), outputs=True)
    assert outputs is not None
    index, bare_index = torch.tensor(owner), torch.tensor(bare)

    def mean(values: Tensor, groups_of: Tensor) -> Tensor:
        values, groups_of = values.double(), groups_of.to(values.device)
        sums = torch.zeros(len(groups), values.shape[1], dtype=values.dtype, device=values.device)
        return sums.index_add(0, groups_of, values) / torch.bincount(groups_of, minlength=len(groups))[:, None]

    return mean(keys[layer], index), mean(outputs[bare_index.to(outputs.device)], index[bare_index]).float()


def first_token_warnings(model: EditableModel, facts: Sequence[Fact], contexts: Sequence[str]) -> list[str]:
    """Facts whose bare prompt has its subject at position 0, where the attention sink sits."""
    at_start = [fact.subject for fact in facts if model.row(fact.text, fact.subject).subject == 0]
    if not at_start:
        return []
    return [
        f"{len(at_start)} subject(s) are the prompt's very first token ({', '.join(map(repr, at_start[:3]))}), where a causal "
        "model keeps its attention sink; their keys and values are taken from the prompts with a context in front"
    ]


def outcome_warnings(report: dict[str, Any], targets: Targets, groups: Sequence[Sequence[Fact]]) -> list[str]:
    """What a careful user wants to know before trusting the edit."""
    warnings = []
    merged = [group[0].subject for group in groups if len(group) > 1]
    if merged:
        warnings.append(f"{len(merged)} subject(s) with several facts share one value each ({', '.join(merged[:3])}, ...)")
    if report["gain"] < LOW_GAIN:
        warnings.append(f"only {report['gain']:.0%} of the planned change is realised; lower the weight, or raise the gain")
    for layer, norm in report["relative_norm"].items():
        if norm > LARGE_NORM:
            warnings.append(
                f"layer {layer} changes by {norm:.0%} of its own norm; spread over more layers or edit fewer facts at once"
            )
    worst = int(targets.nll.argmax())
    if float(targets.nll[worst]) > 1.0:
        warnings.append(
            f"the value of {groups[worst][0].subject!r} did not converge (NLL {float(targets.nll[worst]):.1f}); "
            "more steps or a larger clamp may help"
        )
    return warnings
