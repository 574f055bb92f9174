"""One way to run a part: its layers are called one by one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from knowedit.models.packed import packed
from knowedit.models.partial.arguments import cut, for_rows, of_rows
from knowedit.models.partial.calls import Call, Prefix
from knowedit.models.partial.flat import Flat, pays
from knowedit.models.probing import first_of

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class Replay:
    """Layers called one by one, with their own arguments cut to the part's tokens.

    Attributes:
        calls: of each layer from where the part begins that runs, ascending.
        prefix: keys and values of what stands in front; None: nothing does.
        inside: `[B, Q]` which tokens are no padding; None: all.
    """

    model: EditableModel
    calls: dict[int, Call]
    prefix: Prefix | None
    inside: Tensor | None = None

    def select(self, count: int, rows: Tensor) -> Replay:
        calls = {
            index: call.changed(lambda given: of_rows(given, count, rows))
            for index, call in self.calls.items()
        }
        prefix = None if self.prefix is None else self.prefix.changed(lambda tensor: tensor[rows])
        inside = None if self.inside is None else self.inside[rows]
        return replace(self, calls=calls, prefix=prefix, inside=inside)

    @cached_property
    def flat(self) -> Flat | None:
        """The same on all tokens in one row, where that pays."""
        if self.prefix is None or self.inside is None or not pays(self.model):
            return None
        return Flat(self.model, self.calls, self.prefix, self.inside)

    def run(self, states: Tensor) -> Tensor:
        with nullcontext() if self.inside is None else packed(self.inside):
            for index in self.calls:
                states = self._layer(index, states, self.prefix)
        return self.model.norm(states)

    def layer(self, index: int, states: Tensor) -> Tensor:
        prefix = self.prefix
        if index not in self.calls:
            return states
        if prefix is not None:
            keys, values = prefix.keys[index], prefix.values[index]
            copies = len(states) // len(keys)
            keys, values = (tensor.repeat(copies, 1, 1, 1) for tensor in (keys, values))
            prefix = Prefix({index: keys}, {index: values})
        return self._layer(index, states, prefix)

    def _layer(self, index: int, states: Tensor, prefix: Prefix | None) -> Tensor:
        call = self.calls[index]
        given = for_rows(call.arguments, len(states))
        if prefix is None:
            given = cut(given, states.shape[1])
        if call.cache:
            given = {**given, call.cache: prefix}
        out = self.model.layers[index](states, **given)
        return first_of(out)
