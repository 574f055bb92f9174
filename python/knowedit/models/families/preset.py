"""`Preset`: what works on one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Preset:
    """Settings for one model.

    Attributes:
        layers: edited together (values are optimised at the last of them).
        one_layer: for methods that edit one layer.
        statistics_layers: those `key_statistics` collects by default.
        values: of the optimisation of hidden states, by keyword (`steps`, `lr`, `clamp`,
            `weight_decay`); the optimiser's own defaults for what is not named.
        origin: "measured" by our benchmarks; "calibrated" on these weights, or on others of
            this "shape"; "published" by others and not measured by us; or a "rule of thumb".
        shared_layers: for methods whose layers share the norm of a change (RoSE, Look-Ahead).
        neuron_layer: for NeuronPatch.
    """

    layers: tuple[int, ...]
    one_layer: int
    statistics_layers: tuple[int, ...]
    values: Mapping[str, Any]
    origin: Literal["measured", "calibrated", "shape", "published", "rule of thumb"] = "measured"
    shared_layers: tuple[int, ...] = ()
    neuron_layer: int = 0

    @property
    def measured(self) -> bool:
        """Whether it was measured on this model."""
        return self.origin in ("measured", "calibrated")

    @property
    def fitted(self) -> bool:
        """Whether its numbers suit the place where this model's values are planned."""
        return self.origin in ("calibrated", "shape")


#: A model's shape: layers, hidden size, key size (`d_ff`).
Shape = tuple[int, int, int]
Presets = Mapping[Shape, Preset]


def published(
    layers: range, one_layer: int, steps: int, lr: float, clamp: float, weight_decay: float
) -> Preset:
    """Settings of a method's own code, or of EasyEdit's; not measured by us."""
    values = {"steps": steps, "lr": lr, "clamp": clamp, "weight_decay": weight_decay}
    layers_read = tuple(sorted({*layers, one_layer}))
    return Preset(tuple(layers), one_layer, layers_read, values, "published")
