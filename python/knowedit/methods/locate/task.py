"""What an editor works on, once settings and input have been checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from knowedit.edits.history import History
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.locate.checks import first_token_warnings
from knowedit.methods.locate.keys import GroupKeys
from knowedit.methods.locate.values import ValueSettings
from knowedit.models.editable import EditableModel
from knowedit.models.families import preset_for
from knowedit.statistics import SINK_RATIO, KeyStatistics
from knowedit_kernels import EditSolver

if TYPE_CHECKING:
    from knowedit.methods.locate.recipe import LocateThenEdit


@dataclass(frozen=True)
class Task:
    """One edit to be computed.

    Attributes:
        groups: facts that share a value.
        layers: edited layers, ascending; values are optimised at the last one.
        values: of the value optimisation.
        statistics: of `layers`; empty for an editor that needs none.
        history: of earlier edits, all applied to `model`.
        warnings: so far.
        progress: show bars.
    """

    model: EditableModel
    groups: list[list[Fact]]
    layers: tuple[int, ...]
    values: ValueSettings
    statistics: KeyStatistics
    history: History | None = None
    warnings: tuple[str, ...] = ()
    progress: bool = True

    @property
    def facts(self) -> list[Fact]:
        return [fact for group in self.groups for fact in group]


@dataclass
class Written:
    """Factors `{layer: (U [hidden, groups], V [d_ff, groups])}`, the keys `{layer: [n, d_ff]}` they
    were written at, and what was chosen and measured: a dictionary a layer (`gain`, `lowest_gain`,
    ...), and one for the whole edit. The layers' solvers and group keys (`solved`) are for editors
    that go on from a stock write."""

    factors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    solved: dict[int, tuple[EditSolver, GroupKeys]] = field(default_factory=dict)

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
        self.layers[str(layer)] = {
            **chosen,
            "gain": float(gain.mean()),
            "lowest_gain": float(gain.min()),
        }


def prepare(
    editor: LocateThenEdit,
    model: EditableModel,
    groups: list[list[Fact]],
    statistics: KeyStatistics | None,
    history: History | None = None,
    progress: bool = True,
) -> Task:
    """The task of writing `groups` with `editor`'s settings, or the preset's where it has none.

    Raises:
        EditError: no layers, no statistics, a layer on the attention sink, a history of another
            model.
        StatisticsError: statistics of another model or other layers. ModelError: a layer that does
            not exist.
    """
    preset, layers = preset_for(model), layers_of(editor, model)
    values, warnings = editor.values or ValueSettings(**preset.values), []
    if not preset.measured and (editor.layers is None or editor.values is None):
        chosen = (
            "by calibration" if preset.origin == "calibrated" else "as published for this shape"
        )
        warnings.append(
            f"{model.name} has no measured preset: layer(s) {list(layers)} and value settings "
            f"are chosen {chosen}"
        )
    if statistics is None:
        if editor.needs_statistics:
            raise EditError(
                f"{editor.name} needs key statistics of layers {list(layers)}: pass "
                f"key_statistics(model, ...)"
            )
    else:
        statistics.check(model, layers)
        warnings += _sinks(statistics, layers, editor.allow_sinks)
    facts = [fact for group in groups for fact in group]
    warnings += first_token_warnings(model, facts, values.contexts, editor.allow_sinks)
    return Task(
        model,
        groups,
        layers,
        values,
        statistics or KeyStatistics({}),
        history,
        tuple(warnings),
        progress,
    )


def layers_of(editor: LocateThenEdit, model: EditableModel) -> tuple[int, ...]:
    """The layers that `editor` edits in `model`, ascending. Raises EditError for none, ModelError
    for one that is not there.
    """
    preset = preset_for(model)
    chosen = (
        (preset.one_layer,)
        if editor.one_layer
        else preset.shared_layers
        if editor.shared_layers
        else preset.layers
    )
    layers = tuple(sorted(set(editor.layers))) if editor.layers is not None else chosen
    if not layers:
        raise EditError("layers is empty; name at least one layer")
    model.check_layers(layers)
    return layers


def _sinks(statistics: KeyStatistics, layers: Sequence[int], allowed: bool) -> list[str]:
    """A warning for each layer on the attention sink. Raises EditError when they are not
    allowed.
    """
    warnings = []
    for layer in filter(statistics.is_sink, layers):
        said = (
            f"layer {layer} carries the attention sink (first-token keys are "
            f"{statistics.sink_ratio(layer):.0f}x "
            f"longer than the others, limit {SINK_RATIO:.0f}x)"
        )
        if not allowed:
            raise EditError(f"{said}; choose another layer, or pass allow_sinks=True")
        warnings.append(said)
    return warnings
