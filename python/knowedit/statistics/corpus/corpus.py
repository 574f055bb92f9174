"""Corpora for key statistics: local files, data sets of the Hugging Face hub, mixtures of them, or
the model's own samples. A corpus is parsed once, into a `Corpus`; everything else asks that.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from knowedit.errors import CorpusError
from knowedit.statistics.corpus.hub import HubSource
from knowedit.statistics.corpus.text import TextFiles

logger = logging.getLogger(__name__)

# parts of a hub data set that are read side by side, so that each rank downloads its own
HUB_LANES = 8


@dataclass(frozen=True)
class CorpusPart:
    """One source of a corpus and its weight in a mixture (None: none was given)."""

    source: TextFiles | HubSource
    weight: float | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> CorpusPart:
        """A path or the name of a data set, with ``*weight`` behind it or not.

        Raises:
            CorpusError: nothing there, or a weight of 0.
        """
        weighted = re.fullmatch(r"(.+)\*(\d+(?:\.\d+)?)", text) if isinstance(text, str) else None
        if weighted is None or Path(text).exists():  # a file that is called so is that file
            return cls(_source(text))
        if float(weighted[2]) == 0:
            raise CorpusError(f"corpus {text!r} has weight 0; leave it out")
        return cls(_source(weighted[1]), float(weighted[2]))

    def __str__(self) -> str:
        return str(self.source) + ("" if self.weight is None else f"*{self.weight:g}")

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the source; see `Corpus.identity`."""
        if isinstance(self.source, HubSource):
            return asdict(self.source)
        return {"name": self.source.name, "files": self.source.identity()}

    def stream(self, split: str, seed: int, lane: int, lanes: int) -> Iterator[str]:
        """The documents of one of `lanes` disjoint parts of the source."""
        if isinstance(self.source, TextFiles):
            return self.source.stream(lane, lanes)
        return (text for text in self.source.stream(split, seed, lane, lanes) if text.strip())


