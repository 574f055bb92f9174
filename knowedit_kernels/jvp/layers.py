"""RMSNorm, SwiGLU and attention, and their tangents in many directions at once: the public
functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from knowedit_kernels._arguments import need_tensors
from knowedit_kernels.jvp.autograd import primal, tangent
from knowedit_kernels.jvp.formulas import Attention, RMSNorm, SwiGLU


class WithTangents(NamedTuple):
    """A layer's output and its tangents, [*output] and [T, *output]."""

    primal: Tensor
    tangents: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight (Zhang and Sennrich, 2019) over the last dimension.

    x: [..., d]; weight: [d], as it multiplies (Gemma's is 1 + its parameter); one floating dtype.
    The arithmetic is float32 (float64 for float64). All of torch.func composes; forward mode runs
    the fused kernel, also under vmap.
    Raises ValueError naming the argument.
    """
    _check_rows("x", x)
    _check_weight(x, weight)
    return primal(RMSNorm(eps), x.reshape(-1, x.shape[-1]), weight).view(x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(gate) up (Shazeer, 2020); gate, up: [..., d]. As `rms_norm` in
    everything else.
    """
    _check_rows("gate", gate)
    _check_like("up", up, gate.shape, gate)
    return primal(SwiGLU(), *(x.reshape(-1, x.shape[-1]) for x in (gate, up))).view(gate.shape)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v with forward-mode derivatives, which torch's fused attention lacks
    (pytorch#128971).

    q: [batch, heads, queries, d]; k, v: [batch, shared, keys, d]; each of the `shared` heads serves
    heads / shared consecutive query heads. With ``causal`` the queries are the last positions:
    query i sees keys up to i + keys - queries. scale: d ** -0.5 by default. spans: integer [batch,
    2], row b has keys first <= j < end only (padding on either side may hold anything); a query
    that sees no key gives zero.

    Tangents cost memory in proportion to their own size. Reverse mode holds all scores, and is
    there so that everything
    composes: where only gradients are wanted, torch's fused attention is the better one. Raises
    ValueError.
    """
    layer = _attention_layer(q, k, v, causal, scale, spans)
    return primal(layer, q, k, v)


def rms_norm_jvp(x: Tensor, weight: Tensor, tangents: Tensor, eps: float = 1e-6) -> WithTangents:
    """`rms_norm` of x [..., d] and its tangents for ``tangents`` [T, ..., d] of x, in one pass."""
    _check_rows("x", x)
    _check_weight(x, weight)
    _check_like("tangents", tangents, (None, *x.shape), x)
    rows, moved = (
        x.reshape(-1, x.shape[-1]),
        tangents.reshape(len(tangents), x[..., 0].numel(), x.shape[-1]),
    )
    return _shaped(tangent(RMSNorm(eps), rows, weight, moved, None), x)


def swiglu_jvp(
    gate: Tensor, up: Tensor, gate_tangents: Tensor, up_tangents: Tensor
) -> WithTangents:
    """`swiglu` of gate, up [..., d] and its tangents for those of both, [T, ..., d], in
    one pass.
    """
    _check_rows("gate", gate)
    _check_like("up", up, gate.shape, gate)
    _check_like("gate_tangents", gate_tangents, (None, *gate.shape), gate)
    _check_like("up_tangents", up_tangents, gate_tangents.shape, gate)
    rows = [x.reshape(-1, x.shape[-1]) for x in (gate, up)]
    moved = [t.reshape(len(t), len(rows[0]), gate.shape[-1]) for t in (gate_tangents, up_tangents)]
    return _shaped(tangent(SwiGLU(), *rows, *moved), gate)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    causal: bool = True,
    scale: float | None = None,
    spans: Tensor | None = None,
) -> WithTangents:
    """`attention` and its tangents for T directions at once, never holding all scores.

    tq: [T, *q]; tk, tv: [T, batch, shared, t, d], tangents of the *last* t keys and values: what
    lies before an edit does not move and costs nothing. None means zero; at least one is given.
    Other arguments and errors as of `attention`.
    Source: forward differentiation of online softmax, our derivation.
    """
    layer = _attention_layer(q, k, v, causal, scale, spans)
    need_tensors(**{n: t for n, t in (("tq", tq), ("tk", tk), ("tv", tv)) if t is not None})
    count = next((len(t) for t in (tq, tk, tv) if t is not None and t.ndim), None)
    if count is None:
        raise ValueError("nothing to differentiate along: give tq, tk or tv")
    if tq is not None:
        _check_like("tq", tq, (count, *q.shape), q)
    last = next((t.shape[-2] for t in (tk, tv) if t is not None and t.ndim > 1), 0)
    for name, t in (("tk", tk), ("tv", tv)):
        if t is not None:
            _check_like(name, t, (count, *k.shape[:2], last, k.shape[3]), q)
            if last > k.shape[2]:
                raise ValueError(f"{name} has tangents of {last} keys, but there are {k.shape[2]}")
    return WithTangents(*tangent(layer, q, k, v, tq, tk, tv))


def _shaped(result: tuple[Tensor, Tensor], like: Tensor) -> WithTangents:
    y, dy = result
    return WithTangents(y.reshape(like.shape), dy.reshape(len(dy), *like.shape))


def _attention_layer(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, spans: Tensor | None
) -> Attention:
    for name, x in (("q", q), ("k", k)):
        need_tensors(**{name: x})
        if x.ndim != 4 or not x.is_floating_point() or x.shape[-1] == 0:
            raise ValueError(
                f"{name} must be floating point [batch, heads, tokens, d], got {x.dtype} "
                f"{list(x.shape)}"
            )
    (batch, heads, queries, d), (_, shared, keys, _) = q.shape, k.shape
    _check_like("k", k, (batch, None, None, d), q)
    _check_like("v", v, k.shape, q)
    if shared == 0 or heads % shared:
        raise ValueError(
            f"the {heads} heads of q cannot share {shared} heads of k: their number must be a "
            "multiple"
        )
    if causal and queries > keys:
        raise ValueError(
            f"causal attention of {queries} queries to {keys} keys: queries are the last "
            "positions; pass all keys"
        )
    if spans is not None:
        need_tensors(spans=spans)
    if spans is not None and (
        spans.shape != (batch, 2) or spans.is_floating_point() or spans.device != q.device
    ):
        raise ValueError(
            f"spans must be integer [{batch}, 2] on {q.device}, got {spans.dtype} "
            f"{list(spans.shape)}"
        )
    return Attention(
        causal,
        d**-0.5 if scale is None else float(scale),
        None if spans is None else spans.clamp(0, keys),
    )


def _check_rows(name: str, x: Tensor) -> None:
    need_tensors(**{name: x})
    if x.ndim == 0 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"{name} must be floating point [..., d], got {x.dtype} {list(x.shape)}")


def _check_weight(x: Tensor, weight: Tensor) -> None:
    _check_like("weight", weight, x.shape[-1:], x)


def _check_like(name: str, x: Tensor, shape: Sequence[int | None], like: Tensor) -> None:
    """Raise unless x fits `shape` (None: any size) and is like `like` in dtype and device."""
    need_tensors(**{name: x})
    if len(x.shape) != len(shape) or any(
        size not in (None, got) for size, got in zip(shape, x.shape)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} like the others, got {x.dtype} on "
            f"{x.device}"
        )
