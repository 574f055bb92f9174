"""The recipe as values: every pair of parts composes, records are whole, methods rebuild (unit)."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain, combinations, product
from typing import get_args, get_origin

import pytest
import torch

from knowedit.errors import ConfigError, EditError
from knowedit.io.config import Config, fields_of
from knowedit.methods.base import Method
from knowedit.methods.listing import methods
from knowedit.methods.locate.keysets import ContextKeys, FormKeys
from knowedit.methods.locate.metrics import Blend, Covariance, Exact, NullSpace
from knowedit.methods.locate.named.memit import MEMIT
from knowedit.methods.locate.named.rome import ROME
from knowedit.methods.locate.recipe import Recipe
from knowedit.methods.locate.spreads import Even, OneLayer, OneSubject, SharedLayers, SquareRoot
from knowedit.methods.locate.targets import AttentionAndMLP, HiddenState, MergedFacts
from knowedit.methods.locate.training import TrainingSettings
from knowedit.methods.locate.trainings import ThroughForms, ThroughSolver, ThroughTexts
from knowedit.methods.registry import make_method, method_class
from tests.knowedit.methods.helpers import FACTS, SAME, statistics_of

NUMBERS = {"steps": 2, "lr": 0.5, "clamp": 2.0, "contexts": ("{}", "He said: {}")}
ONCE = TrainingSettings(steps=1)
PARTS = {
    "metric": [Covariance(), Exact(ridge=0.1), NullSpace(), Blend()],
    "target": [HiddenState(**NUMBERS), MergedFacts(**NUMBERS), AttentionAndMLP(**NUMBERS)],
    "spread": [Even(), SquareRoot(), OneLayer(), OneSubject(), SharedLayers()],
    "keys": [ContextKeys(), ContextKeys(mean=True), FormKeys(forms=("bare", "pre1"))],
    "training": [
        None,
        ThroughTexts(parts=2, settings=ONCE),
        ThroughSolver(when="always", settings=ONCE),
        ThroughSolver(when="always", settings=replace(ONCE, through="proxy")),
        ThroughForms(settings=ONCE),
    ],
}


def pairs(chosen: dict[str, int]) -> set[tuple[str, int, str, int]]:
    return {(a, chosen[a], b, chosen[b]) for a, b in combinations(sorted(chosen), 2)}


def covering() -> list[dict[str, int]]:
    """A few combinations in which every pair of parts of two kinds stands at least once."""
    everything = [
        dict(zip(PARTS, choice)) for choice in product(*(range(len(p)) for p in PARTS.values()))
    ]
    missing = set().union(*map(pairs, everything))
    found = []
    while missing:
        best = max(everything, key=lambda chosen: len(pairs(chosen) & missing))
        found.append(best)
        missing -= pairs(best)
    return found


@pytest.mark.parametrize("chosen", covering(), ids=lambda c: "-".join(map(str, c.values())))
def test_every_pair_of_parts_composes(tiny_llama, chosen):
    parts = {name: PARTS[name][index] for name, index in chosen.items()}
    one = isinstance(parts["spread"], OneSubject)
    layers = (2,) if one or isinstance(parts["spread"], OneLayer) else (1, 2)
    facts = [FACTS[0], SAME] if one else [FACTS[0], SAME, FACTS[1]]
    method = Recipe(**parts, layers=layers)
    made = method.compute(tiny_llama, facts, statistics_of(tiny_llama, layers), progress=False)
    for layer in layers:
        assert bool(made.delta(layer).isfinite().all()) and float(made.delta(layer).norm()) > 0
    assert method_of_record(made.config) == method


def method_of_record(record):
    return make_method(json.loads(json.dumps(record)))


@pytest.mark.parametrize("name", methods())
def test_every_method_is_recorded_whole(name):
    made = make_method(name)
    assert type(made) is method_class(name) and made.kind == name
    assert method_of_record(made.to_dict()) == made
    assert methods()[name].summary
    assert len(repr(made).splitlines()) == 1


def test_the_record_of_an_edit_makes_it_again_bit_for_bit(tiny_llama):
    statistics = statistics_of(tiny_llama, [1])
    method = MEMIT(layers=1, target=HiddenState(**NUMBERS), metric=Covariance(gain=0.8))
    first = method.compute(tiny_llama, FACTS, statistics, progress=False)
    again = method_of_record(first.config).compute(tiny_llama, FACTS, statistics, progress=False)
    assert first.config["metric"]["gain"] == 0.8
    assert torch.equal(first.delta(1), again.delta(1)) and first.key == again.key


def numbers_of(config):
    """`(part, name, a number that cannot be)` of every number in a method and its parts."""
    for name, hint in fields_of(type(config)).items():
        options = set(get_args(hint)) or {hint}
        if isinstance(part := getattr(config, name), Config):
            yield from numbers_of(part)
        elif options & {int, float} and get_origin(hint) is not tuple:
            yield config, name, float("nan") if float in options else -1


@pytest.mark.parametrize("name", methods())
def test_no_setting_takes_a_number_that_cannot_be(name):
    """NaN where a number stands, less than nothing where a whole one does."""
    every = [*numbers_of(make_method(name))]
    every += [number for part in chain(*PARTS.values()) if part for number in numbers_of(part)]
    assert len(every) > 10
    for part, setting, wrong in every:
        with pytest.raises(EditError, match=rf"\.{setting} must .*, got {wrong}"):
            part.with_settings({setting: wrong})


def test_settings_by_name():
    method = make_method("alphaedit", ["metric.gain=0.95", "layers=[4, 5]", "target.steps=10"])
    assert method.metric == NullSpace(gain=0.95) and method.layers == (4, 5)
    assert method.target == HiddenState(steps=10)
    other = make_method("memit", ["metric=null-space", "target=attention-and-mlp"])
    assert other.metric == NullSpace() and other.target == AttentionAndMLP()
    assert make_method("memit", layers=5).layers == (5,)
    for name in ("NeuronPatch", "neuron_patch", "NEURON-PATCH"):
        assert make_method(name) == make_method("neuron-patch")
    assert make_method({"kind": "MEMIT", "metric": "NullSpace"}).metric == NullSpace()
    with pytest.raises(ConfigError, match="unknown method 'MEMITT'; did you mean 'memit'"):
        make_method("MEMITT")
    with pytest.raises(ConfigError, match="'gain' could be metric.gain, training.gain"):
        make_method("metake", ["gain=0.5"])


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: MEMIT(weight=3.0), r"memit has no setting 'weight'; it is one of metric: "
                                    r".*Covariance\(weight="),
        (lambda: MEMIT(layer=3), "memit has no setting 'layer'; did you mean 'layers'"),
        (lambda: MEMIT(layers="x"), r"memit.layers must be a list of whole numbers or None, "
                                    r"got str 'x'"),
        (lambda: MEMIT(metric=Covariance(gain="0.9")), r"covariance.gain must be a number, got "
                                                       r"str '0.9'"),
        (lambda: MEMIT(metric=Covariance(gain=1.5)), "covariance.gain must lie between 0 and 1"),
        (lambda: MEMIT(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), "memit takes its settings by name"),
        (lambda: ROME(layers=(1, 2)), "ROME edits one layer"),
        (lambda: method_class("memmit"), "unknown method 'memmit'; did you mean 'memit'"),
        (lambda: make_method({"metric": "exact"}), "needs its name as 'kind'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(made, said):
    with pytest.raises(
        ConfigError if "one layer" not in said and "between" not in said else ValueError, match=said
    ):
        made()


def test_a_method_of_another_distribution(monkeypatch):
    """Found by its entry point; what is no method is refused with the distribution to mend."""
    from importlib.metadata import EntryPoint

    def entries(group):
        good = EntryPoint("mine", "tests.knowedit.methods.test_recipe:Mine", group)
        return [good, EntryPoint("bad", "json:loads", group)]

    methods.cache_clear()
    monkeypatch.setattr("knowedit.methods.listing.entry_points", entries)
    try:
        assert isinstance(make_method("mine"), Mine)
        with pytest.raises(
            ConfigError, match="'json:loads' is not a Method; mend the distribution"
        ):
            make_method("bad")
    finally:
        methods.cache_clear()


class Mine(Recipe):
    name = "Mine"


assert issubclass(Mine, Method)