@dataclass(frozen=True)
class Corpus:
    """Where documents come from: the same ones in the same order every time.

    Attributes:
        parts: the sources; none: the model's own samples.
    """

    parts: tuple[CorpusPart, ...]

    @classmethod
    def parse(cls, corpus: CorpusLike) -> Corpus:
        """A corpus from what a user writes:

        * a path or several: ``.txt`` (documents stand between blank lines; a heading stays with
          what follows), ``.jsonl`` (the field ``text``), ``.parquet`` (the column ``text``), each
          also ``.gz``; a folder stands for all such files in it, sorted. Read in file order.
        * ``"wikipedia"`` (English, November 2023) or
          ``"hf:owner/name[@revision][:config[:column]]"``: streamed from the hub, shuffled by the
          seed (shards, then a buffer of 1,000 documents).
        * ``"self"``: the model's own samples.
        * a list of paths and data sets: one after another; with weights (``["wiki.txt*3",
          "code.jsonl*1"]``, 1 where none is given) mixed document by document, so that their
          characters are in that proportion from the start on. One that runs dry is named in a
          warning, and the others go on.

        Raises:
            CorpusError: no such file or folder, an unknown kind of file, no name of a data set, an
                empty list, "self" beside others.
        """
        if isinstance(corpus, Corpus):
            return corpus
        if corpus == "" or not isinstance(corpus, (str, os.PathLike, Iterable)):
            raise CorpusError(f"corpus must be a path, a name or a list of them, got {corpus!r}")
        given = [corpus] if isinstance(corpus, (str, os.PathLike)) else list(corpus)
        if not given:
            raise CorpusError("corpus is an empty list; give at least one file, or corpus='self'")
        if given == ["self"]:
            return cls(())
        if "self" in given:
            raise CorpusError(
                "corpus 'self' stands alone: the model's samples cannot be mixed with texts"
            )
        return cls(tuple(CorpusPart.parse(part) for part in given))

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts)) or "self"

    @property
    def is_self(self) -> bool:
        """Whether the documents are the model's own samples."""
        return not self.parts

    @property
    def lanes(self) -> int:
        """In how many lanes to read: several only where reading all of it on every rank would be a
        waste.
        """
        return HUB_LANES if self._hub else 1

    @property
    def _hub(self) -> list[HubSource]:
        return [part.source for part in self.parts if isinstance(part.source, HubSource)]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the corpus in a statistics file: independent of folders, dates and
        machines.

        ``{"name": ...}`` with, for local files, ``files`` (name and the first 16 hex digits of each
        file's sha256) and, for a hub data set, ``config``, ``column`` and ``revision`` as asked
        for: the hub itself is not asked, so that cached statistics are found without it; for a
        mixture its ``parts`` and their weights. Read once.

        Raises:
            CorpusError: a file cannot be read.
        """
        if self.is_self:
            return {"name": "self"}
        found = [part.identity for part in self.parts]
        if all(part.weight is None for part in self.parts):
            if not self._hub:
                files = [file for part in found for file in part["files"]]
                return {"name": ", ".join(part["name"] for part in found), "files": files}
            if len(found) == 1:
                return found[0]
        weights = [part.weight for part in self.parts]
        names = [f["name"] + (f"*{w:g}" if w else "") for f, w in zip(found, weights)]
        return {
            "name": ", ".join(names),
            "parts": [{"weight": weight, **part} for part, weight in zip(found, weights)],
        }

    def documents(
        self,
        *,
        samples: Callable[..., Iterable[str]] | None = None,
        seed: int = 0,
        split: str = "train",
        start: int = 0,
        lane: int = 0,
        lanes: int = 1,
    ) -> Iterator[str]:
        """Yield the non-empty documents from number `start` on.

        Args:
            samples: what "self" calls with `seed` and `start`; it yields texts.
            seed: order of a stream, or which samples.
            split: of a hub data set.
            start: documents to skip, to go on where an earlier run stopped.
            lane: which of `lanes` disjoint parts (hub: whole files where there are enough of them;
                local: every `lanes`-th document).

        Raises:
            CorpusError: no documents, a byte that is not UTF-8 (with file and line), a missing
                field, a hub that cannot be reached. Raised while iterating, except for wrong
                arguments.
        """
        if start < 0:
            raise CorpusError(f"start must be 0 or more, got {start}")
        if self.is_self:
            if samples is None:
                raise CorpusError(
                    "corpus 'self' needs a model to sample from; pass samples=, or give a text file"
                )
            return iter(samples(seed=seed, start=start))
        streams = [part.stream(split, seed, lane, lanes) for part in self.parts]
        if all(part.weight is None for part in self.parts):
            texts: Iterator[str] = itertools.chain.from_iterable(streams)
        else:
            texts = _mixed(streams, self.parts)
        return self._from(start, texts, lane)

    def _from(self, start: int, texts: Iterator[str], lane: int) -> Iterator[str]:
        number = 0
        for number, text in enumerate(texts, 1):
            if number > start:
                yield text
        if not number and lane == 0:
            raise CorpusError(
                f"corpus '{self}' holds no text; give one with documents, or corpus='self'"
            )

    def commits(self) -> dict[str, str]:
        """The commit that each hub data set is at now, by its name and revision; see
        `HubSource.commit`.
        """
        return {str(source): source.commit() for source in self._hub}

    def at_commits(self, known: Mapping[str, str]) -> Corpus:
        """The corpus with its hub data sets at those commits, so that it stays the same whatever
        is pushed meanwhile.
        """

        def pinned(part: CorpusPart) -> CorpusPart:
            if not isinstance(part.source, HubSource) or not known:
                return part
            commit = known[str(part.source)]
            return replace(part, source=replace(part.source, revision=commit))

        return Corpus(tuple(map(pinned, self.parts)))


#: What stands for a corpus wherever one is asked for; see `Corpus.parse`.
CorpusLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Corpus


def _source(text: str | os.PathLike[str]) -> TextFiles | HubSource:
    try:
        Path(text).exists()
    except (TypeError, ValueError, OSError) as error:  # no path at all, or too long for one
        raise CorpusError(
            f"corpus {str(text)[:60]!r} is not a file's name ({type(error).__name__}); write texts "
            "into a .txt or .jsonl file and give its path"
        ) from error
    return HubSource.parse(text) if HubSource.named_by(text) else TextFiles.find(Path(text))


def _mixed(streams: Sequence[Iterator[str]], parts: Sequence[CorpusPart]) -> Iterator[str]:
    """The next document always comes from the stream that is furthest behind its share of the
    characters. (`datasets.interleave_datasets` draws by documents, whose lengths differ between
    sources, and at random.)
    """
    weights = [1.0 if part.weight is None else part.weight for part in parts]
    taken = dict.fromkeys(range(len(streams)), 0.0)
    while taken:
        behind = min(taken, key=lambda i: (taken[i], i))
        text = next(streams[behind], None)
        if text is None:
            del taken[behind]
            if taken:
                logger.warning(
                    "corpus %s has run dry; the others go on without it", parts[behind].source
                )
            continue
        taken[behind] += len(text) / weights[behind]
        yield text
