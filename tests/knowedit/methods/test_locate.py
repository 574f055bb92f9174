"""ROME and MEMIT against the published formulas written densely in float64, and what they refuse
(unit, model).
"""

from dataclasses import replace

import pytest
import torch

from knowedit.errors import EditError, StatisticsError
from knowedit.facts.fact import Fact, FactError
from knowedit.methods import EMMET, MEMIT, ROME, FineTuning, NeuronPatch, statistics_for
from knowedit.methods.listing import methods
from knowedit.methods.locate.keys import group_keys
from knowedit.methods.locate.metrics import Covariance
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.values import ValueSettings, optimise_values, prompt_rows
from knowedit.methods.registry import method_class
from knowedit.models import calibration
from knowedit.models.families import preset_of_shape
from knowedit.models.presets import preset_for, rule_of_thumb
from tests.knowedit.methods.helpers import FACTS, MEAN, SAME, VALUES, statistics_of, target_of
from tests.knowedit.models.tiny import plant


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    return request.getfixturevalue(request.param)


def test_memit_is_the_published_formula(tiny):
    """Layers 1 and 2: keys and residual recomputed after each write; per layer solve(lambda C + K
    Kᵀ) in float64.
    """
    statistics = statistics_of(tiny, [1, 2])
    weight = 7.0
    made = MEMIT(
        layers=(1, 2), target=target_of(VALUES), metric=Covariance(weight=weight), keys=MEAN
    ).compute(tiny, FACTS, statistics)
    groups = [[fact] for fact in FACTS]
    targets = optimise_values(tiny, groups, 2, VALUES)
    wanted = targets.value + targets.delta
    originals = {layer: tiny.weight(layer).clone() for layer in (1, 2)}
    for left, layer in ((2, 1), (1, 2)):
        found = group_keys(tiny, groups, layer, 2, VALUES.contexts)
        K, now, C = found.keys.T, found.outputs, statistics.moment(layer)
        adjusted = torch.linalg.solve(weight * C + K @ K.T, K)
        update = ((wanted - now).double().T / left) @ adjusted.T
        assert (made.delta(layer) - update).norm() <= 1e-5 * update.norm()
        tiny.weight(layer).data += (update.T if tiny.layout.transposed else update).float()
    for layer, original in originals.items():
        tiny.weight(layer).data.copy_(original)


def test_every_context_is_a_key_of_its_own_by_default(tiny):
    """The same value at each context's key: solve(lambda C + K Kᵀ) with the residual repeated; rank
    = subjects.
    """
    statistics, weight = statistics_of(tiny, [1]), 7.0
    made = MEMIT(layers=(1,), target=target_of(VALUES), metric=Covariance(weight=weight)).compute(
        tiny, FACTS, statistics
    )
    groups = [[fact] for fact in FACTS]
    delta = optimise_values(tiny, groups, 1, VALUES).delta.double()
    rows = [row for fact in FACTS for row in prompt_rows(tiny, fact, VALUES.contexts)]
    K = tiny.keys(rows, [1])[0][1].double().T
    owner = torch.arange(len(FACTS)).repeat_interleave(len(VALUES.contexts))
    A = torch.linalg.solve(weight * statistics.moment(1) + K @ K.T, K).T
    update = delta[owner].T @ A
    assert (made.delta(1) - update).norm() <= 1e-5 * update.norm()
    assert next(iter(made.changes.values())).rank == len(FACTS)
    own = ((A @ K) * (owner[:, None] == owner)).sum(0)
    assert made.report.layers["1"]["gain"] == pytest.approx(float(own.mean()), abs=1e-6)


def test_rome_is_the_published_formula(tiny):
    statistics = statistics_of(tiny, [1])
    made = ROME(layers=(1,), target=target_of(VALUES)).compute(tiny, FACTS[:1], statistics)
    targets = optimise_values(tiny, [FACTS[:1]], 1, VALUES)
    rows = prompt_rows(tiny, FACTS[0], VALUES.contexts)
    k = tiny.keys(rows, [1])[0][1].double().mean(0)
    u = torch.linalg.solve(statistics.moment(1), k)
    update = torch.outer(targets.delta[0].double(), u) / (u @ k)
    assert (made.delta(1) - update).norm() <= 1e-5 * update.norm()
    torch.testing.assert_close(
        made.delta(1).double() @ k, targets.delta[0].double(), rtol=1e-4, atol=1e-4
    )


