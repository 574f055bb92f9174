"""What a moment refuses, in which words: keys that cannot be summed, a sum that is not whole."""

from __future__ import annotations

import math

import torch

# The trace beyond which float32 products of keys could overflow.
_LARGEST_TRACE = 1e37


def limit_of(precision: str) -> float:
    """The sum of squares that a batch of keys must stay below."""
    return math.inf if precision == "fp64" else _LARGEST_TRACE


def check_whole(whole: bool) -> None:
    """Raises RuntimeError if a launch failed and nobody knows how much of it is in the sum."""
    if not whole:
        raise RuntimeError(
            "a launch failed while this moment took in its rows, so its sum is unknown: restore a "
            "saved state with load_state_dict"
        )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def complaint(keys: torch.Tensor, mask: torch.Tensor | None, limit: float) -> str:
    """Says which kept token of `keys` [..., dim] is the first that cannot be summed, and what to
    do.
    """
    bad = ~(keys.double().square().sum(-1) < limit)
    where = (bad if mask is None else bad & mask.to(bad.device)).nonzero()
    if len(where) == 0:
        return (
            "keys are too large: their squares overflow float32; scale them, or use "
            "precision='fp64'"
        )
    channels = (~keys[tuple(where[0])].isfinite()).nonzero().squeeze(1).tolist()
    what = (
        f"is NaN or infinite in {_number(len(channels), 'channel')} (first: {channels[0]})"
        if channels
        else "is too large"
    )
    first, such = ", ".join(map(str, where[0].tolist())), _number(len(where), "such token")
    return (
        f"keys[{first}] {what}; {such} in this batch, of which nothing was added. Mask them out, "
        "or run the model in a wider dtype"
    )
