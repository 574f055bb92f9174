"""Replaying only what an edit can change: the layers above the edited one, the tokens from the
subject's last one on.

A causal model's hidden states up to the edited layer, and every later layer's keys and values at
earlier tokens, do not depend on what is written at the subject's last token. They are computed once
(`Suffix`), and each optimisation step runs the few remaining tokens through the few remaining
layers, with logits at the scored positions only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from knowedit.errors import ModelError
from knowedit.models.editable import EditableModel
from knowedit.models.tokens import Row


class Prefix:
    """A read-only stand-in for transformers' cache: the clean prefix's keys and values in front of
    the new ones.
    """

    is_compileable = False

    def __init__(self, keys: dict[int, Tensor], values: dict[int, Tensor]) -> None:
        self.keys, self.values = keys, values

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2)

    def get_seq_length(self, layer: int = 0) -> int:
        return next(iter(self.keys.values())).shape[2]


class Suffix:
    """The part of a batch of rows above `layer`, from each row's subject token on.

    Args:
        model: the model; its weights must not change while this is used.
        rows: tokenised texts, each with `subject` set.
        layer: hidden states are replaced at this layer's output.

    Attributes:
        hidden: `[B, Q, hidden]` clean outputs of `layer`, token 0 being the subject's last one.

    Raises:
        ModelError: the model's attention cannot be replayed (its layers do not take a cache or a
            4-D mask).
    """

    def __init__(self, model: EditableModel, rows: Sequence[Row], layer: int) -> None:
        self.model, self.layer = model, layer
        ids, mask = model.pad([r.ids for r in rows])
        start = torch.tensor([r.subject for r in rows], device=ids.device)
        calls, cache, hidden = observe(model, ids, layer)
        queries, prefix = int((mask.sum(1) - start).max()), int(start.max())
        at = start[:, None] + torch.arange(
            queries, device=ids.device
        )  # [B, Q] global positions, may pass the end
        inside = at < mask.sum(1)[:, None]
        at = at.clamp(max=ids.shape[1] - 1)
        self.hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        before = torch.arange(prefix, device=ids.device)
        columns = torch.cat([before.expand(len(rows), -1), at], 1)  # key positions, global
        live = torch.cat([before < start[:, None], inside], 1)
        causal = (columns[:, None, :] <= at[:, :, None]) & live[:, None, :]
        # a padded query sees itself: with nothing to see its softmax is NaN, and NaN poisons the
        # gradient
        itself = (
            torch.arange(columns.shape[1], device=ids.device)
            == prefix + torch.arange(queries, device=ids.device)[:, None]
        )
        idle = ~inside[:, :, None] & itself
        self._calls = [sliced(call, at, columns, causal, idle) for call in calls]
        keys = {index: k[:, :, :prefix] for index, (k, _) in cache.items()}
        values = {index: v[:, :, :prefix] for index, (_, v) in cache.items()}
        self._prefix = Prefix(keys, values)

    def select(self, rows: Tensor) -> Suffix:
        """The same suffix for some of its rows (`rows`: indices)."""

        def take(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(take, value))
            return (
                value[rows]
                if isinstance(value, Tensor) and value.shape[:1] == self.hidden.shape[:1]
                else value
            )

        part = object.__new__(Suffix)
        part.model, part.layer, part.hidden = self.model, self.layer, self.hidden[rows]
        part._calls = [{name: take(value) for name, value in call.items()} for call in self._calls]
        keys, values = (
            {i: t[rows] for i, t in d.items()} for d in (self._prefix.keys, self._prefix.values)
        )
        part._prefix = Prefix(keys, values)
        return part

    def run(self, hidden: Tensor) -> Tensor:
        """Final hidden states (after the last norm) `[B, Q, hidden]` for replaced outputs of
        `layer`; differentiable.
        """
        for block, call in zip(self.model.layers[self.layer + 1 :], self._calls):
            hidden = block(hidden, past_key_values=self._prefix, **call)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.model.norm(hidden)


def observe(model: EditableModel, ids: Tensor, layer: int, embeddings: Tensor | None = None):
    """One forward pass; returns the arguments of every layer above `layer`, their keys and values,
    and the input.

    `embeddings` `[B, T, hidden]` go in instead of those of `ids`; `layer` -1 observes the whole
    stack.
    """
    blocks = list(model.layers)[layer + 1 :]
    calls: list[dict[str, Any]] = []
    hidden: list[Tensor] = []
    if not blocks:
        raise ModelError(f"layer {layer} is the last one; values are optimised at a layer below it")

    def note(block, args, kwargs):
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        call.pop("kwargs", None)
        state = call.pop("hidden_states")
        if not hidden:
            hidden.append(state)
        call.pop("past_key_values", None)
        calls.append(call)

    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks]
    try:
        with torch.no_grad():
            # a cache made without the model's configuration keeps every token, also in
            # sliding-window layers
            text = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
            out = model.hf.base_model(**text, past_key_values=DynamicCache(), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    cache = getattr(out, "past_key_values", None)
    if cache is None or not hasattr(cache, "layers"):
        raise ModelError(
            f"{model.name}: its layers keep no key/value cache, so a suffix of them cannot be "
            f"replayed"
        )
    first = layer + 1
    pairs = {
        i: (cache.layers[i].keys, cache.layers[i].values) for i in range(first, first + len(blocks))
    }
    return calls, pairs, hidden[0]


def sliced(
    call: dict[str, Any], at: Tensor, columns: Tensor, causal: Tensor, idle: Tensor
) -> dict[str, Any]:
    """A layer's arguments restricted to the queries at positions `at` and the keys at positions
    `columns`.
    """
    result, rows = dict(call, use_cache=False), at.shape[0]
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions.expand(rows, -1).gather(1, at)
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = tuple(
            r.expand(rows, -1, -1).gather(1, at[..., None].expand(-1, -1, r.shape[-1]))
            for r in rotary
        )
    mask, allowed = call.get("attention_mask"), causal[:, None]
    if (
        isinstance(mask, Tensor) and mask.dim() == 4
    ):  # the layer's own mask: padding, sliding window
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = seen.expand(rows, -1, -1, -1)
        seen = seen.gather(2, at[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[3]))
        allowed = allowed & seen.gather(
            3, columns[:, None, None, :].expand(-1, seen.shape[1], at.shape[1], -1)
        )
    allowed = allowed | idle[:, None]
    if isinstance(mask, Tensor) and mask.is_floating_point():
        allowed = torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(
            ~allowed, torch.finfo(mask.dtype).min
        )
    result["attention_mask"] = allowed
    return result
