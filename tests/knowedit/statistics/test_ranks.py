"""Several processes, started by torchrun or by its agent: the sums of one process, and what
happens when one dies (unit).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from knowedit.errors import StatisticsError
from knowedit.io.ranks import Ranks
from knowedit.statistics import KeyStatistics, key_statistics
from tests.knowedit.statistics.helpers import WORDS, save_model, varied_texts
from tests.processes import Forked

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


STARTED: list[Forked | subprocess.Popen] = []


PROGRAM = """
import os, sys, time, traceback
import transformers.models.llama.modeling_llama
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from knowedit.errors import KnowEditError, StatisticsError
from knowedit.models.load import load_model
from knowedit.statistics import collect
from knowedit.statistics.corpus import windows
from knowedit.statistics.distributed import rounds
from knowedit.io.ranks import started
from knowedit.statistics import key_statistics
windows.SIZE = 200
ranks, model, corpus, folder, pause = sys.argv[1:]
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
def main():
    with started() as group:
        if float(pause):
            rounds.PREFETCH = 1  # a round a window, so that there is time to be killed
            open("pids", "a").write(f"{group.rank} {os.getpid()}\\n")
        key_statistics(load_model(model), [1, 2], corpus, 2500, directory=folder,
                       checkpoint_every=float(os.environ.get("EVERY", 0)))
    # a thread that outlives the group may abort the process when the interpreter ends
    if sys.platform == "linux":
        tasks = os.listdir("/proc/self/task")
        names = [open(f"/proc/self/task/{task}/comm").read() for task in tasks]
        assert not [name for name in names if "gloo" in name], names
def worker():
    try:
        main()
    except BaseException:  # the agent tells of one rank only
        traceback.print_exc()
        raise
if int(ranks) == 1:
    main()
else:  # torchrun's agent; its workers are forks, which need not import everything again
    elastic_launch(LaunchConfig(1, 1, int(ranks), run_id="test", rdzv_backend="c10d",
                                rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
                                monitor_interval=0.1), worker)()
