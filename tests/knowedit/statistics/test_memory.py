"""How many tokens fit, what running out of memory looks like, and which models take packed rows
(unit).
"""

import pytest
import torch

from knowedit.statistics import key_statistics, memory


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"Text {i} " + "and so on " * (i * i % 17) for i in range(80)))
    return path


def test_a_model_that_mixes_packed_texts_is_not_packed(
    tiny_llama, corpus, tmp_path, monkeypatch, caplog
):
    real = memory.read_keys
    monkeypatch.setattr(memory, "read_keys", lambda *a, positions=None: real(*a))  # one long text
    found = key_statistics(tiny_llama, [1], corpus, 2000, directory=tmp_path / "s", packed=True)
    assert found[1].extra["batches"] == "by length" and "does not keep them apart" in caplog.text

    def refuses(*_, positions=None, **__):
        raise TypeError("got an unexpected keyword argument 'position_ids'")

    monkeypatch.setattr(memory, "read_keys", refuses)
    assert not memory.packs(tiny_llama, 1)


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
