"""BetaEdit (Liu et al. 2026): AlphaEdit with a price on leaks, and a null space that follows the
history.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knowedit.methods.locate.metrics import Metric, NullSpace
from knowedit.methods.locate.recipe import Recipe


@dataclass(frozen=True)
class BetaEdit(Recipe):
    """Refreshed null space with a leak penalty x hidden state x even spread x every context's
    key.
    """

    metric: Metric = field(default_factory=lambda: NullSpace(leak=1.0, refresh=True))

    name = "BetaEdit"
