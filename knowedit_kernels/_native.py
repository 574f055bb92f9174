"""Builds and loads the compiled extension (`csrc`).

Only the standard library is imported here at module level, because `setup.py` runs this file to
put a prebuilt library into the wheel without importing torch. Order at run time: a prebuilt library
of exactly these sources; one compiled earlier into the cache; compile now (a few seconds); else one
warning and the torch paths. torch's stable ABI lets one CPU binary serve every torch >= 2.11.

KNOWEDIT_NATIVE=0 turns it off; KNOWEDIT_CACHE moves the cache; CXX names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
STABLE_ABI, OLDEST = "0x020b000000000000", (2, 11)  # of torch
FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
)


LACKING = "this processor lacks the instructions"


class NativeBuildError(RuntimeError):
    """The extension could not be compiled; the message says why and what would help."""


@dataclass(frozen=True)
class Native:
    """The state of the CPU extension: `path` when loaded, else the `reason` it is not; `isa` as in
    csrc/cpu/isa.h.
    """

    path: Path | None
    isa: int = -1
    reason: str | None = None

    def refusal(self, isa: int) -> str | None:
        """Why kernels of instruction set `isa` cannot run, or None."""
        if self.reason is not None:
            return f"no compiled kernels: {self.reason}"
        return LACKING if self.isa < isa else None


def source_dir() -> Path:
    """Where `csrc` lies: inside the installed package, or beside it in a checkout."""
    installed = PACKAGE / "_csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def torch_dir() -> Path:
    """The torch package's folder, found without importing it. Raises NativeBuildError if its
    headers are absent, or older than the stable ABI that the sources use.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("purelib", "platlib")]
    for place in places:
        if (place / "include" / "torch" / "csrc" / "stable").is_dir():
            text = (place / "version.py").read_text("utf-8")
            check_version("".join(re.findall(r"^__version__ = '(.*)'", text, re.MULTILINE)))
            return place
    raise NativeBuildError("no torch >= 2.11 headers in this environment; install torch first")


def check_version(version: str) -> None:
    """Raises NativeBuildError for a torch older than the stable ABI that the sources use."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise NativeBuildError(f"they need torch 2.11 or newer, and this is {version}")


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else g++, c++ or clang++. Raises NativeBuildError if there
    is none.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]):
            return command
        raise NativeBuildError(f"CXX={command[0]} is not an executable")
    for name in ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NativeBuildError("no C++ compiler (g++ or clang++) on PATH; install one, or set CXX")


def source_key(folder: Path) -> str:
    """A digest of everything a library built from `folder` depends on, except the compiler."""
    digest = hashlib.sha256(" ".join((*FLAGS, platform.machine(), platform.system())).encode())
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def library_name() -> str:
    """The file name of the CPU library of the present sources; a stale prebuilt one has another
    name.
    """
    return f"_native_cpu_{source_key(source_dir() / 'cpu')}.so"


def build(folder: Path) -> Path:
    """Compiles csrc/cpu into `folder`; the file appears whole or not at all. Raises
    NativeBuildError.
    """
    command, torch_home, sources = (
        compiler(),
        torch_dir(),
        sorted((source_dir() / "cpu").glob("*.cpp")),
    )
    if not sources:
        raise NativeBuildError(f"no C++ sources in {source_dir() / 'cpu'}")
    folder.mkdir(parents=True, exist_ok=True)
    link = (
        ["-undefined", "dynamic_lookup"]
        if platform.system() == "Darwin"
        else ["-Wl,--no-as-needed"]
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        output = Path(scratch) / "library.so"
        arguments = [*FLAGS, f"-I{torch_home / 'include'}", *map(str, sources), "-o", str(output)]
        arguments += [f"-L{torch_home / 'lib'}", *link, "-ltorch", "-ltorch_cpu", "-lc10"]
        result = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if result.returncode != 0:
            raise NativeBuildError(f"{command[0]} failed:\n{result.stderr[-2000:]}")
        target = folder / library_name()
        os.replace(output, target)
    return target


def cache_root() -> Path:
    """Where compiled libraries and gate verdicts are kept: $KNOWEDIT_CACHE, else knowedit/ in the
    user's cache.
    """
    named = os.environ.get("KNOWEDIT_CACHE")
    return Path(
        named or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "knowedit"
    ).expanduser()


def cache_dir() -> Path:
    """The per-compiler cache of libraries compiled at first use."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    tag = hashlib.sha256((" ".join(command) + version).encode()).hexdigest()[:8]
    return cache_root() / "native" / tag


def _find_or_build() -> Path:
    prebuilt = PACKAGE / library_name()
    if prebuilt.exists():
        return prebuilt
    cached = cache_dir() / library_name()
    return cached if cached.exists() else build(cached.parent)


@functools.cache
def load() -> Native:
    """Loads the CPU extension once per process, compiling it if need be; never raises, warns once
    on failure.
    """
    if os.environ.get("KNOWEDIT_NATIVE") == "0":
        return Native(None, reason="turned off by KNOWEDIT_NATIVE=0")
    import torch

    try:
        check_version(torch.__version__)  # also where another environment has compiled one
        path = _find_or_build()
        torch.ops.load_library(str(path))
        return Native(path, isa=ctypes.CDLL(str(path)).knowedit_cpu_isa())
    except (NativeBuildError, OSError) as error:
        warnings.warn(
            f"knowedit_kernels: no compiled CPU kernels, using torch ({error})", stacklevel=2
        )
        return Native(None, reason=str(error).partition("\n")[0])
