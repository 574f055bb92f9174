"""The other way to run a part: the whole model runs, and states are put into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knowedit.models.partial.calls import Given
from knowedit.models.partial.hooks import Window, hooked, seen_through
from knowedit.models.partial.reading import Stop
from knowedit.models.probing import first_of, states_of

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


@dataclass(frozen=True)
class Whole:
    """The whole model run, with the part's states put in where the part begins, and read where it
    ends.

    Attributes:
        runs: the layers from where the part begins that run, ascending.
        text: of all rows; None: whole texts by their states alone.
        window: the part's tokens; None: all.
    """

    model: EditableModel
    runs: tuple[int, ...]
    text: Given | None
    window: Window | None

    def select(self, count: int, rows: Tensor) -> Whole:
        text = None if self.text is None else self.text.changed(lambda tensor: tensor[rows])
        window = self.window
        if window is not None:
            window = Window(window.at[rows], window.inside[rows])
        return replace(self, text=text, window=window)

    def run(self, states: Tensor) -> Tensor:
        text, window = self._given(states)
        with _entering(self.model.layers[self.runs[0]], states, window), seen_through(window):
            out = text.run(self.model, use_cache=False)
        return window.take(states_of(out))

    def layer(self, index: int, states: Tensor) -> Tensor:
        if index not in self.runs:
            return states
        text, window = self._given(states)
        block, found = self.model.layers[index], []

        def stop(_block: nn.Module, _args: Any, output: Any) -> None:
            found.append(window.take(first_of(output)))
            raise Stop

        handle = block.register_forward_hook(stop)
        try:
            with _entering(block, states, window), seen_through(window):
                text.run(self.model, use_cache=False)
        except Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    def _given(self, states: Tensor) -> tuple[Given, Window]:
        """The whole texts and the window for states `[.., copies * B, Q, hidden]`."""
        if self.window is None or self.text is None:
            shape = states.shape[-3:-1]
            at = torch.arange(shape[1], device=states.device).expand(shape)
            ids = torch.zeros(shape, dtype=torch.long, device=states.device)
            return Given(ids), Window(at, torch.ones_like(at, dtype=torch.bool))
        copies = states.shape[-3] // len(self.window.at)
        text = self.text.changed(lambda tensor: tensor.repeat(copies, *(1,) * (tensor.dim() - 1)))
        return text, self.window.copies(copies)


@contextmanager
def _entering(block: nn.Module, states: Tensor, window: Window) -> Iterator[None]:
    """Put `states` into the window of a layer's hidden states before it runs."""

    def enter(_block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (window.put(args[0], states), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: window.put(kwargs[name], states)}

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def finished(model: EditableModel, outputs: Tensor) -> Tensor:
    """Final hidden states `[B, T, hidden]` of the last layer's outputs `[.., B, T, hidden]`: the
    model's own forward pass, with these put in.
    """
    ids = torch.zeros(outputs.shape[-3:-1], dtype=torch.long, device=outputs.device)
    with model.evaluating(), hooked({model.layers[-1]: lambda _, output: outputs}):
        return states_of(model.base(input_ids=ids, use_cache=False))
