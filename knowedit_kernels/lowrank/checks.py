"""What an update's arguments must be: each that does not fit is refused by its name."""

from __future__ import annotations

import torch
from torch import Tensor

from knowedit_kernels._arguments import need_tensors
from knowedit_kernels._memory import overlaps

_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_update(
    W: Tensor,
    U: Tensor,
    V: Tensor,
    residual: Tensor | None = None,
    probe: Tensor | None = None,
    base: Tensor | None = None,
    rounding: str = "nearest",
) -> None:
    """Raises ValueError unless the arguments of one update fit together, TypeError for one that is
    no tensor.
    """
    optional = {"residual": residual, "probe": probe, "base": base}
    need_tensors(W=W, U=U, V=V, **{name: x for name, x in optional.items() if x is not None})
    if W.dtype not in _WEIGHTS or W.ndim != 2:
        raise ValueError(
            f"W must be a 2-D bfloat16, float16, float32 or float64 tensor, got {describe(W)}"
        )
    for name, written in (("W", W), ("residual", residual)):
        if written is not None and overlaps(written):
            raise ValueError(
                f"entries of {name} share memory (strides {list(written.stride())}): pass "
                f"{name}.contiguous()"
            )
    rows, columns = W.shape
    if U.ndim != 2 or V.ndim != 2 or U.shape != (rows, V.shape[1]) or V.shape[0] != columns:
        hint = "; W looks transposed: swap U and V" if (len(U), len(V)) == (columns, rows) else ""
        raise ValueError(
            f"W [{rows}, {columns}] needs U [{rows}, r] and V [{columns}, r], got {describe(U)} "
            f"and {describe(V)}{hint}"
        )
    if not (U.is_floating_point() and V.is_floating_point()):
        raise ValueError(f"U and V must be floating point, got {U.dtype} and {V.dtype}")
    if rounding in ("stochastic", "compensated") and W.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"rounding={rounding!r} is for 16-bit weights, W is {W.dtype}: use 'nearest'"
        )
    if (rounding == "compensated") != (residual is not None):
        raise ValueError(
            "rounding='compensated' and residual= go together: pass bfloat16 zeros like W"
        )
    if rounding == "corrected" and (probe is None or probe.numel() == 0):
        raise ValueError(
            "rounding='corrected' needs probe=, the keys [in, p] at which the output must be right"
        )
    for name, other, dtype in (("residual", residual, torch.bfloat16), ("base", base, W.dtype)):
        if other is not None and (
            other.shape != W.shape or other.dtype != dtype or other.device != W.device
        ):
            raise ValueError(
                f"{name} must be {dtype} {list(W.shape)} on {W.device}, got {describe(other)}"
            )
    if probe is not None and (probe.ndim != 2 or probe.shape[0] != columns):
        raise ValueError(f"probe must have shape [{columns}, p], got {describe(probe)}")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
