"""SERAC: what is out of scope stays as it is to the bit, what is in scope is answered with the
fact in view (unit).
"""

from dataclasses import replace

import pytest
import torch

from knowedit.cli.inspection import describe
from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import save_edited
from knowedit.errors import EditError
from knowedit.evaluation import evaluate
from knowedit.facts.fact import FactError
from knowedit.methods.learned.named.serac import SERAC
from knowedit.methods.learned.serac.memory import MemoryEdit
from knowedit.methods.learned.serac.network import in_view
from knowedit.methods.learned.serac.training import train_serac
from knowedit.methods.session import Session
from knowedit.models.partial import reading
from tests.knowedit.methods.trained import PEOPLE, QUICK_SERAC, network_of

OTHER = "Nobody knows why"


def everything(model, prompts):
    """All that a user can ask: scores, next-token log-probabilities, text."""
    return (
        model.score(prompts, ["Rome"] * len(prompts)),
        model.next_logprobs(prompts),
        model.generate(prompts, 4),
    )


def test_out_of_scope_is_the_base_to_the_bit_and_in_scope_is_the_reader(tiny):
    network, fact = network_of(tiny), PEOPLE[0]
    prompts = [OTHER, fact.text, PEOPLE[1].text, OTHER + " it is so"]
    before = everything(tiny, prompts)
    with tiny.virtual(network.adapter):
        wanted = everything(tiny, [in_view(fact.text, fact.target, fact.text)])
    with SERAC(network).compute(tiny, [fact]).applied_to(tiny):
        assert [text is not None for text in tiny.router.route(prompts)] == [
            False,
            True,
            False,
            False,
        ]
        after = everything(tiny, prompts)
    for i in (0, 2, 3):
        assert (
            after[0][i] == before[0][i]
            and torch.equal(after[1][i], before[1][i])
            and after[2][i] == before[2][i]
        )
    assert after[0][1].logprob == pytest.approx(wanted[0][0].logprob, rel=1e-4)
    torch.testing.assert_close(after[1][1], wanted[1][0], rtol=1e-4, atol=1e-4)
    assert after[2][1] == wanted[2][0] and not torch.allclose(after[1][1], before[1][1], atol=0.1)
    again = everything(tiny, prompts)
    assert tiny.router is None and torch.equal(again[1], before[1]) and again[2] == before[2]


def test_edits_add_up_and_are_undone_in_any_order(tiny_llama):
    network, texts = network_of(tiny_llama), [fact.text for fact in PEOPLE[:3]]
    first, second, third = (SERAC(network).compute(tiny_llama, [fact]) for fact in PEOPLE[:3])

    def inside():
        return (
            []
            if tiny_llama.router is None
            else [i for i, t in enumerate(tiny_llama.router.route(texts)) if t]
        )

    first.apply(tiny_llama), second.apply(tiny_llama), third.apply(tiny_llama)
    assert inside() == [0, 1, 2]
    first.undo(tiny_llama)
    assert inside() == [1, 2]
    third.undo(tiny_llama), second.undo(tiny_llama)
    assert inside() == [] and not third.is_applied(tiny_llama)
    with pytest.raises(EditError, match="not applied"):
        first.undo(tiny_llama)
    together = SERAC(network).compute(tiny_llama, PEOPLE[:3])
    with together.applied_to(tiny_llama):
        assert inside() == [0, 1, 2]
        with pytest.raises(EditError, match="already applied"):
            together.apply(tiny_llama)


def test_of_two_answers_to_one_question_the_last_one_counts(tiny_llama):
    network, fact = network_of(tiny_llama), PEOPLE[0]
    for order in ("Rome Oslo", "Oslo Rome"):
        edits = [
            SERAC(network).compute(tiny_llama, [replace(fact, target=target)])
            for target in order.split()
        ]
        for edit in edits:
            edit.apply(tiny_llama)
        assert tiny_llama.router.route([fact.text]) == [
            in_view(fact.text, order.split()[1], fact.text)
        ]
        for edit in edits:
            edit.undo(tiny_llama)


