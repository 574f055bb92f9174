"""Second moments of token lists in memory (unit)."""

from __future__ import annotations

import pytest
import torch

from knowedit import second_moments
from knowedit.errors import ModelError, StatisticsError
from knowedit.statistics import moments

TEXTS = [[3, 4, 5], [7], list(range(20)), [9, 9, 9, 9], list(range(100, 60, -1))]


def by_hand(model, layer, texts, skip=0):
    """Sum in float64 of every text run alone, and how many keys."""
    total, count = torch.zeros(1), 0
    seen = []
    handle = model.projection(layer).register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    for ids in texts:
        model.hf(input_ids=torch.tensor([ids]))
        keys = seen.pop()[0, skip:].detach().double()
        total, count = total + keys.T @ keys, count + len(keys)
    handle.remove()
    return total, count


@pytest.mark.parametrize("skip_first", [False, True])
def test_every_token_counts_once(tiny_llama, skip_first):
    found = second_moments(tiny_llama, [2, 0], TEXTS, skip_first=skip_first)
    assert list(found) == [2, 0]
    for layer, moment in found.items():
        total, count = by_hand(tiny_llama, layer, TEXTS, skip_first)
        assert moment.count == count
        assert float((moment.sum() - total).norm() / total.norm()) < 1e-6


def test_lists_may_come_in_groups_and_from_a_generator(tiny_llama, monkeypatch):
    plain = second_moments(tiny_llama, [1], TEXTS)[1]
    monkeypatch.setattr(moments, "GROUP", 10)
    grouped = second_moments(tiny_llama, [1], (part for part in (TEXTS[:2], [], TEXTS[2:])))[1]
    assert grouped.count == plain.count
    torch.testing.assert_close(grouped.sum(), plain.sum(), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_summed_is_refused(tiny_llama):
    with pytest.raises(StatisticsError, match="no token to count"):
        second_moments(tiny_llama, [1], [[], []])
    with pytest.raises(StatisticsError, match="300 tokens, more than the model's context of 256"):
        second_moments(tiny_llama, [1], [[1] * 300])
    with pytest.raises(ModelError, match="layer 9"):
        second_moments(tiny_llama, [9], TEXTS)
