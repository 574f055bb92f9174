"""A corpus as a numbered sequence of windows: some documents, cut into pieces of tokens.

A window is the unit of work, of progress and of sharing: window `n` goes to rank `n mod ranks`,
whatever the number of ranks, and a checkpoint says how many windows are done. Windows are cut by
characters, so that a rank finds its own without tokenising those of the others. A hub data set has
lanes (`Corpus.lanes`), and window `n` is the next one of lane `n mod lanes`: a rank opens the
lanes it needs. Window `n` of "self" is the model's samples 64 n to 64 n + 63.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np

from knowedit.errors import CorpusError
from knowedit.io.files import atomic_file, cache_dir, trim
from knowedit.models.editable import EditableModel
from knowedit.models.tokens import cut, start_tokens
from knowedit.statistics.corpus.batching import Piece
from knowedit.statistics.corpus.corpus import Corpus

logger = logging.getLogger(__name__)

SIZE = 32_768  # characters of a window: about 8,000 tokens, enough to sort and to fill a batch
SAMPLES = 64  # documents of a window of the model's own samples
PREFETCH = 16  # windows the worker process reads ahead, and that a rank takes at most in one round
WORTH_A_WORKER = 65_536  # tokens from which on a worker process and a cache of tokens pay
CACHED = 2 << 30  # bytes of cached tokens to keep: about 500 million tokens


@dataclass(frozen=True)
class Window:
    """Number, how many documents it holds, and their pieces; `documents` is 0 behind the end of its
    lane.
    """

    number: int
    documents: int
    pieces: list[Piece]

    @property
    def count(self) -> int:
        """Keys that count."""
        return sum(piece.count for piece in self.pieces)


@dataclass
class Reader:
    """What it takes to make windows; small enough to travel to a worker process.

    Attributes:
        corpus, seed: as of `Corpus.documents`.
        tokenizer: a fast one.
        max_length: longer documents are cut into pieces of this many tokens, each of which starts
            as the tokenizer starts a text.
        skip_first: the first token of a piece does not count, nor any other that the tokenizer puts
            in front.
        rank, ranks: which windows to make.
        samples: `EditableModel.samples`, for "self".
        cache: a folder of windows that were tokenised before, or None.
        vocabulary: how many tokens the model embeds. A document with another one (added to the
            tokenizer, and not to the model) is left out.
    """

    corpus: Corpus
    seed: int
    tokenizer: Any
    max_length: int
    skip_first: bool
    rank: int = 0
    ranks: int = 1
    samples: Any = None
    cache: Path | None = None
    vocabulary: int = 1 << 60

    def windows(self, start: int = 0, taken: Sequence[int] = ()) -> Iterator[Window]:
        """This rank's windows from number `start` on, without end: behind the corpus' end they are
        empty.

        Args:
            taken: documents of each lane in the windows before `start`.

        Raises:
            CorpusError: the corpus cannot be read (on).
        """
        if self.corpus.is_self:
            for number in _own(start, self.rank, self.ranks):
                texts = list(
                    itertools.islice(self.samples(seed=self.seed, start=SAMPLES * number), SAMPLES)
                )
                yield self._tokenised(number, texts)
        lanes = self.corpus.lanes
        position = list(taken) or [0] * lanes
        opened: dict[int, Iterator[list[str]]] = {}
        shared = math.gcd(lanes, self.ranks)
        for number in itertools.count(start):
            lane, own = number % lanes, number % self.ranks == self.rank
            if lane % shared != self.rank % shared:
                continue
            if lane not in opened:
                if (found := self._cached(number)) is not None:
                    position[lane] += found.documents
                    if own:
                        yield found
                    continue
                source = self.corpus.documents(
                    seed=self.seed, start=position[lane], lane=lane, lanes=lanes
                )
                opened[lane] = _cut(source)
            texts = next(opened[lane], [])
            if own:
                yield self._kept(self._tokenised(number, texts))

    def _tokenised(self, number: int, texts: list[str]) -> Window:
        encoded = (
            self.tokenizer(texts, truncation=False, verbose=False)["input_ids"] if texts else []
        )
        return Window(number, len(texts), self._pieces(encoded))

    def _pieces(self, encoded: Sequence[Sequence[int]]) -> list[Piece]:
        start = self.start
        skip = max(len(start), 1) if self.skip_first else 0
        if self.exceeds:
            encoded = [ids for ids in encoded if max(ids, default=0) < self.vocabulary]
        pieces = (piece for ids in encoded for piece in cut(ids, self.max_length, start))
        return [Piece(ids, skip) for ids in pieces if len(ids) > 1]

    @cached_property
    def exceeds(self) -> bool:
        """Whether the tokenizer has tokens that the model does not embed."""
        return len(self.tokenizer) > self.vocabulary

    @cached_property
    def start(self) -> list[int]:
        """The tokens that every piece begins with."""
        return start_tokens(self.tokenizer)

    # -- windows that were tokenised before --

    def _file(self, number: int) -> Path:
        assert self.cache is not None
        return self.cache / f"{number // 1000:04d}" / f"{number % 1000:03d}.npz"

    def _of(self, number: int) -> str:
        """What a file of the cache says it is of: the folder's settings, and its number."""
        return f"{self.cache.name if self.cache else ''}/{number}"

    def _cached(self, number: int) -> Window | None:
        if self.cache is None:
            return None
        try:
            with np.load(self._file(number), allow_pickle=False) as found:
                if str(found["of"]) != self._of(number):  # somebody moved it here
                    return None
                ends = np.cumsum(found["lengths"])
                encoded = [ids.tolist() for ids in np.split(found["ids"], ends)[:-1]]
                return Window(number, int(found["documents"]), self._pieces(encoded))
        except Exception:  # absent, or damaged in any way: it is made again
            return None

    def _kept(self, window: Window) -> Window:
        """The window, which is now in the cache; a disk that is full only costs the next run some
        time.
        """
        if self.cache is not None and window.documents:
            ids = np.concatenate(
                [np.asarray(p.ids, np.int32) for p in window.pieces] or [np.empty(0, np.int32)]
            )
            lengths = np.asarray([len(p.ids) for p in window.pieces], np.int32)
            try:
                with atomic_file(self._file(window.number)) as path, path.open("wb") as stream:
                    of = self._of(window.number)
                    np.savez(stream, ids=ids, lengths=lengths, documents=window.documents, of=of)
            except OSError as error:
                logger.warning("tokens are not cached: %s", error)
                self.cache = None
        return window


