"""The estimated error is the true one where the truth is known, and collecting stops when it is
small enough.
"""

import io
import json

import pytest
import torch

from knowedit.errors import StatisticsError
from knowedit.statistics import convergence, key_statistics
from knowedit.statistics.convergence import compare
from knowedit.statistics.corpus import windows
from knowedit.statistics.meter import Meter
from knowedit_kernels import Covariance, NullSpace

D = 120


@pytest.fixture(scope="module")
def truth():
    """A covariance with a long tail, its root, and keys drawn from it."""
    random = torch.Generator().manual_seed(0)
    shape = torch.randn(D, D, dtype=torch.float64, generator=random) * torch.logspace(
        0, -1.5, D, dtype=torch.float64
    )
    C = shape @ shape.T / D + 1e-3 * torch.eye(D, dtype=torch.float64)
    root = torch.linalg.cholesky(C)
    return C, root, torch.randn(48, D, dtype=torch.float64, generator=random) @ root.T


def halves(root, count, seed):
    x = (
        torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        @ root.T
    )
    return [x[: count // 2].T @ x[: count // 2], x[count // 2 :].T @ x[count // 2 :]]


def read_in(C, keys):
    solved = Covariance(C).inverse(keys.T)
    return solved / (keys.T * solved).sum(0)


@pytest.mark.parametrize("count", [2000, 20_000])
def test_estimates_are_the_true_errors(truth, count):
    C, root, keys = truth
    estimated, true = [], []
    for seed in range(6):
        sums = halves(root, count, seed)
        found = compare(sums, [count // 2] * 2, keys, null_space=True)
        estimated.append([found["solve"].median, found["null_space"].median])
        whole = (sums[0] + sums[1]) / count
        right, off = read_in(C, keys), read_in(whole, keys) - read_in(C, keys)
        solve = ((off * (C @ off)).sum(0) / (right * (C @ right)).sum(0)).sqrt().median()
        threshold = float(whole.diagonal().mean())
        kept, other = (NullSpace(M, threshold=threshold).inverse(keys.T) for M in (C, whole))
        null = ((other - kept).norm(dim=0) / kept.norm(dim=0)).median()
        true.append([float(solve), float(null)])
    estimated, true = torch.tensor(estimated).mean(0), torch.tensor(true).mean(0)
    assert 0.85 <= float(estimated[0] / true[0]) <= 1.15
    assert 0.6 <= float(estimated[1] / true[1]) <= 1.6
    assert float(true[0]) == pytest.approx((D / count) ** 0.5, rel=0.15)  # as the module says


def test_quartiles_surround_the_median_and_singular_halves_are_refused(truth):
    _, root, keys = truth
    error = compare(halves(root, 2000, 0), [1000, 1000], keys, null_space=False)["solve"]
    assert 0 < error.low < error.median < error.high < 1
    with pytest.raises(StatisticsError):
        compare([torch.zeros(D, D, dtype=torch.float64)] * 2, [1000, 1000], keys, null_space=False)
    assert not convergence.enough([2 * D, 2 * D - 1], D) and convergence.enough([2 * D, 2 * D], D)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    words = "stone river north bread seven light under paper green clock".split()
    path.write_text(
        "\n\n".join(
            " ".join(words[(i * j + j * j) % 10] + str(i % 97) for j in range(12))
            for i in range(900)
        )
    )
    return path


def test_collecting_stops_when_it_has_converged(tiny_llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 1000)
    options = {"max_length": 64, "progress": False}
    solved = key_statistics(
        tiny_llama,
        [1, 2],
        corpus,
        60_000,
        until="solve",
        tolerance=0.2,
        directory=tmp_path / "a",
        **options,
    )
    looks = solved[2].extra["convergence"]
    assert [look["tokens"] for look in looks] == sorted({look["tokens"] for look in looks})
    assert solved[1].count == solved[2].count == looks[-1]["tokens"] < 60_000
    last = [
        max(found[-1]["solve"][0], other[-1]["solve"][0])
        for found, other in [(looks, solved[1].extra["convergence"])]
    ]
    assert last[0] <= 0.2 and "null_space" not in looks[-1]
    assert max(looks[-2]["solve"][0], solved[1].extra["convergence"][-2]["solve"][0]) > 0.2
    assert (solved[1].recipe.until, solved[1].recipe.tolerance) == ("solve", 0.2)
    both = key_statistics(
        tiny_llama,
        [1, 2],
        corpus,
        60_000,
        until="converged",
        tolerance=0.2,
        directory=tmp_path / "b",
        **options,
    )
    assert (
        both[1].count >= solved[1].count
        and both[1].extra["convergence"][-1]["null_space"][0] <= 0.2
    )


def test_what_does_not_converge_is_kept_and_named(tiny_llama, corpus, tmp_path, caplog):
    found = key_statistics(
        tiny_llama, [1], corpus, 5000, until="solve", tolerance=1e-6, directory=tmp_path / "s"
    )
    assert found[1].count == 5000 and "not converged to 1e-06 after 5000 tokens" in caplog.text
    for wrong in (
        {"until": "soon"},
        {"until": "solve", "tolerance": 0},
        {"until": "solve", "halves": False},
    ):
        with pytest.raises(StatisticsError, match="must be one of tokens, solve, converged"):
            key_statistics(tiny_llama, [1], corpus, 5000, directory=tmp_path / "t", **wrong)


def test_halves_do_not_change_the_sums(tiny_llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 1000)
    one, two = (
        key_statistics(
            tiny_llama, [1], corpus, 9000, directory=tmp_path / str(halves), halves=halves
        )
        for halves in (False, True)
    )
    assert (one[1].total - two[1].total).norm() <= 1e-12 * one[1].total.norm()
    assert not one[1].extra["convergence"] and two[1].extra["convergence"][-1]["tokens"] == 9000


def test_progress_speaks_json(tiny_llama, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "SIZE", 1000)
    monkeypatch.setattr("knowedit.statistics.meter.EVERY_JSON", 0)
    key_statistics(tiny_llama, [1], corpus, 9000, directory=tmp_path / "s", as_json=True)
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.err.splitlines()]
    assert not said.out and [line["tokens"] for line in lines] == sorted(
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
    monkeypatch.setattr("knowedit.statistics.meter.time.monotonic", lambda: now[0])
    meter = Meter(1000, lambda *_: None, lines=False, as_json=True, out=out)
    meter.resumed(300)
    now[0] += 5
    meter.counted(200)
    line = json.loads(out.getvalue())
    assert (line["event"], line["tokens"], line["tokens_per_second"], line["seconds_left"]) == (
        "progress",
        500,
        40.0,
        12.5,
    )
