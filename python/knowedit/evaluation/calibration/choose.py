"""Which settings follow from what was measured: the start, unless something else is clearly better.

A few facts tell good layers from bad ones, and not good ones from each other. So the rule of thumb
stays (or the preset of the model's shape), unless the best one beats it fact by fact by more than
two standard errors of the mean difference: the "one standard error rule" of model selection, made
stricter, as several are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TypeVar

from knowedit.models.calibration import LayerTrial, ValueTrial

T = TypeVar("T")

CLEAR = 2.0  # standard errors
REACHED = 0.9  # share of the facts whose values must reach their answers
SPARE = 1.25  # times the steps that were needed
MOST_STEPS = 50


def clearly_best(scores: Mapping[T, Sequence[float]], start: T) -> T:
    """The option with the best mean score if it clearly beats `start`, else `start`.

    Args:
        scores: of every option, a number for each fact, in the same order.
    """
    best = max(scores, key=lambda option: mean(scores[option]))
    if start not in scores:
        return best
    gains = [one - other for one, other in zip(scores[best], scores[start])]
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return best if mean(gains) > CLEAR * error else start


def one_layer(trials: Sequence[LayerTrial], start: int) -> int:
    """The layer for methods that edit one."""
    return clearly_best({trial.layer: trial.score for trial in trials}, start)


def shared_layers(
    trials: Sequence[LayerTrial], start: Sequence[int], layer: int
) -> tuple[int, ...]:
    """As many neighbouring layers of the tried ones as `start` has, `layer` among them, by their
    mean score; `start` where it has that layer, unless all of it was tried and another is clearly
    better.
    """
    tried = [trial.layer for trial in trials]
    if layer in start and not set(start) <= set(tried):
        return tuple(start)
    size = min(len(start), len(tried))
    runs = [tuple(tried[i : i + size]) for i in range(len(tried) - size + 1)]
    by_layer = {trial.layer: trial.score for trial in trials}
    scores = {
        run: [mean(parts) for parts in zip(*(by_layer[other] for other in run))]
        for run in runs
        if layer in run
    }
    return clearly_best(scores, tuple(start))


def neuron_layer(trials: Sequence[LayerTrial], start: int) -> int:
    """The layer for NeuronPatch."""
    return clearly_best({trial.layer: trial.apart for trial in trials}, start)


def contexts(trials: Sequence[LayerTrial], start: int) -> int:
    """How many contexts."""
    return clearly_best({trial.contexts: trial.score for trial in trials}, start)


def clamp(trials: Sequence[ValueTrial]) -> ValueTrial:
    """The smallest clamp within which nearly all facts reach their answers, or the one within which
    most do.
    """
    enough = [trial for trial in trials if trial.reached >= REACHED]
    if enough:
        return min(enough, key=lambda trial: trial.clamp)
    return max(trials, key=lambda trial: (trial.reached, -trial.clamp))


def steps(trial: ValueTrial, start: int) -> int:
    """Gradient evaluations: what the slowest fact needed and some to spare (the last one only
    measures), at least those of the start. Facts that are done rest, so spare ones cost little.
    """
    needed = math.ceil(SPARE * trial.steps) + 1
    return max(start, min(needed, MOST_STEPS))