def token_cache(model: EditableModel, reader: Reader) -> Path:
    """The folder in the cache for windows of this corpus and tokenizer, the same for any number of
    ranks.

    Of the others the least recently used are deleted where all take more than `CACHED` bytes.
    """
    what = {
        "corpus": reader.corpus.identity,
        "seed": reader.seed,
        "max_length": reader.max_length,
        "lanes": reader.corpus.lanes,
        "size": SIZE,
        "tokenizer": hashlib.blake2b(
            model.tokenizer.backend_tokenizer.to_str().encode(), digest_size=8
        ).hexdigest(),
        **({"start": reader.start} if reader.start else {}),
        **({"vocabulary": reader.vocabulary} if reader.exceeds else {}),
    }
    folder = cache_dir(
        "tokens",
        hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest(),
    )
    os.utime(folder)
    trim(folder.parent, CACHED, keep=folder)
    return folder


@contextmanager
def prefetch(
    reader: Reader, start: int, taken: Sequence[int], *, worker: bool
) -> Iterator[Iterator[Window]]:
    """The reader's windows; with `worker` a process of their own reads and tokenises `PREFETCH` of
    them in advance.

    It is forked, so that it needs no importable main module; where that is not possible the windows
    are made in place.

    Raises:
        CorpusError: with a worker, also when that process was killed.
    """
    # A plain process and not the worker of a torch DataLoader: that installs a handler for SIGCHLD,
    # which raises in the middle of whatever the program does when a worker is killed, also after
    # the corpus was closed. And when the program itself is killed such a worker lives on for
    # seconds, and with it the lock on the folder.
    if not worker or reader.corpus.is_self or "fork" not in multiprocessing.get_all_start_methods():
        yield reader.windows(start, taken)
        return
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(sender, reader, start, list(taken)), daemon=True
    )
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = before or "false"  # or it warns of the fork
    process.start()
    try:
        sender.close()  # now the pipe ends with the process
        yield _received(receiver)
    finally:
        process.kill()  # it may wait for the hub
        process.join()
        receiver.close()
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]


def _received(receiver: Connection) -> Iterator[Window]:
    while True:
        try:
            item = receiver.recv()
        except (EOFError, OSError) as error:
            raise CorpusError(
                "the process that reads the corpus was killed (for want of memory?); start "
                "again to go on from here"
            ) from error
        if isinstance(item, Exception):  # it keeps its type and its one line
            raise item
        yield item


def _work(sender: Connection, reader: Reader, start: int, taken: list[int]) -> None:
    """In the worker process: leave signals, which go to all processes of a job, to the parent, who
    saves first; end with the parent, or this process would keep the lock on the folder.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    made: Queue[Window | Exception] = Queue(PREFETCH)

    def make() -> None:
        try:
            for window in reader.windows(start, taken):
                made.put(window)
        except Exception as error:
            made.put(error)

    Thread(target=make, daemon=True).start()
    Thread(target=_end_with_parent, daemon=True).start()
    while True:
        sender.send(made.get())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _own(start: int, rank: int, ranks: int) -> Iterator[int]:
    return itertools.count(start + (rank - start) % ranks, ranks)


def _cut(source: Iterator[str]) -> Iterator[list[str]]:
    """Documents, about `SIZE` characters at a time."""
    texts: list[str] = []
    size = 0
    for text in source:
        texts.append(text)
        size += len(text)
        if size >= SIZE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
