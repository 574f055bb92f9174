"""Rounds: which windows every rank takes, announced one round ahead (unit)."""

import itertools
from types import SimpleNamespace

import pytest

from knowedit.errors import KnowEditError, StatisticsError
from knowedit.io.ranks import Ranks
from knowedit.statistics.collect import Collection, CollectSettings
from knowedit.statistics.corpus import windows
from knowedit.statistics.corpus.batching import Piece
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.distributed import rounds
from knowedit.statistics.distributed.checkpoints import CollectionState
from knowedit.statistics.distributed.rounds import SECONDS, Rounds
from knowedit.statistics.files.store import CollectionRecipe


def test_rounds_fill_their_seconds_and_are_no_larger_than_what_is_needed():
    def each(ranks, seconds, windows, count):
        made = Rounds(iter(()), Ranks(0, ranks), 10_000)
        made.record_time(seconds, 2)
        made.width = made._wanted_width()
        made.narrow(CollectionState(windows, [0], [count, 0]))
        return made.width

    assert each(1, 2 * SECONDS / 4, 4, 400) == 1  # by itself a process waits for nobody
    assert each(2, 2 * SECONDS / 4, 4, 400) == 4 and each(2, 3 * SECONDS, 4, 400) == 1
    assert each(2, 1e-3, 4, 400) == rounds.PREFETCH
    assert (
        each(2, 1e-3, 90, 9_000) == 5 and each(2, 1e-3, 99, 9_900) == 1
    )  # ten windows are missing, then one
    assert each(2, 2 * SECONDS / 4, 2, 0) == 4  # windows without any text


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_ranks_announce_before_they_compute(
    tiny_llama, corpus, tmp_path, monkeypatch, ranks
):
    """Or each would wait for the slowest in every round; one process has its clock and its signals
    up to date instead.
    """
    monkeypatch.setattr(windows, "SIZE", 200)
    recipe, events = CollectionRecipe(tiny_llama.fingerprint, {"name": "c"}, 10**6, 64, True, 0), []
    made = Collection(
        tiny_llama,
        [1],
        recipe,
        tmp_path,
        Corpus.parse(corpus),
        CollectSettings(),
        Ranks(0, ranks),
    )

    def post(self, numbers):
        events.append("announce")
        return lambda: [list(numbers), [numbers[0], 0, 0, 1, *[0, 1] * (len(numbers) // 2 - 2)]][
            :ranks
        ]

    monkeypatch.setattr(Ranks, "post", post)
    monkeypatch.setattr(made.sums, "add", lambda half, pieces: events.append("add"))
    coming = Rounds(made._reader(False).windows(), made.ranks, 10**6)
    made._announce(coming)
    for _ in range(3):
        made._round(coming, SimpleNamespace(on_tokens=lambda tokens: None))
    first = ["announce"] if ranks == 2 else []
    assert events == [*first, *["announce", "add"] * 3, *["announce"] * (ranks == 1)]


def test_every_rank_hears_of_every_window_and_of_what_went_wrong(monkeypatch):
    """Three ranks played one after the other: what they post is what each receives."""
    posted, problem = [], KnowEditError("window 7 cannot be read")

    def source(rank):
        for number in itertools.count(3 + (rank - 3) % 3, 3):
            if number == 7:
                raise problem
            yield windows.Window(number, number + 1, [Piece([0] * number, 1)])

    def post(self, numbers):
        posted.append(numbers)
        return lambda: posted

    monkeypatch.setattr(Ranks, "post", post)
    monkeypatch.setattr(Ranks, "gather", lambda self, item: [None, problem, None])
    made = [Rounds(source(rank), Ranks(rank, 3), 10**6) for rank in range(3)]
    for rank, one in enumerate(made):
        one.width = 2
        one.record_time(SECONDS / 2, 1)
        one.announce(CollectionState(3, [0], [0, 0]), 100, checkpoint=rank == 0, stop=rank == 2)
    for rank, one in enumerate(made):
        now = one.receive()
        assert not one.announced and (now.start, now.end, now.problem) == (3, 7, problem)
        assert now.sizes == {number: (number - 1, number + 1) for number in range(3, 7)}
        assert {number for number in now.own if number < 7} == set(range(3 + (rank - 3) % 3, 7, 3))
        assert now.checkpoint and now.stop and one.width == 2


def test_a_rank_that_waits_starts_where_the_checkpoint_was(
    tiny_llama, corpus, tmp_path, monkeypatch
):
    """Reading begins at the first window that is asked for, when the state may have moved on."""
    monkeypatch.setattr(windows, "SIZE", 200)
    reader = windows.Reader(Corpus.parse(corpus), 0, tiny_llama.tokenizer, 64, True)
    whole = list(itertools.islice(reader.windows(), 12))
    taken = [sum(window.documents for window in whole[:5])]
    ranks, layers = Ranks(), [1]
    recipe = CollectionRecipe(tiny_llama.fingerprint, {"name": "c"}, 10**6, 64, True, 0)
    made = Collection(
        tiny_llama,
        layers,
        recipe,
        tmp_path,
        Corpus.parse(corpus),
        CollectSettings(progress=False),
        ranks,
    )
    monkeypatch.setattr(
        made, "_resume", lambda: setattr(made, "state", CollectionState(5, taken, [0, 0]))
    )
    found = []

    def moves_on_first(rounds, meter):
        made.state.documents[0] += 3
        found.extend([*rounds.receive().own.values(), *itertools.islice(rounds.source, 3)])
        made.state.converged = True

    monkeypatch.setattr(made, "_round", moves_on_first)
    with pytest.raises(StatisticsError, match="no tokens to count"):
        made.run()
    assert found == whole[5:9]
