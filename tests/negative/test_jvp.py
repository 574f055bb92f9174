"""Deliberately wrong layers and tangents, which the gates must reject; the right ones, in the same
hands, pass (unit).
"""

import pytest
import torch
from torch.nn import functional as F

from knowedit_kernels.jvp import batched, gpu, reference

CPU = torch.device("cpu")
BLOCK = 16  # keys


def online(flaw=""):
    """The kernel's algorithm in plain float64, block by block, with one flaw."""

    def run(call):
        q, k, v, tq, tk, tv, spans, causal, scale = call.arguments
        dtype, group, keys = q.dtype, q.shape[1] // k.shape[1], k.shape[2]
        first = keys - tk.shape[3] + (1 if flaw == "tangents of the neighbouring key" else 0)
        tk, tv = (F.pad(t[..., : keys - first, :], (0, 0, first, 0)) for t in (tk, tv))
        k, v, tk, tv = (x.double().repeat_interleave(group, -3) for x in (k, v, tk, tv))
        q, tq = q.double(), tq.double()
        top = q.new_full(q.shape[:3], -1e30)
        mass, mu, o = (
            torch.zeros_like(top),
            torch.zeros(len(tq), *top.shape).double(),
            torch.zeros_like(q),
        )
        to = torch.zeros_like(tq)
        last = torch.arange(q.shape[2]) + (
            0 if flaw == "queries at the start" else keys - q.shape[2]
        )
        for at in range(0, keys, BLOCK):
            part = slice(at, min(at + BLOCK, keys))
            key = torch.arange(part.start, part.stop)
            seen = torch.ones(q.shape[2], len(key), dtype=torch.bool)
            if causal:
                seen = (
                    key <= last[:, None]
                    if flaw != "sees the next key"
                    else key <= last[:, None] + 1
                )
            if spans is not None and flaw != "padding seen":
                seen = seen & ((key >= spans[:, :1]) & (key < spans[:, 1:]))[:, None, None]
            s = (scale * (q @ k[:, :, part].mT)).masked_fill(~seen, -torch.inf)
            change = (1 if flaw == "scores' tangents unscaled" else scale) * (tq @ k[:, :, part].mT)
            if flaw != "keys' tangents missing":
                change = change + scale * (q @ tk[:, :, :, part].mT)
            higher = torch.maximum(top, s.amax(-1))
            keep, top = torch.exp(top - higher), higher
            p = torch.exp(s - top[..., None])
            mass = mass * keep + p.sum(-1)
            mu = mu * (1 if flaw == "mean not rescaled" else keep) + (p * change).sum(-1)
            o = o * keep[..., None] + p @ v[:, :, part]
            to = (
                to * (1 if flaw == "tangents not rescaled" else keep[..., None])
                + (p * change) @ v[:, :, part]
            )
            if flaw != "values' tangents missing":
                to = to + p @ tv[:, :, :, part]
            if flaw == "sums in the tensors' dtype":
                to, mu = to.to(dtype).double(), mu.to(dtype).double()
        o = o / mass[..., None]
        to = to / mass[..., None]
        if flaw != "mean not subtracted":
            to = to - (mu / mass)[..., None] * o
        if flaw == "tangents rounded to 5 bits":
            to = torch.ldexp(torch.round(torch.frexp(to)[0] * 32), torch.frexp(to)[1] - 5)
        return o.to(dtype), to.to(dtype)

    return run


FLAWS = [
    "tangents not rescaled", "mean not rescaled", "mean not subtracted", "keys' tangents missing",
    "values' tangents missing", "scores' tangents unscaled", "tangents of the neighbouring key",
    "sees the next key", "queries at the start", "padding seen", "tangents rounded to 5 bits",
    "sums in the tensors' dtype",
]  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_wrong_attention_is_rejected(flaw, monkeypatch):
    monkeypatch.setattr(gpu, "attention", online(flaw))
    failure = gpu.attention_gate(CPU)
    assert failure is not None and "off by" in failure, failure
    of_the_function = flaw in ("sees the next key", "queries at the start", "padding seen")
    assert ("tangents of attention" not in failure) == of_the_function, failure


