"""The rows of one update of a `GroupedSecondMoment`: whose they are, their weights, and which of
them cannot be summed.
"""

from __future__ import annotations

import torch

from knowedit_kernels.moments.waiting import sort_rows, starts_of


def grouping(
    groups: int,
    n: int,
    counts: torch.Tensor | None,
    offsets: torch.Tensor | None,
    index: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The order of `n` rows (None: sorted already) and the groups' offsets [groups + 1], from the
    one that is given (`GroupedSecondMoment.update`).

    Raises ValueError unless exactly one is, and fits.
    """
    if sum(given is not None for given in (counts, offsets, index)) != 1:
        raise ValueError("give exactly one of counts=, offsets= or index=")
    if index is not None:
        if index.shape != (n,):
            raise ValueError(f"index has shape {list(index.shape)}; {n} rows need [{n}]")
        return sort_rows(index, groups)
    name, given = ("counts", counts) if counts is not None else ("offsets", offsets)
    assert given is not None
    width = groups + (name == "offsets")
    if given.is_floating_point() or given.shape != (width,):
        raise ValueError(
            f"{name} is {given.dtype} {list(given.shape)}; {groups} groups need whole numbers "
            f"[{width}]"
        )
    starts = given.detach().cpu().long()
    starts = starts_of(starts) if name == "counts" else starts
    if int(starts[0]) or int(starts[-1]) != n or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"{name} must rise from row 0 to the last of the {n} rows, group by group; it is "
            f"{given.tolist()[:8]}{'...' if width > 8 else ''} and ends at {int(starts[-1])}"
        )
    return None, starts


def checked_weights(keys: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
    """weights [n] in the arithmetic of the keys [n, d]: float64 for float64 ones, else float32.

    Raises ValueError unless they are n floating-point numbers on the keys' device.
    """
    if weights is None:
        return None
    if not weights.is_floating_point() or weights.shape != (len(keys),):
        raise ValueError(
            f"weights is {weights.dtype} {list(weights.shape)}; {len(keys)} rows need one "
            f"floating-point weight each, [{len(keys)}]"
        )
    if weights.device != keys.device:
        raise ValueError(f"weights are on {weights.device}, the moment is on {keys.device}")
    wide = keys.dtype == torch.float64
    return weights.detach().to(torch.float64 if wide else torch.float32)


def check_rows(
    keys: torch.Tensor,
    sums: torch.Tensor,
    weights: torch.Tensor | None,
    index: torch.Tensor | None,
    starts: torch.Tensor,
    limit: float,
) -> None:
    """Raises ValueError naming the first of the rows `keys` [n, d] that is not finite or too large
    to be summed: whose square, the first of `sums` [n, 5], is not below `limit`.
    """
    squares = sums[:, 0] if weights is None else sums[:, 0] * weights.double().square()
    if float(squares.sum()) < limit:
        return
    bad = (~(squares < limit)).nonzero().flatten()
    if len(bad) == 0:
        raise ValueError(
            "the rows are too large: their squares overflow float32; scale them, or use "
            "precision='fp64'"
        )
    row = int(bad[0])
    group = int(torch.searchsorted(starts, row, right=True)) - 1
    if index is not None:
        group = int(index[row])
    channels = (~keys[row].isfinite()).nonzero().flatten().tolist()
    what = f"is NaN or infinite in {len(channels)} channels (first: {channels[:1]})"
    if not channels:
        what = "is too large" if weights is None else "times its weight is too large or NaN"
    raise ValueError(
        f"rows[{row}] of group {group} {what}; {len(bad)} such rows in this batch, of which "
        "nothing was added. Leave them out, or run the model in a wider dtype"
    )
