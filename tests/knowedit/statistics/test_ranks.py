"""Several processes, really started by torchrun: the sums of one process, and what happens when one
dies.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from knowedit.errors import KnowEditError, StatisticsError
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.checks import Looks
from knowedit.statistics.collect import Collection, Settings
from knowedit.statistics.corpus import windows
from knowedit.statistics.corpus.batching import Piece
from knowedit.statistics.distributed import rounds
from knowedit.statistics.distributed.checkpoints import Place
from knowedit.statistics.distributed.ranks import Ranks
from knowedit.statistics.distributed.rounds import SECONDS, Rounds
from knowedit.statistics.files.store import Recipe

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards quietly mix strange potions"
).split()
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
STARTED: list[subprocess.Popen] = []

PROGRAM = """
import os, sys, time
from knowedit.errors import KnowEditError, StatisticsError
from knowedit.statistics import collect, rounds, windows
from knowedit.model import load_model
from knowedit.statistics.ranks import started
from knowedit.statistics import key_statistics
windows.SIZE = 200
model, corpus, folder, pause = sys.argv[1:]
run = collect.Collection._round
def slow(*arguments):
    time.sleep(float(pause))
    run(*arguments)
    with open("rounds", "a") as file:
        file.write("x")
collect.Collection._round = slow
made = windows.Reader._tokenised
def breaks(self, number, texts):
    if number == int(os.environ["BROKEN"]):
        raise KnowEditError(f"window {number} cannot be read")
    return made(self, number, texts)
if "BROKEN" in os.environ:
    windows.Reader._tokenised = breaks
added, calls = collect.Sums.add, []
def fails(self, *arguments):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        raise StatisticsError("layer 1 has NaN")
    added(self, *arguments)
if "NAN" in os.environ:
    collect.Sums.add = fails
with started() as ranks:
    if float(pause):
        rounds.AHEAD = 1  # a round a window, so that there is time to be killed
        open("pids", "a").write(f"{ranks.rank} {os.getpid()}\\n")
    key_statistics(load_model(model), [1, 2], corpus, 2500, directory=folder,
                   checkpoint_every=float(os.environ.get("EVERY", 0)))
if sys.platform == "linux":  # a thread that outlives the group may abort the process when the interpreter ends
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    assert not [name for name in names if "gloo" in name], names
"""  # noqa: E501


@pytest.fixture(autouse=True)
def nothing_stays():
    """Ends whatever a failed test leaves running (torchrun passes the signal on to its workers)."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    STARTED.clear()


