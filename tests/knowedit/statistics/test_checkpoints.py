"""Checkpoints: what a collection goes on from, what it refuses, and what it leaves behind
(unit).
"""

import shutil

import pytest
import torch

from knowedit.errors import CorpusError, StatisticsError
from knowedit.io import tensors
from knowedit.io.ranks import Ranks
from knowedit.statistics import collect, key_statistics, sums
from knowedit.statistics.corpus import windows
from knowedit.statistics.distributed import checkpoints
from knowedit.statistics.files import store
from knowedit_kernels import SecondMoment
from tests.knowedit.statistics.helpers import rounds_that_stop_at


def test_results_that_were_only_half_written_are_written_from_the_checkpoint(
    tiny_llama, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "SIZE", 200)
    whole = key_statistics(tiny_llama, [1, 2, 3], corpus, 1500, directory=tmp_path / "whole")
    real = tensors.save_file

    def full_at_layer_2(held, path, **named):
        if "layer-002" in str(path):
            raise OSError(28, "No space left on device")
        real(held, path, **named)

    monkeypatch.setattr(tensors, "save_file", full_at_layer_2)
    with pytest.raises(StatisticsError, match="No space left"):
        key_statistics(
            tiny_llama, [1, 2, 3], corpus, 1500, directory=tmp_path / "s", checkpoint_every=0
        )
    assert [path.name for path in (tmp_path / "s").glob("layer*")] == ["layer-001.safetensors"]
    (tmp_path / "s" / ".checkpoint-x.part").write_text("of a run that was killed while it wrote")
    monkeypatch.setattr(tensors, "save_file", real)
    started, goes_on = [], collect.Collection._resume

    def resumes(self):
        goes_on(self)
        started.append(self.state.windows)

    monkeypatch.setattr(collect.Collection, "_resume", resumes)
    again = key_statistics(tiny_llama, [1, 2, 3], corpus, 1500, directory=tmp_path / "s")
    assert started[0] > 0 and all(torch.equal(again[i].total, whole[i].total) for i in (1, 2, 3))
    assert not list((tmp_path / "s").glob("checkpoint*")) and not list(
        (tmp_path / "s").glob(".*.part")
    )


def test_checkpoints_that_do_not_belong_together_are_refused(
    tiny_llama, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "SIZE", 200)
    goes_on = collect.Collection._resume

    def resumes(self):
        goes_on(self)
        self.state.counts[0] += 7  # as if another rank's file were of another run

    monkeypatch.setattr(collect.Collection, "_resume", resumes)
    with pytest.raises(
        StatisticsError,
        match=r"1493 keys were summed where 1500 should be; .* do not belong together",
    ):
        key_statistics(tiny_llama, [1], corpus, 1500, directory=tmp_path / "s")
    assert not list((tmp_path / "s").glob("layer*"))


def test_an_incomplete_set_of_checkpoints_is_deleted(tiny_llama, corpus, tmp_path, monkeypatch):
    """A rank that could not write: nobody's file stays. One that was killed before it wrote: the
    next run starts clean.
    """
    recipe = store.CollectionRecipe(tiny_llama.fingerprint, {"name": "c"}, 100, 64, True, 0)
    files = checkpoints.Checkpoints(tmp_path, [1], recipe, Ranks())
    state, tally, moments = (
        checkpoints.CollectionState(3, [5], [9, 9]),
        sums.KeyTally.empty([1]),
        {(0, 1): SecondMoment(8)},
    )
    with monkeypatch.context() as other:
        other.setattr(Ranks, "gather", lambda self, item: [item, False])
        files.save(state, tally, moments)
    assert not list(tmp_path.glob("checkpoint*"))
    files.save(state, tally, moments)
    stale = files._file(5, 0, 2)  # newer, and without that of rank 1
    shutil.copy(files._file(3, 0, 1), stale)
    found = files.load()
    assert (
        found is not None
        and found[0].windows == 3
        and not stale.exists()
        and files._file(3, 0, 1).exists()
    )


def test_checkpoints_that_cannot_be_gone_on_from_are_kept_aside(tiny_llama, tmp_path, caplog):
    """As on a node that sees its own disk only, started with another number of ranks."""
    recipe = store.CollectionRecipe(tiny_llama.fingerprint, {"name": "c"}, 100, 64, True, 0)
    files = checkpoints.Checkpoints(tmp_path, [1], recipe, Ranks())
    assert files.save(
        checkpoints.CollectionState(3, [5], [9, 9]),
        sums.KeyTally.empty([1]),
        {(0, 1): SecondMoment(8)},
    )
    mine = files._file(3, 1, 2)
    files._file(3, 0, 1).rename(mine)
    assert files.load() is None and "not those of all 2 ranks" in caplog.text
    assert not mine.exists() and mine.with_name(mine.name + ".incomplete").exists()
    files.drop()
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_run_that_ends_leaves_the_checkpoints_of_other_recipes(tiny_llama, tmp_path):
    """A short run into the folder of a long one that was interrupted."""

    def saved(layers, tokens):
        recipe = store.CollectionRecipe(tiny_llama.fingerprint, {"name": "c"}, tokens, 64, True, 0)
        kept = checkpoints.Checkpoints(tmp_path, layers, recipe, Ranks())
        sums_of = {(0, layer): SecondMoment(8) for layer in layers}
        kept.save(checkpoints.CollectionState(3, [5], [9, 9]), sums.KeyTally.empty(layers), sums_of)
        return kept

    long, short, wider = saved([1], 40_000), saved([1], 3_000), saved([1, 2], 3_000)
    short.drop()
    assert long.load() is not None and short.load() is None and wider.load() is None


def test_a_checkpoint_is_written_once_and_outlives_a_full_disk(
    tiny_llama, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "SIZE", 200)
    real, writes = tensors.save_file, []

    def counted(held, path, **named):
        writes.append(path)
        real(held, path, **named)

    def breaks(self, number, texts, made=windows.Reader._tokenised):
        if number == 4:
            raise CorpusError("the hub cannot be reached")
        return made(self, number, texts)

    monkeypatch.setattr(tensors, "save_file", counted)
    monkeypatch.setattr(windows.Reader, "_tokenised", breaks)
    for _ in range(3):  # the second and third time there is nothing new to write
        with pytest.raises(CorpusError, match="cannot be reached"):
            key_statistics(tiny_llama, [1], corpus, 1500, directory=tmp_path / "s")
        assert len(writes) == 1 and len(list((tmp_path / "s").glob("checkpoint*"))) == 1


def test_a_checkpoint_nobody_can_go_on_from_is_deleted(tiny_llama, corpus, tmp_path, monkeypatch):
    """Once one of its layers has been collected, a run for all of them starts with the others."""
    monkeypatch.setattr(windows, "SIZE", 200)
    real = collect.Collection._round

    with monkeypatch.context() as cut:
        cut.setattr(collect.Collection, "_round", rounds_that_stop_at(real, 3))
        for layers in ([1, 2], [3]):
            with pytest.raises(KeyboardInterrupt):
                key_statistics(
                    tiny_llama, layers, corpus, 1500, directory=tmp_path / "s", checkpoint_every=0
                )
    left = {path.name.split(".")[0] for path in (tmp_path / "s").glob("checkpoint*")}
    key_statistics(tiny_llama, [1], corpus, 1500, directory=tmp_path / "s")
    kept = {path.name.split(".")[0] for path in (tmp_path / "s").glob("checkpoint*")}
    assert len(left) == 2 and len(kept) == 1 and kept < left
