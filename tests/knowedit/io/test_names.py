"""Unit: what a mistyped name may have meant."""

from __future__ import annotations

from knowedit.io.names import did_you_mean


def test_the_nearest_name_or_all_of_them():
    known = ["counterfact", "zsre"]
    assert did_you_mean("contrfact", known) == "did you mean 'counterfact'?"
    assert did_you_mean("qqq", known, "known sets") == "known sets: counterfact, zsre"
    assert did_you_mean("grond_truth", known, also=["ground_truth"]) == (
        "did you mean 'ground_truth'?"
    )
    assert did_you_mean(5, [], "known sets") == "known sets: none"
