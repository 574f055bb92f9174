"""Files put in the place of others, as a copy of a folder or a hand's mistake does it: another
model's, another layer's, another dtype's, another entry of a cache. They are refused where they
were named, and made again where they were only kept (unit).
"""

import itertools
import shutil

import pytest
import torch

from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.journal import ABOUT
from knowedit.errors import EditError, StatisticsError
from knowedit.facts.wordings.paraphrase import Endpoint, ParaphraseError, paraphrases
from knowedit.io.files import cache_dir
from knowedit.methods.learned.mend.network import MendNetwork
from knowedit.methods.session import Session
from knowedit.models import calibration, generation, selfcheck
from knowedit.models.editable import EditableModel
from knowedit.statistics import key_statistics
from knowedit.statistics.corpus import windows
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.corpus.windows import Reader, prefetch, token_cache
from tests.faults.test_damaged import V1
from tests.knowedit.edits.test_edit import an_edit
from tests.knowedit.models.tiny import build, plant


@pytest.fixture
def cache(own_cache, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(own_cache))
    return own_cache


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Text {i}: " + "one more word " * (i % 9 + 1) for i in range(200)))
    return path


def swap(one, other):
    """Two files or folders in each other's place."""
    aside = one.with_name("aside")
    for source, target in ((one, aside), (other, one), (aside, other)):
        source.rename(target)


def other_of(model):
    """The same architecture with other weights."""
    torch.manual_seed(1)
    hf = type(model.hf)(model.hf.config).eval().requires_grad_(False)
    return EditableModel(hf, model.tokenizer, name="other")


def collected(model, corpus, where, layers=(1, 2)):
    return key_statistics(model, list(layers), corpus, tokens=400, directory=where)


def test_statistics_of_another_layer(tiny_llama, corpus, tmp_path):
    collected(tiny_llama, corpus, tmp_path / "s")
    swap(tmp_path / "s" / "layer-001.safetensors", tmp_path / "s" / "layer-002.safetensors")
    with pytest.raises(StatisticsError, match=r"layer-001\.safetensors holds the statistics of la"):
        collected(tiny_llama, corpus, tmp_path / "s")


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_statistics_of_another_model(tiny_llama, corpus, tmp_path, change):
    other = other_of(tiny_llama)
    if change == "dtype":
        other = EditableModel(build("llama").bfloat16(), tiny_llama.tokenizer, name="other")
    collected(tiny_llama, corpus, tmp_path / "s")
    collected(other, corpus, tmp_path / "o")
    swap(tmp_path / "s" / "layer-001.safetensors", tmp_path / "o" / "layer-001.safetensors")
    with pytest.raises(StatisticsError, match="holds other statistics .fingerprint"):
        collected(tiny_llama, corpus, tmp_path / "s")


def test_edits_histories_sessions_and_networks_of_another_model(tiny_llama, tmp_path):
    other = other_of(tiny_llama)
    edit = an_edit(other)
    path = edit.save(tmp_path / "a.edit")
    history = History(other.fingerprint, [edit]).save(tmp_path / "h")
    for use in (
        lambda: Edit.load(path).apply(tiny_llama),
        lambda: History.load(history).replay(tiny_llama),
        lambda: MendNetwork.load(V1 / "mend-network-llama.safetensors", tiny_llama),
    ):
        with pytest.raises(EditError, match=r"fingerprint .*, (but|not)|is of model|of a model"):
            use()
    assert not tiny_llama.ledger.active


def test_a_session_with_another_ones_file(tiny_llama, tmp_path):
    from knowedit.methods.registry import make_method

    method = make_method({**make_method("ft").to_dict(), "layers": [1], "steps": 1})
    for model, folder in ((tiny_llama, "one"), (other_of(tiny_llama), "other")):
        with Session.open(tmp_path / folder, model, method) as session:
            session.write([an_edit(model).facts[0]], force=True, progress=False)
    for name in ("000001.safetensors", ABOUT):
        swap(tmp_path / "one" / name, tmp_path / "other" / name)
        with pytest.raises(EditError, match=r"000001\.safetensors is not the next|belongs to a mo"):
            Session.open(tmp_path / "one", tiny_llama)
        swap(tmp_path / "one" / name, tmp_path / "other" / name)
        assert not tiny_llama.ledger.active


