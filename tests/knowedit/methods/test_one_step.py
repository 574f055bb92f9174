"""One-Step: its Gauss-Newton step and its solve, by hand in float64 (unit)."""

import copy

import pytest
import torch

from knowedit.edits.history import History
from knowedit.errors import EditError, ModelError, StatisticsError
from knowedit.methods import OneStep
from knowedit.methods.gradient.named.one_step import at_answers, curvature_scaled
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from tests.knowedit.methods.helpers import FACTS, statistics_of
from tests.knowedit.methods.test_ultraedit import seen_by

LAYER = 3
PLAIN = OneStep(layer=LAYER, weight=2.0)


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request):
    given = request.getfixturevalue(request.param)
    return EditableModel(copy.deepcopy(given.hf).double(), given.tokenizer)


def by_hand(model, facts, name, aim=0.004, radius=1.0):
    """Keys and steps of every scored token, each fact run alone."""
    keys, steps = [], []
    for fact in facts:
        row = model.row(fact.text, answer=fact.target)
        states = {}
        handle = model.layers[LAYER].register_forward_pre_hook(
            lambda module, given, states=states: states.update(x=given[0].detach()[0])
        )
        x, y = seen_by(model, [fact], name)
        handle.remove()
        logp = model.hf(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for i, place in enumerate(range(row.answer - 1, len(row.ids) - 1)):
            p = logp[place, row.ids[place + 1]].exp()
            slope = -y[i] * (len(row.ids) - row.answer) / (1 - p)  # `seen_by` takes the mean
            missing = torch.logit(torch.exp(torch.tensor(-aim).double())) - torch.logit(p)
            step = slope * missing.clamp(min=0) / slope.square().sum()
            steps.append(step * (radius * states["x"][place].norm() / step.norm()).clamp(max=1))
        keys.append(x)
    return torch.cat(keys).detach(), torch.stack(steps).detach()


@pytest.mark.parametrize("radius", [100.0, 0.05])
def test_it_is_one_gauss_newton_step_under_the_covariance(model, radius):
    statistics, history = statistics_of(model, [LAYER]), History(model.fingerprint)
    name = model.layout.weight_name(LAYER)
    metric, earlier = 2.0 * statistics.moment(LAYER), []
    for facts in (FACTS[:2], FACTS[2:]):
        K, V = by_hand(model, facts, name.removesuffix(".weight"), radius=radius)
        method = PLAIN.with_settings(radius=radius)
        made = method.compute(model, facts, statistics, history=history, progress=False)
        protected = metric + sum(k.T @ k for k in earlier)
        wanted = torch.linalg.solve(protected + K.T @ K, K.T @ V).T
        delta = made.delta(name).double()
        assert delta.shape == wanted.shape
        assert (delta - wanted).norm() <= 1e-5 * wanted.norm() > 0
        made.apply(model)
        history.add(made)
        earlier.append(K)
    for edit in history.edits:
        edit.undo(model)


def test_a_step_arrives_where_the_log_odds_are_linear():
    """Whatever the slope; and a token that is said already asks for nothing."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.tensor([-9.0, -1.0, 2.0, 30.0], dtype=torch.float64)

    def nll(x):
        return -torch.nn.functional.logsigmoid((x * weights).sum(1) + bias)

    x = torch.zeros_like(weights, requires_grad=True)
    (gradients,) = torch.autograd.grad(nll(x).sum(), x)
    far = torch.full((4,), 1e6, dtype=torch.float64)
    steps = curvature_scaled(gradients, nll(x).detach(), 0.02, far)
    torch.testing.assert_close(nll(steps)[:3], torch.full((3,), 0.02).double())
    assert not steps[3].any()
    short = curvature_scaled(gradients, nll(x).detach(), 0.02, far / 1e7)
    assert float(short.norm(dim=1).max()) == pytest.approx(0.1)


def test_facts_do_not_see_each_other(tiny_llama):
    together = at_answers(tiny_llama, FACTS, LAYER)
    alone = [at_answers(tiny_llama, [fact], LAYER) for fact in FACTS]
    for whole, parts in zip(together, zip(*alone)):
        assert (whole - torch.cat(parts)).norm() <= 1e-4 * whole.norm()


def test_it_makes_the_answers_likelier(tiny_llama):
    statistics = statistics_of(tiny_llama, [LAYER])
    said = [fact.text for fact in FACTS], [fact.target for fact in FACTS]
    before = [score.probability for score in tiny_llama.score(*said)]
    edit = OneStep(layer=LAYER, gain=0.98).compute(tiny_llama, FACTS, statistics)
    assert all(now > was for now, was in zip(edit.report.measured.probability, before))
    assert edit.report.steps == 1 and 0.5 < edit.report.layers[str(LAYER)]["gain"] <= 1


def test_in_sequence_and_back(tiny_llama):
    statistics, before = statistics_of(tiny_llama, [LAYER]), tiny_llama.hf.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with Session(OneStep(layer=LAYER), tiny_llama, statistics) as session:
        for fact in FACTS:
            session.write([fact], force=True, progress=False)
        assert len(session.history.facts) == len(FACTS)
    for name, value in tiny_llama.hf.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_it_refuses(tiny_llama):
    assert OneStep().statistics_layers(tiny_llama) == (LAYER,)
    with pytest.raises(EditError, match="first layer cannot be changed"):
        OneStep(layer=0).compute(tiny_llama, FACTS)
    with pytest.raises(EditError, match="needs key statistics of layer 3"):
        OneStep().compute(tiny_llama, FACTS)
    with pytest.raises(StatisticsError):
        OneStep().compute(tiny_llama, FACTS, statistics_of(tiny_llama, [1]))
    with pytest.raises(ModelError):
        OneStep(layer=9).statistics_layers(tiny_llama)
    for wrong in ({"aim": 0}, {"radius": -1}, {"weight": 0}, {"gain": 1.0}):
        with pytest.raises(EditError, match="one-step"):
            OneStep(**wrong)
