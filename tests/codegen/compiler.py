"""`compile_for`: what a launch would compile for an architecture, and what the machine
code says.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ARCHITECTURES = (80, 90, 100)
FULL = 90  # the architecture that takes every case: see `on_each`
# bytes of shared memory one block may use
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# the instruction a 16-bit tensor-core product must become
MMA = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
T = TypeVar("T")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def on_each(every: Iterable[T], elsewhere: Iterable[T]) -> list[tuple[int, T]]:
    """Pairs of an architecture and a case: all of `every` on sm_90, those of `elsewhere` on the
    others. What the types and options of a kernel change is the same on every architecture, so the
    others need each of them once, and where registers are scarcest, but not every combination.
    """
    cases, fewer = list(every), list(elsewhere)
    assert all(case in cases for case in fewer), "a case that sm_90 lacks"
    return [(a, case) for a in ARCHITECTURES for case in (cases if a == FULL else fewer)]


class _Driver:
    """Stands in for a CUDA driver, so that `warmup` specialises on the arguments exactly as a
    launch does.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are cached by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)

    @staticmethod
    def is_active() -> bool:
        return True


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel for one architecture."""

    architecture: int
    registers: int
    shared: int
    sass: str
    ptx: str

    def count(self, instruction: str) -> int:
        """How often an opcode (without its suffixes) occurs in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    @property
    def spills(self) -> int:
        """Loads and stores of thread-local memory."""
        return self.count("LDL") + self.count("STL")

    def check(self, mma: str | None = None) -> None:
        """Asserts a real body, no spills, shared memory within the limit and (if given) the MMA
        instruction.
        """
        assert (
            self.count("EXIT") and len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", self.sass, re.M)) > 20
        ), "empty body"
        assert not re.search(r"^\s*trap;\s*$", self.ptx, re.M), "the body is a trap"
        assert self.spills == 0, f"{self.spills} spill instructions at {self.registers} registers"
        assert self.shared <= SHARED_LIMIT[self.architecture], (
            f"{self.shared} bytes of shared memory"
        )
        if mma is not None:
            assert self.count(mma), f"no {mma} in the machine code"


def compile_for(kernel: Any, architecture: int, *args: Any, **options: Any) -> Compiled:
    """Compiles `kernel(*args, **options)` for `architecture` (80, 90, 100); tensors may be on the
    meta device.

    `options` are the kernel's constexprs and num_warps / num_stages.
    """
    driver.set_active(_Driver(architecture))
    compiled = kernel.warmup(*args, grid=(1,), **options)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        # the analysis of data flow only names targets of branches, for a quarter of the time
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Compiled(
        architecture, int(registers[1]), compiled.metadata.shared, sass, compiled.asm["ptx"]
    )


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout
