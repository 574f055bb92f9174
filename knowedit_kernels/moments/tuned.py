"""Block sizes measured on a GPU: `knowedit_kernels/tuned/<device>.json`, which
`benchmarks/gpu_suite.py` writes.

A table changes speed only: chain lengths, which decide accuracy, are not in it. It is a part of the
accuracy gate's version, and the gate runs every entry (`gpu.gate`), so measured sizes are no less
proven than the built-in ones.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from knowedit_kernels import _native
from knowedit_kernels.moments.schedule import Config

FOLDER = _native.PACKAGE / "tuned"
VARIANTS = ("cuda", "triton")
# what an entry may say; a chain's tokens must stay a multiple of the depth
CHOICES = {
    "tile": (64, 128),
    "depth": (16, 32, 64),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4, 5, 6),
    "tma": (False, True),
}


@dataclass(frozen=True)
class Entry:
    """The fastest way for 16-bit keys of `d` channels: the `variant`, and the best sizes of the
    Triton kernel.
    """

    d: int
    variant: str
    tile: int
    depth: int
    warps: int
    stages: int
    tma: bool

    def sizes(self, config: Config) -> Config:
        """`config` with this entry's sizes; without tensor descriptors where `config`
        forbids them.
        """
        parts = self.tile // 16
        return replace(config, tile=self.tile, depth=self.depth, warps=self.warps,
        stages=self.stages, parts=parts,
                       tma=self.tma and config.tma)  # fmt: skip


def slug(name: str) -> str:
    """A device's name as part of a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file_of(name: str) -> Path:
    """Where the table of the device called `name` lies, if there is one."""
    return FOLDER / f"{slug(name)}.json"


def parse(record: dict[str, Any]) -> Entry:
    """One entry; further keys are notes. Raises ValueError naming the field and its choices,
    KeyError if one is missing.
    """
    entry = Entry(**{name: record[name] for name in Entry.__dataclass_fields__})
    for name, choices in {**CHOICES, "variant": VARIANTS}.items():
        value = getattr(entry, name)
        if value not in choices or type(value) is not type(choices[0]):
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(str, choices))}")
    if type(entry.d) is not int or entry.d < 1:
        raise ValueError(f"d = {entry.d!r} is not a positive integer")
    return entry


@functools.cache
def table(path: Path) -> tuple[Entry, ...]:
    """The entries of a file, by d; none if it is absent. A damaged file counts as absent, with a
    warning.
    """
    try:
        return tuple(
            sorted(
                map(parse, json.loads(path.read_text())["second_moment"]), key=lambda entry: entry.d
            )
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"knowedit_kernels: ignoring {path} ({reason}); delete it or tune again", stacklevel=2
        )
        return ()


def entries(device: torch.device) -> tuple[Entry, ...]:
    """The table of a CUDA device; empty for others."""
    return table(file_of(torch.cuda.get_device_name(device))) if device.type == "cuda" else ()


def nearest(device: torch.device, d: int) -> Entry | None:
    """The entry whose number of channels is nearest to `d`, by ratio; None without a table."""
    return min(entries(device), key=lambda entry: abs(math.log(entry.d / d)), default=None)


def refine(config: Config, dtype: torch.dtype, d: int, device: torch.device) -> Config:
    """`config` with the sizes measured on `device`, for 16-bit keys; unchanged without a table."""
    entry = nearest(device, d) if dtype.itemsize == 2 else None
    return config if entry is None else entry.sizes(config)


def sources(device: torch.device) -> list[str]:
    """The table's file if it exists: a part of the gate's version."""
    path = file_of(torch.cuda.get_device_name(device))
    return [str(path)] if path.exists() else []
