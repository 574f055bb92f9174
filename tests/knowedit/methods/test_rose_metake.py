"""RoSE and MetaKE: what they are made of, what they report, and that they do better than what
they start from (unit).
"""

from dataclasses import replace

import pytest
import torch

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.facts.sets import load
from knowedit.facts.wordings.relations import relations
from knowedit.methods import MEMIT, MetaKE, RoSE
from knowedit.methods.locate.entities import entity_moments
from knowedit.methods.locate.forms import asked_forms
from knowedit.methods.locate.keys import group_by_subject
from knowedit.methods.locate.metrics import Blend, Covariance, NullSpace
from knowedit.methods.locate.targets import HiddenState, MergedFacts, merge
from knowedit.methods.locate.training import TrainingSettings
from knowedit.methods.locate.trainings import ThroughForms, ThroughSolver
from knowedit.methods.locate.trainings.forms import FormWeights, Objective
from knowedit.methods.locate.values import Targets, ValueSettings
from knowedit.methods.session import Session
from knowedit_kernels.jvp import compound_gain
from tests.knowedit.methods.helpers import MEAN, statistics_of, target_of

FACTS = [
    Fact(prompt="The capital of {} is", subject="France", target="Lyon"),
    Fact(prompt="The language of {} is", subject="Brazil", target="Norse"),
    Fact(prompt="It is said that {} plays the", subject="Miles Davis", target="violin"),
]
SAME = [FACTS[0], Fact(prompt="People in {} like", subject="France", target="snow")]
CLOSE = [
    Fact(prompt="{} is", subject="France", target="big"),
    Fact(prompt="{} has", subject="France", target="snow"),
]
VALUES = ValueSettings(steps=4, clamp=2.0)
AHEAD = TrainingSettings(steps=12, lr=0.5, price=0.0, clamp=4.0)
TARGET = target_of(VALUES)
FORMS = ThroughForms(settings=replace(ThroughForms().settings, steps=8, lr=0.5, clamp=4.0))
ALWAYS = ThroughSolver(when="always", settings=AHEAD)


def nll(model, edit, facts):
    with edit.applied_to(model):
        scores = model.score([f.text for f in facts], [f.target for f in facts])
    return -sum(s.logprob for s in scores) / len(scores)


# -- MetaKE


def test_switched_off_it_is_the_recipe_without_training(tiny_llama):
    statistics = statistics_of(tiny_llama, [2])
    settings = {"layers": (2,), "target": TARGET}
    off = ThroughSolver(when="never")
    ours = MetaKE(**settings, training=off).compute(tiny_llama, FACTS, statistics, progress=False)
    plain = MEMIT(
        **settings, metric=Covariance(gain=0.98), keys=MEAN, merge_subjects=False
    ).compute(tiny_llama, FACTS, statistics, progress=False)
    assert torch.equal(ours.delta(2), plain.delta(2))
    assert ours.report.details["look_ahead"]["used"] is False


@pytest.mark.parametrize("through", ["edit", "proxy", "plan"])
@pytest.mark.parametrize("layers", [(2,), (1, 2)])
@pytest.mark.parametrize("metric", [Covariance(gain=0.98), NullSpace(gain=0.98)])
def test_training_lowers_what_it_sees(tiny_llama, through, layers, metric):
    statistics = statistics_of(tiny_llama, layers)
    method = MetaKE(
        layers=layers,
        target=TARGET,
        metric=metric,
        training=replace(ALWAYS, settings=replace(AHEAD, through=through)),
    )
    made = method.compute(tiny_llama, FACTS, statistics, progress=False)
    told = made.report.details["look_ahead"]
    seen = {"edit": "realised", "proxy": "gained", "plan": "planned"}[through]
    assert told["used"] and told["after"][seen] < told["before"][seen]
    if through == "edit":  # the report's figures are of a bfloat16 copy
        assert nll(tiny_llama, made, FACTS) == pytest.approx(told["after"]["realised"], rel=0.02)
        never = replace(method, training=ThroughSolver(when="never"))
        plain = never.compute(tiny_llama, FACTS, statistics, progress=False)
        assert nll(tiny_llama, made, FACTS) < nll(tiny_llama, plain, FACTS)


