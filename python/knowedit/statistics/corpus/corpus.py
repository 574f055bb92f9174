"""Corpora for key statistics: local files, a data set of the Hugging Face hub, or the model's own
samples.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from knowedit.errors import CorpusError as CorpusError
from knowedit.io.lines import kind, read_lines
from knowedit.statistics.corpus.hub import HubSource, hub_source

logger = logging.getLogger(__name__)

Part = str | os.PathLike[str]
Corpus = Part | Sequence[Part]

SUFFIXES = (".txt", ".jsonl", ".parquet")
HEADING = re.compile(r"\s*=.*=\s*")  # as WikiText and WikiExtractor write them
LONGEST = 1 << 18  # characters; a text without blank lines is cut at the line end after this
HUB_LANES = (
    8  # parts of a hub data set that are read side by side, so that each rank downloads its own
)


def documents(
    corpus: Corpus,
    *,
    model: Callable[..., Iterable[str]] | None = None,
    seed: int = 0,
    split: str = "train",
    start: int = 0,
    lane: int = 0,
    lanes: int = 1,
) -> Iterator[str]:
    """Yield the non-empty documents of `corpus` from number `start` on: the same ones in the same
    order every time.

    Args:
        corpus: one of

            * a path or several: ``.txt`` (documents stand between blank lines; a heading stays with
              what follows), ``.jsonl`` (the field ``text``), ``.parquet`` (the column ``text``),
              each also ``.gz``; a folder stands for all such files in it, sorted. Read in file
              order.
            * ``"wikipedia"`` (English, November 2023) or
              ``"hf:owner/name[@revision][:config[:column]]"``: streamed from the hub, shuffled by
              `seed` (shards, then a buffer of 1,000 documents).
            * ``"self"``: ``model(seed=seed, start=start)``, the model's own samples.
            * a list of paths and data sets: one after another; with weights (``["wiki.txt*3",
              "code.jsonl*1"]``, 1 where none is given) mixed document by document, so that their
              characters are in that proportion from the start on. One that runs dry is named in a
              warning, and the others go on.
        model: what ``"self"`` calls; it yields texts.
        seed: order of a stream, or which samples.
        split: of a hub data set.
        start: documents to skip, to go on where an earlier run stopped.
        lane: which of `lanes` disjoint parts (hub: whole files where there are enough of them;
            local: every so-manieth).

    Raises:
        CorpusError: nothing there, no documents, a byte that is not UTF-8 (with file and line), a
            missing field, a hub that cannot be reached. Raised while iterating, except for what
            `corpus` itself shows to be wrong.
    """
    if start < 0:
        raise CorpusError(f"start must be 0 or more, got {start}")
    if corpus == "self":
        if model is None:
            raise CorpusError(
                "corpus 'self' needs a model to sample from; pass model=, or give a text file"
            )
        return iter(model(seed=seed, start=start))
    parts = _parts(corpus)
    opened = [_texts(part, split, seed, lane, lanes) for part, _ in parts]
    weights = [weight for _, weight in parts]
    if all(weight is None for weight in weights):
        return _skip(itertools.chain.from_iterable(opened), start, corpus, lane)
    names = [str(part) for part, _ in parts]
    return _skip(
        _mixed(opened, [1.0 if w is None else w for w in weights], names), start, corpus, lane
    )


def lanes_of(corpus: Corpus) -> int:
    """In how many lanes to read `corpus`: several only where reading all of it on every rank would
    be a waste.
    """
    if corpus == "self":
        return 1
    return HUB_LANES if any(hub_source(part) for part, _ in _parts(corpus)) else 1


def corpus_fingerprint(corpus: Corpus) -> dict[str, Any]:
    """What identifies `corpus` in a statistics file: independent of folders, dates and machines.

    ``{"name": ...}`` with, for local files, ``files`` (name and the first 16 hex digits of each
    file's sha256) and, for a hub data set, ``config``, ``column`` and ``revision`` as asked for:
    the hub itself is not asked, so that cached statistics are found without it; for a mixture its
    ``parts`` and their weights. Raises `CorpusError` for files that are not there.
    """
    if corpus == "self":
        return {"name": "self"}
    if source := hub_source(corpus):
        return asdict(source)
    parts = _parts(corpus)
    if all(weight is None and not hub_source(part) for part, weight in parts):
        paths = [Path(part) for part, _ in parts]
        files = [{"name": path.name, "sha256": _sha256(path)[:16]} for path in _files(paths)]
        return {"name": ", ".join(path.name for path in paths), "files": files}
    found = [{"weight": weight, **corpus_fingerprint(part)} for part, weight in parts]
    return {
        "name": ", ".join(f["name"] + (f"*{f['weight']:g}" if f["weight"] else "") for f in found),
        "parts": found,
    }


def commits(corpus: Corpus) -> dict[str, str]:
    """The commit that each hub data set of `corpus` is at now, by its name and revision; see
    `HubSource.commit`.
    """
    sources = [hub_source(part) for part, _ in _parts(corpus)] if corpus != "self" else []
    return {str(source): source.commit() for source in sources if source}


def at_commits(corpus: Corpus, known: Mapping[str, str]) -> Corpus:
    """`corpus` with its hub data sets at those commits, so that it stays the same whatever is
    pushed meanwhile.
    """
    if not known:
        return corpus
    found: list[Part] = []
    for part, weight in _parts(corpus):
        source = hub_source(part)
        pinned = str(replace(source, revision=known[str(source)])) if source else part
        found.append(pinned if weight is None else f"{pinned}*{Decimal(repr(weight)):f}")
    return found


def _parts(corpus: Corpus) -> list[tuple[Part, float | None]]:
    """What a corpus is made of, and the weight of each part (None where the user gave none)."""
    parts = [corpus] if isinstance(corpus, (str, os.PathLike)) else list(corpus)
    if not parts:
        raise CorpusError("corpus is an empty list; give at least one file, or corpus='self'")
    found: list[tuple[Part, float | None]] = []
    for part in parts:
        weighted = re.fullmatch(r"(.+)\*(\d+(?:\.\d+)?)", part) if isinstance(part, str) else None
        if weighted and not Path(str(part)).exists():
            if float(weighted[2]) == 0:
                raise CorpusError(f"corpus {part!r} has weight 0; leave it out")
            found.append((weighted[1], float(weighted[2])))
        else:
            found.append((part, None))
    if len(found) > 1 and any(part == "self" for part, _ in found):
        raise CorpusError(
            "corpus 'self' stands alone: the model's samples cannot be mixed with texts"
        )
    return found


def _texts(part: Part, split: str, seed: int, lane: int, lanes: int) -> Iterator[str]:
    """The non-empty texts of one part's lane."""
    source = hub_source(part)
    if isinstance(source, HubSource):
        return (text for text in source.stream(split, seed, lane, lanes) if text.strip())
    texts = itertools.chain.from_iterable(map(_read, _files([Path(part)])))
    return itertools.islice((text for text in texts if text.strip()), lane, None, lanes)


def _mixed(
    streams: Sequence[Iterator[str]], weights: Sequence[float], names: Sequence[str]
) -> Iterator[str]:
    """The next document always comes from the stream that is furthest behind its share of the
    characters.
    """
    taken = dict.fromkeys(range(len(streams)), 0.0)
    while taken:
        behind = min(taken, key=lambda i: (taken[i], i))
        text = next(streams[behind], None)
        if text is None:
            del taken[behind]
            if taken:
                logger.warning("corpus %s has run dry; the others go on without it", names[behind])
            continue
        taken[behind] += len(text) / weights[behind]
        yield text


def _skip(found: Iterator[str], start: int, corpus: Corpus, lane: int) -> Iterator[str]:
    number = 0
    for number, text in enumerate(found, 1):
        if number > start:
            yield text
    if not number and lane == 0:
        raise CorpusError(
            f"corpus {corpus!r} holds no text; give one with documents, or corpus='self'"
        )


# -- local files
# ------------------------------------------------------------------------------------------------------  # noqa: E501


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files behind paths and folders, each known to be there and of a kind that can be read."""
    files: list[Path] = []
    kinds = f"{', '.join(SUFFIXES)} (also .gz)"
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind(p) in SUFFIXES and p.is_file())
            if not inside:
                raise CorpusError(f"{path}: no text files in this folder; known kinds: {kinds}")
            files += inside
        elif not path.exists():
            raise CorpusError(
                f"{path}: no such file; a corpus is a path, 'wikipedia', 'hf:owner/name' or "
                f"'self' (the model samples)"
            )
        elif kind(path) not in SUFFIXES:
            raise CorpusError(f"{path}: unknown kind of file; known kinds: {kinds}")
        else:
            files.append(path)
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