@pytest.fixture
def place(tiny_llama, tmp_path, own_cache):
    """A folder with a model, a corpus and a program that collects slowly."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    texts = [
        " ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + (i * 7) % 29)) for i in range(1, 61)
    ]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    (tmp_path / "run.py").write_text(PROGRAM)
    return tmp_path


def start(place, ranks, *command, **more):
    own = {"OMP_NUM_THREADS": "1", "KNOWEDIT_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    environment, launcher = (
        {**os.environ, **own, **more},
        (*TORCHRUN, str(ranks)) if ranks > 1 else (sys.executable,),
    )
    STARTED.append(
        subprocess.Popen(
            [*launcher, *command],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    return STARTED[-1]


def collect(place, ranks, folder, pause="0"):
    process = start(place, ranks, "run.py", "model", "corpus.txt", folder, pause)
    _, errors = process.communicate(timeout=540)
    assert process.returncode == 0, errors
    return KeyStatistics.load(place / folder)


def differ(one, other):
    return max(
        float((one[i].total - other[i].total).norm() / other[i].total.norm()) for i in (1, 2)
    )


def test_two_ranks_write_what_one_process_writes(place):
    long = " ".join(WORDS) + ". "
    (place / "long.txt").write_text(
        "\n\n".join(long * (1 + i % 5) for i in range(700))
    )  # about six windows
    arguments = (
        "-m",
        "knowedit",
        "stats",
        "model",
        "--corpus",
        "long.txt",
        "--tokens",
        "150001",
        "--layer",
        "1-2",
        "--json",
    )
    processes = [start(place, ranks, *arguments, "-o", f"by{ranks}") for ranks in (1, 2)]
    said = [process.communicate(timeout=540) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    rows = [json.loads(out) for out, _ in said]  # one rank speaks
    assert [row["ranks"] for row in rows[0] + rows[1]] == [1, 1, 2, 2]
    one, two = (KeyStatistics.load(place / f"by{ranks}") for ranks in (1, 2))
    assert one[1].count == two[1].count == 150_001 and one[1].recipe == two[1].recipe
    assert differ(two, one) <= 1e-12
    assert two[2].first_norm == pytest.approx(one[2].first_norm, rel=1e-12)
    assert two[1].extra["padding"] == one[1].extra["padding"] <= 0.05
    ours, theirs = (found[2].extra["convergence"] for found in (one, two))
    assert len(ours) == len(theirs) > 0 and theirs[-1]["solve"] == pytest.approx(
        ours[-1]["solve"], rel=1e-6
    )
    events = [json.loads(line) for line in said[1][1].splitlines() if line.startswith("{")]
    assert (
        events[-1]["event"] == "done"
        and events[-1]["tokens"] == 150_001
        and events[-1]["tokens_per_second"] > 0
    )
    assert not list(place.glob("by*/checkpoint*"))


def test_a_dead_rank_ends_the_job_and_any_number_go_on(place):
    whole = collect(place, 2, "whole")
    for pause in ("0.2", "1", "3"):  # slower, should the job have ended before it could be killed
        process = start(place, 2, "run.py", "model", "corpus.txt", "cut", pause)
        while not list((place / "cut").glob("checkpoint*.1-of-2.*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        if process.poll() is None:
            break
        (place / "pids").unlink()
        shutil.rmtree(place / "cut", ignore_errors=True)
    workers = dict(map(int, line.split()) for line in (place / "pids").read_text().splitlines())
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "SIGKILL" in errors
    for worker in workers.values():
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert list((place / "cut").glob("checkpoint*.0-of-2.*")) and not list(
        (place / "cut").glob("layer*")
    )
    shutil.copytree(place / "cut", place / "cut-one")
    again, alone = collect(place, 2, "cut"), collect(place, 1, "cut-one")
    assert all(
        torch.equal(again[i].total, whole[i].total) for i in (1, 2)
    )  # the same ranks: the same bits
    assert differ(alone, whole) <= 1e-12 and alone[1].count == 2500
    assert not list(place.glob("cut*/checkpoint*"))


@pytest.mark.parametrize("broken", ["0", "7"])
def test_a_corpus_that_breaks_leaves_a_checkpoint_of_everything_before_it(place, broken):
    process = start(
        place, 2, "run.py", "model", "corpus.txt", "cut", "0", BROKEN=broken, EVERY="1000"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count(
        f"KnowEditError: window {broken} cannot be read"
    )
    left = sorted(path.name.split(".", 1)[1] for path in (place / "cut").glob("checkpoint*"))
    assert left == (
        [f"{int(broken):08d}.{rank}-of-2.safetensors" for rank in (0, 1)] if broken != "0" else []
    )
    whole, again = collect(place, 1, "whole"), collect(place, 2, "cut")
    assert differ(again, whole) <= 1e-12 and again[1].count == 2500


def test_a_rank_that_fails_while_a_round_is_announced_ends_the_job(place):
    process = start(place, 2, "run.py", "model", "corpus.txt", "cut", "0", NAN="yes")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "StatisticsError: layer 1 has NaN" in errors
    assert list((place / "cut").glob("checkpoint*")) and not list((place / "cut").glob("layer*"))
    assert torch.equal(collect(place, 2, "cut")[1].total, collect(place, 2, "whole")[1].total)


def test_a_job_that_is_told_to_end_saves_first(place):
    """As SLURM and torchrun do it: SIGTERM, and some seconds later SIGKILL."""
    whole = collect(place, 2, "whole")
    rounds = place / "rounds"
    rounds.unlink()
    process = start(place, 2, "run.py", "model", "corpus.txt", "cut", "1", EVERY="1000")
    while (not rounds.exists() or rounds.stat().st_size < 4) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "told to end (SIGTERM): start again" in errors
    assert len(list((place / "cut").glob("checkpoint*-of-2.*"))) == 2 and not list(
        (place / "cut").glob("layer*")
    )
    again = collect(place, 2, "cut")
    assert all(torch.equal(again[i].total, whole[i].total) for i in (1, 2))


def test_a_rank_that_is_left_says_what_happened(place):
    """Without torchrun, which may end it before its next collective."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
    command = ("run.py", "model", "corpus.txt", "cut", "1")
    left, killed = (start(place, 1, *command, **group, RANK=str(rank)) for rank in (0, 1))
    while not list((place / "cut").glob("checkpoint*")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    _, errors = left.communicate(timeout=120)
    assert (
        left.returncode != 0 and "StatisticsError: another rank ended or does not answer" in errors
    )


@pytest.mark.parametrize("ranks", [2, 3, 5, 16])
def test_windows_are_dealt_out_to_any_number_of_ranks(tiny_llama, place, monkeypatch, ranks):
    """Every window goes to one rank, and is the one that a single process makes; also from the
    middle on.
    """
    monkeypatch.setattr(windows, "SIZE", 200)
    monkeypatch.setattr("knowedit.statistics.corpus.windows.lanes_of", lambda _: 4)

    def read(rank, size, start=0, taken=()):
        reader = windows.Reader(place / "corpus.txt", 0, tiny_llama.tokenizer, 64, True, rank, size)
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


def test_a_rank_that_waits_starts_where_the_checkpoint_was(tiny_llama, place, monkeypatch):
    """Reading begins at the first window that is asked for, when the place may have moved on."""
    monkeypatch.setattr(windows, "SIZE", 200)
    reader = windows.Reader(place / "corpus.txt", 0, tiny_llama.tokenizer, 64, True)
    whole = list(itertools.islice(reader.windows(), 12))
    taken = [sum(window.documents for window in whole[:5])]
    ranks, layers = Ranks(), [1]
    recipe = Recipe(tiny_llama.fingerprint, {"name": "c"}, 10**6, 64, True, 0)
    made = Collection(
        tiny_llama, layers, recipe, place, place / "corpus.txt", Settings(progress=False), ranks
    )
    monkeypatch.setattr(made, "_resume", lambda: setattr(made, "place", Place(5, taken, [0, 0])))
    found = []

    def moves_on_first(rounds, meter):
        made.place.taken[0] += 3
        found.extend([*rounds.told().mine.values(), *itertools.islice(rounds.source, 3)])
        made.place.converged = True

    monkeypatch.setattr(made, "_round", moves_on_first)
    with pytest.raises(StatisticsError, match="no tokens to count"):
        made.run()
    assert found == whole[5:9]


def test_rounds_fill_their_seconds_and_are_no_larger_than_what_is_needed():
    def each(ranks, seconds, windows, count):
        made = Rounds(iter(()), Ranks(0, ranks), 10_000)
        made.took(seconds, 2)
        made.each = made._wanted()
        made.fit(Place(windows, [0], [count, 0]))
        return made.each

    assert each(1, 2 * SECONDS / 4, 4, 400) == 1  # by itself a process waits for nobody
    assert each(2, 2 * SECONDS / 4, 4, 400) == 4 and each(2, 3 * SECONDS, 4, 400) == 1
    assert each(2, 1e-3, 4, 400) == rounds.AHEAD
    assert (
        each(2, 1e-3, 90, 9_000) == 5 and each(2, 1e-3, 99, 9_900) == 1
    )  # ten windows are missing, then one
    assert each(2, 2 * SECONDS / 4, 2, 0) == 4  # windows without any text


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_ranks_announce_before_they_compute(tiny_llama, place, monkeypatch, ranks):
    """Or each would wait for the slowest in every round; one process has its clock and its signals
    up to date instead.
    """
    monkeypatch.setattr(windows, "SIZE", 200)
    recipe, events = Recipe(tiny_llama.fingerprint, {"name": "c"}, 10**6, 64, True, 0), []
    made = Collection(
        tiny_llama, [1], recipe, place, place / "corpus.txt", Settings(), Ranks(0, ranks)
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
        made._round(coming, SimpleNamespace(counted=lambda tokens: None))
    first = ["announce"] if ranks == 2 else []
    assert events == [*first, *["announce", "add"] * 3, *["announce"] * (ranks == 1)]


def test_looks_are_rare_and_leave_the_second_half_to_the_last_one():
    def due(tokens, until, windows):
        looks = Looks(
            None,
            Recipe("f", {"name": "c"}, tokens, 64, True, 0, until=until, tolerance=0.1),
            Ranks(),
        )
        return looks.due(Place(windows, [0], [50 * windows, 50 * windows]))

    assert [n for n in range(1, 200) if due(10_000, "tokens", n)] == [8, 32]
    assert [n for n in range(1, 200) if due(30_000, "tokens", n)] == [8, 32, 128]
    assert [n for n in range(1, 12) if due(1_000, "solve", n)] == [2, 3, 4, 5, 7, 9]


def test_every_rank_hears_of_every_window_and_of_what_went_wrong(monkeypatch):
    """Three ranks played one after the other: what they post is what each of them is told."""
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
        one.each = 2
        one.took(SECONDS / 2, 1)
        one.announce(Place(3, [0], [0, 0]), 100, due=rank == 0, ended=rank == 2)
    for rank, one in enumerate(made):
        now = one.told()
        assert not one.announced and (now.start, now.end, now.problem) == (3, 7, problem)
        assert now.sizes == {number: (number - 1, number + 1) for number in range(3, 7)}
        assert {number for number in now.mine if number < 7} == set(range(3 + (rank - 3) % 3, 7, 3))
        assert now.due and now.ended and one.each == 2


def test_ranks_must_agree(tiny_llama, place, monkeypatch):
    real = Ranks.gather
    monkeypatch.setattr(Ranks, "gather", lambda self, item: [*real(self, item), None])
    with pytest.raises(StatisticsError, match="ranks were given different models"):
        key_statistics(tiny_llama, [1], place / "corpus.txt", 100, directory=place / "s")
