"""Checks on keys and masks, and the second moment as a function."""

from __future__ import annotations

import torch

from knowedit_kernels._arguments import need_tensors
from knowedit_kernels._memory import overlaps

PRECISIONS = {
    "exact": "within numerics.MOMENT for float32, float16 and bfloat16 keys; float64 keys in "
    "float64",
    "fp32": "as exact, but on a GPU float32 keys keep 16 bits (four products instead of six); "
    "float64 keys narrowed",
    "fp64": "float64 arithmetic throughout: the gold path, slower",
    "fast": "within numerics.MOMENT_FAST on a CPU, float64 keys in float64; on a GPU one uncentred "
    "bf16 chain, for benchmarks only",
}


def check_precision(precision: str) -> str:
    """Returns `precision`; raises ValueError listing the choices if it is unknown."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r} is unknown; choose one of: {', '.join(PRECISIONS)}"
        )
    return precision


def check_keys(
    keys: torch.Tensor, mask: torch.Tensor | None, dim: int, precision: str
) -> torch.Tensor:
    """keys [..., dim], to be read where mask [...], as dense rows [tokens, dim].

    Raises ValueError for a wrong shape, TypeError for keys that are not floating point or a mask
    that is not bool.
    """
    need_tensors(keys=keys)
    if not keys.is_floating_point() or keys.element_size() < 2:
        raise TypeError(
            f"keys must be a float64, float32, float16 or bfloat16 tensor, not {keys.dtype}"
        )
    if mask is not None:
        need_tensors(mask=mask)
    if keys.dim() == 0 or keys.shape[-1] != dim:
        raise ValueError(
            f"keys has shape {list(keys.shape)}; its last dimension must be {dim}, the moment's"
        )
    if mask is not None and mask.shape != keys.shape[:-1]:
        raise ValueError(f"mask has shape {list(mask.shape)}; keys need {list(keys.shape[:-1])}")
    flat = keys.detach().reshape(-1, dim)
    if precision == "fp32" and flat.dtype == torch.float64:
        flat = flat.float()
    return flat if flat.stride(1) == 1 or dim <= 1 else flat.contiguous()


def kept_rows(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Indices of what a mask keeps, int64 on `device`; None: all. Raises TypeError unless it is
    bool.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool (True keeps a token), not {mask.dtype}; use mask.bool()"
        )
    rows = mask.reshape(-1).nonzero().squeeze(1).to(device)
    return None if len(rows) == mask.numel() else rows


def mirror_(c: torch.Tensor, block: int = 256) -> torch.Tensor:
    """Copies the lower triangle of `c` [d, d] onto the upper one, in place, block by block."""
    for i in range(0, c.shape[0], block):
        corner = c[i : i + block, i : i + block]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        c[i : i + block, i + block :] = c[i + block :, i : i + block].T
    return c


@torch.no_grad()
def second_moment_(
    c: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None = None, precision: str = "exact"
) -> torch.Tensor:
    """c += K^T K in place over the rows of `keys` [..., d] whose `mask` [...] is True; returns `c`.

    `c` [d, d] is float64 and symmetric (its lower triangle is read); it stays exactly symmetric.
    NaN or infinite keys are not looked for here: `SecondMoment` does that.
    Raises ValueError or TypeError for a wrong shape, dtype or device.
    """
    check_precision(precision)
    need_tensors(c=c)
    if c.dtype != torch.float64 or c.dim() != 2 or c.shape[0] != c.shape[1]:
        raise ValueError(f"c must be a square float64 matrix, not {c.dtype} {list(c.shape)}")
    if overlaps(c):
        raise ValueError(f"entries of c share memory (strides {list(c.stride())}): pass c.clone()")
    rows, kept = check_keys(keys, mask, c.shape[0], precision), kept_rows(mask, keys.device)
    if c.device != rows.device:
        raise ValueError(f"c is on {c.device}, keys on {rows.device}; move one")
    torch.ops.knowedit.second_moment_(
        [c], [rows if kept is None else rows.index_select(0, kept)], precision
    )
    return mirror_(c)
