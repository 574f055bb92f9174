"""KL-LoRA: LoRA, held to the unedited model by a KL divergence on other texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.methods.gradient.named.lora import LoRA


@dataclass(frozen=True)
class KLLoRA(LoRA):
    """As LoRA, with KL(unedited || edited) on the context texts in the loss."""

    steps: int = 30
    kl: float = 5.0

    name: ClassVar[str] = "KL-LoRA"
