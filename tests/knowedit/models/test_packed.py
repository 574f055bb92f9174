"""Linear layers on real tokens only: the same states and gradients, fewer tokens (unit)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from knowedit.models.packed import Packed, beginnings, packed
from knowedit.models.partial import PartialModel

LIVE = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_live_tokens_are_linear_layers_and_the_others_zero(dtype):
    states = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(6, 5, dtype=dtype), torch.randn(6, dtype=dtype)
    plain = F.linear(states, weight, bias) * LIVE[..., None]
    (wanted,) = torch.autograd.grad(plain.pow(2).sum(), states)
    with Packed(LIVE):
        found = F.linear(states, weight, bias)
        other = F.linear(states[:2], weight)  # of another shape: not these tokens
    (gradient,) = torch.autograd.grad(found.pow(2).sum(), states)
    assert torch.allclose(found, plain, atol=1e-6) and not found[~LIVE].any()
    assert torch.allclose(gradient, wanted, atol=1e-5)
    assert torch.allclose(other, F.linear(states[:2], weight))


def test_states_of_several_layers_are_gathered_once_until_they_change():
    states, weight = torch.randn(3, 4, 5), torch.randn(6, 5)
    with Packed(LIVE) as packing, torch.no_grad():
        F.linear(states, weight)
        first = packing._last[2]
        F.linear(states, 2 * weight)
        assert packing._last[2] is first
        states.mul_(3)
        found = F.linear(states, weight)
        assert torch.allclose(found, F.linear(states.clone(), weight))
        with torch.enable_grad():  # what was gathered without gradients has none
            leaf = states.requires_grad_()
            assert F.linear(leaf, weight).requires_grad
        packing.limit(LIVE & False)
        assert not F.linear(states, weight).any()


def test_bfloat16_is_left_alone():
    states, weight = torch.randn(3, 4, 5).bfloat16(), torch.randn(6, 5).bfloat16()
    with Packed(LIVE):
        assert torch.equal(F.linear(states, weight), F.linear(states, weight))
        assert F.linear(states, weight)[~LIVE].any()


def test_without_padding_nothing_is_packed():
    with packed(torch.ones(2, 3, dtype=torch.bool)) as found:
        assert found is None


class Counted(TorchFunctionMode):
    """How many tokens linear layers are given."""

    def __init__(self):
        super().__init__()
        self.tokens = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.tokens.add(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


def test_a_part_of_a_model_runs_no_padding(tiny_llama):
    """What linear layers are given: all tokens, above only those in front; then the tails."""
    texts = ["a much longer text about Bob or so", "b is c, they say", "Ada"]
    rows = [tiny_llama.row(text, text.split()[len(text) // 10]) for text in texts]
    length, start = sum(len(r.ids) for r in rows), sum(r.subject for r in rows)
    with Counted() as counted:
        part = PartialModel(tiny_llama, rows, 2)
    assert counted.tokens == {length, start}
    with Counted() as counted:
        part.run()
    assert counted.tokens == {length - start}
    with Counted() as counted:
        part.select(torch.tensor([1])).run()
    assert counted.tokens == {len(rows[1].ids) - rows[1].subject}


def test_tokens_behind_equal_beginnings_have_equal_numbers():
    found = beginnings([[5, 6, 7], [5, 6], [6, 7], [5, 6, 8, 5]], 4).tolist()
    first, second, third, fourth = found
    assert second == [*first[:2], -1, -1] and fourth[:2] == first[:2]
    others = [*first[:3], *third[:2], *fourth[2:]]
    assert len(set(others)) == len(others) == 7 and third[2:] == [-1, -1]


def test_what_is_alike_is_computed_once():
    """Also where the first of its kind is left out."""
    states = torch.randn(3, 4, 5, dtype=torch.float64)
    alike = beginnings([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 7]], 4)
    for line, place in [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]:
        states[line, place] = states[0, place]
    weight, bias = torch.randn(6, 5).double(), torch.randn(6).double()
    live = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
    with Counted() as inner, Packed(live, alike) as mode:
        found = F.linear(states, weight, bias)
        mode.limit(live & (torch.arange(4) < 2))
        fewer = F.linear(states, weight, bias)
    assert inner.tokens == {5, 2}
    wanted = F.linear(states, weight, bias)
    assert torch.allclose(found, wanted * live[..., None])
    assert (
        torch.allclose(fewer[:, :2], (wanted * live[..., None])[:, :2]) and not fewer[:, 2:].any()
    )


def test_a_part_runs_common_beginnings_once(tiny_llama):
    texts = [
        "As I was saying: Ada is",
        "As I was saying: Bob is",
        "As I was",
        "As I was saying: Ada",
    ]
    rows = [tiny_llama.row(text, text.split()[-1 - (len(text) > 20)]) for text in texts]
    apart = PartialModel(tiny_llama, rows, 1)
    with Counted() as counted:
        found = PartialModel(tiny_llama, rows, 1, alike=True)
    tokens = {tuple(row.ids[:i]) for row in rows for i in range(1, len(row.ids) + 1)}
    assert counted.tokens & {len(tokens)} and max(counted.tokens) == len(tokens)
    inside = apart._way.inside
    assert torch.allclose(found.run()[inside], apart.run()[inside], atol=1e-5)
