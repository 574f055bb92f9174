"""Local text files: which ones a path stands for, the documents in them, and what identifies them.

Lines are read by this package and not by a data set library, because an error must name the file
and the line.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from knowedit.errors import CorpusError
from knowedit.io.lines import kind, read_lines

SUFFIXES = (".txt", ".jsonl", ".parquet")
HEADING = re.compile(r"\s*=.*=\s*")  # as WikiText and WikiExtractor write them
LONGEST = 1 << 18  # characters; a text without blank lines is cut at the line end after this


@dataclass(frozen=True)
class TextFiles:
    """A text file, or the files of a folder in sorted order.

    Attributes:
        path: as it was given.
        files: what is read, in order.
    """

    path: Path
    files: tuple[Path, ...]

    @classmethod
    def find(cls, path: Path) -> TextFiles:
        """The files behind `path`.

        Raises:
            CorpusError: nothing there, or a kind of file that is not known.
        """
        kinds = f"{', '.join(SUFFIXES)} (also .gz)"
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind(p) in SUFFIXES and p.is_file())
            if not inside:
                raise CorpusError(f"{path}: no text files in this folder; known kinds: {kinds}")
            return cls(path, tuple(inside))
        if not path.exists():
            raise CorpusError(
                f"{path}: no such file; a corpus is a path, 'wikipedia', 'hf:owner/name' or "
                f"'self' (the model samples)"
            )
        if kind(path) not in SUFFIXES:
            raise CorpusError(f"{path}: unknown kind of file; known kinds: {kinds}")
        return cls(path, (path,))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The name without its folder."""
        return self.path.name

    def identity(self) -> list[dict[str, str]]:
        """Name and the first 16 hex digits of the sha256 of each file.

        Raises:
            CorpusError: a file cannot be read.
        """
        return [{"name": file.name, "sha256": _sha256(file)[:16]} for file in self.files]

    def stream(self, lane: int = 0, lanes: int = 1) -> Iterator[str]:
        """The documents `lane`, `lane + lanes`, `lane + 2 lanes`, ... of all files.

        Raises:
            CorpusError: a byte that is not UTF-8, a missing field, a broken archive (with file and
                line).
        """
        texts = itertools.chain.from_iterable(map(_read, self.files))
        return itertools.islice((text for text in texts if text.strip()), lane, None, lanes)


def _read(path: Path) -> Iterator[str]:
    return {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[kind(path)](path)


def _read_text(path: Path) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for _, line in read_lines(path, CorpusError):
        blank = not line.strip()
        if not blank:
            block.append(line)
            size += len(line)
        if (blank and not all(map(HEADING.fullmatch, block))) or size > LONGEST:
            yield "".join(block).strip()
            block, size = [], 0
    if block:
        yield "".join(block).strip()


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in read_lines(path, CorpusError):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise CorpusError(f"{path}:{number}: not valid JSON ({e})") from e
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            has = (
                f"it has {', '.join(map(repr, record))}"
                if isinstance(record, dict)
                else "it is no object"
            )
            raise CorpusError(f"{path}:{number}: needs a string in the field 'text'; {has}")
        if half := re.search("[\ud800-\udfff]", record["text"]):
            what = (
                f"character {half.start() + 1} of the text is half of a pair "
                f"(\\u{ord(half[0]):04x})"
            )
            raise CorpusError(
                f"{path}:{number}: {what}, as is left when an emoji is cut in two; remove it"
            )
        yield record["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        with pyarrow.parquet.ParquetFile(source) as table:
            if "text" not in (names := table.schema_arrow.names):
                raise CorpusError(
                    f"{path}: has no column 'text'; it has {', '.join(map(repr, names))}"
                )
            column = table.schema_arrow.field("text").type
            if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
                raise CorpusError(
                    f"{path}: the column 'text' holds {column}, not strings; convert it"
                )
            rows = 0
            for batch in table.iter_batches(256, columns=["text"]):
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError as e:
                    raise CorpusError(
                        f"{path}: rows {rows + 1} to {rows + len(batch)}: a text is not UTF-8 ({e})"
                    ) from e
                rows += len(batch)
                yield from (text for text in texts if text)
    except CorpusError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, pyarrow.ArrowException) as e:
        raise CorpusError(f"{path}: cannot be read as parquet ({e}); fetch it again") from e


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as e:
        raise CorpusError(f"{path}: cannot be read ({e.strerror or e})") from e
    return digest.hexdigest()
