"""What works on which model: its own calibration, a measured preset of its shape, and a rule of
thumb for every other one.

A calibration (`models.calibration`) belongs to weights, a preset (`models.families`) to a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from knowedit.models.calibration import (
    Calibration,
    calibration_of,
    calibration_of_shape,
    shape_of,
    sinks_of,
)
from knowedit.models.editable import EditableModel
from knowedit.models.families import preset_of_shape
from knowedit.models.families.preset import Preset


def preset_for(model: EditableModel) -> Preset:
    """The model's own calibration; else the preset of its shape, or a calibration of another model
    of that shape; else a rule of thumb.
    """
    own = calibration_of(model)
    if own is not None:
        return calibrated(own, "calibrated")
    like = calibration_of_shape(model)
    if like is not None and preset_of_shape(*shape_of(model)) is None:
        return calibrated(like, "shape")
    return starting_point(model)


def starting_point(model: EditableModel) -> Preset:
    """Where a calibration starts: the preset of the model's shape, or a rule of thumb."""
    known = preset_of_shape(*shape_of(model))
    return _completed(model, known) if known else rule_of_thumb(model)


def calibrated(found: Calibration, origin: Literal["calibrated", "shape"]) -> Preset:
    """The settings that a calibration chose."""
    chosen = found.choice
    values = {name: getattr(chosen, name) for name in ("steps", "lr", "clamp", "contexts")}
    layers = tuple(sorted({chosen.layer, *chosen.shared_layers}))
    return Preset(
        (chosen.layer,),
        chosen.layer,
        layers,
        values,
        origin,
        chosen.shared_layers,
        chosen.neuron_layer,
    )


def rule_of_thumb(model: EditableModel) -> Preset:
    """One layer about a sixth up, where the published models of every size store facts of a
    subject, or the nearest that carries no attention sink.
    """
    depth = len(model.layers)
    layer = _nearest(free_layers(model), min(max(1, round(depth / 6)), depth - 2))
    return _completed(model, Preset((layer,), layer, (layer,), {"lr": None}, "rule of thumb"))


def free_layers(model: EditableModel) -> list[int]:
    """The layers to choose from, ascending: those that can be edited and carry no attention sink,
    without layer 0, which sees little but the token itself; all that can be edited where there are
    no such layers.
    """
    sinks = sinks_of(model)
    free = [layer for layer in model.layout.editable if layer and not sinks.at(layer)]
    return free or list(model.layout.editable)


def _completed(model: EditableModel, preset: Preset) -> Preset:
    """With the layers that a shape's preset leaves to the model: four around the one layer to share
    a change, and one about a quarter up (8 of 30, where wordings of one thing were best told apart
    from other texts) for neurons.
    """
    free = free_layers(model)
    first = max(0, free.index(_nearest(free, preset.one_layer)) - 2)
    quarter = max(1, round(0.27 * len(model.layers)))
    return replace(
        preset,
        shared_layers=tuple(free[first : first + 4]),
        neuron_layer=_nearest(free, quarter),
    )


def _nearest(layers: Sequence[int], wanted: int) -> int:
    """The layer next to `wanted`, the lower one of two."""
    return min(layers, key=lambda layer: abs(layer - wanted))
