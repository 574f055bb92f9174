"""Layers one by one on the tokens of all texts in one row, without padding: sorted by text for the
attention alone, where what stands in front of a text meets its tokens without being copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from knowedit.errors import ModelError
from knowedit.models.experts import Routed
from knowedit.models.linear import fast_linear
from knowedit.models.packed import beginnings
from knowedit.models.partial.arguments import in_a_row
from knowedit.models.partial.calls import Call, Prefix
from knowedit.models.partial.comparing import WINDOW, check_rows, off, tried
from knowedit.models.partial.reading import read
from knowedit.models.probing import first_of

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


class Order:
    """Where the tokens of texts `[B, Q]` stand in one row.

    Attributes:
        at: `[n]` the place in `[B * Q]` of each token of the row.
        of: `[B, Q]` the place in the row of each token; of padding any of its text's.
    """

    def __init__(self, at: Tensor, of: Tensor) -> None:
        self.at, self.of = at, of
        self._heads: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def heads(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """With this many heads: the places in `[heads * n]` of `[B * heads * Q]`, those the other
        way, and the same of `[n * heads]`.
        """
        if count not in self._heads:
            head = torch.arange(count, device=self.at.device)
            width = self.of.shape[1]
            there = head[:, None] * len(self.at) + self.of[:, None]  # [B, heads, Q]
            text, place = self.at // width, self.at % width
            back = (text * count + head[:, None]) * width + place  # [heads, n]
            self._heads[count] = there.reshape(-1), back.reshape(-1), back.mT.reshape(-1)
        return self._heads[count]


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
        self.order = Order(
            inside.reshape(-1).nonzero()[:, 0],
            (inside.reshape(-1).cumsum(0) - 1).view_as(inside),
        )
        self._rows: dict[int, Tensor] = {}  # of arguments that several layers share
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
            self._rows[id(value)] = value.flatten(0, 1).index_select(0, self.order.at)[None]
        return self._rows[id(value)]

    def run(self, states: Tensor) -> Tensor:
        """Final hidden states (after the last norm) `[B, Q, hidden]` for inputs of the first layer;
        0 at padding.

        Raises:
            ModelError: a layer does otherwise than to attend once, with the function that torch has
                for it.
        """
        at = self.order.at
        row = states.flatten(0, 1).index_select(0, at)[None]
        with _Attention(self.order) as attention:
            for index, given in self.calls.items():
                attention.front = self.prefix.keys[index], self.prefix.values[index]
                attention.mask, attention.seen = self.masks[index], 0
                row = first_of(self.model.layers[index](row, **given))
                if attention.seen != 1:
                    raise ModelError(f"layer {index} attends {attention.seen} times, not once")
        final = self.model.norm(row)[0]
        whole = final.new_zeros(self.shape.numel(), final.shape[-1])
        return whole.index_copy(0, at, final).view(*self.shape, -1)


class Texts:
    """Whole texts in one row, what they begin with in common once; without gradients.

    Args:
        texts: token ids of each.

    Attributes:
        of: `[B, T]` the place in the row of each token.
    """

    def __init__(self, model: EditableModel, texts: Sequence[Sequence[int]]) -> None:
        self.model = model
        length = max(map(len, texts))
        numbers = beginnings(texts, length)
        self.of = numbers.clamp(min=0)
        found, kind = numbers.reshape(-1).unique(return_inverse=True)
        at = kind.new_empty(len(found)).index_copy(0, kind, torch.arange(len(kind)))
        at = at[found >= 0]
        self.order = Order(at, self.of)
        ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
        self.ids, self.places = ids.view(-1)[at][None], (at % length)[None]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.mask = _added(causal, model.dtype)

    def attending(self) -> _Attention:
        """While it is entered, the row's texts are kept apart."""
        attention = _Attention(self.order)
        attention.mask = self.mask
        return attention

    @torch.no_grad()
    def run(self) -> Tensor:
        """Final hidden states (after the last norm) `[n, hidden]` of the row.

        Raises:
            ModelError: the layers do otherwise than to attend once each, with the function that
                torch has for it.
        """
        with self.attending() as attention:
            states = self.model.final_states(self.ids, self.places)[0]
        if attention.seen != len(self.model.layers):
            raise ModelError(f"{len(self.model.layers)} layers attend {attention.seen} times")
        return states


def texts_in_a_row(model: EditableModel, texts: Sequence[Sequence[int]]) -> Texts | None:
    """`Texts`, where they give what texts one below the other do, which is tried once, and pay."""
    # a text longer than those that are tried may pass an attention window
    if not pays(model) or max(map(len, texts)) > WINDOW or not model.replays:
        return None
    fits = tried(model, "texts", lambda: texts_error(model) <= model.rounding)
    return Texts(model, texts) if fits else None


