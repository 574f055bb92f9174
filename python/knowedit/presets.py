"""What works on which model: measured presets, and a calibrated default for every other one.

A preset is chosen by the model's shape (type, layers, hidden size), never by its name. Published hyper-parameters do not
transfer between models - MEMIT's lambda = 15,000 is a no-op on SmolLM2 - so the default asks for none: lambda follows
from the gain, the step of the value optimisation from the size of the hidden state, the layer from the depth.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model import EditableModel
from .targets import ValueSettings


@dataclass(frozen=True)
class Preset:
    """Settings for one model.

    Attributes:
        layers: edited together (values are optimised at the last of them).
        one_layer: for methods that edit one layer.
        statistics_layers: those `key_statistics` collects by default.
        values: of the value optimisation.
        measured: False for the calibrated default.
    """

    layers: tuple[int, ...]
    one_layer: int
    statistics_layers: tuple[int, ...]
    values: ValueSettings
    measured: bool = True


_SHAPES = {
    # benchmarks/quality.py: 100 CounterFact records; layers 3-6 are good, 0-2, 9, 11 and 28 carry the attention sink
    ("llama", 30, 576): Preset((5,), 5, (4, 5, 6, 7, 8), ValueSettings(steps=20, lr=0.5)),
}


def preset_for(model: EditableModel) -> Preset:
    """The measured preset of this shape, or a calibrated default with `measured=False`."""
    config = model.hf.config
    shape = (config.model_type, len(model.layers), model.hidden)
    return _SHAPES.get(shape) or calibrated(model)


def calibrated(model: EditableModel) -> Preset:
    """One layer about a sixth up, where the published models of every size store facts of a subject."""
    depth = len(model.layers)
    layer = min(max(1, round(depth / 6)), depth - 2)
    return Preset((layer,), layer, (layer,), ValueSettings(lr=None), measured=False)
