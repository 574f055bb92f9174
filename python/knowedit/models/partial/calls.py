"""What one forward pass of the whole model hands to the layers from one on: their inputs, their
other arguments, and the keys and values of every token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knowedit.errors import ModelError
from knowedit.models.packed import Packed, packed

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


class Prefix:
    """A read-only stand-in for transformers' cache: the clean prefix's keys and values in front of
    the new ones.

    Attributes:
        keys, values: by layer, `[B, heads, prefix, width]`.
    """

    is_compileable = False

    def __init__(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        self.keys, self.values = keys, values

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2)

    def get_seq_length(self, layer: int = 0) -> int:
        return next(iter(self.keys.values())).shape[2]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        """The same with every tensor passed through `change`."""
        keys, values = (
            {layer: change(tensor) for layer, tensor in part.items()}
            for part in (self.keys, self.values)
        )
        return Prefix(keys, values)


@dataclass(frozen=True)
class Given:
    """What a whole model reads.

    Attributes:
        ids: `[B, T]`.
        embeddings: `[B, T, width]` in the place of theirs; None: theirs.
    """

    ids: Tensor
    embeddings: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Tensor]) -> Given:
        """The same with its tensors passed through `change`."""
        return Given(change(self.ids), None if self.embeddings is None else change(self.embeddings))

    def run(self, model: EditableModel, **more: Any) -> Any:
        """What the model without its head makes of it. The tokens are there too: some models look
        at them once more.
        """
        put = self.embeddings
        if put is None:
            return model.base(input_ids=self.ids, **more)

        def replaced(_module: nn.Module, _ids: Any, output: Tensor) -> Tensor | None:
            return put if output.shape == put.shape else None

        handle = model.hf.get_input_embeddings().register_forward_hook(replaced)
        try:
            return model.base(input_ids=self.ids, **more)
        finally:
            handle.remove()


@dataclass(frozen=True)
class Call:
    """A layer's arguments beside its hidden states.

    Attributes:
        cache: name of the one that takes the key/value cache, "" when there is none.
        arguments: the others, by name.
    """

    cache: str
    arguments: dict[str, Any]

    def changed(self, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Call:
        """The same with its arguments passed through `change`."""
        return replace(self, arguments=change(self.arguments))


@dataclass(frozen=True)
class Capture:
    """What one forward pass hands to the layers from `from_layer` on.

    Attributes:
        states: `[B, T, hidden]` the input of the first of them.
        text: what the whole model was given.
        calls: of each layer that ran, its other arguments; without them where the whole model is
            run.
        cache: `{layer: (keys, values)}`, `[B, heads, T, width]` each; None likewise.
    """

    model: EditableModel
    from_layer: int
    states: Tensor
    text: Given
    calls: dict[int, Call]
    cache: Prefix | None


@torch.no_grad()
def capture(
    model: EditableModel,
    ids: Tensor,
    from_layer: int,
    embeddings: Tensor | None = None,
    *,
    replay: bool | None = None,
    live: tuple[Tensor, Tensor] | None = None,
    alike: Tensor | None = None,
) -> Capture:
    """Run the whole model once and keep what the layers from `from_layer` on are called with.

    Args:
        ids: `[B, T]`, right-padded.
        embeddings: `[B, T, hidden]`, in place of those of `ids`.
        replay: keep what calling layers one by one takes; None: where the model's can be.
        live: `[B, T]` twice: the tokens whose states are wanted at all, and those whose keys and
            values are wanted; the others' may be anything. None: all.
        alike: `[B, T]` tokens that are computed once (`beginnings`).

    Raises:
        ModelError: there is no such layer, or it does not run on plain text.
    """
    from transformers import DynamicCache

    blocks = list(model.layers)[from_layer:]
    if not blocks:
        raise ModelError(
            f"layer {from_layer - 1} is the last one; values are optimised at a layer below it"
        )
    replay = model.replays if replay is None else replay
    text = Given(ids, embeddings)
    calls: dict[int, Call] = {}
    states: list[Tensor] = []
    # a cache made without the model's configuration keeps every token, also in sliding-window
    # layers
    cache = DynamicCache() if replay else None
    packing = packed(live[0], alike) if replay and live is not None else nullcontext()

    def note(index: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        call.pop("kwargs", None)
        state = call.pop(next(iter(call)))
        if not states:
            states.append(state)
            if isinstance(packing, Packed) and live is not None:
                packing.limit(live[1])
        named = next((name for name, value in call.items() if value is cache), "")
        call.pop(named, None)
        calls[index] = Call(named, call if replay else {})

    handles = [
        block.register_forward_pre_hook(partial(note, index), with_kwargs=True)
        for index, block in enumerate(blocks, from_layer)
    ]
    try:
        with model.evaluating(), packing:
            text.run(model, past_key_values=cache, use_cache=replay)
    finally:
        for handle in handles:
            handle.remove()
    if not states:
        raise ModelError(
            f"{model.name}: no layer from {from_layer} on runs on plain text; values are optimised "
            "at a layer below one that does"
        )
    if cache is None:
        return Capture(model, from_layer, states[0], text, calls, None)
    kept = {i: cache.layers[i] for i in calls}
    keys, values = ({i: getattr(c, part) for i, c in kept.items()} for part in ("keys", "values"))
    return Capture(model, from_layer, states[0], text, calls, Prefix(keys, values))
