"""Unit: what a mistyped name may have meant."""

from __future__ import annotations

from knowedit.io.names import nearest, spelled


def test_the_nearest_name_or_all_of_them():
    known = ["counterfact", "zsre"]
    assert nearest("contrfact", known) == "did you mean 'counterfact'?"
    assert nearest("qqq", known, "known sets") == "known sets: counterfact, zsre"
    assert nearest("grond_truth", known, also=["ground_truth"]) == ("did you mean 'ground_truth'?")
    assert nearest(5, [], "known sets") == "known sets: none"


def test_a_name_is_taken_in_any_case_and_with_any_hyphens():
    known = ["neuron-patch", "ft", "ft-l", "my_method", "My-Method"]
    for name in ("neuron-patch", "NeuronPatch", "neuron_patch", "NEURON-PATCH", "Neuron-Patch"):
        assert spelled(name, known) == "neuron-patch"
    assert [spelled(name, known) for name in ("FT", "FT-L", "ftl")] == ["ft", "ft-l", "ft-l"]
    assert spelled("my_method", known) == "my_method" and spelled("My-Method", known) == "My-Method"
    assert spelled("neuron-path", known) == "neuron-path" and spelled("", known) == ""
