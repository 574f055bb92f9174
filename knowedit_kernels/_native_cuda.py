"""Builds and loads the CUDA kernels (`csrc/cuda`), a library of their own: it cannot load under a
CPU build of torch.

Compiled with nvcc into the cache at first use, and never without a GPU that can run it; see
`_native` for the CPU. KNOWEDIT_NATIVE=0 turns it off; NVCC names the compiler.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from knowedit_kernels._native import STABLE_ABI, NativeBuildError, cache_root, source_dir, torch_dir

ARCHITECTURE = "compute_90a,code=sm_90a"
FLAGS = (
    "-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden",
    f"-gencode=arch={ARCHITECTURE}",
    "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
)  # fmt: skip
logger = logging.getLogger("knowedit_kernels")


@dataclass(frozen=True)
class NativeCuda:
    """The state of the CUDA library: `path` when loaded, else the `reason` it is not."""

    path: Path | None
    reason: str | None = None


def compiler() -> str:
    """nvcc's path: $NVCC, else on PATH or in $CUDA_HOME. Raises NativeBuildError if there
    is none.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise NativeBuildError(
            "no nvcc on PATH or in CUDA_HOME; install the CUDA toolkit (12.5 or newer), or set NVCC"
        )
    return found


def sources() -> list[Path]:
    """Every file the library is built from, in a fixed order."""
    return sorted(
        path for path in (source_dir() / "cuda").iterdir() if path.suffix in (".cu", ".cuh", ".h")
    )


def build(folder: Path, *, torch_cuda: bool = True) -> tuple[Path, str]:
    """Compiles csrc/cuda into `folder`; the file appears whole or not at all. Returns it and what
    the compiler said.

    `torch_cuda=False` does not link libtorch_cuda, for machines whose torch has none. Raises
    NativeBuildError.
    """
    torch_home = torch_dir()
    command = [compiler(), *FLAGS, f"-I{torch_home / 'include'}", "-Xptxas", "-v"]
    command += [str(path) for path in sources() if path.suffix == ".cu"]
    command += [
        f"-L{torch_home / 'lib'}",
        "-Xlinker",
        "--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    command += ["-ltorch_cuda"] if torch_cuda else []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        output = Path(scratch) / "library.so"
        result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        said = result.stdout + result.stderr
        if result.returncode != 0:
            raise NativeBuildError(f"nvcc failed:\n{said[-2000:]}")
        target = folder / f"_native_cuda_{_key()}.so"
        os.replace(output, target)
    return target, said


def _key() -> str:
    """A digest of everything the library depends on."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(" ".join((*FLAGS, version)).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def load() -> NativeCuda:
    """Loads the library once per process, compiling it if need be (half a minute); never raises."""
    if os.environ.get("KNOWEDIT_NATIVE") == "0":
        return NativeCuda(None, "turned off by KNOWEDIT_NATIVE=0")
    import torch

    if torch.version.cuda is None:
        return NativeCuda(None, "this torch was built without CUDA")
    try:
        path = cache_root() / "native" / f"_native_cuda_{_key()}.so"
        if not path.exists():
            logger.info("compiling the CUDA kernels, once, into %s", path.parent)
            path, _ = build(path.parent)
        torch.ops.load_library(str(path))
    except (NativeBuildError, OSError) as error:
        return NativeCuda(None, str(error).partition("\n")[0])
    return NativeCuda(path)
