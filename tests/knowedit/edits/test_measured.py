"""What is measured on the edited model, against plain transformers, and what is refused for it
(unit).
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from knowedit.edits.edit import Edit
from knowedit.edits.limits import Limits
from knowedit.edits.measured import PASSAGE, WIDTH, Measured, _passages, measure
from knowedit.edits.report import EditReport
from knowedit.errors import ConfigError, EditError, RuinousEditError
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.ordinary import held_out, passages, sentences
from knowedit.methods import MEMIT, FineTuning
from knowedit.methods.session import Session
from knowedit.models.fingerprint import weights_fingerprint
from tests.knowedit.edits.test_edit import an_edit
from tests.knowedit.methods.helpers import FACTS, VALUES, statistics_of, target_of

GOOD = Measured((1.0, 0.9), (0.9, 0.8), (True, True), 20.0, 20.4, 0.01, 0.97, 160)


def logits_of(model, ids):
    return model.hf(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def ordinary(model, facts):
    """The shipped texts' tokens that are read for an edit of so many facts."""
    short = [model.row(text).ids[:WIDTH] for text in held_out()]
    return short + [model.row(text).ids[:PASSAGE] for text in passages()[: facts - 1]]


@torch.no_grad()
def test_figures_are_those_of_the_plain_edited_model(tiny_llama):
    edit, before = an_edit(tiny_llama, layers=(1,)), []
    fingerprint = weights_fingerprint(tiny_llama.hf)
    found = measure(tiny_llama, edit)
    assert weights_fingerprint(tiny_llama.hf) == fingerprint and not edit.is_applied(tiny_llama)
    rows = ordinary(tiny_llama, len(edit.facts))
    before = [logits_of(tiny_llama, ids)[:-1] for ids in rows]
    with edit.applied_to(tiny_llama):
        after = [logits_of(tiny_llama, ids)[:-1] for ids in rows]
        for fact, p, exact in zip(edit.facts, found.probability, found.exact):
            row = tiny_llama.row(fact.text, answer=fact.target)
            logp = logits_of(tiny_llama, row.ids)[row.answer - 1 : -1]
            token = torch.tensor(row.ids[row.answer :])
            assert p == pytest.approx(math.exp(-float(F.nll_loss(logp, token))), rel=1e-4)
            assert exact == bool((logp.argmax(-1) == token).all())
    token = torch.cat([torch.tensor(ids[1:]) for ids in rows])
    was, now = torch.cat(before), torch.cat(after)
    assert found.tokens == len(token) > 100
    for perplexity, logp in ((found.perplexity_before, was), (found.perplexity, now)):
        assert perplexity == pytest.approx(math.exp(float(F.nll_loss(logp, token))), rel=1e-4)
    assert found.kl == pytest.approx(float((was.exp() * (was - now)).sum(-1).mean()), rel=1e-3)
    assert found.same == pytest.approx(
        float((was.argmax(-1) == now.argmax(-1)).double().mean()), abs=1e-6
    )
    assert found.gain == () and found.mean_gain is None


def test_what_was_measured_before_is_of_the_edits_in_force(tiny_llama):
    """The clean side is kept, and made anew when another edit is in force."""
    one, two = an_edit(tiny_llama, layers=(1,)), an_edit(tiny_llama, layers=(2,))
    alone = measure(tiny_llama, two)
    with one.applied_to(tiny_llama):
        after = measure(tiny_llama, two)
        assert after.perplexity_before == pytest.approx(measure(tiny_llama, two).perplexity_before)
    assert after.perplexity_before == pytest.approx(measure(tiny_llama, one).perplexity)
    assert alone == measure(tiny_llama, two) != after


def test_nothing_is_measured_on_what_edits_train_with():
    shown = held_out() + passages()
    assert len(held_out()) >= 10 and not set(shown) & set(sentences())
    assert len(set(shown)) == len(shown) >= 50


def test_an_edit_of_many_facts_reads_more_text(tiny_llama):
    one = an_edit(tiny_llama, layers=(1,))
    texts = len(ordinary(tiny_llama, 1))
    for facts in (1, 3, 200):
        many = replace(one, facts=[one.facts[0]] * facts, groups=(0,) * facts)
        read = ordinary(tiny_llama, facts)
        assert len(read) == texts + min(facts - 1, len(passages()))
        assert measure(tiny_llama, many).tokens == sum(len(ids) - 1 for ids in read)


def test_ordinary_text_is_not_about_the_facts():
    named = Fact("{} was born in", "Marie Curie", "Lyon")
    assert not any("Marie Curie" in text for text in _passages([named] * 100))
    assert len(_passages([named] * 100)) == len(passages()) - 1


def test_every_method_measures_and_the_file_keeps_it(tiny_llama, tmp_path):
    made = FineTuning(steps=2, layers=(1,)).compute(tiny_llama, FACTS, progress=False)
    assert made.report.measured.gain == () and made.report.gain is None
    planned = MEMIT(layers=(1,), target=target_of(VALUES)).compute(
        tiny_llama, FACTS, statistics_of(tiny_llama, [1]), progress=False
    )
    assert planned.report.gain == pytest.approx(sum(planned.report.measured.gain) / 3)
    for edit in (made, planned):
        again = Edit.load(edit.save(tmp_path / "e.safetensors"))
        assert again.report.measured == edit.report.measured
        json.dumps(edit.report.to_dict())
    assert EditReport.from_dict({"gain": 0.9}).measured is None  # an earlier version's