"""


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
def workplace(tiny_llama, tmp_path, own_cache):
    """A folder with a model, a corpus and a program that collects slowly."""
    save_model(tiny_llama, tmp_path / "model")
    (tmp_path / "corpus.txt").write_text(varied_texts(60))
    (tmp_path / "run.py").write_text(PROGRAM)
    return tmp_path


WHOLE: dict[str, KeyStatistics] = {}


@pytest.fixture
def whole(workplace):
    """What two ranks collect undisturbed; every `workplace` holds the same, so it is made once."""
    if not WHOLE:
        WHOLE["whole"] = collect(workplace, 2, "whole")
        (workplace / "rounds").unlink()
    return WHOLE["whole"]


def start(workplace, *command, torchrun=0, **more):
    own = {
        "OMP_NUM_THREADS": "1",
        "KNOWEDIT_CACHE": str(workplace / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    environment = {**os.environ, **own, **more}
    if torchrun:
        process = subprocess.Popen(
            [*TORCHRUN, str(torchrun), *command],
            cwd=workplace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    else:
        process = Forked(command, workplace, environment)
    STARTED.append(process)
    return STARTED[-1]


def collect(workplace, ranks, folder, pause="0"):
    process = start(workplace, "run.py", str(ranks), "model", "corpus.txt", folder, pause)
    _, errors = process.communicate(timeout=540)
    assert process.returncode == 0, errors
    return KeyStatistics.load(workplace / folder)


def differ(one, other):
    return max(
        float((one[i].total - other[i].total).norm() / other[i].total.norm()) for i in (1, 2)
    )


def test_two_ranks_write_what_one_process_writes(workplace):
    long = " ".join(WORDS) + ". "
    (workplace / "long.txt").write_text(
        "\n\n".join(long * (1 + i % 5) for i in range(400))
    )  # about four windows
    arguments = (
        "-m",
        "knowedit",
        "stats",
        "model",
        "--corpus",
        "long.txt",
        "--tokens",
        "90001",
        "--layer",
        "1-2",
        "--json",
    )
    processes = [
        start(workplace, *arguments, "-o", f"by{ranks}", torchrun=torchrun)
        for ranks, torchrun in ((1, 0), (2, 2))
    ]
    output = [process.communicate(timeout=540) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    rows = [json.loads(out) for out, _ in output]  # one rank speaks
    assert [row["ranks"] for row in rows[0] + rows[1]] == [1, 1, 2, 2]
    one, two = (KeyStatistics.load(workplace / f"by{ranks}") for ranks in (1, 2))
    assert one[1].count == two[1].count == 90_001 and one[1].recipe == two[1].recipe
    assert differ(two, one) <= 1e-12
    assert two[2].first_norm == pytest.approx(one[2].first_norm, rel=1e-12)
    assert two[1].extra["padding"] == one[1].extra["padding"] <= 0.05
    ours, theirs = (found[2].extra["convergence"] for found in (one, two))
    assert len(ours) == len(theirs) > 0 and theirs[-1]["solve"] == pytest.approx(
        ours[-1]["solve"], rel=1e-6
    )
    events = [json.loads(line) for line in output[1][1].splitlines() if line.startswith("{")]
    assert (
        events[-1]["event"] == "done"
        and events[-1]["tokens"] == 90_001
        and events[-1]["tokens_per_second"] > 0
    )
    assert not list(workplace.glob("by*/checkpoint*"))


def test_a_dead_rank_ends_the_job_and_any_number_go_on(workplace, whole):
    for pause in ("0.2", "1", "3"):  # slower, should the job have ended before it could be killed
        process = start(workplace, "run.py", "2", "model", "corpus.txt", "cut", pause)
        while not list((workplace / "cut").glob("checkpoint*.1-of-2.*")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        if process.poll() is None:
            break
        (workplace / "pids").unlink()
        shutil.rmtree(workplace / "cut", ignore_errors=True)
    workers = dict(map(int, line.split()) for line in (workplace / "pids").read_text().splitlines())
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    # torchrun names the one of two that it sees first, the dead rank or the one that misses it
    assert process.returncode != 0
    assert "SIGKILL" in errors or "RankError: another rank ended or does not answer" in errors
    for worker in workers.values():
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert list((workplace / "cut").glob("checkpoint*.0-of-2.*")) and not list(
        (workplace / "cut").glob("layer*")
    )
    shutil.copytree(workplace / "cut", workplace / "cut-one")
    again, alone = collect(workplace, 2, "cut"), collect(workplace, 1, "cut-one")
    assert all(
        torch.equal(again[i].total, whole[i].total) for i in (1, 2)
    )  # the same ranks: the same bits
    assert differ(alone, whole) <= 1e-12 and alone[1].count == 2500
    assert not list(workplace.glob("cut*/checkpoint*"))


@pytest.mark.parametrize("broken", ["0", "7"])
def test_a_corpus_that_breaks_leaves_a_checkpoint_of_everything_before_it(workplace, whole, broken):
    process = start(
        workplace, "run.py", "2", "model", "corpus.txt", "cut", "0", BROKEN=broken, EVERY="1000"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count(
        f"KnowEditError: window {broken} cannot be read"
    )
    left = sorted(path.name.split(".", 1)[1] for path in (workplace / "cut").glob("checkpoint*"))
    assert left == (
        [f"{int(broken):08d}.{rank}-of-2.safetensors" for rank in (0, 1)] if broken != "0" else []
    )
    if left:
        again = collect(workplace, 2, "cut")
        assert differ(again, whole) <= 1e-12 and again[1].count == 2500


def test_a_rank_that_fails_while_a_round_is_announced_ends_the_job(workplace):
    process = start(workplace, "run.py", "2", "model", "corpus.txt", "cut", "0", NAN="yes")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "StatisticsError: layer 1 has NaN" in errors
    assert list((workplace / "cut").glob("checkpoint*")) and not list(
        (workplace / "cut").glob("layer*")
    )


def test_a_job_that_is_terminated_saves_first(workplace, whole):
    """As SLURM and torchrun do it: SIGTERM, and some seconds later SIGKILL."""
    rounds = workplace / "rounds"
    process = start(workplace, "run.py", "2", "model", "corpus.txt", "cut", "1", EVERY="1000")
    while (not rounds.exists() or rounds.stat().st_size < 4) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopped by SIGTERM: start again" in errors
    assert len(list((workplace / "cut").glob("checkpoint*-of-2.*"))) == 2 and not list(
        (workplace / "cut").glob("layer*")
    )
    again = collect(workplace, 2, "cut")
    assert all(torch.equal(again[i].total, whole[i].total) for i in (1, 2))


def test_a_rank_that_is_left_says_what_happened(workplace):
    """Without torchrun, which may end it before its next collective."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
    command = ("run.py", "1", "model", "corpus.txt", "cut", "1")
    left, killed = (start(workplace, *command, **group, RANK=str(rank)) for rank in (0, 1))
    while not list((workplace / "cut").glob("checkpoint*")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    _, errors = left.communicate(timeout=120)
    assert left.returncode != 0 and "RankError: another rank ended or does not answer" in errors


def test_ranks_must_agree(tiny_llama, workplace, monkeypatch):
    real = Ranks.gather
    monkeypatch.setattr(Ranks, "gather", lambda self, item: [*real(self, item), None])
    with pytest.raises(StatisticsError, match="ranks were given different models"):
        key_statistics(tiny_llama, [1], workplace / "corpus.txt", 100, directory=workplace / "s")
