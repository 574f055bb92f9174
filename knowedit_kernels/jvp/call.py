"""The arguments of the layers with tangents, as every implementation takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from knowedit_kernels._dispatch import Call


@dataclass(frozen=True, eq=False)
class RmsNormCall(Call):
    """``rms_norm_jvp``: x [rows, d], weight [d], tangents [T, rows, d]."""

    x: Tensor
    weight: Tensor
    tangents: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class SwigluCall(Call):
    """``swiglu_jvp``: gate, up [rows, d] and their tangents [T, rows, d]."""

    gate: Tensor
    up: Tensor
    gate_tangents: Tensor
    up_tangents: Tensor


@dataclass(frozen=True, eq=False)
class AttentionCall(Call):
    """``attention_jvp``: q [B, heads, queries, d]; k, v [B, shared heads, keys, d].

    tq [T, *q]; tk, tv [T, B, shared heads, t, d] of the last t keys (None: zero); spans [B, 2]: a
    row's keys are first <= j < end. Queries are the last positions where causal.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    spans: Tensor | None
    causal: bool
    scale: float
