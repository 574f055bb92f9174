"""Attention sinks: found where they are written, at any position, and avoided (unit,
model).
"""

import pytest
import torch

from knowedit.facts.wordings.ordinary import sentences
from knowedit.models import calibration
from knowedit.models.calibration import sinks_of
from knowedit.models.editable import EditableModel
from knowedit.models.presets import free_layers, preset_for
from knowedit.models.sinks import SINK_RATIO, WIDTH, measure_sinks
from tests.knowedit.models.tiny import build, plant


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(calibration, "_SINKS", {})


@pytest.mark.parametrize("position", [0, 7])
def test_a_planted_sink_is_found(tiny_llama, position):
    assert measure_sinks(tiny_llama).layers == ()
    plant(tiny_llama, 2, position)
    found = measure_sinks(tiny_llama)
    assert found.layers == (2,) and found.written[2] > 5 * SINK_RATIO
    # the residual keeps what was written
    assert min(found.residual[2:]) > 3 * max(found.residual[:2])


def test_the_ratio_is_the_largest_norm_over_the_median(tiny_gpt2):
    lengths = []
    handle = tiny_gpt2.projection(1).register_forward_hook(
        lambda _m, _x, output: lengths.append(output[0].double().norm(dim=-1))
    )
    for text in sentences():
        tiny_gpt2.final_states(tiny_gpt2.pad([tiny_gpt2.row(text).ids[:WIDTH]])[0])
    handle.remove()
    every = torch.cat(lengths)
    wanted = float(every.max() / every.median())
    assert measure_sinks(tiny_gpt2).written[1] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "opt"])
def test_norms_behind_the_mlp_and_flattened_texts(byte_tokenizer, family):
    model = EditableModel(build(family), byte_tokenizer)
    plain = measure_sinks(model)
    assert plain.layers == () and min(plain.written) > 1
    plant(model, 1, 0) if family != "opt" else None
    assert measure_sinks(model).layers == ((1,) if family != "opt" else ())


def test_default_layers_avoid_it(tiny_llama):
    assert preset_for(tiny_llama).one_layer == 1
    calibration._SINKS.clear()
    plant(tiny_llama, 1, 4)
    chosen = preset_for(tiny_llama)
    assert free_layers(tiny_llama) == [2, 3]
    assert chosen.one_layer == 2 and chosen.layers == (2,)
    assert chosen.shared_layers == (2, 3) and chosen.neuron_layer == 2
    assert sinks_of(tiny_llama).layers == (1,)


def test_smollm(smollm):
    """Layers 9, 11 and 28 write and remove the massive activation, the default layers do not."""
    found = measure_sinks(smollm)
    assert {2, 9, 11, 28, 29} <= set(found.layers)
    assert not set(found.layers) & {3, 4, 5, 6, 7, 8} and found.written[11] > 100
    assert not set(preset_for(smollm).statistics_layers) & set(found.layers)
