"""MEND: gradients as token factors, the hyper-network, its training, resuming it, and the edits
it makes (unit).
"""

import copy
import json
import math
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from knowedit.cli.train import facts_to_train_on
from knowedit.edits.edit import Edit
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, Probe
from knowedit.facts.records import write_facts
from knowedit.methods.learned.examples import examples, split, sums
from knowedit.methods.learned.loop import Plan, stamp, train
from knowedit.methods.learned.mend.network import MendNetwork, token_factors
from knowedit.methods.learned.mend.training import MendTraining, train_mend
from knowedit.methods.learned.named import mend
from knowedit.methods.learned.named.mend import MEND, compressed
from knowedit.methods.learned.networks import NetworkFile
from knowedit.methods.learned.serac.network import SeracNetwork
from knowedit.methods.registry import make_method
from knowedit.models.load import load_model
from knowedit.models.partial import PartialModel, layer_outputs, with_weights
from knowedit.models.texts import Texts
from tests.knowedit.commandline import CommandLine, check_json
from tests.knowedit.methods.trained import LAYERS, NAMES, PEOPLE, QUICK_MEND, QUICK_SERAC


def texts_of(model, facts, first=2):
    return Texts(model, [model.row(f.text, answer=f.target) for f in facts], first)


def dense(model, name, left, right):
    """`left rightᵀ` as the module stores its weight."""
    delta = left @ right.T
    return delta.T if type(model.hf.get_submodule(name)).__name__ == "Conv1D" else delta


def test_the_upper_layers_say_what_the_model_says(tiny):
    rows = [tiny.row("Anna lives in Rome").ids, tiny.row("Oslo").ids]
    ids, mask = tiny.pad(rows)
    with torch.no_grad():
        whole = tiny.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ((order, states),) = layer_outputs(tiny, rows, 1)
    found = PartialModel.for_texts(tiny, 2, 40).run(states[[order.index(i) for i in range(2)]])
    torch.testing.assert_close(found[mask], whole[mask], rtol=1e-4, atol=1e-5)


def test_texts_measure_what_the_model_scores(tiny):
    texts = texts_of(tiny, PEOPLE[:5])
    batch = texts.batch([3, 0])
    scores = tiny.score([PEOPLE[3].text, PEOPLE[0].text], [PEOPLE[3].target, PEOPLE[0].target])
    assert float(texts.nll(batch)) == pytest.approx(-sum(s.logprob for s in scores), rel=1e-4)
    assert float(texts.kl(batch)) == pytest.approx(0, abs=1e-5)
    moved = {
        2: (
            torch.randn(tiny.hidden, 1, generator=torch.Generator().manual_seed(0)),
            torch.ones(tiny.d_ff, 1),
        )
    }
    with tiny.virtual(moved):
        assert float(texts.kl(batch)) > 1e-3


def test_token_factors_add_up_to_each_texts_gradient(tiny):
    network = MendNetwork.new(tiny, LAYERS, 4)
    texts = texts_of(tiny, PEOPLE[:3])
    tokens = token_factors(texts, texts.batch(range(3)), network.weights)
    for number in range(3):
        alone = texts_of(tiny, PEOPLE[number : number + 1])
        weights = {f"{name}.weight": tiny.hf.get_submodule(name).weight for name in tokens}
        leaves = {
            name: weight.detach().clone().requires_grad_() for name, weight in weights.items()
        }
        loss = with_weights(tiny, leaves, lambda alone=alone: alone.nll(alone.batch([0])))
        wanted = torch.autograd.grad(loss, list(leaves.values()))
        for (name, (x, delta, owner)), gradient in zip(tokens.items(), wanted):
            mine = owner == number
            found = dense(tiny, name, delta[mine].T, x[mine].T)
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)


def test_a_new_network_is_the_normalised_gradient(tiny_llama):
    network = MendNetwork.new(tiny_llama, LAYERS, 4, seed=1)
    network.start_at(0.01)
    texts = texts_of(tiny_llama, PEOPLE[:2])
    tokens = token_factors(texts, texts.batch(range(2)), network.weights)
    name = network.weights[0]
    x, delta, _ = tokens[name]
    rows = torch.cat([x, delta], 1).double()
    network.normalise(
        {name: torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), (rows**2).sum(0)])}
    )
    left, right = network.factors(tokens)[name]
    wanted = (rows - rows.mean(0)) / rows.std(0, correction=0)
    torch.testing.assert_close(
        torch.cat([right.T, -100 * left.T], 1).double(), wanted, rtol=2e-3, atol=2e-3
    )
    # what is shared is shared: gate and up have one shape, down another
    assert (
        network.places[network.weights[1]][0]
        == network.places[name][0]
        != network.places[network.weights[2]][0]
    )


