"""Writing files so that a crash, a `kill -9` or a full disk never leaves half of one behind under
its name, and that two processes do not undo each other's work.

What is being written has a temporary name, `.NAME.MACHINE-PROCESS.RANDOM.part`, beside its own.
After a kill it stays; who writes NAME next removes it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from knowedit.errors import KnowEditError

PART = re.compile(r"\..+?\.(?:(?P<machine>[0-9a-zA-Z_-]*)-(?P<process>\d+)\.)?[0-9a-z_]+\.part")
ABANDONED = 86400.0  # seconds without a write, for what another machine or an earlier version wrote
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # of a disk
PATIENCE = 2.0  # seconds that `locked` waits


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
        OSError: the disk is full or not writable, or `path` is a folder; it is then as it was.
    """
    path = Path(path)
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=".part")
    temporary = Path(name)
    try:
        os.close(fd)
        with _named(path):
            yield temporary
            fsync_path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise IsADirectoryError when `path` is a folder, where a file is to be written."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")


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
    path = path.resolve() if path.is_symlink() else path  # a folder takes no link's place
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=".part"))
    try:
        with _named(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():  # safetensors gives its files to their owner alone
                    file.chmod(0o666 & ~_umask())
                fsync_path(file)
        os.chmod(temporary, 0o777 & ~_umask())
        check_free(path)  # another run may have been faster
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(folder: Path, name: str = "") -> list[Path]:
    """What runs that were killed have left in `folder`: temporary files and folders that nobody
    writes any more.

    Args:
        name: of what was being written; empty: anything.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:  # no such folder, or one that may not be read
        return []
    like = f".{name}." if name else "."
    found = (Path(entry.path) for entry in entries if entry.name.startswith(like))
    return sorted(path for path in found if _is_abandoned(path))


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do, whatever its name is: with the length of its
    JSON header.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what cannot be read counts nothing."""
    total = 0
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


@contextmanager
def locked(path: str | Path | None) -> Iterator[None]:
    """Within the block no other process is in such a block for `path`, a file or folder that it
    changes; None: there is none.

    Raises:
        KnowEditError: another one is, and does not leave it within a moment.
    """
    from filelock import FileLock, Timeout  # most of what imports this module locks nothing

    if path is None:
        yield
        return
    real = Path(path).resolve()  # whatever links lead there
    place = real.with_name(f".{real.name}.lock")
    lock = FileLock(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise KnowEditError(
            f"another run is writing to {path}; wait until it ends, or name another place"
        ) from error
    except OSError:  # no lock can be made there: nobody has one
        pass
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within the block the errors of a disk that refuses, which name no file, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _prefix(path: Path) -> str:
    return f".{path.name}.{_machine()}-{os.getpid()}."


def _machine() -> str:
    return re.sub(r"[^0-9a-zA-Z_-]", "", socket.gethostname())[:24]


def _remove_leftovers(path: Path) -> None:
    """Remove what killed runs have left of `path`."""
    _remove(leftovers(path.parent, path.name))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # another process removes it too
                path.unlink()


def _is_abandoned(path: Path) -> bool:
    """Whether a temporary name's process is gone; where that cannot be known, whether nothing was
    written for a day.
    """
    made = PART.fullmatch(path.name)
    if made is None:
        return False
    if made["machine"] is not None and made["machine"] == _machine():
        return not _is_running(int(made["process"]))
    try:
        return time.time() - path.stat().st_mtime > ABANDONED
    except OSError:
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Within the block the errors of safetensors and of tokenizers, which are of no class that says
    so, are OSErrors that name `path`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(f"{path} could not be written: {error}") from error
        raise
