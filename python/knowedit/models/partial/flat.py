"""Layers one by one on the tokens of all texts in one row, without padding: sorted by text for the
attention alone, where what stands in front of a text meets its tokens without being copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from knowedit.errors import ModelError
from knowedit.models.partial.arguments import in_a_row
from knowedit.models.partial.calls import Call, Prefix
from knowedit.models.probing import first_of

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


class Flat:
    """The layers of a `Replay`, with its calls, its prefix and its tokens.

    Args:
        calls: of each layer that runs, ascending, with the mask in its arguments.
        prefix: keys and values of what stands in front.
        inside: `[B, Q]` which tokens are no padding: the first ones of each text.
    """

    def __init__(
        self, model: EditableModel, calls: Mapping[int, Call], prefix: Prefix, inside: Tensor
    ) -> None:
        self.model, self.prefix, self.shape = model, prefix, inside.shape
        # place in [B * Q] of each token of the row, and the other way; for padding any of its text
        self.at = inside.reshape(-1).nonzero()[:, 0]
        self.of = (inside.reshape(-1).cumsum(0) - 1).view_as(inside)
        self._rows: dict[int, Tensor] = {}  # of arguments that several layers share
        self._heads: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.masks = {
            i: _added(call.arguments["attention_mask"], model.dtype) for i, call in calls.items()
        }
        self.calls = {i: self._in_a_row(call) for i, call in calls.items()}

    def _in_a_row(self, call: Call) -> dict[str, Any]:
        given = in_a_row(call.arguments, self.shape, self._row)
        return {**given, call.cache: None} if call.cache else given

    def _row(self, value: Tensor) -> Tensor:
        """`[1, n, ..]` of `[B, Q, ..]`."""
        if id(value) not in self._rows:
            self._rows[id(value)] = value.flatten(0, 1).index_select(0, self.at)[None]
        return self._rows[id(value)]

    def run(self, states: Tensor) -> Tensor:
        """Final hidden states (after the last norm) `[B, Q, hidden]` for inputs of the first layer;
        0 at padding.

        Raises:
            ModelError: a layer does otherwise than to attend once, with the function that torch has
                for it.
        """
        row = states.flatten(0, 1).index_select(0, self.at)[None]
        with _Attention(self) as attention:
            for index, given in self.calls.items():
                attention.layer, attention.seen = index, 0
                row = first_of(self.model.layers[index](row, **given))
                if attention.seen != 1:
                    raise ModelError(f"layer {index} attends {attention.seen} times, not once")
        final = self.model.norm(row)[0]
        whole = final.new_zeros(self.of.numel(), final.shape[-1])
        return whole.index_copy(0, self.at, final).view(*self.shape, -1)

    def heads(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """With this many heads: the places in `[heads * n]` of `[B * heads * Q]`, those the other
        way, and the same of `[n * heads]`.
        """
        if count not in self._heads:
            head = torch.arange(count, device=self.at.device)
            width = self.shape[1]
            there = head[:, None] * len(self.at) + self.of[:, None]  # [B, heads, Q]
            text, place = self.at // width, self.at % width
            back = (text * count + head[:, None]) * width + place  # [heads, n]
            self._heads[count] = there.reshape(-1), back.reshape(-1), back.mT.reshape(-1)
        return self._heads[count]


class _Attention(TorchFunctionMode):
    """While it is entered, attention over the one row is that of each text over what stands in
    front of it and itself.

    Attributes:
        layer: whose keys and values stand in front.
        seen: how often it attended.
    """

    def __init__(self, flat: Flat) -> None:
        super().__init__()
        self.flat, self.layer, self.seen = flat, 0, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        known = func is F.scaled_dot_product_attention
        return (self._attend if known else func)(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_more: Any,
    ) -> Tensor:
        """`[1, heads, n, width]` of queries `[1, heads, n, ..]`, and keys and values of as many
        heads or fewer.
        """
        flat = self.flat
        self.seen += 1
        keys, values = flat.prefix.keys[self.layer], flat.prefix.values[self.layer]
        texts, groups, front, _ = keys.shape
        tokens, heads = query.shape[2], query.shape[1]
        if attn_mask is not None or dropout_p or query.shape[0] != 1 or tokens != len(flat.at):
            raise ModelError(f"layer {self.layer} attends in a way of its own")

        def by_text(part: Tensor) -> Tensor:
            """`[B, heads, Q, width]`; keys and values that were repeated for their queries once."""
            part = part[0, :: part.shape[1] // groups] if part is not query else part[0]
            there, back, _ = flat.heads(len(part))
            found = _Sorted.apply(part.reshape(-1, part.shape[-1]), there, back)
            return found.view(texts, len(part), -1, part.shape[-1])

        # the queries that share keys stand below each other
        asked = by_text(query).view(texts, groups, -1, query.shape[-1])
        own, said = by_text(key), by_text(value)
        scores = torch.cat([asked @ keys.mT, asked @ own.mT], -1)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.view(texts, heads, -1, scores.shape[-1]) + flat.masks[self.layer]
        shares = scores.softmax(-1).view(texts, groups, -1, scores.shape[-1])
        found = shares[..., :front] @ values + shares[..., front:] @ said
        row = found.reshape(-1, found.shape[-1]).index_select(0, flat.heads(heads)[2])
        return row.view(1, tokens, heads, -1).transpose(1, 2)


class _Sorted(torch.autograd.Function):
    """`rows[there]`, where some of `rows` stand in padding too, which has no gradient: it goes back
    along `back`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back), None, None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores."""
    if mask.dtype != torch.bool:
        return mask
    nothing = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return nothing.masked_fill_(~mask, -torch.inf)
