"""The geometry of an edit against analytic cases, and on a small model."""

from __future__ import annotations

import math

import pytest
import torch

from knowedit.evaluation.curvature import Recall, gradients, mean_curvature, tolerance, top_curvature
from knowedit.facts import Fact

FACTS = [Fact("The seat of {} is in", "Bern", "Rome", "Bonn"), Fact("They say that in {} they speak", "Bern", "Thai", "Urdu")]


# -- curvature --------------------------------------------------------------------------------------------------------


def quadratic(eigenvalues, seed=0):
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(seed)))[0]
    matrix = basis @ torch.diag(torch.tensor(eigenvalues)) @ basis.T
    return matrix, lambda x: 0.5 * ((x @ matrix) * x).sum(1)


def test_curvature_of_a_quadratic():
    matrix, loss = quadratic([9.0, 3.0, 1.0, 0.5, 0.1, 0.1, 0.1, 0.1])
    at = torch.randn(3, 8)
    assert torch.allclose(top_curvature(loss, at, steps=40), torch.full((3,), 9.0), rtol=1e-4)
    assert torch.allclose(mean_curvature(loss, at, probes=2000), torch.full((3,), 13.9 / 8), rtol=0.05)
    assert torch.allclose(gradients(loss, at), at @ matrix, atol=1e-5)
    saddle = quadratic([-5.0, 2.0, 1.0])[1]
    assert torch.allclose(top_curvature(saddle, torch.zeros(1, 3), steps=60), torch.tensor([-5.0]), rtol=1e-4)


def test_tolerance_of_a_half_space():
    """Recalled while w v > 0: along a random ray w u ~ N(0, 1/hidden), so 90 % hold up to margin sqrt(hidden) / 1.2816."""
    hidden = 400
    w = torch.zeros(hidden)
    w[0] = 1
    values = torch.zeros(3, hidden)
    values[:, 0], values[:, 1] = torch.tensor([0.05, 0.02, -0.1]), 1
    found = tolerance(lambda states, _: states @ w > 0, values, directions=4000, steps=12)
    wanted = [m * math.sqrt(hidden) / 1.2816 / math.sqrt(1 + m * m) for m in (0.05, 0.02)]
    assert found[:2].tolist() == pytest.approx(wanted, rel=0.06) and found[2] == 0
    assert tolerance(lambda states, _: states[:, 1] > -9, values[:1], largest=1.5).tolist() == [1.5]


def test_recall_is_that_of_the_whole_model(tiny_llama):
    recall = Recall(tiny_llama, FACTS, 1)
    nll, exact = recall(recall.clean)
    for found, hit, fact in zip(nll, exact, FACTS):
        (wanted,) = tiny_llama.score([fact.text], [fact.target])
        assert float(found) == pytest.approx(-wanted.logprob, rel=1e-4) and bool(hit) == wanted.exact
    delta = torch.randn(2, tiny_llama.hidden)
    pair, _ = recall(recall.clean[[1, 1]] + delta, [1, 1])
    for found, shift in zip(pair, delta):
        row = tiny_llama.row(FACTS[1].text, FACTS[1].subject, FACTS[1].target)

        def add(_module, _inputs, output, shift=shift, at=row.subject):
            output[:, at] += shift
            return output

        handle = tiny_llama.layers[1].register_forward_hook(add)
        (wanted,) = tiny_llama.score([FACTS[1].text], [FACTS[1].target])
        handle.remove()
        assert float(found) == pytest.approx(-wanted.logprob, rel=1e-4)


def test_curvature_through_the_model_is_a_second_difference(tiny_llama):
    recall = Recall(tiny_llama, FACTS, 1)

    def loss(states):
        return recall(states)[0]

    gradient = gradients(loss, recall.clean)
    signs = torch.randint(0, 2, recall.clean.shape, generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    h = 1e-2
    with torch.no_grad():
        around = [loss(recall.clean + s * h * signs) for s in (-1, 0, 1)]
    slope, bend = (around[2] - around[0]) / (2 * h), (around[2] - 2 * around[1] + around[0]) / h**2
    assert torch.allclose((gradient * signs).sum(1), slope, rtol=2e-2, atol=2e-3)
    found = mean_curvature(loss, recall.clean, probes=1, seed=3) * recall.clean.shape[1]
    assert torch.allclose(found, bend, rtol=0.1, atol=0.15)
    assert (top_curvature(loss, recall.clean).abs() >= mean_curvature(loss, recall.clean).abs()).all()
