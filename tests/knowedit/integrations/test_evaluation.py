"""The hosts' probability tests and generation, accelerated against plain (integration)."""

from __future__ import annotations

import pytest
import torch

from knowedit.integrations import accelerated

PREFIXES = ["Ada lives in", "The capital of Peru is", "b"]


def test_two_answers_to_each_prompt(standin, tiny, monkeypatch):
    given = tiny.hf, tiny.tokenizer, PREFIXES, [0, 1, 0], "Rome", "Oslo town"
    plain = standin.evaluation.test_batch_prediction(*given)
    with accelerated("standin"):
        fast = standin.evaluation.test_batch_prediction(*given)
    assert fast[1] == plain[1]
    for one, other in zip(fast[0], plain[0]):
        assert one == pytest.approx(other, abs=1e-5)


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
