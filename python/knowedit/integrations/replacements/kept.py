"""Hidden states that are kept while a host goes from layer to layer, so that each layer runs
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knowedit.models.editable import EditableModel
from knowedit.models.partial import PartialModel

#: Bytes of hidden states that are kept at most.
KEPT = 1 << 29


@dataclass
class Kept:
    """Hidden states in front of a layer, kept while a host goes from layer to layer.

    MEMIT reads the keys of a layer, writes it and reads those of the next: for the same prompts,
    whose states below the written layer are still what they were.

    Attributes:
        layer: which layer they enter; 0: nothing is kept.
        states: `[T, hidden]` of each text, by its tokens.
        below: version of all that they depend on.
        part: runs the layers from `first` on, for texts up to a length.
    """

    layer: int = 0
    states: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    below: tuple[int, ...] = ()
    part: PartialModel | None = None
    longest: int = 0

    def reach(
        self, model: EditableModel, texts: Sequence[tuple[int, ...]], layer: int | None
    ) -> bool:
        """Whether a pass over the texts up to `layer` can begin at what is kept."""
        return (
            layer is not None
            and 0 < self.layer <= layer
            and all(text in self.states for text in texts)
            and self.below == _version_below(model, self.layer)
        )

    def run(
        self, model: EditableModel, texts: Sequence[tuple[int, ...]], layer: int
    ) -> tuple[PartialModel, Tensor]:
        """What runs `layer`, and its inputs `[B, T, hidden]`, right-padded."""
        longest = max(map(len, texts))
        if self.part is None or self.part.from_layer > self.layer or self.longest < longest:
            self.longest = longest
            self.part = PartialModel.for_texts(model, self.layer, longest)
        states = torch.nn.utils.rnn.pad_sequence([self.states[text] for text in texts], True)
        for index in range(self.layer, layer):
            states = self.part.layer(index, states)
        return self.part, states

    def move(self, model: EditableModel, layer: int, states: dict[tuple[int, ...], Tensor]) -> None:
        """Keep the states that enter `layer` in place of those of before, if there is room."""
        size = sum(state.numel() * state.element_size() for state in states.values())
        if size > KEPT or not model.replays or any(s.dim() != 2 for s in states.values()):
            states, layer = {}, 0
        self.layer, self.states = layer, states
        self.below = _version_below(model, layer)


def _version_below(model: EditableModel, layer: int) -> tuple[int, ...]:
    """Changes whenever a parameter is written or exchanged that is not of `layer` or above."""
    above = {id(p) for block in list(model.layers)[layer:] for p in block.parameters()}
    below = [p for p in model.hf.parameters() if id(p) not in above]
    return tuple(n for p in below for n in (p._version, p.data_ptr()))


def layer_of(model: EditableModel, module: str) -> int | None:
    """The layer that a module is, or is part of."""
    names = ((index, model.layout.layer(index)) for index in range(len(model.layers)))
    return next((i for i, name in names if f"{module}.".startswith(f"{name}.")), None)