def test_automatic_trains_for_close_keys_crowds_and_histories_only(tiny_llama):
    statistics = statistics_of(tiny_llama, [2])
    method = MetaKE(
        layers=(2,),
        target=replace(TARGET, clamp=0.1),
        training=ThroughSolver(settings=replace(AHEAD, steps=1)),
    )
    alone = method.compute(tiny_llama, FACTS[:1], statistics, progress=False)
    assert alone.report.details["look_ahead"] == {"used": False, "reasons": []}
    close = method.compute(tiny_llama, CLOSE, statistics, progress=False).report.details[
        "look_ahead"
    ]
    assert close["used"] and close["gain"] == 0.9
    assert any("close" in why for why in close["reasons"])
    crowd = replace(method, target=replace(TARGET, clamp=50.0, lr=40.0))
    told = crowd.compute(tiny_llama, FACTS[:1], statistics, progress=False).report.details[
        "look_ahead"
    ]
    assert any("crowded" in why for why in told["reasons"]) and told["gain"] == 0.7
    session = Session(method, tiny_llama, statistics)
    first = session.write(FACTS[:1], force=True, progress=False)
    assert first.report.details["look_ahead"]["reasons"] == [
        "the first of a sequence, which others will follow"
    ]
    later = session.write(FACTS[2:], force=True, progress=False)
    assert "earlier edits to leave alone" in later.report.details["look_ahead"]["reasons"]
    session.undo()
    session.undo()


def test_rehearsed_facts_are_still_said_after_the_next_edit(tiny_llama):
    statistics, losses = statistics_of(tiny_llama, [2]), {}
    for rehearsed in (0, 5):
        training = ThroughSolver(settings=AHEAD, rehearsed=rehearsed)
        method = MetaKE(layers=(2,), target=TARGET, training=training)
        with Session(method, tiny_llama, statistics) as session:
            session.write(CLOSE[:1], force=True, progress=False)
            later = session.write(CLOSE[1:], force=True, progress=False)
            scores = tiny_llama.score([f.text for f in CLOSE], [f.target for f in CLOSE])
            losses[rehearsed] = [-score.logprob for score in scores]
        assert later.report.details["look_ahead"]["rehearsed"] == min(rehearsed, 1)
    assert losses[5][0] < losses[0][0] - 0.1 and losses[5][1] < losses[0][1] + 0.1


def trained(model, facts, **training):
    method = MetaKE(layers=(2,), target=TARGET, training=replace(ALWAYS, **training))
    return method.compute(model, facts, statistics_of(model, [2]), progress=False).delta(2)


def test_the_diagonal_ablation_differs_where_keys_are_close(tiny_llama):
    proxy = replace(AHEAD, through="proxy", steps=3)
    full, diagonal = (trained(tiny_llama, CLOSE, settings=proxy, diagonal=d) for d in (False, True))
    assert (full - diagonal).norm() > 1e-3 * full.norm()


def test_contexts_take_part_in_the_later_steps(tiny_llama):
    few = replace(AHEAD, steps=4)
    bare, wrapped = (
        trained(tiny_llama, FACTS, settings=few, contexts=c) for c in ((), ("He said: {}",))
    )
    assert not torch.equal(bare, wrapped)


def test_a_gain_beside_a_weight_is_refused(tiny_llama):
    method = MetaKE(
        layers=(2,),
        target=TARGET,
        metric=Covariance(weight=3.0),
        training=ThroughSolver(gain=0.7),
    )
    with pytest.raises(EditError, match="says nothing beside metric.weight; give one of them"):
        method.compute(tiny_llama, FACTS, statistics_of(tiny_llama, [2]), progress=False)


@pytest.mark.parametrize(
    "gate, whole", [(0.3, 0.534), (0.5, 0.754), (0.7, 0.894), (0.9, 0.976), (0.99, 0.998)]
)
def test_effective_gain_of_equal_gates(gate, whole):
    """Five layers: 1 - prod (1 - gate / remaining)."""
    found = compound_gain([gate * torch.eye(3, dtype=torch.float64)] * 5)
    torch.testing.assert_close(found, whole * torch.eye(3, dtype=torch.float64), atol=6e-4, rtol=0)


# -- RoSE


def test_the_metrics_ends_are_memits_and_the_identity(tiny_llama):
    statistics = statistics_of(tiny_llama, [2])
    plain = RoSE(layers=(2,), target=TARGET, training=None)
    task = plain.prepare(tiny_llama, group_by_subject(SAME, True), statistics)
    keys = plain.keys.at(task, 2, of_mlp=False).keys.T
    memits = Covariance(gain=0.9).solver(statistics, 2, keys)[0].A
    ours = Blend(gain=0.9, shares=(1.0, 0.0, 0.0)).solver(statistics, 2, keys)[0].A
    assert (ours - memits).norm() <= 1e-9 * memits.norm()
    identity = Blend(gain=0.9, shares=(0.0, 0.0, 1.0))
    weight = float((keys * keys).sum(0).mean()) * (1 - 0.9) / 0.9
    eye = torch.eye(tiny_llama.d_ff, dtype=keys.dtype)
    wanted = torch.linalg.solve(weight * eye + keys @ keys.T, keys).T
    assert (identity.solver(statistics, 2, keys)[0].A - wanted).norm() <= 1e-9 * wanted.norm()
    without = replace(plain, metric=identity)
    assert without.compute(tiny_llama, SAME, None, progress=False).keys  # needs no statistics
    with pytest.raises(EditError, match="statistics"):
        plain.compute(tiny_llama, SAME, None, progress=False)


