"""Which windows every rank takes next, told to all of them one round ahead.

    announce:  read some windows, begin to tell how many keys each has -> (the round before is
        summed meanwhile)
    told:      what all ranks have announced

So a rank waits for the others only when they are more than a round behind: what slows one of them
for a moment, or windows that are longer than others, even out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from knowedit.errors import KnowEditError
from knowedit.statistics.corpus.windows import AHEAD, Window
from knowedit.statistics.distributed.checkpoints import Place
from knowedit.statistics.distributed.ranks import Ranks

# that a round of several ranks takes; a SIGTERM is answered after one or two, and torchrun waits
# for 30
SECONDS = 8.0


@dataclass
class Round:
    """Windows `start` to `end - 1`, which every rank knows the sizes of.

    Attributes:
        mine: this rank's windows.
        sizes: keys that count and documents of every window.
        problem: the corpus could not be read on at window `end`.
        due: rank 0 wants a checkpoint of everything before this round.
        ended: a rank was told to end.
    """

    start: int
    end: int
    mine: dict[int, Window] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    problem: KnowEditError | None = None
    due: bool = False
    ended: bool = False


class Rounds:
    """The rounds of one collection.

    Attributes:
        each: windows of each rank in the next round.
        announced: whether there is a round that nobody has taken yet.
    """

    def __init__(self, source: Iterator[Window], ranks: Ranks, tokens: int) -> None:
        self.source, self.ranks, self.tokens, self.each = source, ranks, tokens, 1
        self._pace = 0.0  # seconds a window
        self._now: tuple[Round, Callable[[], list[list[int]]]] | None = None

    @property
    def announced(self) -> bool:
        return self._now is not None

    def took(self, seconds: float, windows: int) -> None:
        """How long this rank's windows of the last round took."""
        self._pace = seconds / windows if windows else self._pace

    def announce(self, place: Place, limit: int, *, due: bool, ended: bool) -> None:
        """Begin the round after `place`, with windows below `limit`; `due` is rank 0's to say."""
        size, rank = self.ranks.size, self.ranks.rank
        now = Round(place.windows, min(place.windows + self.each * size, limit))
        unread = now.end
        try:
            for number in range(now.start + (rank - now.start) % size, now.end, size):
                unread = number
                now.mine[number] = next(self.source)
            unread = now.end
        except KnowEditError as error:
            now.problem = error
        sizes = [n for w in now.mine.values() for n in (w.count, w.documents)]
        sizes += [0] * (2 * self.each - len(sizes))
        self._now = now, self.ranks.post([unread, due, ended, self._wanted(), *sizes])

    def told(self) -> Round:
        """The round that was announced, once all ranks have announced theirs.

        Raises:
            StatisticsError: another rank died.
        """
        assert self._now is not None
        (now, wait), self._now = self._now, None
        said = wait()
        first, size = now.start, self.ranks.size
        if (end := min(row[0] for row in said)) < now.end:
            problems = self.ranks.gather(now.problem)
            now.problem, now.end = problems[end % size], end
        now.due, now.ended, self.each = bool(said[0][1]), any(row[2] for row in said), said[0][3]
        for number in range(first, now.end):
            mine = 4 + 2 * ((number - first) // size)
            now.sizes[number] = (said[number % size][mine], said[number % size][mine + 1])
        return now

    def fit(self, place: Place) -> None:
        """No more windows in the next round than are still needed behind `place`."""
        needed = (self.tokens - place.count) * place.windows / max(place.count, 1) / self.ranks.size
        self.each = max(1, min(self.each, int(needed)))

    def _wanted(self) -> int:
        """How many windows of each rank fill a round; one process, which waits for nobody, takes
        them one by one.
        """
        if self.ranks.size == 1 or not self._pace:
            return 1
        return max(1, min(AHEAD, int(SECONDS / self._pace)))
