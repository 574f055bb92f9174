"""What works on which model: measured presets, published starting points, and a calibrated default
for every other one.

A preset is chosen by the model's shape (type, layers, hidden size, key size), never by its name.
Published hyper-parameters do not transfer between models - MEMIT's lambda = 15,000 realises 15 % of
a change on SmolLM2 - so a preset has none for the metric: lambda and beta follow from the gain
unless they are given. The calibrated default also sets the step of the value optimisation from the
size of the hidden state, and the layer from the depth.

A family is one file here, named as the `model_type` of its transformers configuration, that sets
`PRESETS`; being in the folder is enough. It holds only what the model's structure cannot tell
(`models.structure` finds the parts).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from knowedit.models.families.preset import Preset, Presets

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

#: Presets by the `model_type` of a transformers configuration: those of every file beside this.
FAMILIES: dict[str, Presets] = {
    found.name: import_module(f"{__name__}.{found.name}").PRESETS
    for found in pkgutil.iter_modules(__path__)
    if found.name != "preset"
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
    layer = min(model.layout.editable, key=lambda other: abs(other - layer))
    return Preset((layer,), layer, (layer,), {"lr": None}, "calibrated")
