"""The public functions: check, fold alpha into U, call the op, wrap the sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from knowedit_kernels import _ops
from knowedit_kernels._arguments import need_tensors
from knowedit_kernels.lowrank import direct
from knowedit_kernels.lowrank.checks import check_update, describe
from knowedit_kernels.lowrank.report import UpdateReport

ROUNDINGS = ("nearest", "stochastic", "compensated", "corrected")


@overload
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
    report: Literal[True] = True,
) -> UpdateReport: ...


@overload
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
    report: Literal[False],
) -> None: ...


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
    report: bool = True,
) -> UpdateReport | None:
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
    report: False updates and measures nothing, which takes less time where W comes from a cache;
    the weight gets the same bits. Returns None.

    What is read may lie in memory that is written (U may be a view of W): it is copied first.

    Raises ValueError or TypeError naming the argument before anything is written. An update that
    overflows W's dtype is written, and counted in the report (``nonfinite``); a `WeightLedger`
    refuses it.
    """
    if probe is None and base is None and not dry_run:
        sums = direct.empty_sums() if report else None
        if direct.add_(W, U, V, alpha, rounding, seed, residual, sums):
            return None if sums is None else UpdateReport(sums, W.numel(), None)
    reports = low_rank_update_many_(
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
        report=report,
    )
    return None if reports is None else reports[0]


@overload
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
    report: Literal[True] = True,
) -> list[UpdateReport]: ...


@overload
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
    report: bool,
) -> list[UpdateReport] | None: ...


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
    report: bool = True,
) -> list[UpdateReport] | None:
    """`low_rank_update_` of several weights in one launch; argument lists are parallel to
    ``Ws``. Raises ValueError for a weight that occurs twice, too.

    prints: int64 [weights, 2] that receives the halves of the new weights' fingerprints, taken on
    the way where an implementation can; not of a dry run.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if not report and dry_run:
        raise ValueError("dry_run=True writes nothing and report=False says nothing: drop one")
    if not report and probes is not None and rounding != "corrected":
        raise ValueError("probe= is measured for the report: drop it, or report=False")
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
                f"dtype=torch.int64), got {describe(prints)}"
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
    sums = errors = None
    if report or keys:
        sums = torch.empty((len(weights), 5), dtype=torch.float64, device=device)
        errors = [
            W.new_empty(len(W), K.shape[1], dtype=torch.float32) for W, K in zip(weights, keys)
        ]

    def call(u: list[Tensor], rounding: str, write: bool, measure: bool = report) -> None:
        seen = keys if measure else []
        _ops.run(
            "low_rank_update_", (*weights, *read, *u, *v, *planes, *seen),
            weights, read, u, v, rounding, seed, planes, seen, write, sums if measure else None,
            errors if seen else [], prints if write else None,
        )  # fmt: skip

    if rounding == "corrected":
        assert errors is not None
        call(u, "nearest", False, True)
        seen = [B.double().mT @ K.double() for B, K in zip(v, keys)]
        extra = [-E.double() @ torch.linalg.pinv(S) for E, S in zip(errors, seen)]
        call([a + b.to(a) for a, b in zip(u, extra)], "nearest", not dry_run)
        for E, b, S in zip(errors, extra, seen):
            E += b @ S
    else:
        call(u, rounding, not dry_run)
    if sums is None or not report:
        return None
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
