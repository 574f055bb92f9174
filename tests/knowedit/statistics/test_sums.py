"""Sums: the same keys packed or not, less memory than there is, linear layers through oneDNN
(unit).
"""

import copy

import pytest
import torch

from knowedit.errors import StatisticsError
from knowedit.models import editable
from knowedit.models.editable import EditableModel
from knowedit.statistics import key_statistics, sums
from knowedit.statistics.corpus.batching import MAX_PADDING


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Text {i} " + "and so on " * (i * i % 17) for i in range(80)))
    return path


def test_packed_rows_have_the_keys_of_single_texts(tiny, corpus, tmp_path):
    alone, packed = (
        key_statistics(
            tiny, [0, 2], corpus, 5000, directory=tmp_path / str(p), packed=p, max_length=64
        )
        for p in (False, True)
    )
    assert (alone[2].extra["batches"], packed[2].extra["batches"]) == ("by length", "packed")
    for layer in (0, 2):
        assert (packed[layer].total - alone[layer].total).norm() <= 1e-6 * alone[layer].total.norm()
        assert packed[layer].first_norm == pytest.approx(alone[layer].first_norm, rel=1e-6)
        assert packed[layer].extra["padding"] <= MAX_PADDING


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_batches_shrink_when_memory_runs_out(
    tiny_llama, corpus, tmp_path, monkeypatch, caplog, error, packed
):
    whole = key_statistics(
        tiny_llama, [1, 2], corpus, 5000, directory=tmp_path / "whole", packed=packed
    )
    real, sizes = sums.read_keys, []

    def small(model, ids, layers, on_key, positions):
        sizes.append(ids.numel())
        if ids.numel() > 300:
            real(model, ids, [1], lambda *_: None)  # those of layer 1 were made before it ran out
            raise error
        real(model, ids, layers, on_key, positions=positions)

    monkeypatch.setattr(sums, "read_keys", small)
    monkeypatch.setattr(sums, "packs", lambda *_: packed)
    found = key_statistics(
        tiny_llama, [1, 2], corpus, 5000, directory=tmp_path / "s", packed=packed, max_length=250
    )
    assert found[1].count == 5000 and "out of memory: batches of at most" in caplog.text
    assert max(sizes) > 300 and max(sizes[-5:]) <= 300
    for layer in (1, 2):
        assert (found[layer].total - whole[layer].total).norm() <= 1e-6 * whole[layer].total.norm()


def test_a_text_that_never_fits_and_other_errors(tiny_llama, corpus, tmp_path, monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sums, "read_keys", none)
    with pytest.raises(
        StatisticsError, match="tokens alone does not fit into memory.*smaller max_length"
    ):
        key_statistics(tiny_llama, [1], corpus, 500, directory=tmp_path / "s")

    def broken(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(sums, "read_keys", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        key_statistics(tiny_llama, [1], corpus, 500, directory=tmp_path / "t")


def test_sums_that_do_not_fit_are_refused_with_their_size(tiny_llama, monkeypatch):
    def none_left(self, half, layer, device=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sums.Sums, "moment", none_left)
    with pytest.raises(
        StatisticsError, match=r"sums of 2 layers take 0\.0 GB.*fewer layers.*--no-halves"
    ):
        sums.Sums(tiny_llama, [1, 2], "exact")
    with pytest.raises(StatisticsError, match=r"fewer layers at a time$"):
        sums.Sums(tiny_llama, [1, 2], "exact", halves=1)


def test_bfloat16_models_are_read_in_float32_where_a_cpu_has_no_units(
    tiny_llama, corpus, tmp_path, monkeypatch, caplog
):
    half = EditableModel(copy.deepcopy(tiny_llama.hf).bfloat16(), tiny_llama.tokenizer)
    wide = EditableModel(copy.deepcopy(half.hf).float(), tiny_llama.tokenizer)

    def total(model, name):
        return key_statistics(
            model, [1], corpus, 3000, directory=tmp_path / name, max_length=64, worker=False
        )[1].total

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert torch.equal(total(half, "widened"), total(wide, "wide"))
    assert [record.getMessage() for record in caplog.records if "no units" in record.getMessage()]
    assert half.dtype == torch.bfloat16
    monkeypatch.setattr(editable, "free_memory", lambda: 1.0)
    assert half.widened() is half and wide.widened() is wide
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(editable, "free_memory", lambda: 1e12)
    assert half.widened() is half
