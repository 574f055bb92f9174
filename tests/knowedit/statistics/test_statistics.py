"""Key statistics: exact sums, one pass, interruption at any moment, and files that are refused."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock

from knowedit.errors import ModelError, StatisticsError
from knowedit.facts.sets import load
from knowedit.statistics import KeyStatistics, collect, key_statistics, keys, sums
from knowedit.statistics import checks as looks
from knowedit.statistics.corpus import windows
from knowedit.statistics.corpus.corpus import CorpusError, documents
from knowedit.statistics.distributed import checkpoints as resume
from knowedit.statistics.distributed.ranks import Ranks
from knowedit.statistics.files import store
from knowedit_kernels import SecondMoment

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards quietly mix strange potions"
).split()


@pytest.fixture
def corpus(tmp_path):
    """Forty documents of very different lengths."""
    texts = [
        " ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + (i * 7) % 29)) for i in range(1, 41)
    ]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(texts))
    return path


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


def naive(model, corpus, layer, tokens, max_length):
    """One document at a time, whole model, first tokens left out; the first `tokens` keys of each
    window's order.
    """
    keys = []
    handle = model.projection(layer).register_forward_pre_hook(
        lambda _m, x: keys.append(x[0][0, 1:].double())
    )
    for text in documents(corpus):
        ids = model.tokenizer(text)["input_ids"]
        for i in range(0, len(ids), max_length):
            if len(ids) - i > 1:
                model.hf(input_ids=torch.tensor([ids[i : i + max_length]]))
    handle.remove()
    found = torch.cat(keys)
    return found.T @ found, len(found)


@pytest.mark.parametrize("budget", [64, 4096])
def test_sums_are_exact_for_all_layers_in_one_pass(tiny, corpus, tmp_path, budget):
    total, count = naive(tiny, corpus, 2, 10**9, 40)
    found = key_statistics(
        tiny, [0, 2], corpus, count, max_length=40, directory=tmp_path / "s", budget=budget
    )
    assert found.layers == [0, 2] and found[2].count == count
    assert (found[2].total - total).norm() <= 1e-6 * total.norm()
    assert torch.equal(found[2].total, found[2].total.T)
    assert found[2].extra["padding"] <= 0.05
    other, _ = naive(tiny, corpus, 0, 10**9, 40)
    assert (found[0].total - other).norm() <= 1e-6 * other.norm()


def test_the_token_count_is_exact(tiny_llama, corpus, tmp_path):
    assert key_statistics(tiny_llama, [1], corpus, 333, directory=tmp_path / "s")[1].count == 333


def test_nothing_above_the_deepest_layer_runs(tiny_llama, corpus, tmp_path):
    ran = []
    for i, layer in enumerate(tiny_llama.layers):
        layer.register_forward_hook(lambda *_a, i=i: ran.append(i))
    key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    assert set(ran) == {0}


def test_the_second_call_reads_the_files(tiny_llama, corpus, tmp_path, monkeypatch):
    first = key_statistics(tiny_llama, [0, 1], corpus, 200, directory=tmp_path / "s")
    monkeypatch.setattr(keys, "Collection", None)  # would raise if anything were collected
    again = key_statistics(tiny_llama, [1], corpus, 200, directory=tmp_path / "s")
    assert torch.equal(again[1].total, first[1].total) and again[1].recipe == first[1].recipe


def test_the_cache_is_keyed_by_the_weights(tiny_llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    key_statistics(tiny_llama, [1], corpus, 50)
    tiny_llama.weight(0).data[0, 0] += 1
    tiny_llama._fingerprint = None
    key_statistics(tiny_llama, [1], corpus, 50)
    assert len(list((tmp_path / "cache").rglob("layer-001.safetensors"))) == 2


def test_another_models_statistics_are_refused(tiny_llama, tiny_gpt2, corpus, tmp_path):
    found = key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    with pytest.raises(StatisticsError, match="are of tiny-llama.*not of tiny-gpt2"):
        found.check(tiny_gpt2, [1])
    with pytest.raises(StatisticsError, match="holds other statistics .*fingerprint"):
        key_statistics(tiny_gpt2, [1], corpus, 100, directory=tmp_path / "s")


def test_a_missing_layer_is_named(tiny_llama, corpus, tmp_path):
    found = key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    with pytest.raises(StatisticsError, match=r"no statistics of layer 2 here, only of \[1\]"):
        found.moment(2)
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        key_statistics(tiny_llama, [9], corpus, 100, directory=tmp_path / "s")


def test_too_few_tokens_for_a_metric(tiny_llama, corpus, tmp_path):
    found = key_statistics(tiny_llama, [1], corpus, 60, directory=tmp_path / "s")
    with pytest.raises(StatisticsError, match="too few"):
        found.metric(1)


def test_a_truncated_file_is_refused(tiny_llama, corpus, tmp_path):
    key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    path = store.layer_file(tmp_path / "s", 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        StatisticsError, match=r"layer-001\.safetensors is truncated or damaged.*delete it"
    ):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")


def test_an_empty_and_a_short_corpus(tiny_llama, tmp_path, corpus):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(CorpusError, match="no text"):
        key_statistics(tiny_llama, [1], tmp_path / "empty.txt", 10, directory=tmp_path / "s")
    (tmp_path / "single.txt").write_text("a\n\nb\n\nc")  # a token each, which is the first one
    with pytest.raises(StatisticsError, match="no tokens to count"):
        key_statistics(tiny_llama, [1], tmp_path / "single.txt", 10, directory=tmp_path / "t")


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "cache"])
def test_what_a_short_corpus_had_is_kept(
    tiny_llama, corpus, tmp_path, monkeypatch, own_cache, folder
):
    where = {"directory": tmp_path / "s"} if folder else {}
    _, count = naive(tiny_llama, corpus, 1, 10**9, 512)
    with pytest.raises(
        StatisticsError,
        match=f"only {count} tokens .* 10000000 were asked for.* kept: ask for {count}",
    ):
        key_statistics(tiny_llama, [1], corpus, 10**7, **where)
    monkeypatch.setattr(collect.Collection, "run", None)  # nothing is run any more
    found = key_statistics(tiny_llama, [1], corpus, count, **where)
    assert found[1].count == found[1].recipe.tokens == count


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_layer_and_text(tiny_llama, corpus, tmp_path, bad):
    tiny_llama.layers[1].mlp.up_proj.weight.data[3] = bad
    with pytest.raises(
        StatisticsError, match=r"layer 1 has NaN or infinite keys at the text '[a-z ]{10,}'"
    ):
        key_statistics(tiny_llama, [0, 1], corpus, 100, directory=tmp_path / "s")
    assert not list((tmp_path / "s").glob("layer*"))


def test_a_full_disk_keeps_what_was_there(tiny_llama, corpus, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StatisticsError, match="No space left.*KNOWEDIT_CACHE"):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    monkeypatch.undo()
    assert key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")[1].count == 100


def test_results_that_were_only_half_written_are_written_from_the_checkpoint(
    tiny_llama, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "SIZE", 200)
    whole = key_statistics(tiny_llama, [1, 2, 3], corpus, 1500, directory=tmp_path / "whole")
    real = store.save_file

    def full_at_layer_2(tensors, path, **named):
        if "layer-002" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path, **named)

    monkeypatch.setattr(store, "save_file", full_at_layer_2)
    with pytest.raises(StatisticsError, match="No space left"):
        key_statistics(
            tiny_llama, [1, 2, 3], corpus, 1500, directory=tmp_path / "s", checkpoint_every=0
        )
    assert [path.name for path in (tmp_path / "s").glob("layer*")] == ["layer-001.safetensors"]
    (tmp_path / "s" / ".checkpoint-x.part").write_text("of a run that was killed while it wrote")
    monkeypatch.setattr(store, "save_file", real)
    started, goes_on = [], collect.Collection._resume

    def resumes(self):
        goes_on(self)
        started.append(self.place.windows)

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
        self.place.counts[0] += 7  # as if another rank's file were of another run

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
    recipe = store.Recipe(tiny_llama.fingerprint, {"name": "c"}, 100, 64, True, 0)
    files = resume.Checkpoints(tmp_path, [1], recipe, Ranks())
    place, seen, moments = (
        resume.Place(3, [5], [9, 9]),
        sums.Seen.nothing([1]),
        {(0, 1): SecondMoment(8)},
    )
    with monkeypatch.context() as other:
        other.setattr(Ranks, "gather", lambda self, item: [item, False])
        files.save(place, seen, moments)
    assert not list(tmp_path.glob("checkpoint*"))
    files.save(place, seen, moments)
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
    recipe = store.Recipe(tiny_llama.fingerprint, {"name": "c"}, 100, 64, True, 0)
    files = resume.Checkpoints(tmp_path, [1], recipe, Ranks())
    assert files.save(
        resume.Place(3, [5], [9, 9]), sums.Seen.nothing([1]), {(0, 1): SecondMoment(8)}
    )
    mine = files._file(3, 1, 2)
    files._file(3, 0, 1).rename(mine)
    assert files.load() is None and "not those of all 2 ranks" in caplog.text
    assert not mine.exists() and mine.with_name(mine.name + ".incomplete").exists()
    files.drop()
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_checkpoint_is_written_once_and_outlives_a_full_disk(
    tiny_llama, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "SIZE", 200)
    real, writes = store.save_file, []

    def counted(tensors, path, **named):
        writes.append(path)
        real(tensors, path, **named)

    def breaks(self, number, texts, made=windows.Reader._tokenised):
        if number == 4:
            raise CorpusError("the hub cannot be reached")
        return made(self, number, texts)

    monkeypatch.setattr(store, "save_file", counted)
    monkeypatch.setattr(windows.Reader, "_tokenised", breaks)
    for _ in range(3):  # the second and third time there is nothing new to write
        with pytest.raises(CorpusError, match="cannot be reached"):
            key_statistics(tiny_llama, [1], corpus, 1500, directory=tmp_path / "s")
        assert len(writes) == 1 and len(list((tmp_path / "s").glob("checkpoint*"))) == 1


def test_sums_that_do_not_fit_are_told_with_their_size(tiny_llama, monkeypatch):
    def none_left(self, half, layer, device=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sums.Sums, "moment", none_left)
    with pytest.raises(
        StatisticsError, match=r"sums of 2 layers take 0\.0 GB.*fewer layers.*--no-halves"
    ):
        sums.Sums(tiny_llama, [1, 2], "exact")
    with pytest.raises(StatisticsError, match=r"fewer layers at a time$"):
        sums.Sums(tiny_llama, [1, 2], "exact", halves=1)


def test_no_memory_for_an_estimate_costs_the_estimate_alone(
    tiny_llama, corpus, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(windows, "SIZE", 200)
    monkeypatch.setattr(looks, "spare", lambda device: 0)
    found = key_statistics(tiny_llama, [1], corpus, 1500, directory=tmp_path / "s")
    assert (
        found[1].count == 1500
        and not found[1].extra["convergence"]
        and "too little memory" in caplog.text
    )


def test_two_runs_do_not_share_a_folder(tiny_llama, corpus, tmp_path):
    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s" / "lock"), pytest.raises(StatisticsError, match="another run"):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")


def test_an_edited_model_is_refused(tiny_llama, corpus, tmp_path):
    from tests.knowedit.edits.test_edit import an_edit

    with an_edit(tiny_llama).applied_to(tiny_llama), pytest.raises(StatisticsError, match="undo"):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")


def test_sinks_are_found(smollm, tmp_path):
    """Layer 11 of SmolLM2 is known to carry the attention sink, layer 5 not."""
    facts = tmp_path / "facts.txt"
    facts.write_text(
        "\n\n".join(
            f"{fact.text} {fact.true}. {'. '.join(fact.paraphrases)}" for fact in load("embedded")
        )
    )
    found = key_statistics(smollm, [5, 11], facts, 2000, directory=tmp_path / "s", progress=False)
    assert found.is_sink(11) and not found.is_sink(5)
    assert found.sink_ratio(11) > 100


def test_an_interrupted_run_ends_with_the_same_bits(tiny_llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 200)
    whole = key_statistics(tiny_llama, [1, 2], corpus, 1500, directory=tmp_path / "whole")
    real, calls = collect.Collection._round, []

    def dies(self, *arguments):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        real(self, *arguments)

    monkeypatch.setattr(collect.Collection, "_round", dies)
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


def test_a_checkpoint_nobody_can_go_on_from_is_deleted(tiny_llama, corpus, tmp_path, monkeypatch):
    """Once one of its layers has been collected, a run for all of them starts with the others."""
    monkeypatch.setattr(windows, "SIZE", 200)
    real = collect.Collection._round

    def dies(self, *arguments):
        if self.place.windows == 3:
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as cut:
        cut.setattr(collect.Collection, "_round", dies)
        for layers in ([1, 2], [3]):
            with pytest.raises(KeyboardInterrupt):
                key_statistics(
                    tiny_llama, layers, corpus, 1500, directory=tmp_path / "s", checkpoint_every=0
                )
    left = {path.name.split(".")[0] for path in (tmp_path / "s").glob("checkpoint*")}
    key_statistics(tiny_llama, [1], corpus, 1500, directory=tmp_path / "s")
    kept = {path.name.split(".")[0] for path in (tmp_path / "s").glob("checkpoint*")}
    assert len(left) == 2 and len(kept) == 1 and kept < left


PROGRAM = """
import sys, torch
from knowedit.statistics import key_statistics, windows
from knowedit.model import load_model
windows.SIZE = 200
model = load_model(sys.argv[1])
found = key_statistics(model, [1, 2], sys.argv[2], 2500, directory=sys.argv[3], checkpoint_every=0)
print(float(found[2].total.sum()))
"""


def test_kill_at_random_moments_loses_nothing(tiny_llama, corpus, tmp_path):
    """Real processes, really killed; the survivor of several kills has the bits of an undisturbed
    run.
    """
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(PROGRAM)

    def start(folder):
        command = [
            sys.executable,
            str(tmp_path / "run.py"),
            str(tmp_path / "model"),
            str(corpus),
            str(folder),
        ]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

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


def test_pack_and_unpack():
    matrix = torch.randn(7, 7, dtype=torch.float64)
    matrix = matrix + matrix.T
    assert torch.equal(store.unpack_lower(store.pack_lower(matrix)), matrix)


def test_key_statistics_is_a_plain_container():
    with pytest.raises(StatisticsError, match=r"only of \[\]"):
        KeyStatistics({})[3]
