"""An emulated tensor core: 16 exact products at a time, added to an accumulator that truncates to
24 bits.

The model of Fasi et al. (2021) for float32 accumulation; what the self-centred scheme is designed
against.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

BLOCK = 16


def truncate(x: torch.Tensor) -> torch.Tensor:
    """float64 -> the nearest float32 value towards zero, kept in float64."""
    near = x.float()
    down = torch.where(near.abs().double() > x.abs(), near.nextafter(torch.zeros_like(near)), near)
    return down.double()


def chain(
    keys: torch.Tensor, start: torch.Tensor, left: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """One MMA chain over `keys` [tokens, d] that starts at `start` [d, d]: the accumulator after
    every token. `left`: the parts that stand on the left instead, [tokens, d] each, in their order.
    """
    acc, right = start.clone(), keys.double()
    parts = [part.double() for part in left or (keys,)]
    for at in range(0, len(keys), BLOCK):
        block = slice(at, at + BLOCK)
        for part in parts:
            acc = truncate(acc + part[block].T @ right[block])
    return acc


def scaled_parts(keys: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """weights^2 keys as three bfloat16 parts, smallest first: the left side of `scaled_product`."""
    wide = keys.float() * weights.float().square()[:, None]
    high = wide.bfloat16()
    mid = (wide - high.float()).bfloat16()
    return [(wide - high.float() - mid.float()).bfloat16(), mid, high]


def plain(keys: torch.Tensor, length: int) -> torch.Tensor:
    """Zero-started chains of `length` tokens, each folded into float64."""
    zero = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64)
    return sum((chain(part, zero) for part in keys.split(length)), zero)


def lengths(tokens: int, cap: int, first: int) -> list[int]:
    """The kernel's chain lengths over `tokens`: first, first, 2 first, 4 first, ... cap, cap, ...
    and the rest.
    """
    ends = [0]
    while ends[-1] < tokens:
        ends.append(min(max(first, min(2 * ends[-1], ends[-1] + cap)), tokens))
    return [end - begin for begin, end in itertools.pairwise(ends)]


def self_centred(
    keys: torch.Tensor,
    cap: int,
    first: int = 64,
    launch: int = 16384,
    left: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The kernel's scheme, step by step, on the emulated tensor core; one float64 fold per `launch`
    tokens. `left` as in `chain`, of one launch.
    """
    total = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64)
    for part in keys.split(launch):
        acc, moved, seen = total.float() * 0, total.float() * 0, 0
        for length in lengths(len(part), cap, first):
            half = (moved + acc) * (0.5 * length / max(seen, 1))
            move = (acc + half).bfloat16().float()
            moved, acc = moved + move, acc - move
            here = slice(seen, seen + length)
            acc = chain(part[here], acc.double(), [x[here] for x in left]).float()
            seen += length
        total += (moved + acc).double()
    return total
