"""Unit: a progress bar on a terminal, and plain lines elsewhere of what takes long."""

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


def test_brackets_are_shown_as_they_are(monkeypatch):
    """They mark no style, and a closing one that was not opened breaks nothing."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=120))
    with progress.bar("answers [bold]", 2) as advance:
        advance(1, "fact [/x]")
    with progress.bar("outer", 2) as outer, progress.bar("MEMIT: after [/b]", 4) as inner:
        inner(3)
        outer.progress.refresh()
    for seen in ("answers [bold]", "fact [/x]", "after [/b] 3 of 4"):
        assert seen in out.getvalue()


def test_a_terminal_shows_the_outermost_bar(monkeypatch):
    out, heard = io.StringIO(), []
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=120))
    listening = progress.heard_by(lambda title, done, total: heard.append(title))
    with listening, progress.bar("outer", 2) as advance:
        for number in range(2):
            with progress.bar("MEMIT: inner", 4) as inner:
                inner(3)
            advance(note=f"part {number}")
    last = out.getvalue()[out.getvalue().rindex("outer") :]
    assert "2/2" in last and "part 1" in last and "inner" not in last
    assert "MEMIT" not in out.getvalue() and heard == ["MEMIT: inner", "outer"] * 2
    with progress.bar("after", 1):
        pass
    assert "after" in out.getvalue()


def test_a_bar_tells_what_goes_on_within_a_step(monkeypatch):
    """Where its own bar is not shown: the first of the steps may take minutes."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, width=120))
    with progress.bar("MEMIT: in sequence", 2) as outer, progress.bar("MEMIT: values", 4) as inner:
        inner(3)
        outer.progress.refresh()
    assert "MEMIT: in sequence" in out.getvalue() and "values 3 of 4" in out.getvalue()