def test_grouped_factors_are_the_edits_of_the_groups(tiny):
    network = MendNetwork.new(tiny, LAYERS, 4)
    with torch.no_grad():
        for p in network.parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    network.report = {"steps": 0}
    texts = texts_of(tiny, PEOPLE[:4])
    batch = texts.batch(range(4))
    tokens = token_factors(texts, batch, network.weights)
    grouped = network.factors(tokens, torch.tensor([0, 1, 0, 1]))
    edits = [MEND(network).compute(tiny, part) for part in (PEOPLE[0:4:2], PEOPLE[1:4:2])]
    whose = torch.tensor([0, 1, 0, 1])
    with tiny.virtual(
        {name: (left[whose], right[whose]) for name, (left, right) in grouped.items()}
    ):
        together = texts.logits(batch)
    for number, edit in enumerate(edits):
        with edit.applied_to(tiny):
            alone = texts.logits(batch)
        mine = batch.places.line % 2 == number
        torch.testing.assert_close(together[mine], alone[mine], rtol=1e-3, atol=1e-3)


def test_edits_of_several_facts_are_summed(tiny, monkeypatch):
    network = MendNetwork.new(tiny, LAYERS, 4)
    network.start_at(0.01)
    network.report = {"steps": 0}
    monkeypatch.setattr(mend, "AT_ONCE", 1)  # several chunks
    method = MEND(network, scale=0.5)
    one, two, both = (
        method.compute(tiny, facts) for facts in (PEOPLE[:1], PEOPLE[1:2], PEOPLE[:2])
    )
    for layer in LAYERS:
        torch.testing.assert_close(
            both.delta(layer, tiny),
            one.delta(layer, tiny) + two.delta(layer, tiny),
            rtol=1e-3,
            atol=1e-5,
        )
    whole = MEND(network).compute(tiny, PEOPLE[:1])
    torch.testing.assert_close(whole.delta(2, tiny), 2 * one.delta(2, tiny), rtol=1e-4, atol=1e-6)
    assert (
        set(both.changes) == set(one.changes)
        and both.changes
        and all("mlp" in name for name in both.changes)
    )


