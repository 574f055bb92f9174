"""Windows: the worker process, the cache of tokens, errors in the middle of a corpus, and what
stays when they happen (unit).
"""

import itertools
import multiprocessing
import os
import signal
import time

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from knowedit.cli import stats as cli_stats
from knowedit.cli.options import Output
from knowedit.errors import CorpusError, StatisticsError
from knowedit.statistics import key_statistics
from knowedit.statistics.corpus import windows
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.corpus.windows import Reader, prefetch, token_cache
from knowedit.statistics.files import store
from tests.knowedit.statistics.helpers import save_model, varied_texts
from tests.processes import Forked


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(
        "\n\n".join(f"Document {i}: " + "word after word " * (1 + i * i % 13) for i in range(200))
    )
    return path


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(windows, "SIZE", 1000)
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))


def first(reader, count, start=0, taken=(), worker=False):
    with prefetch(reader, start, taken, worker=worker) as found:
        return list(itertools.islice(found, count))


def test_a_worker_makes_the_same_windows(tiny_llama, corpus, small):
    reader = Reader(Corpus.parse(corpus), 0, tiny_llama.tokenizer, 50, True)
    here, there = first(reader, 12), first(reader, 12, worker=True)
    assert here == there and all(len(piece.ids) <= 50 for window in here for piece in window.pieces)
    assert (
        max(len(piece.ids) for window in here for piece in window.pieces) == 50
    )  # longer documents are cut


@pytest.mark.timeout(120)
def test_a_worker_reads_parquet_though_this_process_did(tiny_llama, tmp_path, small):
    """Arrow's threads do not survive a fork; a worker that waited for them would wait for ever."""
    path = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"Row {i} " * 20 for i in range(2000)]}), path
    )
    reader = Reader(Corpus.parse(path), 0, tiny_llama.tokenizer, 50, True)
    here = first(reader, 6)
    assert pyarrow.parquet.read_table(path).num_rows == 2000  # with all threads
    assert first(reader, 6, worker=True) == here


def test_a_workers_error_is_the_readers_own(tiny_llama, tmp_path, small):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine and long enough to be a window of its own " * 30 + b"\n\nbad \xff\n")
    reader = Reader(Corpus.parse(path), 0, tiny_llama.tokenizer, 50, True)
    with prefetch(reader, 0, (), worker=True) as found:
        assert next(found).documents == 1
        with pytest.raises(CorpusError, match=r"bad\.txt:3: byte 5 \(0xff\) is not UTF-8"):
            next(found)


def test_tokens_are_cached_for_any_number_of_ranks(tiny_llama, corpus, small, monkeypatch):
    def reader(rank=0, ranks=1):
        made = Reader(Corpus.parse(corpus), 0, tiny_llama.tokenizer, 50, True, rank, ranks)
        made.cache = token_cache(tiny_llama, made)
        return made

    whole = first(reader(), 8)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "_tokenised", None)  # would raise if anything were tokenised
        assert first(reader(), 8) == whole
        assert first(reader(1, 2), 4) == whole[1::2]
    file = reader()._file(3)
    file.write_bytes(file.read_bytes()[:60])  # damaged: made again
    assert first(reader(), 8) == whole
    other = Reader(Corpus.parse(corpus), 1, tiny_llama.tokenizer, 50, True)
    assert token_cache(tiny_llama, other) != reader().cache


