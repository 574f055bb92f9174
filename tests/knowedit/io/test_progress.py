"""Unit: a progress bar on a terminal, and none elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from knowedit.io import progress


@pytest.mark.parametrize(
    ("terminal", "show", "seen"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_bar_is_shown_on_a_terminal_only(monkeypatch, terminal, show, seen):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    monkeypatch.setattr(progress, "console", console)
    with progress.bar("keys", 1000, "tokens", show=show) as advance:
        advance(400, "layer 3")
        advance()
    assert ("keys" in out.getvalue() and "401/1,000 tokens" in out.getvalue()) is seen
    assert ("layer 3" in out.getvalue()) is seen