def test_merge_reaches_as_far_as_every_leaf(tiny_llama):
    """Orthogonal leaves add up, equal ones stay, the clamp holds."""
    method = RoSE(layers=(2,), target=replace(TARGET, clamp=100.0))
    groups = group_by_subject(SAME, True)
    task = method.prepare(tiny_llama, groups, statistics_of(tiny_llama, [2]))
    leaves = torch.zeros(2, tiny_llama.hidden)
    leaves[0, 0], leaves[1, 1] = 3.0, 4.0
    value = torch.ones_like(leaves)
    zeros = torch.zeros(2)
    found = merge(Targets(leaves, value, zeros, zeros, zeros), task).delta
    torch.testing.assert_close(found[0], leaves.sum(0), rtol=2e-3, atol=0)
    same = leaves[:1].expand(2, -1)
    found = merge(Targets(same, value, zeros, zeros, zeros), task).delta
    torch.testing.assert_close(found[0], same[0], rtol=2e-3, atol=1e-6)
    tight = replace(task, values=replace(task.values, clamp=0.1))
    found = merge(Targets(leaves, value, zeros, zeros, zeros), tight).delta
    assert found.norm() <= 0.1001 * value[0].norm()


@pytest.mark.parametrize("target", [HiddenState, MergedFacts])
def test_training_lowers_the_nll_of_the_facts(tiny_llama, target):
    statistics, facts = statistics_of(tiny_llama, [1, 2]), [*SAME, FACTS[1]]
    weights = FormWeights(identity=0.1, neighbours=0.1)
    method = RoSE(
        layers=(1, 2), target=target_of(VALUES, target), training=replace(FORMS, weights=weights)
    )
    made = method.compute(tiny_llama, facts, statistics, progress=False)
    told = made.report.details["look_ahead"]
    assert told["after"]["realised"] < told["before"]["realised"]
    assert torch.linalg.matrix_rank(made.delta(1)) == 2  # one value a subject
    plain = replace(method, training=None).compute(tiny_llama, facts, statistics, progress=False)
    assert nll(tiny_llama, made, facts) < nll(tiny_llama, plain, facts)


def test_the_plan_turns_over_forms_identity_and_neighbours(tiny_llama):
    facts = [fact for fact in load("embedded") if fact.relation in ("capital", "language")][:3]
    method = RoSE(layers=(2,), target=TARGET)
    groups = group_by_subject(facts, True)
    task = method.prepare(tiny_llama, groups, statistics_of(tiny_llama, [2]))
    objective = Objective(FormWeights(forms=1.0, identity=2.0, neighbours=4.0, pools=2), task)
    assert len(objective.pools) == 2 and objective.forms
    seen = {id(lines) for step in range(12) for lines, _ in objective.plan(step)}
    everything = [
        objective.bare,
        objective.identity,
        *objective.pools,
        *(lines for lines, _ in objective.forms),
    ]
    assert seen == {id(lines) for lines in everything}
    steps = 4 * len(objective.forms)
    total = sum(
        f
        for step in range(steps)
        for lines, f in objective.plan(step)
        if lines is objective.identity
    )
    assert total == pytest.approx(2.0 * steps)  # on average the weight that was asked for


def test_questions_by_fact_by_relation_or_shipped(tiny_llama):
    capital = next(fact for fact in load("embedded") if fact.relation == "capital")
    unknown = replace(FACTS[0], relation=None)

    def messages(questions, fact):
        return " ".join(form.message for form in asked_forms(tiny_llama, fact, questions))

    asked = "Which city governs {}?"
    filled = asked.replace("{}", capital.subject)
    assert filled in messages({"capital": [asked]}, capital)
    assert filled in messages({capital.prompt: [asked]}, capital)
    assert filled not in messages(None, capital)
    assert "what?" in messages("generic", capital)
    assert "what?" in messages(None, unknown) and "what?" not in messages(None, capital)


def test_entity_moments_leave_the_edited_out(tiny_llama):
    moments = entity_moments(tiny_llama, [1, 2])
    for moment in moments.values():
        assert moment.shape == (tiny_llama.d_ff, tiny_llama.d_ff) and torch.equal(moment, moment.T)
        assert float(torch.linalg.eigvalsh(moment)[0]) > -1e-12 * float(moment.trace())
    without = entity_moments(
        tiny_llama, [1], f"and {relations()['capital']['entities'][0].upper()} too"
    )[1]
    assert not torch.equal(without, moments[1])
    assert torch.equal(entity_moments(tiny_llama, [1], "nobody")[1], moments[1])
    assert not torch.equal(entity_moments(tiny_llama, [1], pool=FACTS)[1], moments[1])
