"""Text data sets streamed from the Hugging Face hub: shuffled by seed, dealt out in lanes, resumed
when the hub goes away.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from knowedit.errors import CorpusError
from knowedit.io.files import atomic_file, cache_dir

logger = logging.getLogger(__name__)

# documents held while shuffling a stream, over all its lanes; its shards are shuffled too
SHUFFLE_BUFFER = 1000
RETRIES = 8  # in a row; with waits of 2, 4, ... 64 seconds between them that is about five minutes


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub: `name` ("owner/name") at `revision`, its configuration and the column
    with the text.
    """

    name: str
    revision: str | None
    config: str | None
    column: str

    @staticmethod
    def named_by(text: object) -> bool:
        """Whether `text` names a data set of the hub, and not a file."""
        return text == "wikipedia" or (isinstance(text, str) and text.startswith("hf:"))

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> HubSource:
        """The data set that "wikipedia" or "hf:owner/name[@revision][:config[:column]]" names.

        Raises:
            CorpusError: it does not read like that.
        """
        if text == "wikipedia":
            return cls("wikimedia/wikipedia", None, "20231101.en", "text")
        place, *rest = str(text).removeprefix("hf:").split(":")
        name, _, revision = place.partition("@")
        if name.count("/") != 1 or not all(name.split("/")) or len(rest) > 2:
            raise CorpusError(
                f"corpus {text!r} must read 'hf:owner/name', 'hf:owner/name@revision:config:column'"
            )
        config, column = (rest + ["", ""])[:2]
        return cls(name, revision or None, config or None, column or "text")

    def __str__(self) -> str:
        """As `parse` reads it."""
        place = self.name + (f"@{self.revision}" if self.revision else "")
        return f"hf:{place}:{self.config or ''}:{self.column}"

    def commit(self) -> str:
        """The commit that the revision names: now, or the last time the hub could be reached from
        this machine.

        Raises:
            CorpusError: the hub cannot be reached, and it never was.
        """
        from huggingface_hub import HfApi

        if re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            return str(self.revision)
        known = cache_dir("hub") / re.sub(
            r"[^\w.-]+", "-", f"{self.name}@{self.revision or 'main'}"
        )
        try:
            found = str(HfApi().dataset_info(self.name, revision=self.revision, timeout=8).sha)
        # the hub client raises its own, the http library's and the system's errors
        except Exception as e:
            if not known.is_file():
                raise self._unreachable(e) from e
            logger.warning(
                "the hub cannot be reached (%s): %s as it was the last time",
                type(e).__name__,
                self.name,
            )
            return known.read_text(encoding="utf-8")
        with atomic_file(known) as path:
            path.write_text(found, encoding="utf-8")
        return found

    def _unreachable(self, error: Exception) -> CorpusError:
        return CorpusError(
            f"data set {self.name!r} cannot be streamed from the hub ({type(error).__name__}: "
            f"{str(error)[:300]}); "
            "give a local .txt, .jsonl or .parquet file, or corpus='self' to use the model's "
            "own samples"
        )

    def stream(self, split: str, seed: int, lane: int = 0, lanes: int = 1) -> Iterator[str]:
        """The texts of one of `lanes` disjoint parts, the same ones in the same order every time.

        The first failure to reach the hub is an error; one in the middle is retried with growing
        pauses, going on at the text that was due.

        Raises:
            CorpusError: the hub cannot be reached (any more), or the column is missing.
        """
        done = failures = 0
        while True:
            try:
                for text in itertools.islice(self._open(split, seed, lane, lanes), done, None):
                    done, failures = done + 1, 0
                    yield text
                return
            except CorpusError:
                raise
            # the hub client raises its own, the http library's, pyarrow's and the system's errors
            except Exception as e:
                failures += 1
                if done == 0 or failures > RETRIES:
                    raise self._unreachable(e) from e
                pause, reason = min(2**failures, 64), f"{type(e).__name__}: {str(e)[:300]}"
                logger.warning(
                    "%s stopped after %d texts (%s); trying again in %d s",
                    self.name,
                    done,
                    reason,
                    pause,
                )
                time.sleep(pause)

    def _open(self, split: str, seed: int, lane: int, lanes: int) -> Iterator[str]:
        import datasets
        from huggingface_hub import HfApi

        # fails at once; streaming retries long
        HfApi().dataset_info(self.name, revision=self.revision, timeout=8)
        rows = datasets.load_dataset(
            self.name, self.config, split=split, revision=self.revision, streaming=True
        )
        # whole files for each lane; else every lane reads all and keeps its share
        apart = rows.num_shards >= lanes
        if lanes > 1 and apart:
            rows = rows.shard(num_shards=lanes, index=lane)
        shuffled: Iterator[dict[str, Any]] = iter(
            rows.shuffle(seed=seed, buffer_size=max(SHUFFLE_BUFFER // lanes, 1))
        )
        for row in shuffled if apart else itertools.islice(shuffled, lane, None, lanes):
            text = row.get(self.column, 0)
            if text is not None and not isinstance(text, str):
                raise CorpusError(
                    f"{self.name}: no text in column {self.column!r}; columns: {', '.join(row)}"
                )
            yield text or ""
