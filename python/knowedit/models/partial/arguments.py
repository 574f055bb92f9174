"""A decoder layer's arguments beside its hidden states, cut to some rows and some tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def of_rows(call: Mapping[str, Any], count: int, rows: Tensor | slice) -> dict[str, Any]:
    """A layer's arguments for some rows of `count`."""

    def take(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(take, value))
        return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value

    return {name: take(value) for name, value in call.items()}


def for_rows(call: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A layer's arguments with those of one row as often as there are rows: not every model's code
    lets a row stand for all.
    """

    def expanded(name: str, value: Any) -> Any:
        one = isinstance(value, Tensor) and value.shape[:1] == (1,)
        if not one or (name in _KNOWN and name != "attention_mask"):
            return value
        return value.expand(rows, *value.shape[1:])

    return {name: expanded(name, value) for name, value in call.items()}


def cut(call: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A layer's arguments for texts of `length` tokens."""
    result = dict(call)
    if "use_cache" in call:
        result["use_cache"] = False
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions[:, :length]
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = _rotary(rotary, lambda part: part[:, :length])
    if (mask := call.get("attention_mask")) is not None:
        result["attention_mask"] = mask[:, :, :length, :length]
    if (places := call.get("cache_position")) is not None:
        result["cache_position"] = places[:length]
    return result


def sliced(
    call: Mapping[str, Any], at: Tensor, columns: Tensor, causal: Tensor, idle: Tensor, length: int
) -> dict[str, Any]:
    """A layer's arguments for texts of `length` tokens, restricted to the queries at positions
    `at` and the keys at positions `columns`.
    """
    rows = at.shape[0]
    result = {
        name: _at_tokens(value, at) if _by_token(name, value, rows, length) else value
        for name, value in call.items()
    }
    if "use_cache" in call:
        result["use_cache"] = False
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions.expand(rows, -1).gather(1, at)
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = _rotary(
            rotary,
            lambda r: r.expand(rows, -1, -1).gather(1, at[..., None].expand(-1, -1, r.shape[-1])),
        )
    mask, allowed = call.get("attention_mask"), causal[:, None]
    # the layer's own mask: padding, sliding window
    if isinstance(mask, Tensor) and mask.dim() == 4:
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


def in_a_row(
    call: Mapping[str, Any], shape: torch.Size, take: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """A layer's arguments for the tokens `shape` `[B, Q]` of all texts in one row: what holds
    something of every token passed through `take`, and no mask.
    """

    def changed(name: str, value: Any) -> Any:
        if name == "attention_mask":
            return None
        if name == "position_embeddings":
            return _rotary(value, take)
        by_token = isinstance(value, Tensor) and value.shape[:2] == shape
        return take(value) if by_token else value

    return {name: changed(name, value) for name, value in call.items()}


#: Arguments that are cut to a part's tokens in ways of their own; only the mask has rows.
_KNOWN = ("position_ids", "position_embeddings", "attention_mask", "cache_position")


def _by_token(name: str, value: Any, rows: int, length: int) -> bool:
    """Whether an argument that is not known by name holds something of every token."""
    return name not in _KNOWN and isinstance(value, Tensor) and value.shape[:2] == (rows, length)


def _rotary(value: Any, take: Callable[[Tensor], Tensor]) -> Any:
    """Sines and cosines, or complex numbers of both, each passed through `take`."""
    return tuple(map(take, value)) if isinstance(value, tuple | list) else take(value)


def _at_tokens(value: Tensor, at: Tensor) -> Tensor:
    """Those of the tokens `at` `[B, Q]` of an argument `[B, T, ..]`."""
    places = at.reshape(*at.shape, *(1,) * (value.dim() - 2))
    return value.gather(1, places.expand(-1, -1, *value.shape[2:]))
