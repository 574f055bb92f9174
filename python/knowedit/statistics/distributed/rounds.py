"""Which windows every rank takes next, sent to all of them one round ahead.

    announce:  read some windows, begin to send how many keys each has -> (the round before is
               summed meanwhile)
    receive:   what all ranks have announced

So a rank waits for the others only when they are more than a round behind: what slows one of them
for a moment, or windows that are longer than others, even out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from knowedit.errors import KnowEditError
from knowedit.io.ranks import Ranks
from knowedit.statistics.corpus.windows import PREFETCH, Window
from knowedit.statistics.distributed.checkpoints import CollectionState

# of a round of several ranks; a SIGTERM is answered after one or two, and torchrun waits for 30
SECONDS = 8.0


@dataclass
class Round:
    """Windows `start` to `end - 1`, which every rank knows the sizes of.

    Attributes:
        own: this rank's windows.
        sizes: keys that count and documents of every window.
        problem: the corpus could not be read on at window `end`.
        checkpoint: rank 0 wants a checkpoint of everything before this round.
        stop: a rank was sent a SIGTERM.
    """

    start: int
    end: int
    own: dict[int, Window] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    problem: KnowEditError | None = None
    checkpoint: bool = False
    stop: bool = False


class Rounds:
    """The rounds of one collection.

    Attributes:
        width: windows of each rank in the next round.
        announced: whether there is a round that was not received yet.
    """

    def __init__(self, source: Iterator[Window], ranks: Ranks, tokens: int) -> None:
        self.source, self.ranks, self.tokens, self.width = source, ranks, tokens, 1
        self._pace = 0.0  # seconds a window
        self._coming: tuple[Round, Callable[[], list[list[int]]]] | None = None

    @property
    def announced(self) -> bool:
        return self._coming is not None

    def record_time(self, seconds: float, windows: int) -> None:
        """How long this rank's windows of the last round took."""
        self._pace = seconds / windows if windows else self._pace

    def announce(self, state: CollectionState, limit: int, *, checkpoint: bool, stop: bool) -> None:
        """Begin the round after `state`, with windows below `limit`; of all ranks' `checkpoint` the
        one of rank 0 counts.
        """
        size, rank = self.ranks.size, self.ranks.rank
        coming = Round(state.windows, min(state.windows + self.width * size, limit))
        unread = coming.end
        try:
            for number in range(coming.start + (rank - coming.start) % size, coming.end, size):
                unread = number
                coming.own[number] = next(self.source)
            unread = coming.end
        except KnowEditError as error:
            coming.problem = error
        sizes = [n for w in coming.own.values() for n in (w.count, w.documents)]
        sizes += [0] * (2 * self.width - len(sizes))
        posted = self.ranks.post([unread, checkpoint, stop, self._wanted_width(), *sizes])
        self._coming = coming, posted

    def receive(self) -> Round:
        """The round that was announced, once all ranks have announced theirs.

        Raises:
            StatisticsError: another rank died.
        """
        assert self._coming is not None
        (now, wait), self._coming = self._coming, None
        rows = wait()
        first, size = now.start, self.ranks.size
        if (end := min(row[0] for row in rows)) < now.end:
            problems = self.ranks.gather(now.problem)
            now.problem, now.end = problems[end % size], end
        now.checkpoint, now.stop = bool(rows[0][1]), any(row[2] for row in rows)
        self.width = rows[0][3]
        for number in range(first, now.end):
            at = 4 + 2 * ((number - first) // size)
            now.sizes[number] = (rows[number % size][at], rows[number % size][at + 1])
        return now

    def narrow(self, state: CollectionState) -> None:
        """Let the next round have no more windows than are still needed after `state`."""
        left = self.tokens - state.count
        needed = left * state.windows / max(state.count, 1) / self.ranks.size
        self.width = max(1, min(self.width, int(needed)))

    def _wanted_width(self) -> int:
        """How many windows of each rank fill a round; one process, which waits for nobody, takes
        them one by one.
        """
        if self.ranks.size == 1 or not self._pace:
            return 1
        return max(1, min(PREFETCH, int(SECONDS / self._pace)))
