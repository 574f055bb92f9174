"""What a collection shows while it runs (unit)."""

import io
import json

from knowedit.statistics import key_statistics
from knowedit.statistics.corpus import windows
from knowedit.statistics.throughput import Meter


def test_progress_speaks_json(tiny_llama, long_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "SIZE", 1000)
    monkeypatch.setattr("knowedit.statistics.throughput.EVERY", 0)
    key_statistics(tiny_llama, [1], long_corpus, 9000, directory=tmp_path / "s", as_json=True)
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.err.splitlines()]
    assert not output.out and [line["tokens"] for line in lines] == sorted(
        line["tokens"] for line in lines
    )
    assert {line["event"] for line in lines} == {"progress", "convergence", "done"}
    assert lines[-1]["tokens"] == lines[-1]["of"] == 9000 and lines[-1]["seconds_left"] == 0
    assert 0 < lines[-1]["convergence"]["solve"] < 1


def test_time_left_is_of_this_runs_speed(monkeypatch):
    """200 of 1,000 tokens in 5 s, after 300 that an earlier run counted: 500 are left, at 40 tokens
    a second.
    """
    now, out = [100.0], io.StringIO()
    monkeypatch.setattr("knowedit.statistics.throughput.time.monotonic", lambda: now[0])
    meter = Meter(1000, 300, lambda *_: None, as_json=True, out=out)
    now[0] += 5
    meter.on_tokens(200)
    line = json.loads(out.getvalue())
    assert (line["event"], line["tokens"], line["tokens_per_second"], line["seconds_left"]) == (
        "progress",
        500,
        40.0,
        12.5,
    )
