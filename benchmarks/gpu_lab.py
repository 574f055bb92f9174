"""What the steps of the GPU suite share: sizes, predictions, the record of rows, and ways to sum a
second moment.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from knowedit_kernels.bench.problem import Check
from knowedit_kernels.moments import cuda, gpu, reference, schedule
from knowedit_kernels.numerics import MOMENT

from . import common

Row = dict[str, Any]
LAUNCH = 16384  # tokens of our launch


@dataclass(frozen=True)
class Sizes:
    """What one run uses; tokens of the timed rows, [d, tokens] of the correctness rows, shapes of
    the other operations.
    """

    dims: tuple[int, ...] = (4096, 14336)
    tokens: int = 65_536
    check: tuple[tuple[int, int], ...] = ((576, 5000), (1536, 20_000), (4096, 33_001))
    bias: tuple[int, int] = (512, 2**20)
    chains: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 65_536, 2**20)
    folds: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536)
    update: tuple[int, int] = (4096, 14336)
    ranks: tuple[int, ...] = (8, 100)
    head: tuple[int, int, int] = (200, 4096, 128_256)  # rows, d, vocabulary
    mixture: tuple[int, int, int] = (128, 768, 524_288)  # experts, d, rows


DRY = Sizes(
    dims=(64, 96),
    tokens=512,
    check=((48, 301), (65, 257)),
    bias=(32, 1024),
    chains=(128, 512),
    folds=(128, 512),
    update=(40, 96),
    ranks=(3,),
    head=(7, 24, 300),
    mixture=(5, 24, 300),
)

#: Written before any run (KERNELS study, section 5). Seconds per 10^6 tokens and layer, by provider
#: and d; bytes/s; FLOP/s; seconds of one low-rank update of a bf16 [4096, 14336] weight and of one
#: target loss at 200 rows, 128,256 tokens.
PREDICTED: dict[str, Row] = {
    "H200": {
        "ours": {4096: 0.029, 14336: 0.351},
        "cuda": {4096: 0.024, 14336: 0.299},
        "torch": {4096: 0.054, 14336: 0.662},
        "rome": {4096: 0.69, 14336: 8.44},
        "copy": 4.3e12,
        "bf16": 788e12,
        "update": 55e-6,
        "loss": 0.49e-3,
    },
    "H100": {
        "ours": {4096: 0.033, 14336: 0.399},
        "cuda": {4096: 0.028, 14336: 0.341},
        "torch": {4096: 0.064, 14336: 0.788},
        "rome": {4096: 0.70, 14336: 8.55},
        "copy": 3.0e12,
        "bf16": 700e12,
        "update": 78e-6,
        "loss": 0.70e-3,
    },
    "A100": {
        "ours": {4096: 0.086, 14336: 1.057},
        "cuda": {},
        "torch": {4096: 0.156, 14336: 1.915},
        "rome": {4096: 2.34, 14336: 28.7},
        "copy": 1.8e12,
        "bf16": 260e12,
        "update": 130e-6,
        "loss": 1.17e-3,
    },
}


@dataclass(frozen=True)
class Way:
    """One way to add a launch's second moment: the kernel (`variant`) and its launch parameters."""

    name: str
    variant: str
    config: schedule.Config

    def add_(self, c: Tensor, keys: Tensor) -> None:
        """c [d, d] float64 += keys^T keys on the lower triangle, one launch; on a CPU the float64
        reference instead.
        """
        if not keys.is_cuda:
            c += reference.second_moment(keys)
        elif self.variant == "cuda":
            cuda.launch_([c], [keys], self.config)
        else:
            gpu.launch_([c], [keys], self.config)

    def sum_(self, c: Tensor, keys: Tensor, launch: int = LAUNCH) -> None:
        """As `add_`, in launches of `launch` tokens."""
        for part in keys.split(launch):
            self.add_(c, part)


