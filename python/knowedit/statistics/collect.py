"""One collection: windows of a corpus through the model, keys into second moments, on one process
or many.

    round:  every rank has its next windows -> all hear how many keys each has -> each trims its
            own, so that exactly the tokens asked for count, and runs them -> now and then: a
            checkpoint, a look at the convergence

The keys, the batches and the blocks that are summed depend on the window alone, so any number of
ranks gives the same sums up to the order of float64 additions; with the same number they have the
same bits, interrupted or not.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from knowedit.errors import StatisticsError
from knowedit.models.editable import EditableModel
from knowedit.statistics.checks import Looks
from knowedit.statistics.corpus.batching import trim
from knowedit.statistics.corpus.corpus import Corpus, at_commits, commits, lanes_of
from knowedit.statistics.corpus.windows import WORTH_A_WORKER, Reader, ahead, token_cache
from knowedit.statistics.distributed.checkpoints import Checkpoints, Place
from knowedit.statistics.distributed.ranks import Ranks
from knowedit.statistics.distributed.rounds import Rounds
from knowedit.statistics.files import store
from knowedit.statistics.files.store import LayerStatistics, Recipe
from knowedit.statistics.meter import Meter, metered
from knowedit.statistics.sums import Seen, Sums

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to collect; none of it changes what is collected.

    Attributes:
        budget: tokens a batch; None: from the memory that is free. Halved whenever it turns out too
            large.
        packed: several texts a row; None: on a GPU. Only where the model is seen to keep them
            apart.
        halves: keep two halves apart, to estimate the error (twice the memory of the sums).
        checkpoint_every: seconds.
        worker: a process that tokenises ahead, and a cache of tokens; None: when there are many
            tokens.
        progress, as_json: see `meter`.
    """

    budget: int | None = None
    packed: bool | None = None
    halves: bool = True
    checkpoint_every: float = 120.0
    worker: bool | None = None
    progress: bool = True
    as_json: bool = False


