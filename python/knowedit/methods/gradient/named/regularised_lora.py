"""Regularised-LoRA: LoRA on the answers and on texts that should stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from knowedit.methods.gradient.named.lora import LoRA


@dataclass(frozen=True)
class RegularisedLoRA(LoRA):
    """As LoRA, with the model's own continuations of other prompts in every batch."""

    steps: int = 30
    stability: float = 1.0

    name: ClassVar[str] = "Regularised-LoRA"
