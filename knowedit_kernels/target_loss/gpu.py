"""Launching the Triton kernels of the target loss, and their accuracy gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knowedit_kernels import _device, _gate
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.numerics import GRADIENT_ERROR, LOSS_ERROR
from knowedit_kernels.target_loss import chunked
from knowedit_kernels.target_loss.reference import logits

# rows, vocabulary and hidden entries of a tile, by the head's bytes per entry (float32 products take three passes)
TILE = {
    2: {"BP": 64, "BV": 128, "BD": 64, "num_warps": 8, "num_stages": 3},
    4: {"BP": 32, "BV": 64, "BD": 32, "num_warps": 4, "num_stages": 3},
}
TILE_GRADIENT = {
    2: {"BP": 64, "BV": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    4: {"BP": 32, "BV": 32, "BD": 64, "num_warps": 4, "num_stages": 3},
}
CHUNK = 4096  # tokens whose gradient is held at a time: that part of the head stays in L2 between its two uses
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _shared(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    reference: Tensor | None,
    ref_hidden: Tensor | None,
    softcap: float,
    reverse: bool,
) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Pointers, constants and the reference's tensor (a stand-in where there is none)."""
    old = reference if reference is not None else ref_hidden
    tensors = {
        "H": hidden,
        "W": weight,
        "targets": weight if targets is None else targets,
        "bias": weight if bias is None else bias,
        "R": hidden if old is None else old,
    }
    constants = {
        "CE": targets is not None,
        "REF": 0 if old is None else 1 if reference is not None else 2,
        "REVERSE": reverse,
        "BIAS": bias is not None,
        "CAP": softcap != 0,
        **TILE[weight.element_size()],
        "PRECISION": "tf32x3" if weight.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return tensors, constants, tensors["R"]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    reference: Tensor | None,
    ref_hidden: Tensor | None,
    scale: float,
    softcap: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``target_loss_forward`` of `_ops.py`."""
    from knowedit_kernels.target_loss.triton import forward_kernel

    (rows, D), vocabulary = hidden.shape, len(weight)
    ref_lse = hidden.new_empty(0, dtype=torch.float32)
    if ref_hidden is not None:
        ignored = torch.full((rows,), -1, device=hidden.device)
        ref_lse = forward(ref_hidden, weight, ignored, bias, None, None, scale, softcap, reverse)[2]
    tensors, constants, old = _shared(hidden, weight, targets, bias, reference, ref_hidden, softcap, reverse)
    tiles = _ceil(vocabulary, constants["BV"])
    partial = torch.empty(4, tiles, rows, dtype=torch.float32, device=hidden.device)
    if rows:
        forward_kernel[(tiles, _ceil(rows, constants["BP"]))](
            **tensors, ref_lse=ref_lse, partial=partial, rows=rows, vocabulary=vocabulary, D=D,
            h_stride=hidden.stride(0), w_stride=weight.stride(0), r_stride=old.stride(0),
            scale=scale, softcap=softcap, **constants,
        )  # fmt: skip
    lse = (partial[0] + partial[1].log()).logsumexp(0)
    ce, kl = torch.zeros_like(lse), torch.zeros_like(lse)
    if targets is not None:
        ce = torch.where(targets >= 0, lse - partial[2].sum(0), 0.0)
    if constants["REF"]:
        share = torch.exp(partial[0] - lse)
        mass = (partial[1] * share).sum(0)  # one, but for the rounding of lse, which the division removes
        kl = (partial[3] * share).sum(0) / mass - lse if reverse else partial[3].sum(0) + lse
    return ce, kl, lse, ref_lse


def backward(
    g_ce: Tensor,
    g_kl: Tensor,
    kl: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    reference: Tensor | None,
    ref_hidden: Tensor | None,
    scale: float,
    softcap: float,
    reverse: bool,
) -> Tensor:
    """``target_loss_backward`` of `_ops.py`: chunk by chunk in order, so that the same bits come out every time."""
    from knowedit_kernels.target_loss.triton import hidden_grad_kernel, logit_grad_kernel

    (rows, D), vocabulary = hidden.shape, len(weight)
    tensors, constants, old = _shared(hidden, weight, targets, bias, reference, ref_hidden, softcap, reverse)
    # rows of unit size (an exact power of two): small losses must not sink below float16's range in the product
    unit = torch.exp2(torch.floor(torch.log2((g_ce.abs() + g_kl.abs()).clamp_min(1e-30)))) / 256
    g_ce, g_kl = g_ce / unit, g_kl / unit
    tile = TILE_GRADIENT[weight.element_size()]
    out = torch.zeros(rows, D, dtype=torch.float32, device=hidden.device)
    dz = torch.empty(rows, min(CHUNK, _ceil(vocabulary, 128) * 128), dtype=torch.float32, device=hidden.device)
    for first in range(0, vocabulary if rows else 0, CHUNK):
        count = min(CHUNK, vocabulary - first)
        logit_grad_kernel[(_ceil(count, constants["BV"]), _ceil(rows, constants["BP"]))](
            **tensors, ref_lse=ref_lse, lse=lse, kl=kl, g_ce=g_ce, g_kl=g_kl, dz=dz, first=first, rows=rows,
            vocabulary=vocabulary, D=D, h_stride=hidden.stride(0), w_stride=weight.stride(0), r_stride=old.stride(0),
            dz_stride=dz.stride(0), scale=scale, softcap=softcap, **constants,
        )  # fmt: skip
        hidden_grad_kernel[(_ceil(D, tile["BD"]), _ceil(rows, tile["BP"]))](
            dz, weight, out, first, count, rows, D, dz.stride(0), weight.stride(0), out.stride(0),
            **tile, SPLIT=weight.dtype != torch.float32,
        )  # fmt: skip
    return out * unit[:, None]


def gate(device: torch.device) -> str | None:
    """Every dtype, reference and option on ragged sizes against float64; returns what failed, or None."""
    generator = torch.Generator().manual_seed(7)
    for rows, D, vocabulary in ((70, 136, 300), (20, 40, CHUNK + 100)):
        for dtype in DTYPES:
            for kind, reverse, cap in (("none", True, 0.0), ("logs", False, 3.0), ("hidden", True, 5.0)):
                h, old = (torch.randn(rows, D, generator=generator).to(dtype) for _ in range(2))
                W = (torch.randn(vocabulary, D, generator=generator) / D**0.5).to(dtype)
                bias = torch.randn(vocabulary, generator=generator)
                targets = torch.randint(vocabulary, (rows,), generator=generator)
                targets[::4] = -1
                logs = logits(old, W, bias, 1.5, cap or None).log_softmax(-1).float() if kind == "logs" else None
                args = [h, W, targets, bias, logs, old if kind == "hidden" else None]
                g = torch.randn(2, rows, generator=generator) * 1e-6
                if failure := _failure(device, g, args, 1.5, cap, reverse):
                    return f"{dtype} [{rows}, {vocabulary}], reference {kind}: {failure}"
    return None


def _failure(device: torch.device, g: Tensor, tensors: list[Tensor | None], *settings: Any) -> str | None:
    exact: list[Any] = [x.double() if x is not None and x.is_floating_point() else x for x in tensors] + [*settings]
    args: list[Any] = [None if x is None else x.to(device) for x in tensors] + [*settings]
    expected, got = chunked.forward(*exact), forward(*args)
    for name, x, y in zip(("cross-entropy", "divergence"), got, expected):
        if not (worst := (x.cpu().double() - y).abs().max()) <= LOSS_ERROR:
            return f"{name} off by {worst:.2g} nats"
    cotangents: list[Any] = [*g.double(), *expected[1:], *exact]
    wanted = chunked.backward(*cotangents)
    cotangents = [*g.to(device), *got[1:], *args]
    grad = backward(*cotangents)
    if not (off := (grad.cpu().double() - wanted).norm() / wanted.norm()) <= GRADIENT_ERROR:
        return f"gradient off by {off:.2g}"
    return None


def _verify(hidden: Tensor, weight: Tensor, *others: Any) -> str | None:
    tensors = [x for x in others if isinstance(x, Tensor)]
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        return f"needs hidden and head of one 16- or 32-bit dtype, got {hidden.dtype} and {weight.dtype}"
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (hidden, weight, *tensors) if x.ndim):
        return "an argument has strided rows"
    if _device.triton_version() is None:
        return "Triton is not installed"
    return _gate.unproven("target_loss.triton", ("target_loss/triton.py", "target_loss/gpu.py"), hidden.device, gate)


FORWARD = Candidate("triton", forward, _verify, device="cuda")
BACKWARD = Candidate("triton", backward, lambda g_ce, g_kl, kl, lse, ref_lse, *rest: _verify(*rest), device="cuda")
