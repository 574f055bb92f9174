"""Writing files so that a crash, a `kill -9` or a full disk never leaves half of one behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """`$KNOWEDIT_CACHE` (default `~/.cache/knowedit`) joined with `parts`; created."""
    base = Path(os.environ.get("KNOWEDIT_CACHE") or Path.home() / ".cache" / "knowedit")
    path = base.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def trim(folder: Path, limit: int, keep: Path | None = None) -> int:
    """Delete the least recently used subfolders of `folder` until they take at most `limit` bytes;
    returns bytes freed.

    `keep` is never deleted. A subfolder's time stamp says when it was used: whoever uses one
    touches it.
    """
    used: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process deletes too
            files = (Path(where, name) for where, _, names in os.walk(path) for name in names)
            used.append((path.stat().st_mtime, sum(file.stat().st_size for file in files), path))
    left = total = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if left > limit and path != keep:
            shutil.rmtree(path, ignore_errors=True)
            left -= size
    return total - left


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` in one step when the block ends
    well.

    Raises:
        OSError: the disk is full or not writable; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        fsync_path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raise FileExistsError when `path` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists; choose another folder or remove it")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` in one step when the block ends
    well.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():  # safetensors gives its files to their owner alone
                file.chmod(0o666 & ~_umask())
            fsync_path(file)
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
