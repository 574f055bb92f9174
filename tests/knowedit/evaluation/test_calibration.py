"""Calibration: what is measured is what a changed model does, the choice avoids sinks and stays at
the start unless something is clearly better (unit).
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from knowedit.errors import ConfigError, EditError, StatisticsError
from knowedit.evaluation.calibration import choose, measure
from knowedit.evaluation.calibration.measure import calibrate, candidates, known_facts
from knowedit.facts.fact import Fact, Probe
from knowedit.methods import MEMIT, NeuronPatch, RoSE
from knowedit.models import calibration
from knowedit.models.calibration import Calibration, LayerTrial, ValueTrial, calibration_of, keep
from knowedit.models.presets import preset_for, rule_of_thumb
from tests.knowedit.models.tiny import build, plant

FACTS = [
    Fact(
        f"The {what} of {{}} is",
        name,
        new,
        true,
        paraphrases=(f"In {name} the {what} is",),
        neighbours=(Probe(f"The {what} of Italy is", true),),
        relation=what,
    )
    for what, name, new, true in (
        ("capital", "France", "Lyon", "Paris"),
        ("language", "Brazil", "Norse", "Portuguese"),
        ("food", "Japan", "bread", "rice"),
        ("colour", "Peru", "blue", "red"),
    )
]


@pytest.fixture(autouse=True)
def own_memory(monkeypatch, tmp_path):
    """Nothing remembered, a cache of its own, and tiny facts that every model knows."""
    monkeypatch.setattr(calibration, "_SINKS", {})
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "STEPS", 3)
    monkeypatch.setattr(measure, "OPENINGS", 2)
    monkeypatch.setattr(measure, "SPARED", 60)
    monkeypatch.setattr(measure, "CLAMPS", 1)
    monkeypatch.setattr(measure, "known_facts", lambda model, facts, count: list(facts)[:count])


@pytest.fixture
def found(tiny_llama):
    return calibrate(tiny_llama, FACTS, progress=False)


def test_a_trial_is_what_a_changed_weight_does(tiny_llama):
    """A rank-one change by the dense formula, put into the weight; log-probabilities by the plain
    model.
    """
    bench = measure._Bench.of(tiny_llama, FACTS[:1], [2])
    trial = bench.trial(2, 1, None)
    fact, keys = FACTS[0], bench.spared[2]
    prompts = [fact.text, *fact.paraphrases]
    rows = [tiny_llama.row(text, fact.subject) for text in prompts]
    own = tiny_llama.keys(rows, [2])[0][2].double()
    C = keys.T @ keys
    size = len(C)
    M = 0.9 * C / C.trace() + 0.1 * torch.eye(size, dtype=C.dtype) / size
    read_in = torch.linalg.solve(M, own[0])
    read_in /= own[0] @ read_in
    assert trial.gain == pytest.approx(float(own[1] @ read_in), rel=1e-5)
    settings = bench.numbers(2).with_settings(steps=3, contexts=("{}",))
    value = measure.optimise_values(tiny_llama, [[fact]], 2, settings)
    texts = [*prompts, fact.neighbours[0].prompt]

    def said():
        ids = [torch.tensor([tiny_llama.row(text).ids]) for text in texts]
        return torch.stack([tiny_llama.hf(x).logits[0, -1].double().log_softmax(-1) for x in ids])

    before = said()
    tiny_llama.weight(2).data += torch.outer(value.delta[0], read_in.float())
    after = said()
    new, true = 32, 32  # both answers begin with a blank, a token of its own
    odds = after[:2, new] - after[:2, true]
    assert trial.paraphrase == pytest.approx(float(odds[1].sigmoid()), abs=1e-5)
    divergence = (before[2].exp() * (before[2] - after[2])).sum()
    assert trial.neighbours == pytest.approx(float(divergence), rel=1e-3)
    assert trial.exact == float(after[0].argmax() == new)


def test_settings_follow_and_are_used(tiny_llama, found):
    assert [trial.layer for trial in found.layers] == [1, 2, 3][: len(found.layers)]
    assert all(len(trial.score) == len(FACTS) == found.facts for trial in found.layers)
    assert all(trial.traced is not None for trial in found.layers)
    assert preset_for(tiny_llama) == rule_of_thumb(tiny_llama)
    chosen = replace(found.choice, layer=2, shared_layers=(2, 3), neuron_layer=3, clamp=1.5)
    keep(replace(found, choice=chosen))
    preset = preset_for(tiny_llama)
    assert preset.measured and preset.origin == "calibrated"
    assert MEMIT().statistics_layers(tiny_llama) == (2,)
    assert RoSE().statistics_layers(tiny_llama) == (2, 3)
    assert MEMIT(layers=(1,)).statistics_layers(tiny_llama) == (1,)
    assert NeuronPatch()._layers(tiny_llama) == (3,)
    task = MEMIT(metric="blend").with_settings(["metric.shares=[0,0,1]"])
    made = task.prepare(tiny_llama, [[FACTS[0]]], None, progress=False)
    assert made.values.clamp == 1.5 and made.values.steps == found.choice.steps
    assert not [warning for warning in made.warnings if "calibrate" in warning]


def test_a_planted_sink_is_avoided(tiny_llama):
    plant(tiny_llama, 1, position=6)
    found = calibrate(tiny_llama, FACTS, progress=False)
    assert found.sinks.layers == (1,)
    assert [trial.layer for trial in found.layers] == [2]
    assert found.choice.layer == 2 and 1 not in found.choice.shared_layers
    assert found.choice.neuron_layer != 1


def test_values_planned_at_the_projection(byte_tokenizer):
    from knowedit.models.editable import EditableModel

    model = EditableModel(build("gemma3_text"), byte_tokenizer)
    found = calibrate(model, FACTS, progress=False)
    assert found.choice.lr is None and found.choice.clamp >= 4.0
    keep(found)
    task = MEMIT(metric="blend").with_settings(["metric.shares=[0,0,1]"])
    made = task.prepare(model, [[FACTS[0]]], None, progress=False)
    assert made.values.clamp == found.choice.clamp


def test_it_is_kept_whole(tiny_llama, found):
    assert calibration_of(tiny_llama) is None
    path = keep(found)
    record = json.loads(path.read_text("utf-8"))
    assert record["kind"] == "calibration" and record["version"] == 1
    assert calibration_of(tiny_llama) == found == Calibration.from_dict(record)
    with pytest.raises(ConfigError, match="newer"):
        Calibration.from_dict({**record, "version": 2})
    path.write_text("{", "utf-8")
    assert calibration_of(tiny_llama) is None
    tiny_llama.weight(1).data *= 2
    tiny_llama._state.fingerprint = None
    assert calibration_of(tiny_llama) is None


def test_facts_that_the_model_knows(tiny_llama, monkeypatch):
    asked = []

    def score(prompts, answers, **others):
        asked.extend(answers)
        return [SimpleNamespace(exact=answer != "rice") for answer in answers]

    monkeypatch.setattr(tiny_llama, "score", score)
    monkeypatch.setattr(measure, "_first_token", lambda model, prompt, answer: answer)
    more = [*FACTS, Fact("The capital of {} is", "Spain", "Cadiz", "Madrid", relation="capital")]
    same = Fact("The sea of {} is", "Spain", "red", "red", relation="sea")
    known = known_facts(tiny_llama, [*more, same])
    assert [f.subject for f in known] == ["France", "Brazil", "Peru", "Spain"]
    assert asked == ["Paris", "Portuguese", "rice", "red", "Madrid"]
    with pytest.raises(EditError, match="knows 3 of 4 facts.*needs 4"):
        known_facts(tiny_llama, FACTS)


def test_an_edited_model_is_refused(tiny_llama):
    from tests.knowedit.edits.test_edit import an_edit

    with an_edit(tiny_llama).applied_to(tiny_llama), pytest.raises(EditError, match="undo"):
        calibrate(tiny_llama, FACTS, progress=False)


def test_candidates(tiny_llama, monkeypatch):
    free = list(range(1, 48))
    monkeypatch.setattr(measure, "free_layers", lambda model: free)
    deep = SimpleNamespace(layers=range(48))
    found = candidates(deep, 8)
    assert len(found) == measure.CANDIDATES and 8 in found
    assert min(found) == 1 and max(found) < 48 * measure.DEPTH


def trial(layer, score, apart=(0.5, 0.5)):
    return LayerTrial(layer, 1, None, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, tuple(score), tuple(apart))


class TestChoice:
    def test_the_start_stays_unless_clearly_beaten(self):
        noisy = {4: (0.5, 0.6, 0.4, 0.5), 5: (0.9, 0.2, 0.7, 0.4)}
        assert choose.clearly_best(noisy, 4) == 4
        clear = {4: (0.5, 0.6, 0.4, 0.5), 5: (0.7, 0.75, 0.65, 0.7)}
        assert choose.clearly_best(clear, 4) == 5
        assert choose.clearly_best(clear, 5) == 5
        assert choose.clearly_best(noisy, 9) == 5  # the start was not tried

    def test_layers(self):
        trials = [trial(1, (0.1, 0.1)), trial(4, (0.8, 0.8)), trial(6, (0.7, 0.7), (0.9, 0.9))]
        assert choose.one_layer(trials, 1) == 4
        assert choose.shared_layers(trials, (1, 4), 4) == (4, 6)
        assert choose.shared_layers(trials, (4, 6, 7), 4) == (4, 6, 7)  # 7 was not tried
        assert choose.shared_layers(trials, (7, 8), 4) == (4, 6)
        assert choose.neuron_layer(trials, 4) == 6

    def test_clamp_and_steps(self):
        tried = [ValueTrial(4, 0.75, 3, 0.5, 9), ValueTrial(4, 1.1, 3, 1.0, 30)]
        assert choose.clamp(tried) == tried[1]
        assert choose.clamp(tried[:1]) == tried[0]
        assert choose.steps(tried[0], 25) == 25 and choose.steps(tried[1], 25) == 39


def test_shipped_ones_avoid_sinks():
    found = calibration.shipped()
    assert all(key == one.fingerprint for key, one in found.items())
    for one in found.values():
        assert not set(one.sinks.layers) & {one.choice.layer, *one.choice.shared_layers}
        assert one.choice.neuron_layer not in one.sinks.layers


def test_keys_of_zeros_are_refused_by_name():
    with pytest.raises(StatisticsError, match="keys .* all zeros.*leave the layer out"):
        measure._ReadIn(torch.zeros(5, 8, dtype=torch.float64))
