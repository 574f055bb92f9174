"""Deliberately wrong updates, which the gates must reject (unit)."""

import pytest
import torch

from knowedit_kernels import numerics
from knowedit_kernels.lowrank import LedgerError, WeightLedger, blocked
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.fingerprint import sums_of
from knowedit_kernels.lowrank.reference import grade_update
from knowedit_kernels.lowrank.rounding import random_bits


def truncated(x):
    return (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


def half_bits(x):
    """Stochastic rounding from fifteen bits: up half as often as it should be."""
    bits = random_bits(slice(0, len(x)), x.shape[1], 0, 0) >> 1
    return ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32).bfloat16()


WRONG = {
    "truncating": lambda W, U, V: truncated(W.float() + U @ V.T),
    "stochastic with half the bits": lambda W, U, V: half_bits(W.float() + U @ V.T),
    "product in bf16": lambda W, U, V: W + U.bfloat16() @ V.bfloat16().T,
    "rounded twice": lambda W, U, V: W + (U @ V.T).bfloat16(),
    "last column left out": lambda W, U, V: torch.cat(
        [(W.float() + U @ V.T).bfloat16()[:, :-1], W[:, -1:]], 1
    ),
    "last rank left out": lambda W, U, V: (W.float() + U[:, :-1] @ V[:, :-1].T).bfloat16(),
    "minus": lambda W, U, V: (W.float() - U @ V.T).bfloat16(),
}


def problem():
    g = torch.Generator().manual_seed(0)
    W = (torch.randn(200, 150, generator=g) * 0.02).bfloat16()
    return W, torch.randn(200, 8, generator=g) * 0.004, torch.randn(150, 8, generator=g)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_updates_miss_the_budget(name):
    W, U, V = problem()
    failures = grade_update(WRONG[name](W, U, V), W, U, V).failures(
        numerics.UPDATE_NEAREST[torch.bfloat16]
    )
    assert failures, name
    if "stochastic" in name or "truncating" in name:
        assert any("bias" in line for line in failures)
        assert grade_update(WRONG[name](W, U, V), W, U, V).failures(numerics.UPDATE_STOCHASTIC)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_right_update_passes_the_same_gate(rounding):
    W, U, V = problem()
    w = W.clone()
    blocked.update_(
        UpdateCall(
            [w], [], [U], [V], rounding, 3, [], [], True, torch.empty(1, 5, dtype=torch.float64), []
        )
    )
    budget = (
        numerics.UPDATE_STOCHASTIC
        if rounding == "stochastic"
        else numerics.UPDATE_NEAREST[torch.bfloat16]
    )
    assert grade_update(w, W, U, V).failures(budget) == []


@pytest.mark.parametrize("wrong", ["of what was there before", "without the last row"])
def test_a_ledger_notices_the_fingerprint_of_something_else(wrong, monkeypatch):
    """As it would if a kernel took it before it wrote, or of a part of what it wrote."""
    W, U, V = problem()

    def take_prints(call):
        call.prints[0] = sums_of(call.base[0] if "before" in wrong else call.w[0][:-1])

    monkeypatch.setenv("KNOWEDIT_IMPL", "torch")
    ledger = WeightLedger({"w": W})
    ledger.add("w", U, V, "one")
    ledger.verify()
    monkeypatch.setattr(UpdateCall, "take_prints", take_prints)
    ledger.add("w", U, V, "two")
    with pytest.raises(LedgerError, match="changed outside the ledger"):
        ledger.verify()