def test_a_question_costs_the_same_whatever_is_stored(tiny_llama, monkeypatch):
    network = network_of(tiny_llama)
    seen = []
    original = reading.read

    def counted(model, ids, *, outputs):
        seen.append((list(outputs), ids.shape))
        original(model, ids, outputs=outputs)

    monkeypatch.setattr(reading, "read", counted)
    costs = []
    for stored in (PEOPLE[:1], PEOPLE):
        edit = SERAC(network).compute(tiny_llama, stored)
        with edit.applied_to(tiny_llama):
            seen.clear()
            tiny_llama.router.route([OTHER, OTHER, PEOPLE[0].text])
            costs.append(list(seen))
    assert costs[0] == costs[1] and len(costs[0]) == 1
    assert (
        costs[0][0][0] == [tiny_llama.layout.layer(network.layer)] and costs[0][0][1][0] == 2
    )  # nothing above the layer runs; equal texts once


def test_what_needs_a_weight_is_refused(tiny_llama, tmp_path):
    made = SERAC(network_of(tiny_llama)).compute(tiny_llama, PEOPLE[:1])
    for act in (
        lambda: made.delta(2),
        lambda: made.export(tmp_path / "a", tiny_llama),
        lambda: save_edited(tiny_llama, [made], tmp_path / "m"),
    ):
        with pytest.raises(EditError, match="SERAC edit changes no weight"):
            act()
    assert not list(tmp_path.iterdir())


def test_edits_of_weights_at_the_same_time_are_refused(tiny_llama):
    network = network_of(tiny_llama)
    made = SERAC(network).compute(tiny_llama, PEOPLE[:1])
    ones = LowRank(torch.ones(tiny_llama.hidden, 1), torch.ones(tiny_llama.d_ff, 1))
    changes = {tiny_llama.layout.weight_name(2): ones}
    weights = Edit("MEMIT", changes, [], tiny_llama.fingerprint)
    with weights.applied_to(tiny_llama):
        for act in (
            lambda: made.apply(tiny_llama),
            lambda: SERAC(network).compute(tiny_llama, PEOPLE[:1]),
        ):
            with pytest.raises(EditError, match="cannot be in force together: undo MEMIT-"):
                act()
    with (
        made.applied_to(tiny_llama),
        pytest.raises(EditError, match="memory edits, which are of its unedited weights"),
    ):
        weights.apply(tiny_llama)
    assert tiny_llama.router is None and not tiny_llama.ledger.active


def test_edits_of_different_networks_are_refused(tiny_llama):
    one, two = (
        SERAC(network_of(tiny_llama, seed)).compute(tiny_llama, PEOPLE[:1]) for seed in (0, 1)
    )
    with one.applied_to(tiny_llama), pytest.raises(EditError, match="different SERAC networks"):
        two.apply(tiny_llama)


def test_a_saved_edit_needs_nothing_else(tiny_llama, tmp_path):
    made = SERAC(network_of(tiny_llama)).compute(tiny_llama, PEOPLE[:2])
    found = Edit.load(made.save(tmp_path / "e"))
    assert isinstance(found, MemoryEdit)
    assert found.key == made.key and found.facts == made.facts
    assert found.report.record() == made.report.record()
    prompts = [PEOPLE[0].text, OTHER]
    with made.applied_to(tiny_llama):
        wanted = tiny_llama.generate(prompts, 4)
    with found.applied_to(tiny_llama):
        assert tiny_llama.generate(prompts, 4) == wanted
    assert PEOPLE[0].text in describe(tmp_path / "e").text
    ones = LowRank(torch.ones(tiny_llama.hidden, 1), torch.ones(tiny_llama.d_ff, 1))
    changes = {tiny_llama.layout.weight_name(2): ones}
    Edit("MEMIT", changes, [], tiny_llama.fingerprint).save(tmp_path / "w")
    with pytest.raises(EditError, match="not an edit of this version"):
        MemoryEdit.load(tmp_path / "w")


