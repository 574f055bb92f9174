"""The hosts' probability tests and generation, accelerated against plain (unit)."""

from __future__ import annotations

import pytest
import torch

from knowedit.integrations import accelerated
from knowedit.integrations.replacements.evaluation import holding, logits_at

PREFIXES = ["Ada lives in", "The capital of Peru is", "b"]


def test_two_answers_to_each_prompt(standin, tiny, monkeypatch):
    given = tiny.hf, tiny.tokenizer, PREFIXES, [0, 1, 0], "Rome", "Oslo town"
    plain = standin.evaluation.test_batch_prediction(*given)
    with accelerated("standin"):
        fast = standin.evaluation.test_batch_prediction(*given)
    assert fast[1] == plain[1]
    for one, other in zip(fast[0], plain[0]):
        assert one == pytest.approx(other, abs=1e-5)


def test_what_a_row_begins_with_is_read_from_it(tiny, monkeypatch):
    rows = [[5, 6, 7, 8, 1], [5, 6, 7, 2], [5, 6, 7, 8, 9, 3], [4, 4], [5, 6, 7, 3]]
    places = [[2, 3], [2], [4, 1], [0], [2]]
    texts = [tuple(row[: max(where) + 1]) for row, where in zip(rows, places)]
    assert {text: sorted(read) for text, read in holding(texts).items()} == {
        (5, 6, 7, 8, 9): [0, 1, 2, 4],
        (4,): [3],
    }
    run, plain = [], tiny.final_states
    monkeypatch.setattr(tiny, "final_states", lambda ids: run.append(ids.shape) or plain(ids))
    found = logits_at(tiny, rows, places)
    assert run == [(2, 5)]
    for row, where, seen in zip(rows, places, found):
        wanted = tiny.hf(input_ids=torch.tensor([row])).logits[0, where]
        assert torch.allclose(seen, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("locality", [False, True])
def test_the_tokens_that_win(standin, tiny_llama, locality):
    given = tiny_llama.hf, tiny_llama.tokenizer, None, PREFIXES, ["Rome", "Oslo", "x y"], "cpu"
    plain = standin.evaluation.test_prediction_acc(*given, locality=locality)
    with accelerated("standin"):
        fast = standin.evaluation.test_prediction_acc(*given, locality=locality)
    assert fast == plain


def test_absolute_positions_with_padding_are_the_hosts_own(standin, tiny_gpt2, caplog):
    given = tiny_gpt2.hf, tiny_gpt2.tokenizer, None, PREFIXES, ["Rome", "Oslo", "x y"], "cpu"
    with accelerated("standin"):
        standin.evaluation.test_prediction_acc(*given)
    assert "padded on the left of absolute positions" in caplog.text


def test_generation_is_corrected_on_demand(standin, tiny):
    given = tiny.hf, tiny.tokenizer, ["Ada", "Bob Ray", "Eve"]
    with accelerated("standin"):
        assert standin.evaluation.generate_fast(*given) == ["wrong"] * 3
    with accelerated("standin", fix="generation"):
        texts = standin.evaluation.generate_fast(*given, top_k=1, max_out_len=12)
    for prompt, text in zip(given[2], texts):
        ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
        while ids.shape[1] < 12:
            best = tiny.hf(input_ids=ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], 1)
        assert text.replace("�", "") == tiny.tokenizer.decode(ids[0]).replace("�", "")