def test_of_cached_tokens_the_least_recently_used_go_first(
    tiny_llama, corpus, small, monkeypatch, tmp_path, capsys
):
    def used(seed):
        reader = Reader(Corpus.parse(corpus), seed, tiny_llama.tokenizer, 50, True)
        reader.cache = token_cache(tiny_llama, reader)
        return reader, first(reader, 3)

    def kept():
        return {reader.cache.name for reader, _ in made if reader.cache.exists()}

    made = [used(seed) for seed in range(3)]
    names = [reader.cache.name for reader, _ in made]
    for age, (reader, _) in zip((20, 30, 10), made):
        os.utime(reader.cache, (time.time() - age,) * 2)
    each = max(sum(f.stat().st_size for f in reader.cache.rglob("*.npz")) for reader, _ in made)
    monkeypatch.setattr(windows, "CACHED", 2 * each)
    again, found = used(1)  # the oldest, but now it is used; the next oldest goes
    assert found == made[1][1] and kept() == {names[1], names[2]}
    assert (
        first(made[0][0], 3) == made[0][1]
    )  # a reader whose cache was deleted makes its windows again
    monkeypatch.setattr(windows, "CACHED", 0)
    token_cache(tiny_llama, again)
    assert kept() == {names[1]}
    cli_stats.clean(keep=1, output=Output())
    assert kept() == {names[1]} and ": 0 bytes" in capsys.readouterr().out
    cli_stats.clean(keep=0, output=Output())
    assert (
        not kept()
        and (tmp_path / "cache" / "tokens").exists()
        and ": 0 bytes" not in capsys.readouterr().out
    )


def test_a_full_disk_only_costs_the_cache(tiny_llama, corpus, small, monkeypatch, caplog):
    reader = Reader(Corpus.parse(corpus), 0, tiny_llama.tokenizer, 50, True)
    plain = first(reader, 4)

    def full(*_a, **_k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(windows, "atomic_file", full)
    reader.cache = token_cache(tiny_llama, reader)
    assert first(reader, 4) == plain and caplog.text.count("tokens are not cached") == 1


def test_the_models_own_samples_go_to_any_number_of_ranks(tiny_llama):
    def samples(seed, start):
        return (f"sample {seed} {n}" for n in itertools.count(start))

    def read(rank, ranks):
        return first(
            Reader(Corpus.parse("self"), 3, tiny_llama.tokenizer, 50, True, rank, ranks, samples),
            6 // ranks,
        )

    whole = read(0, 1)
    assert sorted(read(0, 2) + read(1, 2), key=lambda window: window.number) == whole
    assert [window.documents for window in whole] == [64] * 6
    assert tiny_llama.tokenizer.decode(whole[2].pieces[5].ids) == "sample 3 133"


@pytest.mark.parametrize("ranks", [2, 3, 5, 16])
def test_windows_are_dealt_out_to_any_number_of_ranks(tiny_llama, tmp_path, monkeypatch, ranks):
    """Every window goes to one rank, and is the one that a single process makes; also from the
    middle on.
    """
    (tmp_path / "varied.txt").write_text(varied_texts(60))
    varied = Corpus.parse(tmp_path / "varied.txt")
    monkeypatch.setattr(windows, "SIZE", 200)
    monkeypatch.setattr(Corpus, "lanes", 4)

    def read(rank, size, start=0, taken=()):
        reader = windows.Reader(varied, 0, tiny_llama.tokenizer, 64, True, rank, size)
        found = []
        for window in reader.windows(start, taken):
            if window.number >= 40:
                return found
            found.append(window)

    whole = read(0, 1)
    assert sum(window.documents for window in whole) == 60 and [
        window.number for window in whole
    ] == list(range(40))
    parts = sorted(
        (window for rank in range(ranks) for window in read(rank, ranks)),
        key=lambda window: window.number,
    )
    assert parts == whole
    taken = [
        sum(window.documents for window in whole[:10] if window.number % 4 == lane)
        for lane in range(4)
    ]
    later = [window for rank in range(ranks) for window in read(rank, ranks, 10, taken)]
    assert sorted(later, key=lambda window: window.number) == whole[10:]


def test_large_collections_use_worker_and_cache_and_are_the_same(
    tiny_llama, corpus, small, tmp_path
):
    alone, helped = (
        key_statistics(
            tiny_llama, [1], corpus, 9000, directory=tmp_path / str(worker), worker=worker
        )
        for worker in (False, True)
    )
    assert torch.equal(alone[1].total, helped[1].total)
    assert list((tmp_path / "cache" / "tokens").rglob("*.npz"))


def test_an_error_in_the_middle_keeps_what_was_collected(
    tiny_llama, corpus, small, tmp_path, monkeypatch
):
    whole = key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "whole")
    real = Corpus.documents

    def goes_away(*arguments, **named):
        for number, text in enumerate(real(*arguments, **named)):
            if number == 60:
                raise CorpusError("the hub cannot be reached")
            yield text

    monkeypatch.setattr(Corpus, "documents", goes_away)
    with pytest.raises(CorpusError, match="cannot be reached"):
        key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "cut")
    (kept,) = (tmp_path / "cut").glob("checkpoint*")
    assert sum(store.read(kept)[0]["counts"]) > 2000  # though no checkpoint was due
    monkeypatch.setattr(Corpus, "documents", real)
    again = key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "cut")
    assert torch.equal(again[1].total, whole[1].total) and not list(
        (tmp_path / "cut").glob("checkpoint*")
    )


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(
    tiny_llama, corpus, small, tmp_path, monkeypatch, caplog
):
    real, calls = save_file, []

    def sometimes_full(tensors, path, **named):
        calls.append(path)
        if "checkpoint" in str(path) and len(calls) < 3:
            raise OSError(28, "No space left on device")
        real(tensors, path, **named)

    monkeypatch.setattr("knowedit.io.tensors.save_file", sometimes_full)
    found = key_statistics(
        tiny_llama, [1], corpus, 9000, directory=tmp_path / "s", checkpoint_every=0
    )
    assert found[1].count == 9000 and caplog.text.count("no checkpoint: ") == 2

    def full_at_the_end(tensors, path, **named):
        if "layer" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, **named)

    monkeypatch.setattr("knowedit.io.tensors.save_file", full_at_the_end)
    with pytest.raises(StatisticsError, match="No space left"):
        key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "t", checkpoint_every=0)
    assert list((tmp_path / "t").glob("checkpoint*"))


