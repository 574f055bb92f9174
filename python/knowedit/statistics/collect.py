"""One collection: windows of a corpus through the model, keys into second moments, on one process
or many.

    round:  every rank has its next windows -> all receive how many keys each has -> each trims its
            own, so that exactly the tokens asked for count, and runs them -> now and then: a
            checkpoint, a convergence check

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
from typing import Any

from knowedit.errors import StatisticsError, Terminated
from knowedit.io.config import Config
from knowedit.io.lines import named
from knowedit.io.ranges import Count, NotNegative
from knowedit.io.ranks import Ranks
from knowedit.models.editable import EditableModel
from knowedit.statistics.convergence import ConvergenceChecks
from knowedit.statistics.corpus.batching import trim
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.corpus.windows import WORTH_A_WORKER, Reader, prefetch, token_cache
from knowedit.statistics.distributed.checkpoints import Checkpoints, CollectionState
from knowedit.statistics.distributed.rounds import Rounds
from knowedit.statistics.experts import ExpertMoment
from knowedit.statistics.files import store
from knowedit.statistics.files.store import CollectionRecipe, LayerStatistics
from knowedit.statistics.sums import KeyTally, Moment, Sums
from knowedit.statistics.throughput import Meter, metered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectSettings(Config):
    """How to collect; none of it changes what is collected.

    Attributes:
        budget: tokens a batch; None: from the memory that is free. Halved whenever it turns out too
            large.
        packed: several texts a row; None: on a GPU. Only where the model is seen to keep them
            apart.
        halves: keep two halves apart, to estimate the error (twice the memory of the sums).
        checkpoint_every: seconds between checkpoints.
        worker: a process that tokenises ahead, and a cache of tokens; None: when there are many
            tokens.
        progress, as_json: see `throughput`.
    """

    budget: Count | None = None
    packed: bool | None = None
    halves: bool = True
    checkpoint_every: NotNegative = 120.0
    worker: bool | None = None
    progress: bool = True
    as_json: bool = False


class Collection:
    """Sums of the keys of some layers of one model, and where they stand in the corpus."""

    def __init__(
        self,
        model: EditableModel,
        layers: Sequence[int],
        recipe: CollectionRecipe,
        where: Path,
        corpus: Corpus,
        settings: CollectSettings,
        ranks: Ranks,
    ) -> None:
        self.model, self.layers, self.recipe, self.corpus = model, list(layers), recipe, corpus
        self.where, self.settings, self.ranks = where, settings, ranks
        self.state = CollectionState(0, [0] * corpus.lanes, [0, 0])
        self.sums = Sums(
            model, layers, recipe.precision, settings.budget, settings.packed, 1 + settings.halves
        )
        self.checkpoints = Checkpoints(where, self.layers, recipe, ranks)
        self.checks = ConvergenceChecks(self.sums, recipe, ranks)
        self._dry: set[int] = set()  # lanes of the corpus that have ended
        # of the last checkpoint: when it was written, seconds it took, windows it is after, tokens
        self._saved, self._spent, self._safe, self._kept = time.monotonic(), 0.0, 0, 0
        self._stop = False  # there was a SIGTERM, or a Ctrl-C that could not be answered at once
        self._interrupted = False  # it was a Ctrl-C
        self._summing = False  # counts and sums are not of the same windows just now

    # -- the main path --

    def run(self) -> None:
        """Collect until the tokens asked for are counted, or the estimate has converged.

        Raises:
            StatisticsError: nothing to count, NaN in a layer, one piece alone does not fit into
                memory, another rank died; a SIGTERM, after a checkpoint.
            KeyboardInterrupt: Ctrl-C, after a checkpoint; its text says what is kept, and how to
                go on.
            CorpusError: the corpus cannot be read (on); what was counted until then is in a
                checkpoint.
        """
        self._resume()
        title = f"key statistics, {named('layer', self.layers)}"
        show = self.settings.progress and self.ranks.rank == 0
        worker = (
            self.recipe.tokens >= WORTH_A_WORKER
            if self.settings.worker is None
            else self.settings.worker
        )
        state, reader = self.state, self._reader(worker)
        with (
            prefetch(reader, state.windows, tuple(state.documents), worker=worker) as source,
            metered(
                title,
                self.recipe.tokens,
                state.count,
                show=show,
                as_json=self.settings.as_json,
            ) as meter,
            self._saving_on_interrupt(),
            self._noting_signals(),
        ):
            if self.corpus.is_self:  # sampling takes longer than summing: it moves the bar, too
                reader.samples = partial(self.model.samples, within=meter.within)
            rounds = Rounds(source, self.ranks, self.recipe.tokens)
            if state.count < self.recipe.tokens and not state.converged:
                self._announce(rounds)
            while rounds.announced:
                self._round(rounds, meter)
            self._stop_if(any(self.ranks.gather(self._stop)))
            if self.settings.halves and not state.converged:
                self.checks.check_at_end(state, meter)
                self._stop_if(any(self.ranks.gather(self._stop)))
            meter.write("done")
        self._check_end()

    def _announce(self, rounds: Rounds) -> None:
        every = max(self.settings.checkpoint_every, 20 * self._spent)
        due = time.monotonic() - self._saved > every
        limit = self.checks.next_after(self.state.windows)
        rounds.announce(self.state, limit, checkpoint=due, stop=self._stop)

    def _round(self, rounds: Rounds, meter: Meter) -> None:
        """The windows that were announced; several ranks announce the next ones before they begin
        with these.
        """
        state, now = self.state, rounds.receive()
        self._stop_if(now.stop)
        if now.checkpoint:
            self._save()
        self._summing = True
        used: dict[int, int] = {}
        for number, (count, documents) in now.sizes.items():
            used[number] = min(count, self.recipe.tokens - state.count)
            state.counts[self._half(number)] += used[number]
            lane = number % len(state.documents)
            state.documents[lane] += documents
            if not documents:
                self._dry.add(lane)
        state.windows = now.end
        more = state.count < self.recipe.tokens and len(self._dry) < len(state.documents)
        more = more and not now.problem
        check = self.settings.halves and self.checks.is_due(state)
        rounds.narrow(state)
        if early := more and not check and self.ranks.size > 1:
            self._announce(rounds)
        began = time.monotonic()
        for number, tokens in used.items():
            if number in now.own and tokens:
                self.sums.add(self._half(number), trim(now.own[number].pieces, tokens))
            meter.on_tokens(tokens)
        rounds.record_time(time.monotonic() - began, len(now.own))
        self._summing = False
        if self._interrupted and self.ranks.size == 1:
            raise KeyboardInterrupt
        if now.problem and state.count < self.recipe.tokens:
            self._save()
            raise now.problem
        if check:
            self.checks.check(state, meter)
        if more and not early and not state.converged:
            self._announce(rounds)

    def _half(self, number: int) -> int:
        return number % 2 if self.settings.halves else 0

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """A SIGTERM (what schedulers send, and torchrun to its ranks) is answered between two
        rounds, by all ranks; a Ctrl-C of a single process at once, where the sums are whole.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGTERM: self._on_sigterm, signal.SIGINT: self._on_interrupt}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_sigterm(self, *_: Any) -> None:
        self._stop = True

    def _on_interrupt(self, *_: Any) -> None:
        again, self._interrupted = self._interrupted, True
        if again or (self.ranks.size == 1 and not self._summing):
            raise KeyboardInterrupt
        self._stop = True

    @contextmanager
    def _saving_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C: a checkpoint first, where the sums are whole; the text says what it has."""
        try:
            yield
        except KeyboardInterrupt:
            if not self._summing and self.ranks.size == 1:
                self._save()
            raise KeyboardInterrupt(
                f"key statistics of {self._kept:,} of {self.recipe.tokens:,} tokens are kept in "
                f"{self.where}; run the same command again to go on"
            ) from None

    def _stop_if(self, stop: bool) -> None:
        if stop:
            self._save()
            if self._interrupted:
                raise KeyboardInterrupt
            raise Terminated("stopped by SIGTERM: start again to go on from the last checkpoint")

    @property
    def short(self) -> bool:
        """The corpus has fewer tokens than were to be counted."""
        return self.recipe.until == "tokens" and self.state.count < self.recipe.tokens

    def _check_end(self) -> None:
        state, recipe = self.state, self.recipe
        if not state.count:
            raise StatisticsError(
                "the corpus has no tokens to count: every text is a single token; give longer ones"
            )
        if recipe.until != "tokens" and not state.converged and self.ranks.rank == 0:
            logger.warning(
                "not converged to %g after %d tokens; more text is needed, or more --tokens",
                recipe.tolerance,
                state.count,
            )

    def _reader(self, cache: bool) -> Reader:
        recipe, corpus = self.recipe, self.corpus.at_commits(self.state.commits)
        reader = Reader(
            corpus,
            recipe.seed,
            self.model.tokenizer,
            recipe.max_length,
            recipe.skip_first,
            self.ranks.rank,
            self.ranks.size,
            self.model.samples if corpus.is_self else None,
            vocabulary=self.model.vocabulary,
        )
        if cache and not corpus.is_self:
            reader.cache = token_cache(self.model, reader)
        return reader

    # -- files --

    def _save(self) -> None:
        """A checkpoint, unless there is one of this state already."""
        if self.state.windows == self._safe:
            return
        start = time.monotonic()
        if self.checkpoints.save(self.state, self.sums.tally, self.sums.moments):
            self._safe, self._kept = self.state.windows, self.state.count
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
            self.state, tally, moments = found
            self._safe, self._kept = self.state.windows, self.state.count
            self.sums.tally = tally or self.sums.tally
            for (half, layer), sums in moments.items():
                self.sums.moment(half, layer).load_state_dict(sums)
        if not self.state.commits:
            self.state.commits = self.ranks.first(self.corpus.commits)

    def finish(self, recipe: CollectionRecipe, where: Path) -> dict[int, LayerStatistics]:
        """Add up halves and ranks, write each layer's file into `where` (rank 0), then drop the
        checkpoints.

        Raises:
            StatisticsError: a file could not be written (the checkpoint stays); the checkpoints
                that were gone on from do not belong together.
        """
        tally = KeyTally.empty(self.layers)
        for part in self.ranks.gather(self.sums.tally):
            tally.add(part)
        result = {}
        for layer in self.layers:
            moment = self.sums.moment(0, layer)
            if (1, layer) in self.sums.moments:
                moment.merge(self.sums.moments.pop((1, layer)))  # type: ignore[arg-type]
            if self.ranks.total(moment).count != self.state.count:
                raise StatisticsError(
                    f"layer {layer}: {moment.count} keys were summed where {self.state.count} "
                    f"should be; the checkpoints in "
                    f"{self.where} do not belong together: delete them and start again"
                )
            first, firsts, other, others = tally.norms[str(layer)]
            result[layer] = LayerStatistics(
                layer=layer,
                module=self.model.layout.projection(layer),
                model=self.model.name,
                recipe=recipe,
                count=moment.count,
                total=moment.sum().cpu(),
                counts=_experts_tokens(moment),
                first_norm=first / max(firsts, 1),
                other_norm=other / max(others, 1),
                extra={
                    "audit": asdict(moment.audit()),
                    "padding": 1 - tally.text / max(tally.padded, 1),
                    "batches": "packed" if self.sums.packed else "by length",
                    "ranks": self.ranks.size,
                    "convergence": self.state.checks.get(str(layer), []),
                    "version": metadata.version("knowedit-kernels"),
                    **({"commits": self.state.commits} if self.state.commits else {}),
                },
            )
            self.ranks.first(partial(result[layer].save, store.layer_file(where, layer)))
            del self.sums.moments[0, layer]
        self.checkpoints.drop()
        return result


def _experts_tokens(moment: Moment) -> tuple[int, ...]:
    """Tokens that each expert was given; none where the MLP is dense."""
    return tuple(moment.counts.tolist()) if isinstance(moment, ExpertMoment) else ()
