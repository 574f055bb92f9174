"""The torch path: all tangents in one batched product, in pieces that bound memory and stay in
cache.

16-bit tensors are widened piece by piece and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.jvp.call import AttentionCall, RmsNormCall, SwigluCall

ELEMENTS = (
    1 << 18
)  # of one tensor held at a time by the elementwise operations: what stays in cache
SCORES = 1 << 20  # attention weights and their tangents held at a time


def working(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pieces(total: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def rms_norm(call: RmsNormCall) -> tuple[Tensor, Tensor]:
    """``rms_norm_jvp`` of `_ops.py`."""
    x, weight, tangents, eps = call.arguments
    wide, (rows, d) = working(x), x.shape
    y, dy, scale = torch.empty_like(x), torch.empty_like(tangents), weight.to(wide)
    for part in pieces(rows, ELEMENTS // max(d * (1 + len(tangents)), 1)):
        unit, t = x[part].to(wide), tangents[:, part].to(wide)
        r = torch.rsqrt(unit.square().mean(-1, keepdim=True) + eps)
        unit = unit * r
        y[part] = unit * scale
        along = (t * unit).sum(-1, keepdim=True).div_(d)
        dy[:, part] = torch.addcmul(t, unit, along, value=-1).mul_(r * scale)
    return y, dy


def swiglu(call: SwigluCall) -> tuple[Tensor, Tensor]:
    """``swiglu_jvp`` of `_ops.py`."""
    gate, up, gate_tangents, up_tangents = call.arguments
    wide, (rows, d) = working(gate), gate.shape
    y, dy = torch.empty_like(gate), torch.empty_like(gate_tangents)
    for part in pieces(rows, ELEMENTS // max(d * (1 + len(dy)), 1)):
        g, u = gate[part].to(wide), up[part].to(wide)
        s = torch.sigmoid(g)
        silu = g * s
        y[part] = silu * u
        slope = (s + silu * (1 - s)).mul_(u)
        dy[:, part] = (gate_tangents[:, part].to(wide) * slope).addcmul_(
            up_tangents[:, part].to(wide), silu
        )
    return y, dy


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``attention_jvp`` of `_ops.py`."""
    q, k, v, tq, tk, tv, spans, causal, scale = call.arguments
    (batch, heads, queries, _), keys, wide = q.shape, k.shape[2], working(q)
    count = next((len(t) for t in (tq, tk, tv) if t is not None), 0)
    o, do = torch.empty_like(q), q.new_empty(count, *q.shape)
    k, v = (_existing(x.to(wide), spans, keys) for x in (k, v))
    tk, tv = (None if x is None else _existing(x.to(wide), spans, keys) for x in (tk, tv))
    some = max(
        1, min(count, SCORES // max(16 * heads * keys, 1))
    )  # tangents of a piece, if it has 16 rows
    row = (1 + some) * heads * max(keys, 1)
    for b in pieces(batch, SCORES // (row * max(queries, 1))):
        for rows in pieces(queries, SCORES // row):
            end = rows.stop + keys - queries if causal else keys
            seen = _seen(
                rows, end, keys - queries, None if spans is None else spans[b], causal, q.device
            )
            for t in pieces(count, some) if count else [slice(0, 0)]:
                turned = None if tq is None else tq[t, b, :, rows].to(wide)
                pushed, moved = (
                    None if x is None else x[t, b, :, : max(0, end - keys + x.shape[3])]
                    for x in (tk, tv)
                )
                o[b, :, rows], do[t, b, :, rows] = _attend(
                    q[b, :, rows].to(wide),
                    k[b, :, :end],
                    v[b, :, :end],
                    turned,
                    pushed,
                    moved,
                    seen,
                    t.stop - t.start,
                    scale,
                )
    return o, do


def _existing(x: Tensor, spans: Tensor | None, keys: int) -> Tensor:
    """Zeros in place of padding, which may hold anything; x [..., batch, shared, the last
    keys, d].
    """
    if spans is None:
        return x
    key = torch.arange(keys - x.shape[-2], keys, device=x.device)
    return torch.where(((key >= spans[:, :1]) & (key < spans[:, 1:]))[:, None, :, None], x, 0)


def _seen(
    rows: slice, end: int, offset: int, spans: Tensor | None, causal: bool, device: torch.device
) -> Tensor | None:
    """Which keys [..., rows, end] each query sees; None: all. Broadcasts to [batch, shared, group,
    rows, end].
    """
    key, seen = torch.arange(end, device=device), None
    if causal and offset + rows.start + 1 < end:
        seen = key <= torch.arange(offset + rows.start, offset + rows.stop, device=device)[:, None]
    if spans is not None:
        exists = ((key >= spans[:, :1]) & (key < spans[:, 1:]))[:, None, None, None]
        seen = exists if seen is None else exists & seen
    return seen


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    seen: Tensor | None,
    count: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One piece: (o [batch, heads, rows, d], do [count, ...]); heads that share a key are rows of
    one product.
    """
    batch, shared, rows = len(q), k.shape[1], q.shape[2]

    def fold(
        x: Tensor,
    ) -> Tensor:  # [t, batch, heads, rows, d] -> [batch, shared, t, group rows, d]
        return x.unflatten(2, (shared, -1)).flatten(3, 4).movedim(0, 2)

    inner = fold(q[None])
    stacked = inner if tq is None else torch.cat([inner, fold(tq)], 2)
    scores = (stacked.flatten(2, 3) @ k.mT).unflatten(2, (-1, inner.shape[3])).mul_(scale)
    p, change = scores[:, :, :1], scores[:, :, 1:]
    if count and tq is None:
        change = scores.new_zeros(batch, shared, count, *scores.shape[3:])
    if tk is not None and tk.shape[3]:
        change[..., -tk.shape[3] :].add_(inner @ tk.movedim(0, 2).mT, alpha=scale)
    by_head = p.unflatten(3, (-1, rows)).squeeze(2)
    if seen is not None:
        by_head.masked_fill_(~seen, -torch.inf)
    by_head.copy_(by_head.softmax(-1))
    if seen is not None:
        by_head.masked_fill_(~seen, 0)  # also the NaN of a query that sees nothing
    change.sub_((change * p).sum(-1, keepdim=True)).mul_(p)
    weights = torch.cat([p, change], 2) if tq is None else scores
    out = (weights.flatten(2, 3) @ v).unflatten(2, (-1, inner.shape[3]))
    if tv is not None and tv.shape[3]:
        out[:, :, 1:] += p[..., -tv.shape[3] :] @ tv.movedim(0, 2)
    out = out.movedim(2, 0).unflatten(3, (-1, rows)).flatten(2, 3)
    return out[0], out[1:]


RMS_NORM, SWIGLU, ATTENTION = (
    Candidate("torch", rms_norm),
    Candidate("torch", swiglu),
    Candidate("torch", attention),
)
