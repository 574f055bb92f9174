"""What the tests of methods share: facts, settings, and statistics with a random covariance."""

from __future__ import annotations

import torch

from knowedit.facts.fact import Fact
from knowedit.methods.locate.keysets import ContextKeys
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.values import ValueSettings
from knowedit.statistics import KeyStatistics
from knowedit.statistics.files.store import CollectionRecipe, LayerStatistics

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon", true="Paris"),
    Fact(prompt="The language of {} is", subject="Brazil", target="Norse", true="Portuguese"),
    Fact(
        prompt="It is said that {} plays the",
        subject="Miles Davis",
        target="violin",
        true="trumpet",
    ),
]
SAME = Fact(prompt="People in {} like", subject="France", target="snow")
VALUES = ValueSettings(steps=4, clamp=4.0)


def statistics_of(model, layers, *, count=5000, seed=0):
    """Statistics with a random covariance, for `model`."""
    generator = torch.Generator().manual_seed(seed)
    recipe = CollectionRecipe(model.fingerprint, {"name": "test"}, count, 64, True, 0)
    found = {}
    for layer in layers:
        keys = torch.randn(
            4 * model.d_ff, model.d_ff, dtype=torch.float64, generator=generator
        ) * torch.linspace(0.2, 2, model.d_ff)
        total = keys.T @ keys * (count / len(keys))
        found[layer] = LayerStatistics(layer, "m", model.name, recipe, count, total, 1.0, 1.0)
    return KeyStatistics(found)


MEAN = ContextKeys(mean=True)


def pair(model, edit, layer):
    """`U` and `V` of what an edit writes into a layer's output projection."""
    return edit.by_parameter(model)[model.layout.weight_name(layer)].raw


def target_of(values, kind=HiddenState):
    """The target that optimises with these numbers on every model."""
    return kind.of(values)
