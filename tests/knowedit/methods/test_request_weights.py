"""Regularising each request by what it realises (MetaKE's third version), on cases whose optimum is
known (unit).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from knowedit.methods import MetaKE
from knowedit.methods.locate.objective import FrozenLayer
from knowedit.methods.locate.training import (
    Penalty,
    TrainingSettings,
    request_weights,
    train_write_outs,
)
from tests.knowedit.methods.helpers import FACTS, VALUES, pair, statistics_of, target_of

GAIN = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
WANTED = torch.tensor([[2.0, -1.0], [0.5, 3.0], [-1.0, 1.5]], dtype=torch.float64)


def frozen_of(gain, norm):
    """A layer whose keys do not see each other: `u_i = g_i R_i`, `price_i = g_i (1 - g_i)`."""
    return FrozenLayer(torch.zeros(3, 4), gain.diag(), (gain * (1 - gain)).diag(), norm)


def optimum(frozen, settings):
    """The write-outs that minimise |u - v|^2 / 2 plus the penalty, exactly: both are quadratic."""
    penalty = Penalty({1: frozen}, {1: torch.ones_like(WANTED)}, settings)

    def loss(out):
        return (frozen.gain.T @ out - WANTED).square().sum() / 2 + penalty({1: out})

    zero = torch.zeros_like(WANTED)
    slope = torch.autograd.functional.jacobian(loss, zero).flatten()
    hessian = torch.autograd.functional.hessian(loss, zero).reshape(6, 6)
    return torch.linalg.solve(hessian, -slope).reshape(3, 2)


@pytest.mark.parametrize("kind", ["norm", "price"])
def test_every_request_realises_the_same_share(kind):
    """By request the realised share of a wanted shift is 1 / (1 + 2 mu c) for all gains; uniformly
    it falls with the gain as the formula says.
    """
    frozen = frozen_of(GAIN, torch.ones(3, dtype=torch.float64))
    settings = TrainingSettings(price=0.0, norm=0.0)
    settings = replace(settings, **{kind: 0.3})
    shares = {}
    for how in ("uniform", "request"):
        chosen = replace(settings, regularise=how)
        share = GAIN[:, None] * optimum(frozen, chosen) / WANTED
        assert (share[:, 0] - share[:, 1]).abs().max() < 1e-12
        shares[how] = share[:, 0]
    cost = torch.ones(3, dtype=torch.float64) if kind == "norm" else GAIN * (1 - GAIN)
    weights = GAIN**2 / cost / (GAIN**2 / cost).mean()
    assert torch.allclose(request_weights(frozen, cost), weights, rtol=1e-12)
    paid = {"uniform": cost.sum(), "request": (weights * cost).sum()}
    for how, weight in (("uniform", torch.ones(3)), ("request", weights)):
        mu = 0.3 if kind == "norm" else 0.3 * 3 / (2 * paid[how])  # of a start of ones, two wide
        wanted = GAIN**2 / (GAIN**2 + 2 * mu * weight * cost)
        assert torch.allclose(shares[how], wanted, rtol=1e-10)
    assert shares["request"].max() - shares["request"].min() < 1e-10
    assert shares["uniform"][0] < 0.5 * shares["request"][0]  # over-shrunk
    assert shares["uniform"][2] > shares["request"][2]  # under-regularised


class Asked:
    """Texts that ask for `WANTED` at the requests' own keys."""

    def losses(self, layers, out, through):
        realised = layers[1].gain.T @ out[1]
        loss = (realised - WANTED.float()).square().sum(1) / 2
        yield torch.stack([loss, torch.zeros(3)])


@pytest.mark.parametrize("how", ["uniform", "request"])
def test_the_training_arrives_there(how):
    frozen = frozen_of(GAIN.float(), torch.ones(3))
    settings = TrainingSettings(
        steps=600, lr=0.1, decay=0.01, clamp=1e6, price=0.0, norm=0.3, regularise=how
    )
    start = {1: torch.ones(3, 2)}
    found = train_write_outs({1: frozen}, start, lambda step: [(Asked(), 1.0)], settings)[1]
    exact = frozen_of(GAIN, torch.ones(3, dtype=torch.float64))
    wanted = optimum(exact, settings)
    assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


def test_metake_takes_it_as_a_setting(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    plain = MetaKE(layers=(1,), target=target_of(VALUES)).with_settings(
        {"training.when": "always", "training.settings.steps": 2}
    )
    by_request = plain.with_settings({"training.settings.regularise": "request"})
    one, other = (
        editor.compute(tiny_llama, FACTS, statistics, progress=False)
        for editor in (plain, by_request)
    )
    told = other.report.details["look_ahead"]["settings"]
    assert told["regularise"] == "request"
    left, right = (pair(tiny_llama, edit, 1)[0] for edit in (one, other))
    assert (left - right).norm() > 1e-5 * left.norm()
