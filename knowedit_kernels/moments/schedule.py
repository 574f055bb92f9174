"""Which tiles a launch computes, in which order, and with which block sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    """Launch parameters of `second_moment_kernel`; chain lengths in tokens (0: one uncentred
    chain).
    """

    tile: int
    depth: int
    warps: int
    stages: int
    tma: bool
    parts: int
    products: int = 1
    chain: int = 512
    first: int = 64

    def constants(self) -> dict[str, int | bool]:
        """The kernel's compile-time arguments, except KEY and EVEN, and the launch options."""
        return {
            "M": self.tile,
            "N": self.tile,
            "K": self.depth,
            "CHAIN": self.chain,
            "FIRST": self.first,
            "DOUBLINGS": max(self.chain // self.first, 1).bit_length() - 1,
            "PRODUCTS": self.products,
            "TMA": self.tma,
            "PARTS": self.parts,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# A launch over fewer tokens than this runs in float64: too few chains to average over, and cheap
# anyway.
FEW_TOKENS = 4096
# From here on chains of 512 tokens keep the budget; below, of 256 (emulated: README).
MANY_TOKENS = 16384


def config(
    dtype: torch.dtype, precision: str, capability: int, tokens: int, tma: bool = True
) -> Config:
    """The launch parameters for `tokens` keys of `dtype` on a GPU of `capability` (80, 90, 100);
    none spills.

    `tma=False` forbids tensor descriptors, which need rows of a multiple of 16 bytes.
    """
    tma = tma and capability >= 90
    if dtype == torch.float64:
        return Config(tile=64, depth=16, warps=4, stages=3, tma=False, parts=1, chain=0)
    chain = 0 if precision == "fast" else 512 if tokens >= MANY_TOKENS else 256
    if dtype != torch.float32:
        return Config(128, 32 if capability < 90 else 64, 8, 4, tma, parts=8, chain=chain)
    if precision == "fast":
        return Config(128, 32, 8, 2 if tma else 3, tma, parts=8, products=1, chain=0)
    # several products truncate several times per token, so the chains are shorter
    if precision == "fp32":
        return Config(128, 32, 8, 2 if tma else 3, tma, parts=8, products=4, chain=chain // 4)
    if capability >= 100:  # Triton 3.6 compiles six products of a 128-wide tile to a trap there
        return Config(64, 32, 8, 3, tma, parts=4, products=6, chain=chain // 4)
    return Config(
        128, 16 if capability < 90 else 32, 8, 3, False, parts=8, products=6, chain=chain // 4
    )


# Groups of a mixture with fewer rows than this run in float64: even the shortest chains are few.
FEW_ROWS = 256


def grouped_config(
    dtype: torch.dtype, precision: str, capability: int, rows: int, weighted: bool
) -> Config | None:
    """The launch parameters for a group of `rows` keys of `dtype`; None: they run in float64.

    weighted: bfloat16 keys, multiplied by weights in the kernel.
    Below `FEW_TOKENS` 16-bit keys keep the budget with chains of 64, with weights of 32 (three
    products truncate three times); float32 keys, whose six products truncate six times, do not.
    """
    if dtype == torch.float64 or precision == "fp64" or rows < FEW_ROWS:
        return None
    few = rows < FEW_TOKENS
    if weighted:
        depth, tma = (16, False) if capability < 90 else (32, True)
        return Config(128, depth, 8, 3, tma, parts=8, chain=32 if few else 64, first=32)
    if few and dtype == torch.float32:
        return None
    found = config(dtype, precision, capability, rows)
    return replace(found, chain=64) if few else found


def cut_rows(rows: Sequence[int], tiles: int, processors: int) -> list[int]:
    """Into how many pieces to cut each group, of `rows` and `tiles` tiles each, so that none keeps
    a processor longer than its share of a launch; a piece keeps at least 2048 rows.
    """
    share = max(2048, sum(rows) * tiles // processors)
    return [-(-count // share) for count in rows]


@functools.lru_cache(maxsize=64)
def tile_table(
    dims: int,
    layers: int,
    tile: int,
    width: int | None = None,
    device: torch.device = CPU,
    group: int = 8,
) -> torch.Tensor:
    """int32 [programs, 4] of (layer, row, column, 0): every tile [tile, width] that touches the
    lower triangle, once. Made and copied to a device once.

    `width` defaults to `tile`.
    Super-rows of `group` tile rows are walked column by column, so that running programs share
    columns in L2.
    """
    if device != CPU:
        return tile_table(dims, layers, tile, width, CPU, group).to(device)
    width = width or tile
    rows = range(-(-dims // tile))
    lower = [(i, j) for i in rows for j in range(-(-min((i + 1) * tile, dims) // width))]
    lower.sort(key=lambda ij: (ij[0] // group, ij[1], ij[0]))
    return torch.tensor(
        [(layer, i, j, 0) for layer in range(layers) for i, j in lower],
        dtype=torch.int32,
        device=CPU,
    )


def splits(tiles: int, tokens: int, processors: int) -> int:
    """Into how many token ranges to cut a launch of `tiles` programs so that they fill
    `processors`.

    Only when there are too few tiles; a range keeps at least 2048 tokens.
    """
    return 1 if 2 * tiles > processors else max(1, min(processors // max(tiles, 1), tokens // 2048))
