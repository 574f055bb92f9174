"""Corpora for key statistics: local files, a data set of the Hugging Face hub, or the model's own samples."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import KnowEditError
from .lines import kind, read_lines

Corpus = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

SUFFIXES = (".txt", ".jsonl", ".parquet")
HEADING = re.compile(r"\s*=.*=\s*")  # as WikiText and WikiExtractor write them
LONGEST = 1 << 18  # characters; a text without blank lines is cut at the line end after this
SHUFFLE_BUFFER = 1000  # documents held while shuffling a stream; its shards are shuffled too


class CorpusError(KnowEditError):
    """A corpus that is missing, empty or unreadable; the message says where, why and what to do."""


def documents(
    corpus: Corpus,
    *,
    model: Callable[..., Iterable[str]] | None = None,
    seed: int = 0,
    split: str = "train",
    start: int = 0,
) -> Iterator[str]:
    """Yield the non-empty documents of `corpus` from number `start` on: the same ones in the same order every time.

    Args:
        corpus: one of

            * a path or several: ``.txt`` (documents stand between blank lines; a heading stays with what follows),
              ``.jsonl`` (the field ``text``), ``.parquet`` (the column ``text``), each also ``.gz``; a folder stands
              for all such files in it, sorted. Read in file order.
            * ``"wikipedia"`` (English, November 2023) or ``"hf:owner/name[@revision][:config[:column]]"``: streamed
              from the hub, shuffled by `seed` (shards, then a buffer of 1,000 documents).
            * ``"self"``: ``model(seed=seed, start=start)``, the model's own samples.
        model: what ``"self"`` calls; it yields texts.
        seed: order of a stream, or which samples.
        split: of a hub data set.
        start: documents to skip, to go on where an earlier run stopped.

    Raises:
        CorpusError: nothing there, no documents, a byte that is not UTF-8 (with file and line), a missing field, a hub
            that cannot be reached. Raised while iterating, except for what `corpus` itself shows to be wrong.
    """
    if start < 0:
        raise CorpusError(f"start must be 0 or more, got {start}")
    if corpus == "self":
        if model is None:
            raise CorpusError("corpus 'self' needs a model to sample from; pass model=, or give a text file")
        return iter(model(seed=seed, start=start))
    source = _hub_source(corpus)
    found = source.stream(split, seed) if source else itertools.chain.from_iterable(map(_read, _files(corpus)))
    return _skip(found, start, corpus)


def corpus_fingerprint(corpus: Corpus) -> dict[str, Any]:
    """What identifies `corpus` in a statistics file: independent of folders, dates and machines.

    ``{"name": ...}`` with, for local files, ``files`` (name and the first 16 hex digits of each file's sha256) and, for
    a hub data set, ``config``, ``column`` and ``revision`` as asked for: the hub itself is not asked, so that cached
    statistics are found without it. Raises `CorpusError` for files that are not there.
    """
    if corpus == "self":
        return {"name": "self"}
    if source := _hub_source(corpus):
        return asdict(source)
    files = [{"name": path.name, "sha256": _sha256(path)[:16]} for path in _files(corpus)]
    return {"name": ", ".join(Path(p).name for p in _paths(corpus)), "files": files}


def _skip(found: Iterator[str], start: int, corpus: Corpus) -> Iterator[str]:
    number = 0
    for number, text in enumerate((text for text in found if text.strip()), 1):
        if number > start:
            yield text
    if not number:
        raise CorpusError(f"corpus {corpus!r} holds no text; give one with documents, or corpus='self'")


# -- local files ------------------------------------------------------------------------------------------------------


def _paths(corpus: Corpus) -> list[Path]:
    return [Path(corpus)] if isinstance(corpus, (str, os.PathLike)) else [Path(path) for path in corpus]


def _files(corpus: Corpus) -> list[Path]:
    """The files behind paths and folders, each known to be there and of a kind that can be read."""
    files: list[Path] = []
    kinds = f"{', '.join(SUFFIXES)} (also .gz)"
    for path in _paths(corpus):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind(p) in SUFFIXES and p.is_file())
            if not inside:
                raise CorpusError(f"{path}: no text files in this folder; known kinds: {kinds}")
            files += inside
        elif not path.exists():
            raise CorpusError(
                f"{path}: no such file; a corpus is a path, 'wikipedia', 'hf:owner/name' or 'self' (the model samples)"
            )
        elif kind(path) not in SUFFIXES:
            raise CorpusError(f"{path}: unknown kind of file; known kinds: {kinds}")
        else:
            files.append(path)
    if not files:
        raise CorpusError("corpus is an empty list; give at least one file, or corpus='self'")
    return files


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
        except ValueError as e:
            raise CorpusError(f"{path}:{number}: not valid JSON ({e})") from e
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            has = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no object"
            raise CorpusError(f"{path}:{number}: needs a string in the field 'text'; {has}")
        yield record["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
        with pyarrow.parquet.ParquetFile(source) as table:
            if "text" not in (names := table.schema_arrow.names):
                raise CorpusError(f"{path}: has no column 'text'; it has {', '.join(map(repr, names))}")
            for batch in table.iter_batches(256, columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (OSError, EOFError, pyarrow.ArrowException) as e:
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


# -- the hub ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HubSource:
    name: str
    revision: str | None
    config: str | None
    column: str

    def stream(self, split: str, seed: int) -> Iterator[str]:
        import datasets
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info(self.name, revision=self.revision, timeout=8)  # fails at once; streaming retries long
            rows = datasets.load_dataset(self.name, self.config, split=split, revision=self.revision, streaming=True)
            for row in rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
                if not isinstance(row.get(self.column), str):
                    raise CorpusError(f"{self.name}: no text in column {self.column!r}; columns: {', '.join(row)}")
                yield row[self.column]
        except CorpusError:
            raise
        except Exception as e:  # the hub client raises its own, the http library's, pyarrow's and the system's errors
            raise CorpusError(
                f"data set {self.name!r} cannot be streamed from the hub ({type(e).__name__}: {str(e)[:300]}); "
                "give a local .txt, .jsonl or .parquet file, or corpus='self' to use the model's own samples"
            ) from e


def _hub_source(corpus: Corpus) -> _HubSource | None:
    """The hub data set that `corpus` names, or None when it names files."""
    if corpus == "wikipedia":
        return _HubSource("wikimedia/wikipedia", None, "20231101.en", "text")
    if not isinstance(corpus, str) or not corpus.startswith("hf:"):
        return None
    place, *rest = corpus[3:].split(":")
    name, _, revision = place.partition("@")
    if name.count("/") != 1 or not all(name.split("/")) or len(rest) > 2:
        raise CorpusError(f"corpus {corpus!r} must read 'hf:owner/name', 'hf:owner/name@revision:config:column'")
    config, column = (rest + ["", ""])[:2]
    return _HubSource(name, revision or None, config or None, column or "text")
