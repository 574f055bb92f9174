"""What works on which model: measured presets, published starting points, and a calibrated default
for every other one.

A preset is chosen by the model's shape (type, layers, hidden size, key size), never by its name.
Published hyper-parameters do not transfer between models - MEMIT's lambda = 15,000 realises 15 % of
a change on SmolLM2 - so a preset has none for the metric: lambda and beta follow from the gain
unless they are given. The calibrated default also sets the step of the value optimisation from the
size of the hidden state, and the layer from the depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class Preset:
    """Settings for one model.

    Attributes:
        layers: edited together (values are optimised at the last of them).
        one_layer: for methods that edit one layer.
        statistics_layers: those `key_statistics` collects by default.
        values: numbers of the value optimisation (`targets.HiddenState`).
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


def _published(
    layers: range, one_layer: int, steps: int, lr: float, clamp: float, weight_decay: float
) -> Preset:
    values = dict(steps=steps, lr=lr, clamp=clamp, weight_decay=weight_decay)
    return Preset(
        tuple(layers), one_layer, tuple(sorted({*layers, one_layer})), values, "published"
    )


#: (model type, layers, hidden size, key size). The published ones are those of the methods' own
#: code, or EasyEdit's.
_SHAPES = {
    # SmolLM2-135M, benchmarks/quality.py: 100 CounterFact records; layers 3-6 are good, 0-2, 9, 11
    # and 28 carry the sink
    ("llama", 30, 576, 1536): Preset((5,), 5, (3, 4, 5, 6, 7, 8), dict(steps=20, lr=0.5)),
    ("gpt2", 24, 1024, 4096): _published(
        range(8, 9), 8, 20, 0.5, 3, 0.5
    ),  # GPT-2 medium (ROME only)
    ("gpt2", 36, 1280, 5120): _published(
        range(12, 13), 12, 20, 0.5, 4, 0.5
    ),  # GPT-2 large (ROME only)
    ("gpt2", 48, 1600, 6400): _published(range(13, 18), 17, 20, 0.5, 0.75, 0.5),  # GPT-2 XL
    ("gptj", 28, 4096, 16384): _published(range(3, 9), 5, 25, 0.5, 0.75, 0.5),  # GPT-J 6B
    ("llama", 32, 4096, 11008): _published(
        range(4, 9), 5, 25, 0.5, 4, 1e-3
    ),  # Llama and Llama 2, 7B
    ("llama", 32, 4096, 14336): _published(
        range(4, 9), 5, 25, 0.1, 0.75, 0.5
    ),  # Llama 3 and 3.1, 8B
    ("llama", 28, 3072, 8192): _published(range(4, 9), 5, 25, 0.5, 4, 1e-3),  # Llama 3.2, 3B
    ("mistral", 32, 4096, 14336): _published(range(4, 9), 5, 25, 0.5, 4, 1e-3),  # Mistral 7B
    ("qwen2", 28, 3584, 18944): _published(range(4, 9), 5, 25, 0.5, 4, 1e-3),  # Qwen2.5 7B
}


def preset_for(model: EditableModel) -> Preset:
    """The preset of this shape, or a calibrated default."""
    shape = (model.hf.config.model_type, len(model.layers), model.hidden, model.d_ff)
    return _SHAPES.get(shape) or calibrated(model)


def calibrated(model: EditableModel) -> Preset:
    """One layer about a sixth up, where the published models of every size store facts of a
    subject.
    """
    depth = len(model.layers)
    layer = min(max(1, round(depth / 6)), depth - 2)
    return Preset((layer,), layer, (layer,), dict(lr=None), "calibrated")