def test_what_went_on_is_not_told_when_it_is_over(monkeypatch):
    """Nor behind a bar that is not around it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", console)
    with progress.bar("hidden", 3, show=False) as hidden, progress.bar("outer", 2) as outer:
        outer(1, "part 1")
        note = outer.progress.tasks[0].fields
        hidden()
        assert note["note"] == "part 1"
        with pytest.raises(KeyError), progress.bar("MEMIT: values", 4) as inner:
            inner(3)
            assert note["note"] == "values 3 of 4"
            raise KeyError
        assert note["note"] == "part 1"


@pytest.fixture
def elsewhere(monkeypatch):
    """A console that is no terminal, and a clock that is set by hand."""
    out, clock = io.StringIO(), [100.0]
    monkeypatch.setattr(progress, "console", Console(file=out, width=40))
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])
    return out, clock


def test_lines_tell_what_goes_on_within_a_step(elsewhere):
    out, clock = elsewhere
    with progress.bar("outer", 100, "facts") as advance:
        assert isinstance(advance, progress._Lines)
        with progress.bar("MEMIT: values", 40, show=False) as inner:
            inner(30)
            for _ in range(2):
                advance._say_how_far(waited_since=advance.lines)
                clock[0] += 60
            advance(50, "part 1")
            advance._say_how_far(waited_since=advance.lines)
            inner(5)
        advance._say_how_far(waited_since=advance.lines)
        with progress.bar("MEMIT: shown by itself", 40) as inner:
            inner(30)
            advance._say_how_far(waited_since=advance.lines)
    assert [line for line in out.getvalue().splitlines() if line.startswith("outer")] == [
        f"outer: {said}"
        for said in (
            "100 facts to do",
            "0 of 100 facts after 60 s, values 30 of 40",
            *4 * ["50 of 100 facts, part 1, about 2 min left"],
            "done in 2 min",
        )
    ]


def test_what_takes_long_is_said_in_lines_where_there_is_no_terminal(elsewhere):
    out, clock = elsewhere
    with progress.bar("MEMIT: training on a title that is long", 100, "steps") as advance:
        for _ in range(10):
            advance(10, "loss [0.5]")
            clock[0] += 20
    assert out.getvalue().splitlines() == [
        f"MEMIT: training on a title that is long: {said}"
        for said in (
            "20 of 100 steps, loss [0.5], about 80 s left",
            "50 of 100 steps, loss [0.5], about 80 s left",
            "80 of 100 steps, loss [0.5], about 35 s left",
            "done in 3 min",
        )
    ]


def test_a_first_step_that_takes_long_is_said_too(elsewhere, monkeypatch):
    out, _ = elsewhere
    monkeypatch.setattr(progress, "FIRST", 0.01)
    for unit, show in (("tokens", True), ("", True), ("", False)):
        with progress.bar("sampling", 4096, unit, show=show) as advance:
            while show and not out.getvalue().endswith(("do\n", "begun\n")):
                pass
            advance(4096)
        out.write("--\n")
    with progress.bar("short", 1) as advance:
        advance()
    ended = "sampling: done in 0 s"
    assert out.getvalue().splitlines() == [
        *("sampling: 4,096 tokens to do", ended, "--"),
        *("sampling: begun", ended, "--"),
        "--",
    ]


def test_a_step_that_takes_minutes_is_not_silent(elsewhere, monkeypatch):
    out, clock = elsewhere
    monkeypatch.setattr(progress, "FIRST", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with progress.bar("sampling", 4096, "tokens") as advance:
        clock[0] += 600
        while "after" not in out.getvalue():
            pass
        advance(1024)
        while "left" not in out.getvalue():
            pass
    said = out.getvalue().splitlines()
    assert said[:2] == ["sampling: 4,096 tokens to do", "sampling: 0 of 4,096 tokens after 10 min"]
    assert "sampling: 1,024 of 4,096 tokens, about 30 min left" in said


def test_a_line_is_said_once_by_whoever_comes_first(elsewhere, monkeypatch):
    out, clock = elsewhere
    monkeypatch.setattr(progress, "FIRST", 0.01)
    with progress.bar("weights", 10, "weights") as advance:
        advance(4)
        while "left" not in out.getvalue() and "do" not in out.getvalue():
            pass
        clock[0] += 1
        advance(1)  # within the minute of the line that was just said
    assert len(out.getvalue().splitlines()) == 2 and "done in 1 s" in out.getvalue()


def test_what_an_earlier_run_did_says_nothing_of_the_speed(elsewhere):
    out, clock = elsewhere
    with progress.bar("keys", 1000, "tokens", done=800) as advance:
        clock[0] += 30
        advance(100)
    with progress.bar("values", 4, "values") as advance:
        clock[0] += 30
        advance(0.3)
    said = [line for line in out.getvalue().splitlines() if "done" not in line]
    assert said[1] == "values: 0.3 of 4 values, about 6 min left"
    assert said[0] == "keys: 900 of 1,000 tokens, about 30 s left"


@pytest.mark.parametrize(
    "show, seconds, quiet", [(True, 1.9, False), (False, 9, False), (True, 9, True)]
)
def test_nothing_is_said_of_what_is_short_or_hidden(elsewhere, show, seconds, quiet):
    out, clock = elsewhere
    progress.console.quiet = quiet
    with progress.bar("short", 2, show=show) as advance:
        clock[0] += seconds
        advance()
    assert out.getvalue() == ""


def test_no_color_is_obeyed_on_a_terminal(monkeypatch):
    for variable, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", variable)
        out = io.StringIO()
        monkeypatch.setattr(
            progress, "console", Console(file=out, force_terminal=True, color_system="standard")
        )
        with progress.bar("keys", 10) as advance:
            advance(5)
        assert ("\x1b[3" in out.getvalue()) is coloured


@pytest.mark.parametrize("terminal", [True, False])
def test_listeners_hear_what_gets_on_shown_or_not(monkeypatch, terminal):
    heard = []
    console = Console(file=io.StringIO(), force_terminal=terminal)
    monkeypatch.setattr(progress, "console", console)
    listening = progress.heard_by(lambda *what: heard.append(what))
    with listening, progress.bar("keys", 10, show=False) as advance:
        advance(4)
        advance(6, "note")
    with progress.bar("later", 1) as advance:
        advance()
    assert heard == [("keys", 4, 10), ("keys", 10, 10)]


def test_a_block_that_is_under_way_moves_the_bar(elsewhere):
    out, clock = elsewhere
    heard = []
    with (
        progress.heard_by(lambda title, done, total: heard.append(done)),
        progress.bar("sampling", 30_000, "tokens") as advance,
    ):
        for block in range(5):  # four of 7,500 tokens would do, but for a rest of 200
            for step in range(10):
                clock[0] += 6
                advance.within((step + 1) / 10, 8_000)
            advance(200 if block == 4 else 7_450)
            assert heard[-1] <= 30_000
    said = out.getvalue().splitlines()
    # 60 s a block: at first it is four of 8,000 less a tenth
    assert said[0] == "sampling: 800 of 30,000 tokens, about 4 min left"
    assert said[2] == "sampling: 15,700 of 30,000 tokens, about 2 min left"
    assert said[4] == "sampling: the last of 30,000 tokens, about 58 s left"
    assert said[5:] == ["sampling: done in 5 min"]
    assert heard == sorted(heard), "it never goes back"


def test_a_terminal_shows_the_block_that_is_under_way(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", console)
    clock = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])
    with progress.bar("sampling", 1000, "tokens") as advance:
        clock[0] += 30
        advance.within(0.5, 500)
    assert "250/1,000 tokens" in out.getvalue() and "0:01:30" in out.getvalue()
