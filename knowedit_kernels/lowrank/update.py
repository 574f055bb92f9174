"""The public functions: check, fold alpha into U, call the op, wrap the sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from knowedit_kernels import _ops
from knowedit_kernels._arguments import need_tensors
from knowedit_kernels._memory import overlaps

ROUNDINGS = ("nearest", "stochastic", "compensated", "corrected")
_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class UpdateReport:
    """What an update asked for and what the weight's dtype let through. Reading a figure waits for
    the device.

    probe_error [out, p] float32 (None without probe keys): (applied - ideal) @ probe, what rounding
    adds to the layer's output at those keys.
    """

    def __init__(
        self, sums: Tensor, total: int, probe_error: Tensor | None, row: int | None = None
    ) -> None:
        self._sums, self._row, self.total, self.probe_error = sums, row, total, probe_error

    @cached_property
    def _figures(self) -> list[float]:
        return (self._sums if self._row is None else self._sums[self._row]).tolist()

    @property
    def ideal_norm(self) -> float:
        """Frobenius norm of alpha U V^T."""
        return self._figures[0] ** 0.5

    @property
    def applied_norm(self) -> float:
        """Frobenius norm of the change of W."""
        return self._figures[1] ** 0.5

    @property
    def error_norm(self) -> float:
        """Frobenius norm of (applied - ideal): what rounding did."""
        return self._figures[2] ** 0.5

    @property
    def survived(self) -> float:
        """<applied, ideal> / ||ideal||^2: the share of the edit that arrived; 1 for an
        empty edit.
        """
        ideal, applied, error = self._figures[:3]
        return (ideal + applied - error) / (2 * ideal) if ideal else 1.0

    @property
    def changed(self) -> int:
        """Entries of W whose value changed."""
        return int(self._figures[3])

    @property
    def nonfinite(self) -> int:
        """Entries that became infinite or NaN (an update too large for the dtype)."""
        return int(self._figures[4])

    def __repr__(self) -> str:
        return (
            f"UpdateReport(ideal_norm={self.ideal_norm:.4g}, applied_norm={self.applied_norm:.4g}, "
            f"survived={self.survived:.4f}, changed={self.changed} of {self.total}, "
            f"nonfinite={self.nonfinite})"
        )


def low_rank_update_(
    W: Tensor,
    U: Tensor,
    V: Tensor,
    alpha: float = 1.0,
    rounding: str = "nearest",
    *,
    seed: int = 0,
    residual: Tensor | None = None,
    probe: Tensor | None = None,
    base: Tensor | None = None,
    dry_run: bool = False,
) -> UpdateReport:
    """W += alpha U V^T in place, computed in float32 and rounded once (float64 weights: in
    float64).

    W: [out, in] bfloat16, float16, float32 or float64. U: [out, r], V: [in, r], any floating dtype.

    rounding:
      * "nearest": ties to even.
      * "stochastic" (16-bit W): unbiased; bits depend on ``seed`` and the element's position alone.
      * "compensated" (16-bit W): ``residual`` (bfloat16, shaped like W, zeros at first) carries
        what rounding cut off
        into the next update: eight more effective bits over a sequence of edits.
      * "corrected" (needs ``probe``): measures the loss at the probe keys first and adds it to U,
        with V unchanged, so that the output there is right after rounding (least squares). Norms in
        the report are then of the corrected update; probe_error is against the requested one.

    probe: [in, p] keys; the report then says what rounding did to the output there.
    base: read W from here instead (same shape and dtype): W = round(base + alpha U V^T).
    dry_run: report only, change nothing.

    What is read may lie in memory that is written (U may be a view of W): it is copied first.

    Raises ValueError or TypeError naming the argument before anything is written. An update that
    overflows W's dtype is written, and counted in the report (``nonfinite``); a `WeightLedger`
    refuses it.
    """
    return low_rank_update_many_(
        [W],
        [U],
        [V],
        alpha,
        rounding,
        seed=seed,
        residuals=None if residual is None else [residual],
        probes=None if probe is None else [probe],
        bases=None if base is None else [base],
        dry_run=dry_run,
    )[0]


def low_rank_update_many_(
    Ws: Sequence[Tensor],
    Us: Sequence[Tensor],
    Vs: Sequence[Tensor],
    alpha: float = 1.0,
    rounding: str = "nearest",
    *,
    seed: int = 0,
    residuals: Sequence[Tensor] | None = None,
    probes: Sequence[Tensor] | None = None,
    bases: Sequence[Tensor] | None = None,
    dry_run: bool = False,
    prints: Tensor | None = None,
) -> list[UpdateReport]:
    """`low_rank_update_` of several weights in one launch; argument lists are parallel to
    ``Ws``. Raises ValueError for a weight that occurs twice, too.

    prints: int64 [weights, 2] that receives the halves of the new weights' fingerprints, taken on
    the way where an implementation can; not of a dry run.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    for name, given in (
        ("U", Us), ("V", Vs), ("residual", residuals), ("probe", probes), ("base", bases)
    ):  # fmt: skip
        if given is not None and len(given) != len(Ws):
            raise ValueError(f"{len(Ws)} weights but {len(given)} of {name}")
    if prints is not None:
        need_tensors(prints=prints)
        if (
            prints.dtype != torch.int64
            or prints.shape != (len(Ws), 2)
            or not prints.is_contiguous()
        ):
            raise ValueError(
                f"prints must be int64 [{len(Ws)}, 2], like torch.empty({len(Ws)}, 2, "
                f"dtype=torch.int64), got {_describe(prints)}"
            )
    weights, u, v, keys = [], [], [], []
    for i, W in enumerate(Ws):
        residual = residuals[i] if residuals else None
        probe = probes[i] if probes else None
        base = bases[i] if bases else None
        try:
            check_update(W, Us[i], Vs[i], residual, probe, base, rounding)
        except ValueError as error:
            raise ValueError(f"weight {i}: {error}" if len(Ws) > 1 else str(error)) from None
        # what only looks must not count as a write: `data` has a version counter of its own
        weights.append(W.data if dry_run else W.detach())
        u.append(_factor(Us[i], W, alpha))
        v.append(_factor(Vs[i], W))
        if probe is not None:
            keys.append(_factor(probe, W))
    read, planes = list(bases or ()), [plane.detach() for plane in residuals or ()]

    device = weights[0].device if weights else None
    sums = torch.empty((len(weights), 5), dtype=torch.float64, device=device)
    errors = [W.new_empty(len(W), K.shape[1], dtype=torch.float32) for W, K in zip(weights, keys)]

    def call(u: list[Tensor], rounding: str, write: bool) -> None:
        _ops.run(
            "low_rank_update_", (*weights, *read, *u, *v, *planes, *keys),
            weights, read, u, v, rounding, seed, planes, keys, write, sums, errors,
            prints if write else None,
        )  # fmt: skip

    if rounding == "corrected":
        call(u, "nearest", False)
        seen = [B.double().mT @ K.double() for B, K in zip(v, keys)]
        extra = [-E.double() @ torch.linalg.pinv(S) for E, S in zip(errors, seen)]
        call([a + b.to(a) for a, b in zip(u, extra)], "nearest", not dry_run)
        for E, b, S in zip(errors, extra, seen):
            E += b @ S
    else:
        call(u, rounding, not dry_run)
    return [
        UpdateReport(sums, W.numel(), errors[i] if errors else None, i)
        for i, W in enumerate(weights)
    ]


def _factor(x: Tensor, W: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha x as W's update takes it: contiguous, on its device, in the dtype of its arithmetic."""
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    x = x.detach()
    if x.dtype != dtype or x.device != W.device:  # asked first: it costs less than to be told so
        x = x.to(W.device, dtype)
    return (x if alpha == 1 else x * alpha).contiguous()


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
            f"W must be a 2-D bfloat16, float16, float32 or float64 tensor, got {_describe(W)}"
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
            f"W [{rows}, {columns}] needs U [{rows}, r] and V [{columns}, r], got {_describe(U)} "
            f"and {_describe(V)}{hint}"
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
                f"{name} must be {dtype} {list(W.shape)} on {W.device}, got {_describe(other)}"
            )
    if probe is not None and (probe.ndim != 2 or probe.shape[0] != columns):
        raise ValueError(f"probe must have shape [{columns}, p], got {_describe(probe)}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