def test_compressed_keeps_the_product_at_its_rank():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(width, 3, generator=generator).repeat(1, 4) for width in (20, 30))
    u, v = compressed(left, right)
    assert u.shape == (20, 3) and v.shape == (30, 3)
    torch.testing.assert_close(u @ v.T, left @ right.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_trained_network_edits_facts_it_has_not_seen(request, name, tmp_path):
    model = request.getfixturevalue(name)
    before = model.fingerprint
    network = train_mend(model, PEOPLE, QUICK_MEND, tmp_path / "n.safetensors", progress=False)
    report, curve = network.report, network.report["curve"]
    assert report["validation"]["loss"] < curve[0][2] and report["steps"] == 24
    assert report["trainable_parameters"] == sum(p.numel() for p in network.parameters.values()) > 0
    assert report["seconds"] > report["preparation_seconds"] > 0
    assert not list(tmp_path.glob("*.checkpoint"))
    fact = Fact("{} lives in", "Zora", "Oslo")
    made = MEND(tmp_path / "n.safetensors").compute(model, [fact])
    [was] = model.score([fact.text], [fact.target])
    with made.applied_to(model):
        [now] = model.score([fact.text], [fact.target])
    assert now.logprob > was.logprob + 1
    assert model.fingerprint == before
    made.save(tmp_path / "e.safetensors")
    assert Edit.load(tmp_path / "e.safetensors").key == made.key


def run(steps, checkpoint, stop=None, seed=0):
    """A small regression; `stop`: Ctrl-C there."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.zeros(3))

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return ((x @ weight - x.sum(1)) ** 2).mean()

    plan = Plan(steps=steps, lr=0.1, warm_up=3, validate=4)
    course = train(
        {"w": weight},
        loss,
        lambda: float((weight.detach() - 1).norm()),
        plan,
        checkpoint,
        "s",
        progress=False,
    )
    return weight.detach(), course


def test_an_interrupted_training_resumes_to_the_same_bits(tmp_path):
    whole, course = run(20, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(20, tmp_path / "b", stop=10)
    assert (tmp_path / "b").exists()
    resumed, again = run(20, tmp_path / "b")
    assert torch.equal(whole, resumed)
    assert [e[0::2] for e in again.curve] == [e[0::2] for e in course.curve] and again.curve[
        -1
    ] == course.curve[-1]
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert course.best == min(entry[2] for entry in course.curve) and course.curve[0][1] is None


@pytest.mark.parametrize("late", [False, True])  # before the parameters move, and when they have
def test_an_interrupted_step_is_taken_and_counted_or_neither(tmp_path, monkeypatch, late):
    whole, _ = run(20, tmp_path / "a")
    taken, step = [], torch.optim.Adam.step

    def stopped(self, *args):
        taken.append(1)
        if len(taken) == 7 and not late:
            signal.raise_signal(signal.SIGINT)
        step(self, *args)
        if len(taken) == 7 and late:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", stopped)
        run(20, tmp_path / "b")
    resumed, course = run(20, tmp_path / "b")
    assert torch.equal(whole, resumed) and course.steps == 20


@pytest.mark.parametrize("look", [2, 3])
def test_an_interrupted_validation_is_made_up_for(tmp_path, look):
    def go(stop):
        weight, calls = torch.nn.Parameter(torch.ones(3)), []

        def validate():
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return float(-weight.detach().sum())

        plan, loss = Plan(4, 0.1, validate=2, warm_up=1), lambda step: ((weight - 5) ** 2).sum()
        train_it = partial(
            train, {"w": weight}, loss, validate, plan, tmp_path / str(stop), "s", progress=False
        )
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train_it()
        return weight, [entry[0] for entry in train_it().curve]

    (weight, curve), (whole, course) = go(look), go(0)
    assert curve == course == [0, 2, 4] and torch.equal(weight, whole)


def test_the_network_resumes_to_the_same_bits(tiny_llama, tmp_path, monkeypatch):
    whole = train_mend(tiny_llama, PEOPLE, QUICK_MEND, tmp_path / "a", progress=False)
    from knowedit.methods.learned.mend import training as mend_training

    original = mend_training._Task.loss

    def stopped(self, step):
        if step == 13:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(mend_training._Task, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_mend(tiny_llama, PEOPLE, QUICK_MEND, tmp_path / "b", progress=False)
    monkeypatch.setattr(mend_training._Task, "loss", original)
    resumed = train_mend(tiny_llama, PEOPLE, QUICK_MEND, tmp_path / "b", progress=False)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name


def test_out_of_minutes_keeps_the_checkpoint_and_goes_on(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    plan = Plan(steps=6, lr=0.1, minutes=1e-9)
    steps = []
    for _ in range(6):
        course = train(
            {"w": weight},
            lambda _: (weight - 1).square().sum(),
            lambda: 0.0,
            plan,
            tmp_path / "c",
            "s",
            progress=False,
        )
        steps.append(course.steps)
    assert steps == [1, 2, 3, 4, 5, 6] and not (tmp_path / "c").exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(20, tmp_path / "b", stop=5)
    weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(EditError, match="other settings; remove it"):
        train(
            {"w": weight},
            lambda _: weight.sum(),
            lambda: 0.0,
            Plan(steps=2, lr=0.1),
            tmp_path / "b",
            "t",
            progress=False,
        )


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(EditError, match="loss is nan at step 0; lower the learning rate"):
        train(
            {"w": weight},
            lambda _: weight.sum() * math.nan,
            lambda: 0.0,
            Plan(steps=2, lr=1),
            tmp_path / "c",
            "s",
            progress=False,
        )


def test_examples_ask_for_the_fact_and_leave_neighbours():
    made = examples(PEOPLE, seed=3)
    assert made == examples(PEOPLE, seed=3) != examples(PEOPLE, seed=4)
    for fact, example in zip(PEOPLE, made):
        assert all(fact.subject in text for text in example.rephrasings)
        swapped = "The home of {} is" if "lives" in fact.prompt else "{} lives in"
        assert any(
            text.endswith(swapped.replace("{}", fact.subject)) for text in example.rephrasings
        )
        others = [probe for probe in example.neighbours if probe.answer]
        assert others and all(
            fact.subject not in probe.prompt and probe.answer == "Kiev" for probe in others
        )
        assert any(fact.subject in probe.prompt for probe in example.neighbours)


def test_sums_are_wrong_and_their_neighbours_right():
    found = sums(30, seed=1)
    assert (
        found == sums(30, seed=1) != sums(30, seed=2)
        and len({fact.subject for fact in found}) == 30
    )
    for fact in found:
        a, b = map(int, fact.subject.split("+"))
        assert fact.text == f"{a}+{b}=" and a != b and int(fact.true) == a + b != int(fact.target)
        assert len(fact.paraphrases) > 5 and all(
            str(a) in text and str(b) in text for text in fact.paraphrases
        )
        for probe in fact.neighbours:
            numbers = [int(n) for n in re.findall(r"\d+", probe.prompt)]
            assert (
                sum(numbers) == int(probe.answer)
                and fact.subject not in probe.prompt.split("=")[0].split()
            )


def test_the_facts_to_train_on_leave_the_tested_subjects_out(tmp_path):
    write_facts(tmp_path / "a.jsonl", PEOPLE), write_facts(tmp_path / "b.jsonl", PEOPLE[:2])
    found = facts_to_train_on(
        [str(tmp_path / "a.jsonl"), "sums"], [str(tmp_path / "b.jsonl")], 7, seed=0
    )
    assert len(found) == 157 and set(found[:7]) <= set(PEOPLE[2:]) and found[7:] == sums()


def test_training_and_validation_share_no_subject():
    twice = PEOPLE + [Fact("{} likes", f.subject, "snow") for f in PEOPLE]
    told, held = split(twice, share=0.2)
    assert len(told) + len(held) == len(twice) and held
    assert not {f.subject for f in told} & {f.subject for f in held}


def test_too_few_facts_or_the_wrong_ones_are_refused(tiny_llama, tmp_path):
    with pytest.raises(EditError, match="too few to train on"):
        train_mend(tiny_llama, PEOPLE[:5], QUICK_MEND, tmp_path / "n", progress=False)
    alone = [Fact("{} lives in", name, "Rome") for name in NAMES]
    with pytest.raises(EditError, match="no fact has another wording"):
        train_mend(tiny_llama, alone, QUICK_MEND, tmp_path / "n", progress=False)
    worded = [
        Fact("{} lives in", name, "Rome", paraphrases=(f"{name} has a home in",)) for name in NAMES
    ]
    with pytest.raises(EditError, match="has no neighbours, and no other fact is of its relation"):
        train_mend(tiny_llama, worded, QUICK_MEND, tmp_path / "n", progress=False)
    kept = [
        Fact(
            "{} lives in",
            n,
            "Rome",
            paraphrases=(f"{n} is at home in",),
            neighbours=(Probe("Kim is"),),
        )
        for n in NAMES
    ]
    assert len(examples(kept)) == len(kept)
    assert not list(tmp_path.iterdir())


def test_networks_that_are_missing_untrained_or_of_another_model_are_refused(
    tiny_llama, tiny_gpt2, tmp_path, monkeypatch
):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    with pytest.raises(EditError, match="train one with: knowedit train mend tiny-llama"):
        MEND().compute(tiny_llama, PEOPLE[:1])
    nameless = load_model(copy.deepcopy(tiny_llama.hf), tiny_llama.tokenizer)
    with pytest.raises(EditError, match=r"train one with train_mend\(model, facts\)"):
        MEND().compute(nameless, PEOPLE[:1])
    network = MendNetwork.new(tiny_llama, LAYERS, 4)
    with pytest.raises(EditError, match="not trained"):
        MEND(network).compute(tiny_llama, PEOPLE[:1])
    network.report = {"steps": 1}
    network.save(tmp_path / "n")
    with pytest.raises(
        EditError, match="trained for a model with fingerprint .* knowedit train mend tiny-gpt2"
    ):
        MEND(tmp_path / "n").compute(tiny_gpt2, PEOPLE[:1])
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(EditError, match="damaged"):
        MEND(tmp_path / "broken").compute(tiny_llama, PEOPLE[:1])
    with pytest.raises(EditError, match="layers from 1 on"):
        MendNetwork.new(tiny_llama, (0,), 4)
    with pytest.raises(EditError, match="plan.steps must be at least 1"):
        Plan(steps=0, lr=1)
    assert Path(tmp_path / "n").stat().st_size < 10**6


def test_without_a_file_the_network_of_the_cache_is_used(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    network = train_mend(
        tiny_llama,
        PEOPLE,
        MendTraining(rank=4, facts=4, layers=(3,), plan=Plan(steps=1, lr=1e-3)),
        progress=False,
    )
    named, found = (
        MEND(network).compute(tiny_llama, PEOPLE[:1]),
        MEND().compute(tiny_llama, PEOPLE[:1]),
    )
    assert named.key == found.key and set(found.keys) == {3}


def test_train_and_edit_from_the_command_line(tiny_llama, tmp_path, own_cache, monkeypatch, capsys):
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    for name, facts in (
        ("told", PEOPLE),
        ("asked", [Fact("{} lives in", "Zora", "Oslo")]),
        ("tested", PEOPLE[:2]),
    ):
        write_facts(tmp_path / f"{name}.jsonl", facts)
    knowedit = CommandLine(monkeypatch, capsys, tmp_path, cache=own_cache)
    assert "knowedit train mend model" in knowedit(
        "edit", "model", "asked.jsonl", "--method", "mend", "-o", "e", code=1
    )
    report = json.loads(
        knowedit(
            "train",
            "mend",
            "model",
            "--dataset",
            "told.jsonl",
            "--without",
            "tested.jsonl",
            "--steps",
            "2",
            "--json",
        )
    )
    assert report["steps"] == 2 and sum(report["facts"].values()) == len(PEOPLE) - 2
    assert "1 facts" in knowedit("edit", "model", "asked.jsonl", "--method", "mend", "-o", "e")
    assert "MEND edit" in knowedit("inspect", "e")
    assert "saved to s" in knowedit(
        "train", "serac", "model", "--dataset", "told.jsonl", "--steps", "1", "-o", "s"
    )
    report = SeracNetwork.load("s", tiny_llama).report
    check_json(["train", "serac"], json.dumps({"file": "s", **report}))
    asked = (
        "edit",
        "model",
        "asked.jsonl",
        "--method",
        "serac",
        "--set",
        'network="s"',
        "-o",
        "m",
    )
    assert "1 facts" in knowedit(*asked)
    assert "changes no weight" in knowedit("apply", "model", "m", "-o", "folder", code=1)
    assert "too few" in knowedit(
        "train", "mend", "model", "--dataset", "asked.jsonl", "-o", "n", code=1
    )


def test_the_record_names_the_network_by_file_and_digest(tiny_llama, tmp_path):
    network = MendNetwork.new(tiny_llama, LAYERS, 4)
    network.report = {"steps": 1}
    made = MEND(network).compute(tiny_llama, PEOPLE[:1])
    assert made.config["network"] == {"reference": "MendNetwork", "digest": network.digest()}
    with pytest.raises(EditError, match="was an object .*pass it again"):
        MEND.from_dict(made.config)
    file = network.save(tmp_path / "n")
    made = MEND(file, scale=0.5).compute(tiny_llama, PEOPLE[:1])
    again = make_method(json.loads(json.dumps(made.config)))
    assert again.network == NetworkFile(file, network.digest()) and again.scale == 0.5
    assert again.compute(tiny_llama, PEOPLE[:1]).key == made.key
    network.start_at(0.5)
    network.save(file)
    with pytest.raises(EditError, match="another MEND network .* than the recorded one"):
        again.compute(tiny_llama, PEOPLE[:1])


@pytest.mark.parametrize("settings", [QUICK_MEND, QUICK_SERAC], ids=["mend", "serac"])
def test_settings_of_a_training_go_to_a_dictionary_and_back(settings):
    assert type(settings).from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    plan = "plan" if settings is QUICK_MEND else "gate"
    longer = settings.with_settings([f"{plan}.steps=99"])
    assert stamp("f", settings) != stamp("f", longer)
    assert stamp("f", longer) == stamp("f", longer.with_settings({f"{plan}.minutes": 1.0}))
    with pytest.raises(EditError, match="did you mean 'locality'"):
        settings.with_settings(localty=1.0)
