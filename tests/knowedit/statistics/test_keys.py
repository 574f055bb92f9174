"""Key statistics as users call for them: the cache, what is refused, what identifies them
(unit).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from knowedit.errors import CorpusError, ModelError, StatisticsError
from knowedit.statistics import (
    KeyStatistics,
    collect,
    key_statistics,
    keys,
)
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.files import store
from tests.knowedit.statistics.helpers import naive


def test_the_second_call_reads_the_files(tiny_llama, corpus, tmp_path, monkeypatch):
    first = key_statistics(tiny_llama, [0, 1], corpus, 200, directory=tmp_path / "s")
    monkeypatch.setattr(keys, "Collection", None)  # would raise if anything were collected
    again = key_statistics(tiny_llama, [1], corpus, 200, directory=tmp_path / "s")
    assert torch.equal(again[1].total, first[1].total) and again[1].recipe == first[1].recipe


def test_the_cache_is_keyed_by_the_weights(tiny_llama, corpus, own_cache, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(own_cache))
    key_statistics(tiny_llama, [1], corpus, 50)
    tiny_llama.weight(0).data[0, 0] += 1
    key_statistics(tiny_llama, [1], corpus, 50)
    assert len(list(own_cache.rglob("layer-001.safetensors"))) == 2


def test_without_wikipedia_the_statistics_at_hand_are_used_and_named(
    tiny_llama, corpus, own_cache, monkeypatch, caplog
):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setenv("KNOWEDIT_CACHE", str(own_cache))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(CorpusError, match="no route"):
        keys.layer_statistics([1], tiny_llama, None, None)
    key_statistics(tiny_llama, [1], corpus, 50)
    key_statistics(tiny_llama, [1, 2], corpus, 200)
    damaged = key_statistics(tiny_llama, [1], corpus, 300)[1].recipe
    file = store.layer_file(store.folder(tiny_llama.name, damaged), 1)
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # its header is sound
    found = keys.layer_statistics([1], tiny_llama, None, None)
    assert found.layers == [1] and found[1].count == 200
    assert "no route" in caplog.text and "200 tokens of corpus.txt" in caplog.text
    for asked in ((None, 100), ("wikipedia", None)):  # what was asked for, or an error
        with pytest.raises(CorpusError, match="no route"):
            keys.layer_statistics([1], tiny_llama, *asked)
    with pytest.raises(CorpusError, match="no route"):
        keys.layer_statistics([0], tiny_llama, None, None)


def test_pinned_statistics_stay_whatever_becomes_of_the_text(
    tiny_llama, corpus, own_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(own_cache))
    text = tmp_path / "own.txt"
    text.write_text(Path(corpus).read_text())
    pinned = keys.layer_statistics([1], tiny_llama, text, 200).identity
    key_statistics(tiny_llama, [1, 2], corpus, 400)  # larger, at hand too
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", None)  # would raise
    for named in (None, text):
        found = keys.layer_statistics([1], tiny_llama, named, 200, pinned=pinned)
        assert found.identity == pinned
    text.write_text(Path(corpus).read_text()[:-10])
    found = keys.layer_statistics([1], tiny_llama, text, 200, pinned=pinned)
    assert found.identity == pinned
    shutil.rmtree(own_cache / "statistics")
    gone = r"pinned \(200 tokens of own.txt\) are not in the cache any more"
    with pytest.raises(StatisticsError, match=gone):
        keys.layer_statistics([1], tiny_llama, None, None, pinned=pinned)
    with pytest.raises(StatisticsError, match="are now 200 tokens of own.txt, and not those that"):
        keys.layer_statistics([1], tiny_llama, text, 200, pinned=pinned)
    text.write_text(Path(corpus).read_text())
    again = keys.layer_statistics([1], tiny_llama, text, 200, pinned=pinned)
    assert again.identity == pinned
    file = store.layer_file(store.folder(tiny_llama.name, again[1].recipe), 1)
    others = replace(again[1], total=2 * again[1].total)
    others.save(file)  # of the same text, it says, and yet not the same sums
    with pytest.raises(StatisticsError, match="not in the cache any more"):
        keys.layer_statistics([1], tiny_llama, None, None, pinned=pinned)


def test_another_models_statistics_are_refused(tiny_llama, tiny_gpt2, corpus, tmp_path):
    found = key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    with pytest.raises(StatisticsError, match="are of tiny-llama.*not of tiny-gpt2"):
        found.check(tiny_gpt2, [1])
    with pytest.raises(StatisticsError, match="holds other statistics .*fingerprint"):
        key_statistics(tiny_gpt2, [1], corpus, 100, directory=tmp_path / "s")


def test_its_repr_says_what_it_is_of(tiny_llama, corpus, tmp_path):
    found = key_statistics(tiny_llama, [1, 2], corpus, 500, directory=tmp_path / "s")
    said = "KeyStatistics(layers 1, 2 of tiny-llama, 500 tokens of corpus.txt, 64 keys a layer)"
    assert repr(found) == said.replace("64", str(tiny_llama.d_ff)).replace(
        "tiny-llama", tiny_llama.name
    )
    assert repr(KeyStatistics({})) == "KeyStatistics(no layers)"


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


def test_a_moment_of_zeros_is_refused_by_every_way_to_it(tiny_llama, corpus, tmp_path):
    found = key_statistics(tiny_llama, [1], corpus, 200, directory=tmp_path / "s")
    found[1].total.zero_()
    for ask in (found.moment, found.metric, lambda layer: found.null_space(layer, None, 0.1)):
        with pytest.raises(StatisticsError, match="layer 1: the second moment is all zeros.*again"):
            ask(1)


def test_a_truncated_file_is_refused(tiny_llama, corpus, tmp_path):
    key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")
    path = store.layer_file(tmp_path / "s", 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        StatisticsError, match=r"layer-001\.safetensors is truncated or damaged.*delete it"
    ):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "cache"])
def test_what_a_short_corpus_had_is_kept(
    tiny_llama, corpus, tmp_path, monkeypatch, own_cache, folder
):
    where = {"directory": tmp_path / "s"} if folder else {}
    _, count = naive(tiny_llama, corpus, 1, 512)
    with pytest.raises(
        StatisticsError,
        match=f"only {count} tokens .* 10000000 were asked for.* kept: ask for {count}",
    ):
        key_statistics(tiny_llama, [1], corpus, 10**7, **where)
    monkeypatch.setattr(collect.Collection, "run", None)  # nothing is run any more
    found = key_statistics(tiny_llama, [1], corpus, count, **where)
    assert found[1].count == found[1].recipe.tokens == count


def test_two_runs_do_not_share_a_folder(tiny_llama, corpus, tmp_path):
    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s" / "lock"), pytest.raises(StatisticsError, match="another run"):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")


def test_an_edited_model_is_refused(tiny_llama, corpus, tmp_path):
    from tests.knowedit.edits.test_edit import an_edit

    with an_edit(tiny_llama).applied_to(tiny_llama), pytest.raises(StatisticsError, match="undo"):
        key_statistics(tiny_llama, [1], corpus, 100, directory=tmp_path / "s")


def test_key_statistics_is_a_plain_container():
    with pytest.raises(StatisticsError, match=r"only of \[\]"):
        KeyStatistics({})[3]


def test_the_identity_is_that_of_the_sums(tiny_llama, corpus, tmp_path):
    """The same in memory and read from the files, JSON, and another one for other sums."""
    found = key_statistics(tiny_llama, [1, 2], corpus, 300, directory=tmp_path / "s")
    identity = found.identity
    assert KeyStatistics.load(tmp_path / "s").identity == json.loads(json.dumps(identity))
    assert list(identity) == ["1", "2"] and identity["1"] == {
        "fingerprint": tiny_llama.fingerprint,
        "corpus": Corpus.parse(corpus).identity,
        "tokens": 300,
        "digest": found[1].digest,
    }
    changed = found[1].total.clone()
    changed[5, 3] = changed[3, 5] = changed[5, 3] * (1 + 2e-16)
    others = [found[2], replace(found[1], total=changed), replace(found[1], total=-found[1].total)]
    assert len({found[1].digest, *(other.digest for other in others)}) == 4
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert replace(found[1], total=zeros).digest == replace(found[1], total=-zeros).digest


def test_one_layer_may_be_given_as_a_number(tiny_llama, corpus, tmp_path):
    assert key_statistics(tiny_llama, 1, corpus, 100, directory=tmp_path / "s").layers == [1]


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"layers": "1,2"}, ModelError, "layers are whole numbers.*got '1'"),
        ({"tokens": "many"}, StatisticsError, "tokens must be a whole number, got 'many'"),
        ({"tokens": True}, StatisticsError, "tokens must be a whole number, got True"),
        ({"seed": "x"}, StatisticsError, "seed must be a whole number, got 'x'"),
        ({"layers": 1.5}, ModelError, "layers are whole numbers, such as .4, 5., got 1.5"),
        ({"corpus": ""}, CorpusError, "corpus must be a path, a name or a list of them, got ''"),
        ({"corpus": 5}, CorpusError, "corpus must be a path.*got 5"),
        ({"corpus": ["a text. " * 100]}, CorpusError, "not a file's name.*give its path"),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_type(tiny_llama, tmp_path, wrong, error, match):
    settings = {"layers": [1], "corpus": "self", "tokens": 100} | wrong
    with pytest.raises(error, match=match):
        key_statistics(tiny_llama, **settings, directory=tmp_path / "s")