# -- what is only kept ----------------------------------------------------------------------------


def test_samples(tiny_llama, cache, monkeypatch):
    def texts(seed):
        return list(itertools.islice(tiny_llama.samples(seed=seed, batch=4, length=8), 4))

    wanted = texts(0)
    assert texts(1) != wanted
    swap(*sorted(cache_dir("samples").rglob("*.json.gz")))
    assert texts(0) == wanted
    monkeypatch.setattr(generation, "samples", None)  # kept again
    assert texts(0) == wanted


def test_tokens(tiny_llama, corpus, cache, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 1000)

    def read():
        reader = Reader(Corpus.parse(corpus), 0, tiny_llama.tokenizer, 50, True)
        reader.cache = token_cache(tiny_llama, reader)
        with prefetch(reader, 0, (), worker=False) as found:
            return reader, list(itertools.islice(found, 6))

    reader, wanted = read()
    swap(reader._file(1), reader._file(2))
    assert read()[1] == wanted


def test_sinks(tiny_llama, cache, monkeypatch):
    monkeypatch.setattr(calibration, "SMALL", 0)
    planted = other_of(tiny_llama)
    plant(planted, 2, 0)
    found = {}
    for _ in range(2):
        monkeypatch.setattr(calibration, "_SINKS", {})
        for model in (tiny_llama, planted):
            sinks = calibration.sinks_of(model).layers
            assert sinks == found.setdefault(model.name, sinks)
        swap(*sorted((cache / calibration.Sinks.kind).iterdir()))
    assert found["tiny-llama"] == () and found["other"]


def test_checkups(byte_tokenizer, cache, monkeypatch):
    monkeypatch.setattr(selfcheck, "SMALL", 0)
    monkeypatch.setattr(selfcheck, "_REMEMBERED", {})  # or an earlier test's is not written again
    names = ("granite", "gpt2")
    found = {name: EditableModel(build(name), byte_tokenizer).checkup for name in names}
    swap(*sorted((cache / "checkups").iterdir()))
    monkeypatch.setattr(selfcheck, "_REMEMBERED", {})
    for name in names:
        assert EditableModel(build(name), byte_tokenizer).checkup == found[name]


def test_paraphrases(cache, monkeypatch):
    server = Endpoint("http://127.0.0.1:9/v1", "m", retries=0, timeout=1)
    answers = ['["Two and two make", "The sum of two and two is"]',
               '["Three and one make", "The sum of three and one is"]']  # fmt: skip
    for prompt, answer in zip(("2 + 2 =", "3 + 1 ="), answers):
        monkeypatch.setattr(Endpoint, "ask", lambda *_, answer=answer: answer)
        assert len(paraphrases(prompt, 2, server)) == 2
    monkeypatch.undo()
    monkeypatch.setenv("KNOWEDIT_CACHE", str(cache))
    swap(*sorted((cache / "paraphrases").iterdir()))
    with pytest.raises(ParaphraseError):  # asked again
        paraphrases("2 + 2 =", 2, server)


def test_a_folders_undo_record_of_another_folder(tiny_llama, tmp_path):
    from knowedit.edits.export.folder import RECORD, restore, save_edited

    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    one = save_edited(tiny_llama, [an_edit(tiny_llama)], tmp_path / "one")
    other = save_edited(tiny_llama, [an_edit(tiny_llama, seed=5)], tmp_path / "other")
    before = (one / "model.safetensors").read_bytes()
    shutil.copy(other / RECORD, one / RECORD)
    with pytest.raises(EditError, match="changed since the edit was written"):
        restore(one)
    assert (one / "model.safetensors").read_bytes() == before
