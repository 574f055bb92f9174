"""Text files read line by line with positions in every error, and files written whole or not at all."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast


def open_bytes(path: Path) -> BinaryIO:
    """Open `path` for reading, decompressing it when its name ends in ``.gz``. Raises OSError."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_lines(path: Path, error: type[ValueError]) -> Iterator[tuple[int, str]]:
    """Yield ``(line number from 1, line with its end)`` of a UTF-8 file, plain or ``.gz``; a byte order mark is fine.

    Lines end at ``\\n`` only, so U+2028 and lone carriage returns stay inside their record.
    Raises `error` naming file, line and byte for an unreadable file, a broken archive or a byte that is not UTF-8.
    """
    number = 0
    try:
        with open_bytes(path) as stream:
            for number, raw in enumerate(stream, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        bad, column = e.object[e.start], e.start + 1
        raise error(f"{path}:{number}: byte {column} (0x{bad:02x}) is not UTF-8; save the file as UTF-8") from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise error(f"{path}: broken gzip archive after line {number} ({e}); fetch or compress it again") from e
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror or e})") from e


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash at any moment, sees the old file or the new one.

    A name ending in ``.gz`` is compressed, with no time stamp: equal data give equal bytes. Raises OSError.
    """
    path = Path(path)
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream:
            stream.write(data)
        data = packed.getvalue()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; the user expects ordinary ones
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
