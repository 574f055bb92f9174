"""One collection: exact sums of all layers in one pass, and interruption at any moment (unit)."""

import os
import re
import signal
import time

import pytest
import torch

from knowedit.errors import CorpusError, StatisticsError
from knowedit.io import tensors
from knowedit.statistics import collect, key_statistics
from knowedit.statistics.corpus import windows
from knowedit.statistics.distributed.rounds import Rounds
from tests.knowedit.statistics.helpers import naive, rounds_that_stop_at, save_model
from tests.processes import Forked


@pytest.mark.parametrize("budget", [64, 4096])
def test_sums_are_exact_for_all_layers_in_one_pass(tiny, corpus, tmp_path, budget):
    total, count = naive(tiny, corpus, 2, 40)
    found = key_statistics(
        tiny, [0, 2], corpus, count, max_length=40, directory=tmp_path / "s", budget=budget
    )
    assert found.layers == [0, 2] and found[2].count == count
    assert (found[2].total - total).norm() <= 1e-6 * total.norm()
    assert torch.equal(found[2].total, found[2].total.T)
    assert found[2].extra["padding"] <= 0.05
    other, _ = naive(tiny, corpus, 0, 40)
    assert (found[0].total - other).norm() <= 1e-6 * other.norm()


def test_the_token_count_is_exact(tiny_llama, corpus, tmp_path):
    assert key_statistics(tiny_llama, [1], corpus, 333, directory=tmp_path / "s")[1].count == 333


def test_nothing_above_the_deepest_layer_runs(tiny_llama, corpus, tmp_path):
    ran = []
    for i, layer in enumerate(tiny_llama.layers):
        layer.register_forward_hook(lambda *_a, i=i: ran.append(i))
    key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    assert set(ran) == {0}


def test_an_empty_and_a_short_corpus(tiny_llama, tmp_path, corpus):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(CorpusError, match="no text"):
        key_statistics(tiny_llama, [1], tmp_path / "empty.txt", 10, directory=tmp_path / "s")
    (tmp_path / "single.txt").write_text("a\n\nb\n\nc")  # a token each, which is the first one
    with pytest.raises(StatisticsError, match="no tokens to count"):
        key_statistics(tiny_llama, [1], tmp_path / "single.txt", 10, directory=tmp_path / "t")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_layer_and_text(tiny_llama, corpus, tmp_path, bad):
    tiny_llama.layers[1].mlp.up_proj.register_forward_hook(lambda *_: torch.full((), bad))
    with pytest.raises(
        StatisticsError, match=r"layer 1 has NaN or infinite keys at the text '[a-z ]{10,}'"
    ):
        key_statistics(tiny_llama, [0, 1], corpus, 100, directory=tmp_path / "s")
    assert not list((tmp_path / "s").glob("layer*"))


def test_a_full_disk_keeps_what_was_there(tiny_llama, corpus, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(StatisticsError, match="No space left.*KNOWEDIT_CACHE"):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    monkeypatch.undo()
    assert key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")[1].count == 100


@pytest.mark.parametrize("moment", ["reading", "summing"])
def test_ctrl_c_keeps_what_was_counted(tiny_llama, corpus, tmp_path, monkeypatch, moment):
    """While a window is read, which may take minutes, at once; while it is summed, after it."""
    monkeypatch.setattr(windows, "SIZE", 200)
    whole = key_statistics(tiny_llama, [1, 2], corpus, 1500, directory=tmp_path / "whole")
    owner, name = {"reading": (Rounds, "announce"), "summing": (collect.Sums, "add")}[moment]
    real, calls = getattr(owner, name), []

    def interrupted(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments, **named)

    with monkeypatch.context() as cut:
        cut.setattr(owner, name, interrupted)
        with pytest.raises(
            KeyboardInterrupt, match="key statistics of .* tokens are kept in"
        ) as stop:
            key_statistics(tiny_llama, [1, 2], corpus, 1500, directory=tmp_path / "cut")
    kept = int(re.search(r"of ([0-9,]+) of 1,500", str(stop.value))[1].replace(",", ""))
    assert kept > 0 and len(list((tmp_path / "cut").glob("checkpoint*"))) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = key_statistics(tiny_llama, [1, 2], corpus, 1500, directory=tmp_path / "cut")
    assert all(torch.equal(resumed[layer].total, whole[layer].total) for layer in (1, 2))


def test_an_interrupted_run_ends_with_the_same_bits(tiny_llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 200)
    whole = key_statistics(tiny_llama, [1, 2], corpus, 1500, directory=tmp_path / "whole")
    real = collect.Collection._round
    monkeypatch.setattr(collect.Collection, "_round", rounds_that_stop_at(real, 5))
    with pytest.raises(KeyboardInterrupt):
        key_statistics(
            tiny_llama, [1, 2], corpus, 1500, directory=tmp_path / "cut", checkpoint_every=0
        )
    monkeypatch.setattr(collect.Collection, "_round", real)
    assert list((tmp_path / "cut").glob("checkpoint*")) and not list(
        (tmp_path / "cut").glob("layer*")
    )
    resumed = key_statistics(
        tiny_llama, [1, 2], corpus, 1500, directory=tmp_path / "cut", checkpoint_every=0
    )
    for layer in (1, 2):
        assert torch.equal(resumed[layer].total, whole[layer].total)
        assert resumed[layer].first_norm == whole[layer].first_norm
    assert not list((tmp_path / "cut").glob("checkpoint*"))


PROGRAM = """
import sys, torch
from knowedit.models.load import load_model
from knowedit.statistics import key_statistics
from knowedit.statistics.corpus import windows
windows.SIZE = 200
model = load_model(sys.argv[1])
found = key_statistics(model, [1, 2], sys.argv[2], 2500, directory=sys.argv[3], checkpoint_every=0)
print(float(found[2].total.sum()))
"""


def test_kill_at_random_moments_loses_nothing(tiny_llama, corpus, tmp_path):
    """Real processes, really killed; the survivor of several kills has the bits of an undisturbed
    run.
    """
    save_model(tiny_llama, tmp_path / "model")
    (tmp_path / "run.py").write_text(PROGRAM)

    def start(folder):
        command = ("run.py", tmp_path / "model", corpus, folder)
        return Forked(command, tmp_path, {**os.environ, "OMP_NUM_THREADS": "1"})

    first = start(tmp_path / "whole")
    wanted, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    folder = tmp_path / "cut"
    for kill in range(3):
        process = start(folder)
        deadline = time.monotonic() + 60
        written = len(list(folder.glob("*"))) if folder.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if folder.exists() and len(list(folder.glob("*"))) > min(written, 1):
                break
            time.sleep(0.005)
        time.sleep(0.004 * (kill + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not [p for p in folder.glob("layer*") if p.stat().st_size == 0]
    last = start(folder)
    output, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert output == wanted
    assert not list(folder.glob("checkpoint*"))
