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
        origin: "measured" by our benchmarks, "published" by others and not measured by us, or
            "calibrated".
    """

    layers: tuple[int, ...]
    one_layer: int
    statistics_layers: tuple[int, ...]
    values: Mapping[str, Any]
    origin: Literal["measured", "published", "calibrated"] = "measured"

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """For methods whose layers share the norm (RoSE): four around the one layer; measured on
        SmolLM2-135M only.
        """
        return tuple(range(max(1, self.one_layer - 2), max(1, self.one_layer - 2) + 4))

    @property
    def measured(self) -> bool:
        return self.origin == "measured"


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
