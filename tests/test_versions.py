"""What `make versions` reads and prints (unit); the environments are not made here."""

from __future__ import annotations

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
