"""Unit: a model's samples are kept, and only its own."""

from __future__ import annotations

import itertools

import pytest
import torch

from knowedit.io.files import cache_dir
from knowedit.models import generation


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """An empty cache, and the blocks that were sampled for want of kept ones."""
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    blocks = []
    plain = generation.samples

    def counted(model, seed, start, **sizes):
        blocks.append((seed, start))
        return plain(model, seed, start, **sizes)

    monkeypatch.setattr(generation, "samples", counted)
    return blocks


def texts(model, count=6, **given):
    return list(itertools.islice(model.samples(**given, batch=4, length=8), count))


def kept():
    return sorted(cache_dir("samples").rglob("*.json.gz"))


def test_samples_are_drawn_once(tiny_llama, drawn):
    wanted = list(itertools.islice(generation.samples(tiny_llama, 3, 0, batch=4, length=8), 8))
    drawn.clear()
    assert texts(tiny_llama, seed=3) == wanted[:6] and drawn == [(3, 0), (3, 4)]
    assert texts(tiny_llama, seed=3) == wanted[:6]
    assert texts(tiny_llama, 5, seed=3, start=3) == wanted[3:8] and len(drawn) == 2
    assert texts(tiny_llama, seed=4) != wanted[:6] and len(drawn) == 4


def test_a_damaged_block_is_drawn_again(tiny_llama, drawn):
    wanted = texts(tiny_llama, 4)
    (file,) = kept()
    content = bytearray(file.read_bytes())
    content[-12] ^= 1
    file.write_bytes(content)
    assert texts(tiny_llama, 4) == wanted and len(drawn) == 2
    file.write_bytes(b"")
    assert texts(tiny_llama, 4) == wanted and len(drawn) == 3
    assert texts(tiny_llama, 4) == wanted and len(drawn) == 3


def test_an_edited_or_changed_model_has_other_samples(tiny_llama, drawn):
    model = tiny_llama
    texts(model, 4)
    name = model.layout.weight_name(1)
    left, right = torch.ones(model.hidden, 1), torch.ones(model.d_ff, 1)
    model.ledger.add(name, left, right, "an edit")
    edited = texts(model, 4)
    assert len(kept()) == 1 and len(drawn) == 2  # not kept, and none of the plain model's
    model.ledger.remove("an edit")
    assert texts(model, 4) != edited and len(drawn) == 2
    with torch.no_grad():
        model.weight(1).mul_(3)
    texts(model, 4)
    assert len(kept()) == 2 and len(drawn) == 3


def test_a_full_disk_costs_only_the_samples(tiny_llama, drawn, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("knowedit.models.samples.atomic_file", full)
    assert texts(tiny_llama, 4) == texts(tiny_llama, 4) and len(drawn) == 2 and not kept()
    assert "No space left" in caplog.text


def test_sampling_says_after_every_token_how_far_it_is(tiny_llama, drawn):
    told = []
    texts(tiny_llama, 8, within=lambda share, block: told.append((share, block)))
    assert {block for _, block in told} == {32} and len(told) <= 2 * 7
    shares = [share for share, _ in told]
    assert shares[0] == 0.0 and max(shares) < 1.0 and shares.count(0.0) == 2
    told.clear()
    texts(tiny_llama, 8, within=lambda share, block: told.append((share, block)))
    assert not told  # they are kept
