"""Texts that a model samples from itself, kept in the cache: its statistics and its ordinary text
are the same samples each time, and sampling them takes minutes.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from knowedit.io.files import atomic_file, cache_dir, trim
from knowedit.io.progress import Within
from knowedit.models import generation

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

logger = logging.getLogger(__name__)

KEPT = 256 << 20  # bytes of samples to keep: about 500 million tokens


def samples(
    model: EditableModel,
    seed: int = 0,
    start: int = 0,
    *,
    batch: int = 64,
    length: int = 128,
    within: Within | None = None,
) -> Iterator[str]:
    """The texts of `generation.samples`, from the cache where they were sampled before. What an
    edited model says is not kept.
    """
    size = {"batch": batch, "length": length}
    plain = not model.ledger.active and model.router is None
    folder = _folder(model, batch, length) if plain else None
    for number in itertools.count(start // batch):
        file = None if folder is None else folder / f"{seed}-{number}.json.gz"
        texts = None if file is None else _read(file, batch)
        if texts is None:
            fresh = generation.samples(model, seed, number * batch, **size, within=within)
            texts = list(itertools.islice(fresh, batch))
            if file is not None:
                _write(file, texts)
        yield from texts[start % batch :] if number == start // batch else texts


def _folder(model: EditableModel, batch: int, length: int) -> Path:
    """Where the samples of this model are kept. Of the other models' the least recently used are
    deleted where all take more than `KEPT` bytes.
    """
    ends = sorted(generation.end_tokens(model))
    what = json.dumps([model.fingerprint, model.setup, ends, batch, length])
    folder = cache_dir("samples", hashlib.blake2b(what.encode(), digest_size=8).hexdigest())
    os.utime(folder)
    trim(folder.parent, KEPT, keep=folder)
    return folder


def _read(file: Path, batch: int) -> list[str] | None:
    """The texts of a block; None where there are none, the file is damaged (gzip has a checksum),
    or it is another block's.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            kept = json.load(stream)
        return kept["texts"] if kept["of"] == _of(file) and len(kept["texts"]) == batch else None
    except Exception:
        return None


def _of(file: Path) -> str:
    """What a block says it is of: a model's settings, and its number."""
    return f"{file.parent.name}/{file.name}"


def _write(file: Path, texts: list[str]) -> None:
    """Keep a block; a disk that is full only costs the next run some time."""
    try:
        with atomic_file(file) as path, gzip.open(path, "wt", encoding="utf-8") as stream:
            json.dump({"of": _of(file), "texts": texts}, stream)
    except OSError as error:
        logger.warning("samples are not kept: %s", error)
