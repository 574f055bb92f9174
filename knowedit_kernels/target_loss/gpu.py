"""Launching the Triton kernels of the target loss, and their accuracy gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knowedit_kernels import _device, _gate
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.numerics import GRADIENT_ERROR, LOSS_ERROR
from knowedit_kernels.target_loss import chunked
from knowedit_kernels.target_loss.call import LossCall
from knowedit_kernels.target_loss.reference import logits

# rows, vocabulary and hidden entries of a tile, by the head's bytes per entry (float32 products
# take three passes)
TILE = {
    2: {"BP": 64, "BV": 128, "BD": 64, "num_warps": 8, "num_stages": 3},
    4: {"BP": 32, "BV": 64, "BD": 32, "num_warps": 4, "num_stages": 3},
}
TILE_GRADIENT = {
    2: {"BP": 64, "BV": 64, "BD": 64, "num_warps": 8, "num_stages": 3},
    4: {"BP": 32, "BV": 32, "BD": 64, "num_warps": 4, "num_stages": 3},
}
# tokens whose gradient is held at a time: that part of the head stays in L2 between its two uses
CHUNK = 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIFT = 256.0  # float16 parts of a gradient: small probabilities must not sink below its range


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def losses(call: LossCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``target_losses`` of `_ops.py`."""
    hidden, weight, targets, bias, reference, ref_hidden = call.arguments[:6]
    scale, softcap, reverse, gradient = call.arguments[6:]
    from knowedit_kernels.target_loss.triton import loss_kernel

    (rows, D), vocabulary = hidden.shape, len(weight)
    ce, kl = (torch.zeros(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    d_ce, d_kl = (torch.zeros(rows, D, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if rows == 0:
        return ce, kl, d_ce, d_kl
    old = reference if reference is not None else ref_hidden
    arguments: dict[str, Any] = {
        "H": hidden, "W": weight, "targets": targets, "bias": bias, "R": old,
        "rows": rows, "vocabulary": vocabulary, "D": D,
        "h_stride": hidden.stride(0), "w_stride": weight.stride(0),
        "r_stride": 0 if old is None else old.stride(0), "scale": scale, "softcap": softcap,
        "CE": targets is not None, "REF": 0 if old is None else 1 if reference is not None else 2,
        "REVERSE": reverse, "BIAS": bias is not None, "CAP": softcap != 0,
        "PRECISION": "tf32x3" if weight.dtype == torch.float32 else "tf32",
        **TILE[weight.element_size()],
    }  # fmt: skip
    tiles = _ceil(vocabulary, arguments["BV"])
    partial = torch.empty(6, tiles, rows, dtype=torch.float32, device=hidden.device)
    grid = (tiles, _ceil(rows, arguments["BP"]))
    _device.launch(loss_kernel, grid, hidden.device, partial=partial, **arguments)
    lse, share, mass = _combine(partial[0], partial[1])
    ref_lse = gap = lse
    if targets is not None:
        ce = torch.where(targets >= 0, lse - partial[2].sum(0), 0.0)
    if old is not None:
        ref_lse, ref_share, ref_mass = _combine(partial[3], partial[4])
        # the masses are one but for the rounding of lse, which the division removes
        gap = (partial[5] * (share if reverse else ref_share)).sum(0) / (
            mass if reverse else ref_mass
        )
        kl = gap - lse + ref_lse if reverse else lse - ref_lse - gap
    if gradient:
        kinds = [
            out for out, wanted in ((d_ce, targets is not None), (d_kl, old is not None)) if wanted
        ]
        _gradients(kinds, {"lse": lse, "ref_lse": ref_lse, "gap": gap}, arguments)
    return ce, kl, d_ce, d_kl


def _combine(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp [rows] of tiles, each tile's weight [tiles, rows], and what the tiles' sums then
    add up to.
    """
    lse = (largest + total.log()).logsumexp(0)
    share = torch.exp(largest - lse)
    return lse, share, (total * share).sum(0)


def _gradients(outs: list[Tensor], state: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    """Fills the gradients chunk by chunk, in order: the same bits every time."""
    from knowedit_kernels.target_loss.triton import hidden_grad_kernel, logit_grad_kernel

    weight, rows, D, vocabulary = (arguments[name] for name in ("W", "rows", "D", "vocabulary"))
    tile, stacked = TILE_GRADIENT[weight.element_size()], len(outs) * rows
    lift = _LIFT if weight.dtype == torch.float16 else 1.0
    dz = weight.new_empty(stacked, min(CHUNK, _ceil(vocabulary, 128) * 128), dtype=torch.float32)
    out = weight.new_zeros(stacked, D, dtype=torch.float32)
    for first in range(0, vocabulary, CHUNK):
        count = min(CHUNK, vocabulary - first)
        grid = (_ceil(count, arguments["BV"]), _ceil(rows, arguments["BP"]))
        places = {"ce": dz[:rows], "kl": dz[-rows:], "first": first, "out_stride": dz.stride(0)}
        _device.launch(logit_grad_kernel, grid, weight.device, **places, **state, **arguments)
        grid = (_ceil(D, tile["BD"]), _ceil(stacked, tile["BP"]))
        _device.launch(
            hidden_grad_kernel, grid, weight.device, dz, weight, out, first, count,
            stacked, D, dz.stride(0), weight.stride(0), out.stride(0), lift,
            SPLIT=weight.dtype != torch.float32, **tile,
        )  # fmt: skip
    for target, part in zip(outs, out.split(rows)):
        target.copy_(part / lift)


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


def gate(device: torch.device) -> str | None:
    """Every dtype, reference and option on ragged sizes against float64; returns what failed, or
    None.
    """
    generator = torch.Generator().manual_seed(7)
    for rows, D, vocabulary in ((70, 136, 300), (20, 40, CHUNK + 100)):
        for dtype in DTYPES:
            for kind, reverse, cap in (
                ("none", True, 0.0),
                ("logits", False, 3.0),
                ("hidden", True, 5.0),
            ):
                h, old = (_draw(generator, rows, D).to(dtype) for _ in range(2))
                W = (_draw(generator, vocabulary, D) / D**0.5).to(dtype)
                bias = _draw(generator, vocabulary)
                targets = torch.randint(vocabulary, (rows,), generator=generator, device="cpu")
                targets[::4] = -1
                given = logits(old, W, bias, 1.5, cap or None).float() if kind == "logits" else None
                args = [h, W, targets, bias, given, old if kind == "hidden" else None]
                if failure := _failure(device, args, 1.5, cap, reverse, True):
                    return f"{dtype} [{rows}, {vocabulary}], reference {kind}: {failure}"
    return None


def _failure(device: torch.device, tensors: list[Tensor | None], *settings: Any) -> str | None:
    exact: list[Any] = [
        x.double() if x is not None and x.is_floating_point() else x for x in tensors
    ] + [*settings]
    args: list[Any] = [None if x is None else x.to(device) for x in tensors] + [*settings]
    names = (
        "cross-entropy",
        "divergence",
        "gradient of the cross-entropy",
        "gradient of the divergence",
    )
    for name, x, y in zip(names, losses(LossCall(*args)), chunked.losses(LossCall(*exact))):
        difference = x.double().cpu() - y
        if name.startswith("gradient"):
            if not (off := float(difference.norm() / y.norm().clamp_min(1e-30))) <= GRADIENT_ERROR:
                return f"{name} off by {off:.2g}"
        elif not (worst := float(difference.abs().max())) <= LOSS_ERROR:
            return f"{name} off by {worst:.2g} nats"
    return None


def _verify(call: LossCall) -> str | None:
    hidden, weight, *others = call.arguments
    tensors = [x for x in others if isinstance(x, Tensor)]
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        return (
            f"needs hidden and head of one 16- or 32-bit dtype, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (hidden, weight, *tensors) if x.ndim):
        return "an argument has strided rows"
    if _device.triton_version() is None:
        return "Triton is not installed"
    return _gate.unproven(
        "target_loss.triton", ("target_loss/triton.py", "target_loss/gpu.py"), hidden.device, gate
    )


TRITON = Candidate("triton", losses, _verify, device="cuda")
