"""The estimated error is the true one where the truth is known, and collecting stops when it is
small enough (unit).
"""

import pytest
import torch

from knowedit.errors import StatisticsError
from knowedit.io.ranks import Ranks
from knowedit.statistics import convergence, key_statistics
from knowedit.statistics.convergence import ConvergenceChecks, compare_halves
from knowedit.statistics.corpus import windows
from knowedit.statistics.distributed.checkpoints import CollectionState
from knowedit.statistics.files.store import CollectionRecipe
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
        found = compare_halves(sums, [count // 2] * 2, keys, null_space=True)
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
    error = compare_halves(halves(root, 2000, 0), [1000, 1000], keys, null_space=False)["solve"]
    assert 0 < error.low < error.median < error.high < 1
    with pytest.raises(StatisticsError):
        compare_halves(
            [torch.zeros(D, D, dtype=torch.float64)] * 2, [1000, 1000], keys, null_space=False
        )
    assert not convergence.enough_tokens([2 * D, 2 * D - 1], D) and convergence.enough_tokens(
        [2 * D, 2 * D], D
    )


def test_collecting_stops_when_it_has_converged(tiny_llama, long_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 1000)
    options = {"max_length": 64, "progress": False}
    solved = key_statistics(
        tiny_llama,
        [1, 2],
        long_corpus,
        60_000,
        until="solve",
        tolerance=0.2,
        directory=tmp_path / "a",
        **options,
    )
    checks = solved[2].extra["convergence"]
    assert [check["tokens"] for check in checks] == sorted({check["tokens"] for check in checks})
    assert solved[1].count == solved[2].count == checks[-1]["tokens"] < 60_000
    last = [
        max(found[-1]["solve"][0], other[-1]["solve"][0])
        for found, other in [(checks, solved[1].extra["convergence"])]
    ]
    assert last[0] <= 0.2 and "null_space" not in checks[-1]
    assert max(checks[-2]["solve"][0], solved[1].extra["convergence"][-2]["solve"][0]) > 0.2
    assert (solved[1].recipe.until, solved[1].recipe.tolerance) == ("solve", 0.2)
    both = key_statistics(
        tiny_llama,
        [1, 2],
        long_corpus,
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


def test_what_does_not_converge_is_kept_and_named(tiny_llama, long_corpus, tmp_path, caplog):
    found = key_statistics(
        tiny_llama, [1], long_corpus, 5000, until="solve", tolerance=1e-6, directory=tmp_path / "s"
    )
    assert found[1].count == 5000 and "not converged to 1e-06 after 5000 tokens" in caplog.text
    for wrong in (
        {"until": "soon"},
        {"until": "solve", "tolerance": 0},
        {"until": "solve", "halves": False},
    ):
        with pytest.raises(StatisticsError, match="must be one of tokens, solve, converged"):
            key_statistics(tiny_llama, [1], long_corpus, 5000, directory=tmp_path / "t", **wrong)


def test_halves_do_not_change_the_sums(tiny_llama, long_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "SIZE", 1000)
    one, two = (
        key_statistics(
            tiny_llama, [1], long_corpus, 9000, directory=tmp_path / str(halves), halves=halves
        )
        for halves in (False, True)
    )
    assert (one[1].total - two[1].total).norm() <= 1e-12 * one[1].total.norm()
    assert not one[1].extra["convergence"] and two[1].extra["convergence"][-1]["tokens"] == 9000


def test_no_memory_for_an_estimate_costs_the_estimate_alone(
    tiny_llama, corpus, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(windows, "SIZE", 200)
    monkeypatch.setattr(convergence, "spare", lambda device: 0)
    found = key_statistics(tiny_llama, [1], corpus, 1500, directory=tmp_path / "s")
    assert (
        found[1].count == 1500
        and not found[1].extra["convergence"]
        and "too little memory" in caplog.text
    )


def test_checks_are_rare_and_leave_the_second_half_to_the_last_one():
    def due(tokens, until, windows):
        checks = ConvergenceChecks(
            None,
            CollectionRecipe("f", {"name": "c"}, tokens, 64, True, 0, until=until, tolerance=0.1),
            Ranks(),
        )
        return checks.is_due(CollectionState(windows, [0], [50 * windows, 50 * windows]))

    assert [n for n in range(1, 200) if due(10_000, "tokens", n)] == [8, 32]
    assert [n for n in range(1, 200) if due(30_000, "tokens", n)] == [8, 32, 128]
    assert [n for n in range(1, 12) if due(1_000, "solve", n)] == [2, 3, 4, 5, 7, 9]
