"""Runs the kernels of csrc/cpu for instruction sets that this processor lacks.

Where the processor has the instructions, a candidate runs as it is. Elsewhere on x86 the sources
are compiled with instructions that `include/immintrin.h` emulates lane by lane, and registered
under a namespace of their own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from filelock import FileLock

from knowedit_kernels import _native
from knowedit_kernels._dispatch import Candidate

HERE = Path(__file__).resolve().parent
NAMESPACE = "knowedit_emulated"
LEVELS = {"avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx": 4}  # as in csrc/cpu/isa.h
OPS = (
    "syrk_cpu_",
    "pack_cpu_",
    "grouped_syrk_cpu_",
    "row_audit_cpu_",
    "low_rank_cpu_",
    "fingerprint_cpu_",
)


def build(library: Path) -> None:
    """Compiles csrc/cpu into `library` with emulated instructions; the file appears whole or not at
    all.
    """
    sources, home = _native.source_dir() / "cpu", _native.torch_dir()
    flags = [
        "-Wno-psabi",
        *(flag for flag in _native.FLAGS[1:] if flag != "-shared"),
        f"-Dknowedit={NAMESPACE}",
    ]
    flags += [f"-I{sources}", "-include", str(HERE / "every_isa.h")]
    links = [f"-L{home / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    kernels = sorted(sources.glob("*_*.cpp"))  # of one instruction set each
    drivers = sorted(set(sources.glob("*.cpp")) - set(kernels))
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part, whole = Path(folder, "kernels.o"), Path(folder, "whole.so")
        # apart from the drivers, because torch's own headers need the compiler's <immintrin.h>
        emulating = [
            "-O2",
            "-march=native",
            "-r",
            f"-I{HERE / 'include'}",
            *map(str, kernels),
            "-o",
            str(part),
        ]
        linking = [
            "-O1",
            "-shared",
            f"-I{home / 'include'}",
            *map(str, drivers),
            str(part),
            "-o",
            str(whole),
            *links,
        ]
        for arguments in (emulating, linking):
            subprocess.run([*_native.compiler(), *flags, *arguments], check=True)
        whole.replace(library)


@functools.cache
def load() -> _native.Native:
    """Loads the emulated library and registers its ops as `knowedit_emulated`; it is compiled once
    per machine.
    """
    processor = str(sorted(torch.cpu.get_capabilities().items()))
    keys = (
        _native.source_key(_native.source_dir() / "cpu"),
        _native.source_key(HERE),
        processor,
        torch.__version__,
    )
    digest = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    library = _native.cache_dir() / f"emulated_{digest}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):  # processes that test side by side compile it once
        if not library.exists():
            build(library)
    for op in OPS:
        schema = str(getattr(torch.ops.knowedit, op).default._schema)
        torch.library.define(f"{NAMESPACE}::{op}", schema.removeprefix(f"knowedit::{op}"))
    torch.ops.load_library(str(library))
    return _native.Native(library, isa=max(LEVELS.values()))


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Candidates of every instruction set run, with emulated instructions."""
    native = load()
    with (
        mock.patch.object(torch.ops, "knowedit", getattr(torch.ops, NAMESPACE)),
        mock.patch.object(_native, "load", lambda: native),
    ):
        yield


def instructions_of(candidate: Candidate) -> contextlib.AbstractContextManager[None]:
    """Emulates the instructions of `candidate` where the processor lacks them and is of that kind
    at all.
    """
    lacking = _native.load().refusal(LEVELS.get(candidate.name, 0)) == _native.LACKING
    needed = lacking and platform.machine() in ("x86_64", "AMD64")
    return emulated() if needed else contextlib.nullcontext()
