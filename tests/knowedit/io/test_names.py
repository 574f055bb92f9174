"""Unit: what a mistyped name may have meant."""

from __future__ import annotations

from knowedit.io.names import nearest


def test_the_nearest_name_or_all_of_them():
    known = ["counterfact", "zsre"]
    assert nearest("contrfact", known) == "did you mean 'counterfact'?"
    assert nearest("qqq", known, "known sets") == "known sets: counterfact, zsre"
    assert nearest("grond_truth", known, also=["ground_truth"]) == ("did you mean 'ground_truth'?")
    assert nearest(5, [], "known sets") == "known sets: none"
