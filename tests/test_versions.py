"""What `make versions` reads and prints (unit); the environments are not made here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests import versions

ROW = {"transformers": "5.5.4", "numpy": "2.2.6", "compiled": False, "names": []}


def test_counts_of_pytests_last_line():
    said = "....F\nFAILED tests/a.py::b\n1 failed, 12 passed, 3 skipped in 4.01s\n"
    assert versions.counts_of(said) == {"failed": 1, "passed": 12, "skipped": 3}
    assert versions.counts_of("Traceback\nImportError: no torch") == {}
    assert versions.counts_of("") == {}


def test_the_oldest_torch_comes_first_and_failures_by_name():
    rows = [
        {**ROW, "torch": "2.13.0+cpu", "passed": 7, "compiled": True},
        {**ROW, "torch": "2.9.1", "passed": 5, "failed": 1, "names": ["tests/a.py::b"]},
    ]
    lines = versions.table(rows).splitlines()
    assert lines[2] == "| 2.9.1 | 5.5.4 | 2.2.6 | torch's | 5 | 0 | tests/a.py::b |"
    assert lines[3] == "| 2.13.0+cpu | 5.5.4 | 2.2.6 | compiled | 7 | 0 | 0 |"


def bounds(package):
    """What pyproject.toml says of the versions of a package, wherever it names it."""
    said = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    found = re.findall(rf'^ *"{package}([<>=!~][^";]*)', said, re.MULTILINE)
    assert found
    return [SpecifierSet(one) for one in found]


@pytest.mark.parametrize("pair", versions.PAIRS)
def test_every_pair_may_be_installed(pair):
    for package, version in zip(("torch", "transformers"), pair.split(":")):
        assert all(bound.contains(version) for bound in bounds(package))


@pytest.mark.parametrize("package", ["torch", "numpy", "safetensors"])
def test_what_the_kernels_need_may_be_newer_than_what_was_tested(package):
    assert all(bound.contains("999.0") for bound in bounds(package))