def test_heads_in_another_order_are_rejected(monkeypatch):
    def flipped(call):
        o, do = batched.attention(call)
        return o.flip(1), do.flip(2)

    monkeypatch.setattr(gpu, "attention", flipped)
    assert "attention off by" in (gpu.attention_gate(CPU) or "")


@pytest.mark.parametrize("right", [online(), batched.attention], ids=["online", "batched"])
def test_right_attention_passes_the_same_gate(right, monkeypatch):
    monkeypatch.setattr(gpu, "attention", right)
    assert gpu.attention_gate(CPU) is None


def wide(formula):
    """A formula for one layer and its tangents, computed in float64 and rounded once."""
    return lambda call: tuple(
        y.to(call.arguments[0].dtype)
        for y in formula(*(a.double() if torch.is_tensor(a) else a for a in call.arguments))
    )


def normed(flaw=""):
    def formula(x, w, t, eps):
        r = (x.square().mean(-1, keepdim=True) + (0 if flaw == "eps" else eps)).rsqrt()
        along = (x * t).sum(-1, keepdim=True) / (1 if flaw == "not the mean" else x.shape[-1])
        if flaw == "no projection":
            along = 0 * along
        moved = t - x * along * r**2
        return x * r * w, moved * r * (1 if flaw == "no weight" else w)

    return wide(formula)


def gated(flaw=""):
    def formula(g, u, tg, tu):
        s = torch.sigmoid(g)
        slope = s if flaw == "sigmoid held fixed" else s * (1 + g * (1 - s))
        moved = slope * u * tg + (0 if flaw == "up held fixed" else g * s) * tu
        return g * s * u, moved.float().bfloat16().double() if flaw == "tangents in bf16" else moved

    return wide(formula)


@pytest.mark.parametrize("flaw", ["eps", "not the mean", "no projection", "no weight"])
def test_wrong_norms_are_rejected(flaw, monkeypatch):
    monkeypatch.setattr(gpu, "rms_norm", normed(flaw))
    assert "rms_norm off by" in (gpu.rms_norm_gate(CPU) or "")


@pytest.mark.parametrize("flaw", ["sigmoid held fixed", "up held fixed", "tangents in bf16"])
def test_wrong_gated_units_are_rejected(flaw, monkeypatch):
    monkeypatch.setattr(gpu, "swiglu", gated(flaw))
    assert "tangents of swiglu off by" in (gpu.swiglu_gate(CPU) or "")


@pytest.mark.parametrize(
    "norm, unit",
    [(normed(), gated()), (batched.rms_norm, batched.swiglu)],
    ids=["formula", "batched"],
)
def test_right_ones_pass(norm, unit, monkeypatch):
    monkeypatch.setattr(gpu, "rms_norm", norm)
    monkeypatch.setattr(gpu, "swiglu", unit)
    assert gpu.rms_norm_gate(CPU) is None and gpu.swiglu_gate(CPU) is None


def test_the_last_tangents_of_a_program_count(monkeypatch):
    """A grid that is one program short leaves its tangents unwritten."""

    def short(call):
        y, dy = batched.rms_norm(call)
        dy[gpu.GROUP :] = 0
        return y, dy

    monkeypatch.setattr(gpu, "rms_norm", short)
    assert "tangents of rms_norm" in (gpu.rms_norm_gate(CPU) or "")


def test_the_specification_is_torchs_own():
    """Attention and its norm against torch's functions, so that the gates judge by the
    right thing.
    """
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 6, 4, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(reference.attention(q, k, v), wanted, atol=1e-14)
    x, w = q[0, 0], v[0, 0, 0]
    assert torch.allclose(reference.rms_norm(x, w, 0.1), F.rms_norm(x, (4,), w, 0.1), atol=1e-14)
    assert torch.allclose(reference.swiglu(x, q[0, 1]), F.silu(x) * q[0, 1], atol=1e-14)