class Collection:
    """Sums of the keys of some layers of one model, and where they stand in the corpus."""

    def __init__(
        self,
        model: EditableModel,
        layers: Sequence[int],
        recipe: Recipe,
        where: Path,
        corpus: Corpus,
        settings: Settings,
        ranks: Ranks,
    ) -> None:
        self.model, self.layers, self.recipe, self.corpus = model, list(layers), recipe, corpus
        self.where, self.settings, self.ranks = where, settings, ranks
        self.place = Place(0, [0] * lanes_of(corpus), [0, 0])
        self.sums = Sums(
            model, layers, recipe.precision, settings.budget, settings.packed, 1 + settings.halves
        )
        self.checkpoints = Checkpoints(where, self.layers, recipe, ranks)
        self.looks = Looks(self.sums, recipe, ranks)
        self._dry: set[int] = set()  # lanes of the corpus that have ended
        self._saved, self._spent, self._safe = (
            time.monotonic(),
            0.0,
            0,
        )  # when, for how long, and which place
        self._ended = False  # by a SIGTERM

    # -- the main path
    # --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Collect until the tokens asked for are counted, or the estimate has converged.

        Raises:
            StatisticsError: nothing to count, NaN in a layer, one piece alone does not fit into
                memory, another rank died; a SIGTERM, after a checkpoint.
            CorpusError: the corpus cannot be read (on); what was counted until then is in a
                checkpoint.
        """
        self._resume()
        title = f"key statistics, layers {', '.join(map(str, self.layers))}"
        show = self.settings.progress and self.ranks.rank == 0
        worker = (
            self.recipe.tokens >= WORTH_A_WORKER
            if self.settings.worker is None
            else self.settings.worker
        )
        place = self.place
        with (
            ahead(self._reader(worker), place.windows, tuple(place.taken), worker=worker) as source,
            metered(title, self.recipe.tokens, show=show, as_json=self.settings.as_json) as meter,
            self._until_told(),
        ):
            meter.resumed(place.count)
            rounds = Rounds(source, self.ranks, self.recipe.tokens)
            if place.count < self.recipe.tokens and not place.converged:
                self._announce(rounds)
            while rounds.announced:
                self._round(rounds, meter)
            self._end_if_told(any(self.ranks.gather(self._ended)))
            if self.settings.halves and not place.converged:
                self.looks.last(place, meter)
                self._end_if_told(any(self.ranks.gather(self._ended)))
            meter.say("done")
        self._check_end()

    def _announce(self, rounds: Rounds) -> None:
        due = time.monotonic() - self._saved > max(self.settings.checkpoint_every, 20 * self._spent)
        rounds.announce(
            self.place, self.looks.following(self.place.windows), due=due, ended=self._ended
        )

    def _round(self, rounds: Rounds, meter: Meter) -> None:
        """The windows that were announced; several ranks announce the next ones before they begin
        with these.
        """
        place, now = self.place, rounds.told()
        self._end_if_told(now.ended)
        if now.due:
            self._save()
        used: dict[int, int] = {}
        for number, (count, documents) in now.sizes.items():
            used[number] = min(count, self.recipe.tokens - place.count)
            place.counts[self._half(number)] += used[number]
            place.taken[number % len(place.taken)] += documents
            if not documents:
                self._dry.add(number % len(place.taken))
        place.windows = now.end
        on = (
            place.count < self.recipe.tokens
            and len(self._dry) < len(place.taken)
            and not now.problem
        )
        look = self.settings.halves and self.looks.due(place)
        rounds.fit(place)
        if early := on and not look and self.ranks.size > 1:
            self._announce(rounds)
        began = time.monotonic()
        for number, tokens in used.items():
            if number in now.mine and tokens:
                self.sums.add(self._half(number), trim(now.mine[number].pieces, tokens))
            meter.counted(tokens)
        rounds.took(time.monotonic() - began, len(now.mine))
        if now.problem and place.count < self.recipe.tokens:
            self._save()
            raise now.problem
        if look:
            self.looks.look(place, meter)
        if on and not early and not place.converged:
            self._announce(rounds)

    def _half(self, number: int) -> int:
        return number % 2 if self.settings.halves else 0

    @contextmanager
    def _until_told(self) -> Iterator[None]:
        """A SIGTERM (what schedulers send, and torchrun to its ranks) is answered between two
        rounds, by all ranks.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_ended", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _end_if_told(self, told: bool) -> None:
        if told:
            self._save()
            raise StatisticsError(
                "told to end (SIGTERM): start again to go on from the last checkpoint"
            )

    @property
    def short(self) -> bool:
        """The corpus has fewer tokens than were to be counted."""
        return self.recipe.until == "tokens" and self.place.count < self.recipe.tokens

    def _check_end(self) -> None:
        place, recipe = self.place, self.recipe
        if not place.count:
            raise StatisticsError(
                "the corpus has no tokens to count: every text is a single token; give longer ones"
            )
        if recipe.until != "tokens" and not place.converged and self.ranks.rank == 0:
            logger.warning(
                "not converged to %g after %d tokens; more text is needed, or more --tokens",
                recipe.tolerance,
                place.count,
            )

    def _reader(self, cache: bool) -> Reader:
        recipe, corpus = self.recipe, at_commits(self.corpus, self.place.commits)
        reader = Reader(
            corpus,
            recipe.seed,
            self.model.tokenizer,
            recipe.max_length,
            recipe.skip_first,
            self.ranks.rank,
            self.ranks.size,
            self.model.samples if self.corpus == "self" else None,
        )
        if cache and self.corpus != "self":
            reader.cache = token_cache(self.model, reader)
        return reader

    # -- files
    # ------------------------------------------------------------------------------------------------------  # noqa: E501

    def _save(self) -> None:
        """A checkpoint, unless there is one of this place already."""
        if self.place.windows == self._safe:
            return
        start = time.monotonic()
        if self.checkpoints.save(self.place, self.sums.seen, self.sums.moments):
            self._safe = self.place.windows
        self._saved = time.monotonic()
        if (
            self._saved - start > max(self.settings.checkpoint_every / 20, self._spent)
            and self.ranks.rank == 0
        ):
            minutes = (self._saved - start) / 3
            logger.warning(
                "a checkpoint takes %.0f s here: one every %.0f minutes",
                self._saved - start,
                minutes,
            )
        self._spent = self._saved - start

    def _resume(self) -> None:
        if (found := self.checkpoints.load()) is not None:
            self.place, seen, states = found
            self._safe = self.place.windows
            self.sums.seen = seen or self.sums.seen
            for (half, layer), state in states.items():
                self.sums.moment(half, layer).load_state_dict(state)
        if not self.place.commits:
            self.place.commits = self.ranks.first(lambda: commits(self.corpus))

    def finish(self, recipe: Recipe, where: Path) -> dict[int, LayerStatistics]:
        """Add up halves and ranks, write each layer's file into `where` (rank 0), then drop the
        checkpoints.

        Raises:
            StatisticsError: a file could not be written (the checkpoint stays); the checkpoints
                that were gone on from do not belong together.
        """
        seen = Seen.nothing(self.layers)
        for part in self.ranks.gather(self.sums.seen):
            seen.add(part)
        result = {}
        for layer in self.layers:
            moment = self.sums.moment(0, layer)
            if (1, layer) in self.sums.moments:
                moment.merge(self.sums.moments.pop((1, layer)))
            if self.ranks.total(moment).count != self.place.count:
                raise StatisticsError(
                    f"layer {layer}: {moment.count} keys were summed where {self.place.count} "
                    f"should be; the checkpoints in "
                    f"{self.where} do not belong together: delete them and start again"
                )
            first, firsts, other, others = seen.norms[str(layer)]
            result[layer] = LayerStatistics(
                layer=layer,
                module=self.model.layout.projection.format(layer),
                model=self.model.name,
                recipe=recipe,
                count=moment.count,
                total=moment.sum().cpu(),
                first_norm=first / max(firsts, 1),
                other_norm=other / max(others, 1),
                extra={
                    "audit": asdict(moment.audit()),
                    "padding": 1 - seen.text / max(seen.padded, 1),
                    "batches": "packed" if self.sums.packed else "by length",
                    "ranks": self.ranks.size,
                    "convergence": self.place.looks.get(str(layer), []),
                    "version": metadata.version("knowedit-kernels"),
                    **({"commits": self.place.commits} if self.place.commits else {}),
                },
            )
            self.ranks.first(partial(result[layer].save, store.layer_file(where, layer)))
            del self.sums.moments[0, layer]
        self.checkpoints.drop()
        return result
