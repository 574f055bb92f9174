"""What works on which model: measured presets, published starting points, and a calibrated default
for every other one.

A preset is chosen by the model's shape (type, layers, hidden size, key size), never by its name.
Published hyper-parameters do not transfer between models - MEMIT's lambda = 15,000 realises 15 % of
a change on SmolLM2 - so a preset has none for the metric: lambda and beta follow from the gain
unless they are given. The calibrated default also sets the step of the value optimisation from the
size of the hidden state, and the layer from the depth.

A family is one file here, in the table below. It holds only what the model's structure cannot tell
(`models.structure` finds the parts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowedit.models.families import gpt2, gptj, llama, mistral, qwen2
from knowedit.models.families.preset import Preset, Presets

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

#: Presets by the `model_type` of a transformers configuration.
FAMILIES: dict[str, Presets] = {
    "gpt2": gpt2.PRESETS,
    "gptj": gptj.PRESETS,
    "llama": llama.PRESETS,
    "mistral": mistral.PRESETS,
    "qwen2": qwen2.PRESETS,
}


def preset_for(model: EditableModel) -> Preset:
    """The preset of this shape, or a calibrated default."""
    shape = (len(model.layers), model.hidden, model.d_ff)
    return FAMILIES.get(model.hf.config.model_type, {}).get(shape) or calibrated(model)


def calibrated(model: EditableModel) -> Preset:
    """One layer about a sixth up, where the published models of every size store facts of a
    subject.
    """
    depth = len(model.layers)
    layer = min(max(1, round(depth / 6)), depth - 2)
    return Preset((layer,), layer, (layer,), {"lr": None}, "calibrated")
