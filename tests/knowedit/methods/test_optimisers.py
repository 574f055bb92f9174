"""Optimisers of values: what a Gauss-Newton step is, and where it leads (unit)."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from knowedit.errors import ConfigError
from knowedit.methods import MEMIT
from knowedit.methods.base import Method
from knowedit.methods.locate.optimisers import (
    Adam,
    GaussNewton,
    Optimiser,
    Scale,
    Seen,
    log_odds,
    shortest,
)
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.values import ValueSettings, optimise_values

from .test_values import FACTS

QUICK = ValueSettings(clamp=4.0, optimiser=GaussNewton())


def test_log_odds_are_those_of_the_probability():
    p = torch.tensor([1e-6, 0.1, 0.5, 0.99], dtype=torch.float64)
    torch.testing.assert_close(log_odds(-p.log()), (p / (1 - p)).log())


def test_the_shortest_step_is_the_pseudo_inverses():
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    wanted = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    jacobian[1, 2], wanted[1, 2] = 0, 0  # a row less
    found = shortest(jacobian, wanted, 1e-12)
    expected = torch.linalg.pinv(jacobian) @ wanted[..., None]
    torch.testing.assert_close(found, expected[..., 0], rtol=1e-6, atol=1e-9)


def logistic(delta, weights, owner, bias, live):
    """An evaluation of rows whose log-odds are linear in their group's value."""
    delta = delta.clone().requires_grad_()
    each = delta[owner]
    nll = -F.logsigmoid((each * weights).sum((1, 2)) + bias)
    loss = nll.new_zeros(len(delta)).index_add(0, owner, nll)
    return Seen(1, live, delta, each, owner, nll, loss)


def test_one_step_arrives_where_the_log_odds_are_linear():
    """Whatever the lengths of the parts, the number of rows, and of groups that have left."""
    generator = torch.Generator().manual_seed(1)
    owner, live = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2])
    weights = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64)
    bias = torch.tensor([-9.0, -4.0, 0.5, -1.0], dtype=torch.float64)
    norm = torch.tensor([[3.0, 5.0], [1.0, 1.0], [0.2, 7.0]], dtype=torch.float64)[..., None]
    moves = GaussNewton(aim=0.02, enough=0.05, radius=100.0, damping=1e-12).begin(
        Scale(norm, norm, float("inf"), 0.05)
    )
    seen = logistic(torch.zeros(2, 2, 6, dtype=torch.float64), weights, owner, bias, live)
    assert moves.moving(seen).all()
    there = logistic(moves.update(seen), weights, owner, bias, live)
    torch.testing.assert_close(there.nll.detach(), torch.full_like(bias, 0.02), rtol=1e-6, atol=0)
    assert not moves.moving(there).any()


def test_no_step_is_longer_than_the_radius():
    owner, live = torch.tensor([0]), torch.tensor([0])
    weights, bias = torch.ones(1, 1, 4, dtype=torch.float64), torch.tensor([-50.0]).double()
    norm = torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    for clamp, length in ((0.75, 0.25 * 0.75 * 3), (float("inf"), 0.25 * 3)):
        moves = GaussNewton(radius=0.25).begin(Scale(norm, norm, clamp, 0.05))
        step = moves.update(logistic(torch.zeros(1, 1, 4).double(), weights, owner, bias, live))
        assert float(step.norm()) == pytest.approx(length)


def test_eight_evaluations_reach_what_adam_reaches(tiny_llama):
    groups = [[fact] for fact in FACTS]
    slow = optimise_values(tiny_llama, groups, 1, replace(QUICK, optimiser=Adam()))
    fast = optimise_values(tiny_llama, groups, 1, replace(QUICK, optimiser=GaussNewton(most=8)))
    assert int(fast.steps.max()) <= 7  # the last evaluation only measures
    assert float(fast.nll.max()) < max(float(slow.nll.max()), 0.05)
    bound = 4.0 * fast.value.norm(dim=1) * (1 + 1e-5)
    assert bool((fast.delta.norm(dim=1) <= bound).all())


def test_a_value_is_the_best_that_was_evaluated(tiny_llama, monkeypatch):
    """A step that overshoots is not what is left in the end."""
    seen = []
    begin = GaussNewton.begin

    def overshooting(self, scale):
        moves = begin(self, scale)
        update = moves.update

        def far(evaluation):
            seen.append(evaluation.loss.detach().clone())
            return update(evaluation) * (1 if len(seen) < 3 else -50)

        moves.update = far
        return moves

    monkeypatch.setattr(GaussNewton, "begin", overshooting)
    settings = replace(QUICK, optimiser=GaussNewton(most=4, enough=1e-9))
    found = optimise_values(tiny_llama, [FACTS[:1]], 1, settings)
    torch.testing.assert_close(found.loss, torch.stack(seen).min(0).values)


def test_batches_and_company_do_not_change_a_value(tiny_llama):
    together = optimise_values(tiny_llama, [[f] for f in FACTS], 1, QUICK)
    alone = optimise_values(tiny_llama, [[f] for f in FACTS], 1, replace(QUICK, budget=1))
    assert (together.delta - alone.delta).norm() <= 1e-4 * together.delta.norm()


def test_facts_of_one_subject_share_one_value(tiny_llama):
    pair = [replace(FACTS[0], prompt=prompt) for prompt in ("The capital of {} is", "In {} is")]
    found = optimise_values(tiny_llama, [pair], 1, QUICK)
    start = optimise_values(tiny_llama, [pair], 1, replace(QUICK, steps=1))
    assert found.delta.shape == (1, tiny_llama.hidden)
    assert not start.delta.any() and float(found.loss) < float(start.loss)


def test_an_optimiser_is_a_part_of_the_recipe():
    method = MEMIT(target=HiddenState(optimiser=GaussNewton(most=5)))
    assert Method.from_dict(method.to_dict()) == method
    assert MEMIT().with_settings(["target.optimiser=gauss-newton"]).target.optimiser == (
        GaussNewton()
    )
    record = HiddenState().to_dict()
    del record["optimiser"]  # as it was before there was a choice
    assert HiddenState.from_dict(record).optimiser == Adam()
    values = ValueSettings(optimiser=GaussNewton(aim=0.1))
    assert HiddenState.of(values).optimiser == GaussNewton(aim=0.1)


@pytest.mark.parametrize("bad", [{"most": 0}, {"aim": 0}, {"radius": -1}, {"damping": "much"}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        Optimiser.from_dict({"kind": "gauss-newton", **bad})