#: So many tokens less must be run before it is worth trying whether a model can be run like this.
SPARED = 512


def read_last(
    model: EditableModel,
    texts: Sequence[Sequence[int]],
    *,
    inputs: Mapping[str, Callable[[Any], Any]],
    outputs: Mapping[str, Callable[[Tensor], Any]],
) -> None:
    """As `read`, of token lists; what is called is given the last token of each `[n, width]`. What
    texts begin with in common is run once, where that pays.
    """
    lengths = torch.tensor([len(text) for text in texts], device=model.device)
    lines = torch.arange(len(texts), device=model.device)
    length = int(lengths.max())
    spared = len(texts) * length - int(beginnings(texts, length).max()) - 1
    row = texts_in_a_row(model, texts) if spared >= SPARED and pays(model) else None
    if row is None:
        ids, positions = model.pad(texts)[0], None
        at: tuple[Any, Tensor] = lines, lengths - 1
    else:
        ids, positions, at = row.ids, row.places, (0, row.of[lines, lengths - 1])

    def last(take: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def taken(part: Any) -> Any:
            device = part.states.device if isinstance(part, Routed) else part.device
            return take(part[tuple(torch.as_tensor(index, device=device) for index in at)])

        return taken

    attending = nullcontext() if row is None else row.attending()
    with fast_linear(), attending:
        read(
            model,
            ids,
            inputs={name: last(take) for name, take in inputs.items()},
            outputs={name: last(take) for name, take in outputs.items()},
            positions=positions,
        )


def pays(model: EditableModel) -> bool:
    """On a CPU, which computes a padded token as slowly as any other; not in bfloat16, where a
    product compiles a kernel for every number of tokens.
    """
    return (
        model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


@torch.no_grad()
def texts_error(model: EditableModel) -> float:
    """How far final states of short texts in one row are from those of each alone, relatively;
    infinite when they cannot be run.
    """
    texts = [row.ids for row in check_rows(model)[0]]
    texts.append([*texts[0][: len(texts[1]) // 2], *texts[1]])  # begins as another one
    try:
        row = Texts(model, texts)
        states = row.run()
        alone = [model.final_states(torch.tensor([text]))[0] for text in texts]
    except Exception:  # whatever a model's own code raises when it is called like this
        return float("inf")
    return max(off(states[row.of[i, : len(text)]], alone[i]) for i, text in enumerate(texts))


class _Attention(TorchFunctionMode):
    """While it is entered, attention over the one row is that of each text over what stands in
    front of it and itself.

    Attributes:
        front: keys and values `[B, heads, front, width]` of what stands in front; None: nothing,
            and masks that are given are those of the row, for which `mask` stands.
        mask: what is added to the scores `[B, heads, Q, front + Q]`.
        seen: how often it attended.
    """

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order, self.seen = order, 0
        self.front: tuple[Tensor, Tensor] | None = None
        self.mask = torch.zeros(())

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
        self.seen += 1
        texts, tokens, heads = len(self.order.of), query.shape[2], query.shape[1]
        masked = attn_mask is not None and self.front is not None
        if masked or dropout_p or query.shape[0] != 1 or tokens != len(self.order.at):
            raise ModelError("a layer attends in a way of its own")
        groups = key.shape[1] if self.front is None else self.front[0].shape[1]

        def by_text(part: Tensor) -> Tensor:
            """`[B, heads, Q, width]`; keys and values that were repeated for their queries once."""
            part = part[0, :: part.shape[1] // groups] if part is not query else part[0]
            there, back, _ = self.order.heads(len(part))
            found = _Sorted.apply(part.reshape(-1, part.shape[-1]), there, back)
            return found.view(texts, len(part), -1, part.shape[-1])

        # the queries that share keys stand below each other
        asked = by_text(query).view(texts, groups, -1, query.shape[-1])
        own, said = by_text(key), by_text(value)
        scores = asked @ own.mT
        if self.front is not None:
            scores = torch.cat([asked @ self.front[0].mT, scores], -1)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.view(texts, heads, -1, scores.shape[-1]) + self.mask
        shares = scores.softmax(-1).view(texts, groups, -1, scores.shape[-1])
        found = shares[..., -own.shape[2] :] @ said
        if self.front is not None:
            found = found + shares[..., : -own.shape[2]] @ self.front[1]
        row = found.reshape(-1, found.shape[-1]).index_select(0, self.order.heads(heads)[2])
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