@dataclass
class Lab:
    """The device, the sizes, the clock, and what was found so far.

    `deadline` ends the suite and `until` the running step, on `time.monotonic()`.
    """

    device: torch.device
    name: str
    sizes: Sizes
    report: common.Report
    rounds: int
    deadline: float
    until: float = 0.0
    step: str = ""
    environment: Row = field(default_factory=dict)
    benched: list[Row] = field(default_factory=list)
    bias: list[Row] = field(default_factory=list)
    best: dict[int, Way] = field(default_factory=dict)
    tuned: list[Row] = field(default_factory=list)
    cuda_proven: bool = False

    @property
    def dry(self) -> bool:
        """On a CPU: Triton and CUDA launches are replaced by the float64 reference."""
        return self.device.type == "cpu"

    @property
    def capability(self) -> int:
        """80, 90, 100, ...; a dry run goes through the steps of a Hopper."""
        return 90 if self.dry else gpu.capability(self.device)

    def predicted(self, what: str) -> Any:
        """The prediction for this device, or None."""
        return next((table[what] for name, table in PREDICTED.items() if name in self.name), None)

    def left(self) -> float:
        """Seconds left to the running step."""
        return self.until - time.monotonic()

    def row(self, line: str, *, red: bool = False, **fields: Any) -> None:
        """Prints and records one row; a `red` one fails the suite."""
        self.report.failed |= red
        path = {"path": "CPU and float64 reference in place of the GPU kernels"} if self.dry else {}
        self.report.note(
            f"  {line}{'  RED' if red else ''}", step=self.step, red=red, **path, **fields
        )

    def ways(self) -> list[Way]:
        """Ways to sum 16-bit keys; the launcher's built-in choice first."""
        base = schedule.config(torch.bfloat16, "exact", self.capability, LAUNCH)
        shapes = [
            (128, 64, 8, 4),
            (128, 64, 8, 3),
            (128, 64, 8, 6),
            (128, 32, 8, 4),
            (128, 32, 8, 6),
            (64, 64, 4, 4),
        ]
        configs = [base]
        for tile, depth, warps, stages in shapes:
            for tma in (True, False) if self.capability >= 90 else (False,):
                sizes: Row = {
                    "tile": tile,
                    "depth": depth,
                    "warps": warps,
                    "stages": stages,
                    "tma": tma,
                }
                configs.append(replace(base, parts=tile // 16, **sizes))
        ways = [Way(name_of(config), "triton", config) for config in dict.fromkeys(configs)]
        if self.dry or self.cuda_proven:
            ways.append(Way(f"cuda {cuda.ROWS}x{cuda.COLUMNS}", "cuda", base))
        return ways


def name_of(config: schedule.Config) -> str:
    kind = "TMA" if config.tma else "pointer"
    return (
        f"{kind} {config.tile}x{config.tile}x{config.depth}, {config.warps} warps, "
        f"{config.stages} stages"
    )


def sum64(keys: Tensor) -> Tensor:
    """keys^T keys in float64 on the keys' device, block by block."""
    c = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64, device=keys.device)
    for block in keys.split(4096):
        wide = block.double()
        c.addmm_(wide.T, wide)
    return c


def moment_checks(c: Tensor, expected: Tensor, rows: int = 1024) -> list[Check]:
    """The three errors of `numerics` of the lower triangle of `c` [d, d], on its own device, `rows`
    rows at a time.
    """
    root = expected.diagonal().sqrt()
    square, norm, worst = 0.0, 0.0, []
    for i in range(0, len(c), rows):
        error = (c[i : i + rows] - expected[i : i + rows]).tril(i)
        square += float(2 * error.square().sum() - error.diagonal(i).square().sum())
        norm += float(expected[i : i + rows].square().sum())
        worst.append((error / torch.outer(root[i : i + rows], root)).abs().max())
    diagonal = c.diagonal() - expected.diagonal()
    bias = float((diagonal / expected.diagonal()).mean())
    values = {
        "normwise": (square / norm) ** 0.5,
        "elementwise": float(torch.stack(worst).max()),
        "bias": bias,
    }
    return [Check(name, value, getattr(MOMENT, name)) for name, value in values.items()]


def errors(checks: Sequence[Check]) -> Row:
    """Checks as in the benchmark's rows: {name: [value, limit]}."""
    return {check.name: [check.value, check.limit] for check in checks}


def in_words(checks: Sequence[Check]) -> str:
    return ", ".join(
        f"{check.name} {check.value:.1e}{'' if check.ok else ' OVER'}" for check in checks
    )
