"""Look-Ahead (our own): MEMIT's write, trained on through the edited model with everything in the
loss that should stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.keysets import ContextKeys, Keys
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.spreads import SharedLayers, Spread
from knowedit.methods.locate.trainings import ThroughTexts, Training


@dataclass(frozen=True)
class LookAhead(Recipe):
    """Covariance x hidden state x shared layers x mean keys, trained through texts: for facts with
    many wordings, and texts to spare (`material.preserve`).
    """

    spread: Spread = field(default_factory=SharedLayers)
    keys: Keys = field(default_factory=lambda: ContextKeys(mean=True))
    training: Training | None = field(default_factory=ThroughTexts)

    name = "Look-Ahead"
