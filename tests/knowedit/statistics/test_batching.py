"""Batches: every token once, hardly any padding, the same keys packed or not, and less memory than
there is.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowedit.errors import StatisticsError
from knowedit.statistics import key_statistics, memory, onednn, sums
from knowedit.statistics.corpus.batching import MAX_PADDING, Piece, batches, trim

LENGTHS = st.lists(st.integers(2, 700), min_size=1, max_size=60)


def made(lengths):
    return [Piece([100 * i + j for j in range(n)], 1) for i, n in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 3000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_token_once_and_hardly_any_padding(lengths, budget, packed):
    pieces = made(lengths)
    found = list(batches(pieces, budget, packed=packed))
    assert sorted(p.ids[0] for batch in found for p in batch.pieces) == [p.ids[0] for p in pieces]
    for batch in found:
        assert batch.ids.numel() <= budget or len(batch.pieces) == 1
        assert batch.ids.numel() - batch.tokens <= MAX_PADDING * batch.ids.numel()
        assert batch.tokens == sum(len(p.ids) for p in batch.pieces)
        assert int(batch.keep.sum()) == sum(p.count for p in batch.pieces) and int(
            batch.first.sum()
        ) == len(batch.pieces)
        assert batch.positions is not None or not any(len(row) > 1 for row in batch.rows)
        for row, column in batch.first.nonzero().tolist():
            piece = batch.piece_at(row, column)
            assert batch.ids[row, column : column + len(piece.ids)].tolist() == piece.ids
            if batch.positions is not None:
                assert batch.positions[row, column : column + len(piece.ids)].tolist() == list(
                    range(len(piece.ids))
                )


@given(LENGTHS, st.integers(0, 5000), st.integers(0, 1))
@settings(max_examples=100, deadline=None)
def test_trimming_keeps_exactly_the_first_tokens(lengths, count, skip):
    pieces = [Piece(p.ids, skip) for p in made(lengths)]
    kept = trim(pieces, count)
    assert sum(p.count for p in kept) == min(count, sum(p.count for p in pieces))
    assert all(a.ids == b.ids[: len(a.ids)] for a, b in zip(kept, pieces))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Text {i} " + "and so on " * (i * i % 17) for i in range(80)))
    return path


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


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


def test_a_model_that_mixes_packed_texts_is_not_packed(
    tiny_llama, corpus, tmp_path, monkeypatch, caplog
):
    real = tiny_llama.forward_to
    monkeypatch.setattr(
        tiny_llama, "forward_to", lambda *a, positions=None, **k: real(*a, **k)
    )  # one long text
    found = key_statistics(tiny_llama, [1], corpus, 2000, directory=tmp_path / "s", packed=True)
    assert found[1].extra["batches"] == "by length" and "does not keep them apart" in caplog.text

    def refuses(*_, positions=None, **__):
        raise TypeError("got an unexpected keyword argument 'position_ids'")

    monkeypatch.setattr(tiny_llama, "forward_to", refuses)
    assert not memory.packs(tiny_llama, 1)


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
    real, sizes = tiny_llama.forward_to, []

    def small(layer, ids, on_key, *more, **named):
        sizes.append(ids.numel())
        if ids.numel() > 300:
            real(1, ids, lambda *_: None)  # layer 1's keys were made before memory ran out
            raise error
        real(layer, ids, on_key, *more, **named)

    monkeypatch.setattr(tiny_llama, "forward_to", small)
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

    monkeypatch.setattr(tiny_llama, "forward_to", none)
    with pytest.raises(
        StatisticsError, match="tokens alone does not fit into memory.*smaller max_length"
    ):
        key_statistics(tiny_llama, [1], corpus, 500, directory=tmp_path / "s")

    def broken(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(tiny_llama, "forward_to", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        key_statistics(tiny_llama, [1], corpus, 500, directory=tmp_path / "t")


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)  # a petabyte, really refused
    assert memory.is_out_of_memory(caught.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("x")) and not memory.is_out_of_memory(
        RuntimeError("shape")
    )


def test_the_budget_follows_free_memory(tiny_llama, monkeypatch):
    assert memory.token_budget(tiny_llama, [1]) == memory.ON_A_CPU

    class Weight:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(tiny_llama, "weight", lambda _: Weight)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (1 << 30, 1 << 31))
    monkeypatch.setattr(type(tiny_llama), "dtype", torch.float32)
    a_token = 4 * ((2 + 3) * 48 + 12 * 32)
    assert (
        memory.token_budget(tiny_llama, [1, 2])
        == ((1 << 30) - 2 * memory.WAITING * 48 * 4) // 2 // a_token
    )


@pytest.fixture
def fast(monkeypatch):
    """oneDNN, whatever the CPU; and how often it is called."""
    calls = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(onednn, "_helps", lambda: True)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *given: calls.append(1) or real(*given)
    )
    return calls


@pytest.mark.parametrize("shape", [(3, 5, 48), (7, 48), (1, 1, 48), (0, 48), (48,)])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_linear_layers_are_linear_layers(fast, shape, bias):
    layer, x = torch.nn.Linear(48, 33, bias=bias).requires_grad_(False), torch.randn(shape)
    wanted = layer.double()(x.double())
    with onednn.fast_linear():
        found = layer.float()(x)
    assert found.shape == wanted.shape and found.dtype == torch.float32 and len(fast) == 1
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    layer(x)
    assert len(fast) == 1  # only inside


def test_other_linear_layers_are_left_alone(fast):
    with onednn.fast_linear():
        for dtype in (torch.bfloat16, torch.float64):
            assert torch.nn.Linear(4, 3, dtype=dtype)(torch.ones(2, 4, dtype=dtype)).dtype == dtype
        assert torch.nn.functional.linear(torch.ones(2, 4), weight=torch.ones(3, 4)).sum() == 24
        with pytest.raises(RuntimeError):
            torch.nn.functional.linear(torch.ones(2, 4), torch.ones(3, 5, dtype=torch.float64))
    assert not fast


@pytest.mark.parametrize(
    "cpu, capability, helps",
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
    ],
)
def test_who_is_helped(monkeypatch, cpu, capability, helps):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(onednn.Path, "read_text", lambda *_, **__: f"vendor_id : {cpu}")
    assert onednn._helps.__wrapped__() is helps
