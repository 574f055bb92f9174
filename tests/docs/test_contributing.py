"""What CONTRIBUTING.md says of test modules: each says in its docstring what it needs (unit)."""

from __future__ import annotations

import ast
import re

import pytest

from docs.hooks import ROOT

NEED = r"(?:unit|model|data|gpu)"
#: "... (unit, model)", "... (unit; data for the last)", or "Unit: ...; model: ...".
SAID = (rf"\({NEED}(?:, {NEED})*[;)][^)]*", rf"\b{NEED}(?:(?: and|,) {NEED})*: ")
MODULES = sorted((ROOT / "tests").rglob("test_*.py"))


def said(docstring):
    """The needs that a docstring names."""
    text = " ".join(docstring.split()).lower()
    parts = [part for form in SAID for part in re.findall(form, text)]
    return {need for part in parts for need in re.findall(rf"\b{NEED}\b", part)}


def needed(code):
    """Those that markers and fixtures show."""
    marked = set(re.findall(r"mark\.(model|data|gpu)\b", code))
    return marked | ({"model"} if re.search(r"\bsmollm\b", code) else set())


@pytest.mark.parametrize(
    "docstring, needs",
    [
        ("What is read (unit, model).", {"unit", "model"}),
        ("What is read (unit; data for the real files).", {"unit", "data"}),
        ("Unit: on a tiny model; data: the real files.", {"unit", "data"}),
        ("What a tiny model makes of data.", set()),
    ],
)
def test_what_a_docstring_says(docstring, needs):
    assert said(docstring) == needs


def test_every_module_says_what_it_needs():
    assert len(MODULES) > 100
    wrong = {}
    for module in MODULES:
        code = module.read_text("utf-8")
        found = said(ast.get_docstring(ast.parse(code)) or "")
        if missing := needed(code) - found or (not found and {"unit, model, data or gpu"}):
            wrong[str(module.relative_to(ROOT))] = missing
    assert wrong == {}