def test_a_subject_that_is_the_first_token_is_told_from_a_written_fact(tiny_llama):
    """Its own prompt does not take the value of the prompts in context, whatever the solver
    predicts: there the attention sink sits.
    """
    fact = Fact("{} is", "A", "Lyon")
    assert tiny_llama.row(fact.text, fact.subject).subject == 0
    target = replace(target_of(VALUES), contexts=("{}", "So it is said: {}"))
    made = MEMIT(layers=(1,), target=target).compute(
        tiny_llama, [fact], statistics_of(tiny_llama, [1]), progress=False
    )
    assert made.report.layers["1"]["gain"] > 0.8
    assert made.report.gain < 0.5 and not made.report.within_limits
    assert made.warnings[0].startswith("RUINOUS") and "own prompts" in made.warnings[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gain": (0.2, 0.3)}, "realises 25% of the planned change"),
        ({"perplexity": 22.5}, r"from 20.00 to 22.50 \(limit \+10%\)"),
        ({"perplexity": math.nan}, "perplexity"),
        ({"perplexity": math.inf}, "perplexity"),
        ({"kl": 0.5}, "KL of 0.50 nats"),
        ({"same": 0.5}, "only 50% of the next words"),
    ],
)
def test_each_limit(change, said):
    good = EditReport(relative_norm={"3": 0.3}, measured=GOOD)
    assert good.within_limits
    Limits().check(good)
    bad = EditReport(measured=replace(GOOD, **change))
    assert not bad.within_limits
    with pytest.raises(RuinousEditError, match=f"{said}.*Better: .*force=True"):
        Limits().check(bad)
    Limits(gain=0.0, perplexity=1e9, kl=1e9, same=0.0).broken(bad)


def test_that_the_facts_are_said_may_be_asked_for():
    half = EditReport(measured=replace(GOOD, exact=(True, False)))
    assert half.within_limits and not Limits().with_settings(["said=0.5"]).broken(half)
    wanted = Limits().with_settings(["said=1"])
    with pytest.raises(RuinousEditError, match=r"1 of 2 facts are said.*\(limit 100%\)"):
        wanted.check(half)
    wanted.check(EditReport(measured=GOOD))
    with pytest.raises(RuinousEditError, match="nobody measured"):
        wanted.check(EditReport())
    with pytest.raises(EditError, match="a share"):
        Limits(said=2.0)


def test_a_weight_that_is_lost_in_its_change_is_refused():
    with pytest.raises(RuinousEditError, match="layer 3 changes by 60.7 times its own norm"):
        Limits().check(EditReport(relative_norm={"3": 60.7}, measured=GOOD))
    Limits(relative_norm=100).check(EditReport(relative_norm={"3": 60.7}, measured=GOOD))


def test_small_steps_do_not_pass_the_limit_together():
    """+8 % after +8 %: each within the limit, both together not."""
    first = EditReport(measured=replace(GOOD, perplexity_before=20.0, perplexity=21.6))
    second = EditReport(measured=replace(GOOD, perplexity_before=21.6, perplexity=23.3))
    assert not Limits().broken(second)
    assert "from 20.00 to 23.30" in Limits().broken(second, [first])[0]
    other = EditReport(measured=replace(GOOD, perplexity_before=30.0, perplexity=32.4))
    assert "from 27.78 to 32.40" in Limits().broken(other, [first])[0]  # on other texts


@pytest.mark.parametrize("wrong", [{"perplexity": 0.9}, {"kl": -1.0}, {"relative_norm": 0.0}])
def test_limits_that_nothing_can_meet_are_refused(wrong):
    with pytest.raises(EditError, match="limits"):
        Limits(**wrong)
    with pytest.raises(ConfigError, match="perplexity"):
        Limits().with_settings(["perplexty=2"])


def test_a_session_refuses_a_ruinous_edit_and_leaves_all_as_it_was(tiny_llama):
    before = weights_fingerprint(tiny_llama.hf)
    editor = MEMIT(layers=(1,), target=target_of(replace(VALUES, clamp=50.0, lr=10.0)))
    session = Session(editor, tiny_llama, statistics_of(tiny_llama, [1]))
    with pytest.raises(RuinousEditError, match="refused"):
        session.write(FACTS, progress=False)
    assert not session.history and weights_fingerprint(tiny_llama.hf) == before
    made = session.write(FACTS, force=True, progress=False)
    assert any(text.startswith("RUINOUS") for text in made.warnings) and len(session.history) == 1
    session.undo()
    generous = Limits(gain=0.0, relative_norm=1e9, kl=1e9, same=0.0, perplexity=1e9)
    Session(editor, tiny_llama, statistics_of(tiny_llama, [1]), limits=generous).write(
        FACTS, progress=False
    )
