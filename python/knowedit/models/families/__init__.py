"""The families: measured presets and published starting points of known models.

A preset is chosen by the model's shape (type, layers, hidden size, key size), never by its name.
Published hyper-parameters do not transfer between models - MEMIT's lambda = 15,000 realises 15 % of
a change on SmolLM2 - so a preset has none for the metric: lambda and beta follow from the gain
unless they are given.

A family is one file here, named as the `model_type` of its transformers configuration, that sets
`PRESETS`; being in the folder is enough. It holds only what the model's structure cannot tell
(`models.structure` finds the parts).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from knowedit.models.families.preset import Preset, Presets

#: Presets by the `model_type` of a transformers configuration: those of every file beside this.
FAMILIES: dict[str, Presets] = {
    found.name: import_module(f"{__name__}.{found.name}").PRESETS
    for found in pkgutil.iter_modules(__path__)
    if found.name != "preset"
}


def preset_of_shape(kind: str, depth: int, hidden: int, d_ff: int) -> Preset | None:
    """That of a model type, layers, hidden size and key size."""
    return FAMILIES.get(kind, {}).get((depth, hidden, d_ff))
