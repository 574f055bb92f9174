"""RoSE: several facts of one subject that survive rephrasing and instructions; our implementation
of the idea.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.keysets import FormKeys, Keys
from knowedit.methods.locate.metrics import Blend, Metric
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.spreads import SharedLayers, Spread
from knowedit.methods.locate.trainings import ThroughForms, Training


@dataclass(frozen=True)
class RoSE(Recipe):
    """Blend x hidden state x shared layers x keys at the forms, trained through forms.

    Derived from the public abstract (arXiv 2603.15518; its body was not available): isotropic
    geometric alignment is the isotropic share of the metric; hierarchical knowledge integration
    goes from a value for each fact over their merge (`target=MergedFacts()`; joint values, the
    default, end equal) to a training through the edited model. `material` has more questions and
    neighbours; what `Fact.neighbours` tests is in neither metric nor training.
    """

    metric: Metric = field(default_factory=Blend)
    spread: Spread = field(default_factory=SharedLayers)
    keys: Keys = field(default_factory=FormKeys)
    training: Training | None = field(default_factory=ThroughForms)

    name = "RoSE"