def test_a_worker_that_is_killed_is_an_error_that_keeps_what_was_collected(
    tiny_llama, corpus, small, tmp_path, monkeypatch
):
    whole = key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "whole")
    real = Reader._tokenised

    def out_of_memory(self, number, texts):
        if number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number, texts)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "_tokenised", out_of_memory)
        with pytest.raises(CorpusError, match="was killed"):
            key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "cut", worker=True)
    (kept,) = (tmp_path / "cut").glob("checkpoint*")
    assert 0 < sum(store.read(kept)[0]["counts"]) < 9000 and not multiprocessing.active_children()
    again = key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "cut")
    assert torch.equal(again[1].total, whole[1].total)


def test_an_unforeseen_error_in_the_worker_is_raised_as_it_is(
    tiny_llama, corpus, small, monkeypatch
):
    monkeypatch.setattr(Reader, "_tokenised", lambda self, number, texts: 1 // 0)
    reader = Reader(Corpus.parse(corpus), 0, tiny_llama.tokenizer, 50, True)
    with pytest.raises(ZeroDivisionError), prefetch(reader, 0, (), worker=True) as found:
        next(found)


ORPHAN = """
import sys, time
from knowedit.models.load import load_model
from knowedit.statistics.corpus import windows
from knowedit.statistics.corpus.corpus import Corpus
reader = windows.Reader(Corpus.parse(sys.argv[2]), 0, load_model(sys.argv[1]).tokenizer, 50, True)
windows.SIZE = 1000
with windows.prefetch(reader, 0, (), worker=True) as found:
    next(found)
    from multiprocessing import active_children
    print(active_children()[0].pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_no_worker_behind(tiny_llama, corpus, tmp_path):
    """At once, since it has the lock too."""
    save_model(tiny_llama, tmp_path / "model")
    (tmp_path / "run.py").write_text(ORPHAN)
    process = Forked(("run.py", tmp_path / "model", corpus), tmp_path, os.environ)
    while not process.said()[0].endswith("\n") and process.poll() is None:
        time.sleep(0.01)
    worker = int(process.said()[0])
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(10):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{worker}/stat") as stat:
            if stat.read().split(") ")[1][0] == "Z":  # ended, and waits for init
                return
        time.sleep(0.1)
    pytest.fail("the worker outlived the run by a second")