def test_compute_leaves_the_model_alone(tiny):
    from knowedit.models.fingerprint import weights_fingerprint

    before = weights_fingerprint(tiny.hf)
    MEMIT(layers=(1, 2), target=target_of(VALUES)).compute(tiny, FACTS, statistics_of(tiny, [1, 2]))
    assert weights_fingerprint(tiny.hf) == before
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in tiny.hf.modules()
    )


def test_the_same_input_gives_the_same_bits(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    one, two = (
        MEMIT(layers=(1,), target=target_of(VALUES)).compute(tiny_llama, FACTS, statistics)
        for _ in range(2)
    )
    assert one.key == two.key


@pytest.mark.parametrize("gain", [0.5, 0.9, 0.98])
def test_lambda_follows_from_the_gain(tiny_llama, gain):
    editor = MEMIT(layers=(1,), target=target_of(VALUES), metric=Covariance(gain=gain), keys=MEAN)
    made = editor.compute(tiny_llama, FACTS[:1], statistics_of(tiny_llama, [1]))
    assert made.report.layers["1"]["gain"] == pytest.approx(gain, abs=1e-9)
    assert made.report.layers["1"]["lambda"] > 0


def test_an_explicit_lambda_wins(tiny_llama):
    made = MEMIT(layers=(1,), target=target_of(VALUES), metric=Covariance(weight=123.0)).compute(
        tiny_llama, FACTS[:1], statistics_of(tiny_llama, [1])
    )
    assert made.report.layers["1"]["lambda"] == 123.0


def test_one_subject_gets_one_key_by_default(tiny_llama):
    statistics, facts = statistics_of(tiny_llama, [1]), [*FACTS, SAME]
    merged = MEMIT(layers=(1,), target=target_of(VALUES)).compute(tiny_llama, facts, statistics)
    apart = MEMIT(layers=(1,), target=target_of(VALUES), merge_subjects=False).compute(
        tiny_llama, facts, statistics
    )
    assert (
        next(iter(merged.changes.values())).rank == 3
        and next(iter(apart.changes.values())).rank == 4
    )
    assert any("share one value" in warning for warning in merged.warnings)


def test_compute_each_equals_single_edits(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    editor = ROME(layers=(1,), target=target_of(VALUES))
    for fact, edit in zip(FACTS, editor.compute_each(tiny_llama, FACTS, statistics)):
        alone = editor.compute(tiny_llama, [fact], statistics)
        assert edit.facts == [fact]
        assert (edit.delta(1) - alone.delta(1)).norm() <= 1e-4 * alone.delta(1).norm()


def test_a_subject_at_position_zero_is_reported_and_kept_out(smollm):
    fact = Fact(prompt="{} is the home of", subject="Paris", target="the tango")
    assert smollm.row(fact.text, "Paris").subject == 0
    rows = prompt_rows(smollm, fact, ValueSettings().contexts)
    assert len(rows) == 2 and all(row.subject > 0 for row in rows)
    made = MEMIT(target=HiddenState(steps=2)).compute(smollm, [fact], statistics_of(smollm, [5]))
    assert any("very first token" in warning for warning in made.warnings)


def test_low_gain_and_large_updates_are_reported(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    low = MEMIT(layers=(1,), target=target_of(VALUES), metric=Covariance(weight=1e6)).compute(
        tiny_llama, FACTS, statistics
    )
    assert any("of the planned change is realised" in w for w in low.warnings)
    tiny_llama.weight(1).data *= 0.001
    large = MEMIT(layers=(1,), target=target_of(VALUES)).compute(
        tiny_llama, FACTS, statistics_of(tiny_llama, [1])
    )
    assert any("of its own norm" in w for w in large.warnings)


class TestRefusals:
    def test_a_sink_layer(self, tiny_llama, monkeypatch):
        statistics = statistics_of(tiny_llama, [1])
        monkeypatch.setattr(calibration, "_SINKS", {})
        plant(tiny_llama, 1, position=5)
        with pytest.raises(EditError, match="layer 1 carries an attention sink.*allow_sinks"):
            MEMIT(layers=(1,), target=target_of(VALUES)).compute(tiny_llama, FACTS, statistics)
        made = MEMIT(layers=(1,), target=target_of(VALUES), allow_sinks=True).compute(
            tiny_llama, FACTS, statistics
        )
        assert any("attention sink" in warning for warning in made.warnings)

    def test_no_statistics(self, tiny_llama):
        with pytest.raises(EditError, match="needs key statistics"):
            MEMIT(layers=(1,)).compute(tiny_llama, FACTS)

    def test_statistics_of_another_model(self, tiny_llama, tiny_gpt2):
        with pytest.raises(StatisticsError, match="not of tiny-llama"):
            MEMIT(layers=(1,)).compute(tiny_llama, FACTS, statistics_of(tiny_gpt2, [1]))

    def test_rome_with_several_subjects_or_layers(self, tiny_llama):
        statistics = statistics_of(tiny_llama, [1, 2])
        with pytest.raises(EditError, match="one subject at a time"):
            ROME(layers=(1,)).compute(tiny_llama, FACTS, statistics)
        with pytest.raises(EditError, match="one layer"):
            ROME(layers=(1, 2)).compute(tiny_llama, FACTS[:1], statistics)

    def test_contradictions(self, tiny_llama):
        facts = [FACTS[0], replace(FACTS[0], target="Nice")]
        with pytest.raises(FactError, match="contradicts"):
            MEMIT(layers=(1,)).compute(tiny_llama, facts, statistics_of(tiny_llama, [1]))


def test_an_unknown_model_is_told_so(tiny_llama):
    assert preset_for(tiny_llama) == rule_of_thumb(tiny_llama)
    assert not preset_for(tiny_llama).measured
    layer = preset_for(tiny_llama).layers[0]
    made = MEMIT().compute(tiny_llama, FACTS, statistics_of(tiny_llama, [layer]))
    told = [warning for warning in made.warnings if "not calibrated" in warning]
    assert len(told) == 1 and "knowedit calibrate" in told[0]


@pytest.mark.parametrize(
    ("shape", "layers", "one", "lr", "clamp"),
    [
        (("gpt2", 48, 1600, 6400), range(13, 18), 17, 0.5, 0.75),
        (("gptj", 28, 4096, 16384), range(3, 9), 5, 0.5, 0.75),
        (("llama", 32, 4096, 14336), range(4, 9), 5, 0.1, 0.75),
        (("llama", 32, 4096, 11008), range(4, 9), 5, 0.5, 4),
        (("qwen2", 28, 3584, 18944), range(4, 9), 5, 0.5, 4),
    ],
)
def test_published_presets_go_by_the_shape(shape, layers, one, lr, clamp):
    preset = preset_of_shape(*shape)
    assert (
        preset.layers == tuple(layers)
        and preset.one_layer == one
        and preset.origin == "published"
        and not preset.measured
    )
    assert (preset.values["lr"], preset.values["clamp"]) == (lr, clamp) and set(
        preset.layers
    ) <= set(preset.statistics_layers)


def test_methods_of_one_layer_take_the_presets(tiny_llama, monkeypatch):
    both = replace(
        rule_of_thumb(tiny_llama),
        layers=(1, 2),
        one_layer=1,
        values=vars(VALUES),
        origin="published",
    )
    monkeypatch.setattr("knowedit.methods.locate.recipe.preset_for", lambda model: both)
    statistics = statistics_of(tiny_llama, [1, 2])
    for editor, layers in ((ROME(), {1}), (EMMET(), {1}), (MEMIT(), {1, 2})):
        made = editor.compute(tiny_llama, FACTS[:1], statistics, progress=False)
        assert set(made.keys) == layers
        assert any("published for this shape" in warning for warning in made.warnings)


def test_the_default_model_has_a_measured_preset(smollm):
    assert preset_for(smollm).measured and preset_for(smollm).layers == (5,)


def test_named_statistics_that_nothing_reads_are_refused(tiny_llama, tmp_path):
    editors = [FineTuning(), NeuronPatch()]
    assert statistics_for(editors, tiny_llama, None, None) is None
    with pytest.raises(StatisticsError, match="no method here reads statistics"):
        statistics_for(editors, tiny_llama, None, None, tmp_path)


def test_methods_that_read_texts_have_their_own_choice():
    made = NeuronPatch().with_corpus("a.txt")
    assert (NeuronPatch().corpus, made.corpus, made.with_corpus(None)) == ("self", "a.txt", made)
    assert MEMIT().with_corpus("a.txt") == MEMIT()


def test_every_method_is_listed_under_its_name():
    assert all(method_class(name).name.lower() == name for name in methods())
