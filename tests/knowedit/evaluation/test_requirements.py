"""Unit: a result that misses what is asked of it is named with its figures."""

from __future__ import annotations

import math

import pytest

from knowedit.errors import KnowEditError
from knowedit.evaluation.requirements import (
    Requirement,
    check_names,
    check_requirements,
    figures,
)

RECORD = {
    "method": "MEMIT",
    "evaluation": {"after": {"efficacy": {"exact": {"mean": 0.9}, "success": {"mean": 1.0}}}},
    "side_effects": {"drift": {"kl": 0.02, "worst": ["a", 1.0], "same": 0.98}},
}


def at_least(text):
    return Requirement.parse(text, at_least=True)


def at_most(text):
    return Requirement.parse(text, at_least=False)


def test_figures_by_name():
    assert figures(RECORD) == {
        **{"efficacy.exact": 0.9, "efficacy.success": 1.0},
        **{"drift.kl": 0.02, "drift.same": 0.98},
    }


def test_what_is_reached_passes():
    check_requirements([RECORD], [at_least("efficacy.exact=0.9"), at_most("drift.kl=0.02")])
    check_requirements([RECORD], [])
    check_requirements([], [at_least("efficacy.exact=2")])


def test_all_that_is_missed_is_named():
    wanted = [at_least("efficacy.exact=0.95"), at_most("drift.kl=1e-2")]
    said = (
        "MEMIT: efficacy.exact is 0.9, at least 0.95 asked; MEMIT: drift.kl is 0.02, at most 0.01"
    )
    with pytest.raises(KnowEditError, match=said):
        check_requirements([RECORD], wanted)


def test_no_number_reaches_nothing():
    assert at_least("a=0").broken(math.nan) and at_most("a=0").broken(math.nan)


def test_what_failed_reaches_nothing():
    with pytest.raises(KnowEditError, match="ROME: no such layer; MEMIT: efficacy.exact is 0.9"):
        check_requirements([RECORD], [at_least("efficacy.exact=1")], ["ROME: no such layer"])
    check_requirements([RECORD], [], ["ROME: no such layer"])


@pytest.mark.parametrize("name", ["neighborhood.unchanged", "efficacy", "efficacy.", ".kl", "ki.x"])
def test_a_figure_of_no_measure_is_refused_before_anything_is_measured(name):
    with pytest.raises(KnowEditError, match=f"no figure is called '{name}'"):
        check_names([at_least("efficacy.exact=1"), at_least(f"{name}=1")])


def test_every_figure_of_a_record_has_a_name_that_passes():
    check_names([at_least(f"{name}=1") for name in figures(RECORD)])


def test_a_figure_that_is_not_there_is_no_success():
    with pytest.raises(KnowEditError, match="no figure 'efficacy.exakt'; did you mean"):
        check_requirements([RECORD], [at_least("efficacy.exakt=0.5")])


@pytest.mark.parametrize("text", ["efficacy.exact", "=1", "efficacy.exact=all", "a=nan", ""])
def test_what_is_no_figure_and_number_is_refused(text):
    with pytest.raises(KnowEditError, match="must be a figure and a number"):
        at_least(text)
