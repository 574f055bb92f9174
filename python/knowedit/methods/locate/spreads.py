"""Spreads: which layers are written, and how much of what is still missing each of them writes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.config import Config
from knowedit.models.families.preset import Preset


class Spread(Config):
    """How a change is divided among layers."""

    family = "spread"

    @abstractmethod
    def layers(self, preset: Preset) -> tuple[int, ...]:
        """The layers to edit where the method names none."""

    def share(self, residual: Tensor, remaining: int) -> Tensor:
        """The part of `residual` `[groups, hidden]` that a layer writes when `remaining` layers,
        this one included, are left.
        """
        return residual / remaining

    def check(self, groups: Sequence[Sequence[Fact]], layers: Sequence[int]) -> None:
        """Raise EditError for facts or layers that cannot be spread like this."""
        return None


@dataclass(frozen=True)
class Even(Spread):
    """Every layer writes the same part of the whole: residual / remaining layers (MEMIT)."""

    def layers(self, preset: Preset) -> tuple[int, ...]:
        return preset.layers


@dataclass(frozen=True)
class SquareRoot(Even):
    """Lower layers write more: residual / square root of the remaining layers (PMET)."""

    def share(self, residual: Tensor, remaining: int) -> Tensor:
        return residual / remaining**0.5


@dataclass(frozen=True)
class OneLayer(Even):
    """One layer where none is named (EMMET)."""

    def layers(self, preset: Preset) -> tuple[int, ...]:
        return (preset.one_layer,)


@dataclass(frozen=True)
class OneSubject(OneLayer):
    """One layer and one subject (ROME).

    Raises:
        EditError: several subjects, or several layers.
    """

    def check(self, groups: Sequence[Sequence[Fact]], layers: Sequence[int]) -> None:
        if len(layers) != 1:
            raise EditError(f"ROME edits one layer, got {list(layers)}; use MEMIT for several")
        if len(groups) > 1:
            raise EditError(
                f"ROME writes one subject at a time, got {len(groups)}; use MEMIT, or one edit for "
                "each (of `knowedit eval`: --protocol single)"
            )


@dataclass(frozen=True)
class SharedLayers(Even):
    """Several layers that share the norm of a change (RoSE, Look-Ahead)."""

    def layers(self, preset: Preset) -> tuple[int, ...]:
        return preset.shared_layers
