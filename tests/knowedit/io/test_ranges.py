"""Ranges of numbers in settings (unit)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from knowedit.errors import ConfigError
from knowedit.io.config import Config
from knowedit.io.ranges import Bound, Count, Finite, NotNegative, Positive, Share, Whole


@dataclass(frozen=True)
class Numbers(Config):
    positive: Positive = 1.0
    weight: NotNegative | None = None
    bound: Bound = 1.0
    share: Share = 0.5
    any: Finite = 0.0
    count: Count = 1
    seed: Whole = 0
    parts: tuple[NotNegative, ...] = ()
    lr: Positive | str = "calibrated"


@dataclass(frozen=True)
class OtherDefaults(Numbers):
    positive: float = 2.0


@pytest.mark.parametrize(
    "name, inside, wrong, said",
    [
        ("positive", (1e-9, 3), (0, -1, math.inf, math.nan), "be positive and finite"),
        ("weight", (0, 2, None), (-1e-9, math.inf, math.nan), "not be negative"),
        ("bound", (1e-9, math.inf), (0, -1, math.nan), "be positive"),
        ("share", (0.1, 0.9), (0, 1, math.nan), "lie between 0 and 1"),
        ("any", (-3, 0), (math.inf, math.nan), "be finite"),
        ("count", (1, 10**9), (0, -1), "be at least 1"),
        ("seed", (0, 10**9), (-1,), "not be negative"),
        ("parts", ((), (0, 1)), ((0, -1), math.nan), "not be negative"),
        ("lr", ("calibrated", 1), (0,), "be positive"),
    ],
)
def test_numbers_inside_and_outside(name, inside, wrong, said):
    for value in inside:
        assert Numbers.from_dict(Numbers(**{name: value}).to_dict()) == Numbers(**{name: value})
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"numbers\.{name} must {said}.*, got "):
            Numbers(**{name: value})
        with pytest.raises(ConfigError, match=rf"numbers\.{name} must {said}"):
            Numbers().with_settings({name: value})


def test_another_default_keeps_the_range():
    with pytest.raises(ConfigError, match="other-defaults.positive must be positive"):
        OtherDefaults(positive=-1)
