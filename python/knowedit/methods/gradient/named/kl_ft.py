"""KL-FT: fine-tune every weight, held to the unedited model by a KL divergence on other texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.methods.gradient.named.ft import FineTuning


@dataclass(frozen=True)
class KLFineTuning(FineTuning):
    """As FT, with KL(unedited || edited) on the context texts in the loss."""

    steps: int = 30
    kl: float = 5.0

    name: ClassVar[str] = "KL-FT"
