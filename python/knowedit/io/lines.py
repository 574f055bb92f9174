"""Text files read line by line, with the position in every error; text from files as a terminal may
show it.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast


def kind(path: Path) -> str:
    """The ending that says what `path` holds, leaving ``.gz`` aside: ``.txt`` for ``a.txt.gz``."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix


#: Controls of terminals, of the direction of text, and surrogates.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with its control characters spelled out, but for line ends and tabs: what comes from a
    file moves no cursor, sets no title, hides no line and turns no words round; and what no
    encoding has (half a pair of UTF-16, a byte of a file's name) can be printed.
    """
    return HIDDEN.sub(lambda found: _spelled(ord(found[0])), text)


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def number_of(count: int, what: str) -> str:
    """`1 fact`, `2 facts`, `1,000 facts`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def named(what: str, which: Iterable[object]) -> str:
    """`layer 5`, `layers 4, 5`."""
    names = [str(one) for one in which]
    return f"{what}{'s' * (len(names) != 1)} {', '.join(names)}"


def open_bytes(path: Path) -> BinaryIO:
    """Open `path` for reading, decompressing it when its name ends in ``.gz``. Raises OSError."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_lines(path: Path, error: type[ValueError]) -> Iterator[tuple[int, str]]:
    """Yield ``(line number from 1, line with its end)`` of a UTF-8 file, plain or ``.gz``; a byte
    order mark is fine.

    Lines end at ``\\n`` only, so U+2028 and lone carriage returns stay inside their record.
    Raises `error` naming file, line and byte for an unreadable file, a broken archive or a byte
    that is not UTF-8.
    """
    number = 0
    try:
        with open_bytes(path) as stream:
            for number, raw in enumerate(stream, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        bad, column = e.object[e.start], e.start + 1
        raise error(
            f"{path}:{number}: byte {column} (0x{bad:02x}) is not UTF-8; save the file as UTF-8"
        ) from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise error(
            f"{path}: broken gzip archive after line {number} ({e}); fetch or compress it again"
        ) from e
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror or e})") from e