def test_it_is_evaluated_like_any_other_edit(tiny_llama):
    fact = replace(PEOPLE[0], paraphrases=(OTHER,))
    found = evaluate(
        tiny_llama,
        SERAC(network_of(tiny_llama)).compute(tiny_llama, [fact]),
        [fact],
        progress=False,
    )
    assert found.after["paraphrase"] == found.before["paraphrase"]
    assert found.after["efficacy"]["magnitude"].mean != found.before["efficacy"]["magnitude"].mean


def test_sessions_write_edit_after_edit(tiny_llama, tmp_path):
    with Session(SERAC(network_of(tiny_llama)), tiny_llama) as session:
        session.write(PEOPLE[:1], force=True, progress=False)
        session.write(PEOPLE[1:3], force=True, progress=False)
        assert len(tiny_llama.router.edits) == 2
        with pytest.raises(FactError, match="repeats"):
            session.write(PEOPLE[:1], force=True, progress=False)
        with pytest.raises(EditError, match="save the edit itself"):
            session.history.save(tmp_path / "h")
    assert tiny_llama.router is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Gives a network for `tiny_llama`, which is the same in every test, and the cache it is in; it
    is trained once.
    """
    kept = {}

    def of(model):
        if not kept:
            kept["cache"] = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("KNOWEDIT_CACHE", str(kept["cache"]))
                kept["network"] = train_serac(model, PEOPLE, QUICK_SERAC, progress=False)
        return kept["network"], kept["cache"]

    return of


def test_training_teaches_gate_and_reader(tiny_llama, tmp_path, monkeypatch, trained):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    with pytest.raises(EditError, match="train one with: knowedit train serac tiny-llama"):
        SERAC().compute(tiny_llama, PEOPLE[:1])
    network, cache = trained(tiny_llama)
    monkeypatch.setenv("KNOWEDIT_CACHE", str(cache))
    report = network.report
    assert report["gate_curve"][-1][1] < 0.7 * report["gate_curve"][1][1]  # training losses
    assert min(entry[2] for entry in report["reader_curve"][1:]) < report["reader_curve"][0][2]
    assert report["trainable_parameters"] == report["gate_parameters"] + report["reader_parameters"]
    assert 0 <= report["validation"]["in_scope_found"] <= 1
    with SERAC().compute(tiny_llama, PEOPLE[:1]).applied_to(tiny_llama):
        assert tiny_llama.router.route([PEOPLE[0].text])[0]
    [file] = (cache / "networks").iterdir()
    assert "SERAC network" in describe(file).text


def test_an_interrupted_reader_keeps_the_gate(tiny_llama, tmp_path, monkeypatch, trained):
    """And a training gives the same bits again."""
    from knowedit.methods.learned.serac import training as serac_training

    original = serac_training._Reader.loss

    def stopped(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step)

    whole, _ = trained(tiny_llama)
    monkeypatch.setattr(serac_training._Reader, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_serac(tiny_llama, PEOPLE, QUICK_SERAC, tmp_path / "b", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"b.gate", "b.reader"}
    monkeypatch.setattr(serac_training._Reader, "loss", original)
    monkeypatch.setattr(serac_training._Gate, "loss", None)  # it is not trained again
    resumed = train_serac(tiny_llama, PEOPLE, QUICK_SERAC, tmp_path / "b", progress=False)
    tensors = resumed.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.tensors().items())
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_networks_of_another_model_or_untrained_are_refused(tiny_llama, tiny_gpt2, tmp_path):
    network = network_of(tiny_llama)
    network.save(tmp_path / "n")
    with pytest.raises(
        EditError,
        match="SERAC network .*/n was trained for a model .* knowedit train serac tiny-gpt2",
    ):
        SERAC(tmp_path / "n").compute(tiny_gpt2, PEOPLE[:1])
    network.report = {}
    with pytest.raises(EditError, match="not trained"):
        SERAC(network).compute(tiny_llama, PEOPLE[:1])
